"""The published code's accuracy on the published checkpoints, cell by cell (images correct of 10,000)."""

import itertools
import json

import pytest

from nm_lightning.cli import compress

LENET = {
    0.5: (8840, 8786, 8808, 8869, 8838, 8857),
    0.6: (8517, 8303, 8582, 8692, 8807, 8810),
    0.7: (7126, 7121, 7838, 8275, 8327, 8639),
    0.8: (6676, 6390, 6419, 8002, 7711, 7749),
}
RESNET = {
    0.1: (9153, 9221, 9261, 9276),
    0.2: (8702, 8742, 9002, 9084),
    0.3: (7446, 7695, 8372, 8447),
    0.4: (4968, 4644, 7537, 7512),
    0.5: (2558, 2434, 5706, 5782),
}
VGG = (1028, 1115, 1021, 1260, 1405, 1245)


def run(published, name, data, tmp_path, criteria, ratios=(), methods=("prune", "merge")):
    flags = ["--checkpoint", str(published(name)), "--model", name, "--data", data]
    flags += ["--method", *methods, "--criterion", *criteria, "--output", str(tmp_path / "out")]
    compress.main(flags + (["--ratio", *map(str, ratios)] if ratios else []))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    cells = {(row["method"], row["criterion"], row["ratio"]): row["accuracy"] for row in report["results"]}
    return round(report["baseline"]["accuracy"] * 10000), {cell: round(a * 10000) for cell, a in cells.items()}


def wanted(table, criteria):
    return {
        (method, criterion, ratio): value
        for ratio, row in table.items()
        for (method, criterion), value in zip(itertools.product(("prune", "merge"), criteria), row, strict=True)
    }


def check(cells, expected, tolerance):
    wrong = {cell: (cells[cell], expected[cell]) for cell in expected if abs(cells[cell] - expected[cell]) > tolerance}
    assert not wrong, f"measured and published: {wrong}"


def test_lenet(published, tmp_path):
    criteria = ("l1-norm", "l2-norm", "l2-GM")
    baseline, cells = run(published, "lenet_300_100", "fashion_mnist", tmp_path, criteria, LENET)
    assert abs(baseline - 8980) <= 2
    assert len(cells) == 24
    check(cells, wanted(LENET, criteria), tolerance=2)


def test_resnet56(published, tmp_path, pytestconfig):
    everything = pytestconfig.getoption("paper")
    criteria = ("l1-norm", "l2-norm")
    expected = wanted(RESNET, criteria)
    if not everything:  # CI's six: both methods at three ratios
        criteria = ("l2-norm",)
        expected = {
            cell: value for cell, value in expected.items() if cell[1] == "l2-norm" and cell[2] in (0.3, 0.4, 0.5)
        }
    ratios = sorted({ratio for *_, ratio in expected})
    baseline, cells = run(published, "resnet56", "cifar10", tmp_path, criteria, ratios)
    assert abs(baseline - 9388) <= 2
    assert len(cells) == len(expected) == (20 if everything else 6)
    check(cells, expected, tolerance=2)


def test_vgg16(published, tmp_path, pytestconfig):
    if not pytestconfig.getoption("paper"):
        pytest.skip("`make paper` checks it: two and a half minutes of forward passes")
    criteria = ("l1-norm", "l2-norm", "l2-GM")
    baseline, cells = run(published, "vgg16", "cifar10", tmp_path, criteria)
    assert abs(baseline - 9098) <= 5
    check(cells, wanted({None: VGG}, criteria), tolerance=5)
