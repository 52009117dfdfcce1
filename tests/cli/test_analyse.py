"""compress.py --analyse: what each site holds, and what removing some of it alone costs."""

import json
import sys
from collections import Counter

import pytest

import compress
from nm_lightning import trace
from tests.cli import run


@pytest.fixture(scope="module")
def analysis(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis") / "out"
    return folder, run(trained, folder, "--analyse", "--ratio", "0.5", "0.9", "--method", "prune")


def test_costs_are_what_compressing_that_site_alone_costs(analysis, trained, tmp_path):
    """The digits' test set has fewer images than are asked for, so that both see the same."""
    _, report = analysis
    assert report["images"] == 360 and [site["name"] for site in report["sites"]] == ["ip1", "ip2"]
    for site in report["sites"]:
        assert [removal["width"] for removal in site["removals"]] == [site["width"] // 2, site["width"] // 10]
        for removal in site["removals"]:
            flags = ["--method", "prune", "--widths", f"{site['name']}={removal['width']}", "--quiet"]
            (row,) = run(trained, tmp_path / "out", *flags)["results"]
            assert removal["accuracy"] == row["accuracy"]
    assert (
        report["baseline"]["accuracy"] == json.loads((tmp_path / "out/report.json").read_text())["baseline"]["accuracy"]
    )


def test_shares_are_what_goes_with_the_neurons(analysis):
    """ip1 owns its rows, biases and ip2's columns; ip2's weights are counted again at ip2."""
    _, report = analysis
    macs = [64 * 300, 300 * 100, 100 * 10]
    for what, own, biases in (("parameters", report["baseline"]["parameters"], [300, 100]),
                              ("macs", sum(macs), [0, 0])):  # fmt: skip
        for place, site in enumerate(report["sites"]):
            assert site[what] == pytest.approx((macs[place] + macs[place + 1] + biases[place]) / own)


def test_a_network_is_traced_once_and_none_is_written(trained, tmp_path, monkeypatch, capsys):
    calls = Counter()

    def counted(*arguments):
        calls["trace"] += 1
        return trace(*arguments)

    monkeypatch.setattr(sys.modules["nm_lightning.compression.compress"], "trace", counted)
    report = run(trained, tmp_path / "out", "--analyse", "100")
    assert calls["trace"] == 1
    assert report["images"] == 100 and report["ratios"] == [0.1, 0.3, 0.5]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "report.html", "report.md", "report.json", "sensitivity.png"
    }  # fmt: skip
    printed, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    for site in report["sites"]:
        for removal in site["removals"]:
            lost = f"{100 * (report['baseline']['accuracy'] - removal['accuracy']):.2f}"
            assert (
                lost in printed and f">{lost}</td>" in page and f" {lost} |" in (tmp_path / "out/report.md").read_text()
            )
    assert page.count("ip2</td>") == 1 and "ip3 was left alone" in page


def test_nothing_removed_costs_nothing(trained, tmp_path):
    report = run(trained, tmp_path / "out", "--analyse", "50", "--ratio", "0", "--quiet")
    for site in report["sites"]:
        assert site["removals"] == [{"ratio": 0.0, "width": site["width"], "accuracy": report["baseline"]["accuracy"]}]


def test_one_folder_holds_one_report(trained, tmp_path):
    run(trained, tmp_path / "out", "--ratio", "0.5", "--quiet")
    assert list((tmp_path / "out").glob("*.ckpt"))
    run(trained, tmp_path / "out", "--analyse", "50", "--quiet")
    assert not list((tmp_path / "out").glob("*.ckpt")) and not (tmp_path / "out" / "accuracy.png").exists()
    run(trained, tmp_path / "out", "--ratio", "0.5", "--quiet")
    assert not (tmp_path / "out" / "sensitivity.png").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--analyse", "0"], "analyse 0: give the number of test images"),
        (["--analyse", "many"], "'many'"),
        (["--analyse", "--widths", "30", "20"], "leave out --widths"),
        (["--analyse", "--target_macs", "0.5"], "leave out --target_macs"),
        (["--analyse", "--latency"], "leave out --latency"),
        (["--analyse", "--export", "onnx"], "leave out --export"),
        (["--analyse", "--method", "prune", "merge"], "--method prune merge: --analyse takes one"),
        (["--analyse", "--ratio", "1"], "ratio 1.0"),
    ],
)
def test_bad_input_is_one_line(flags, says, trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        compress.main(["--checkpoint", str(trained), "--output", str(tmp_path / "out"), *flags])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and not list(tmp_path.iterdir())
