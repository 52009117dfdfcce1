"""The plot and the page of an analysis."""

import json

import pytest

from nm_lightning.reporting.sensitivity import LABELLED, figure, points, write_analysis
from tests.reporting.test_page import browser  # noqa: F401 - a fixture


def report(sites, name="layer{}.conv1"):
    rows = [
        {
            "name": name.format(place),
            "width": 16,
            "parameters": 0.01,
            "macs": 0.02,
            "removals": [
                {"ratio": ratio, "width": 16 - int(16 * ratio), "accuracy": 0.9 - ratio * (place % 7 - 1) / 100}
                for ratio in (0.1, 0.3, 0.5)
            ],
        }
        for place in range(sites)
    ]
    return {
        "title": "resnet56 on cifar10", "origin": "best.ckpt", "left_alone": {"fc": "it is <the> end"}, "images": 1000,
        "command": "python compress.py --analyse", "versions": {"torch": "2"}, "device": "cpu",
        "checkpoint_sha256": None, "method": "merge", "criterion": "l2-norm", "ratios": [0.1, 0.3, 0.5], "sites": rows,
        "baseline": {"accuracy": 0.9, "parameters": 1000, "macs": 2000},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sites", "name"), [(1, "layer{}"), (27, "layer{}.conv1"), (200, "encoder.a_long.name.{}.mlp")]
)
def test_the_plot_has_a_dot_for_each_removal_and_names_what_fits(sites, name):
    found = report(sites, name)
    (axes,) = figure(found).axes
    for place, line in enumerate(axes.lines[1:]):  # the first is the axis at 0
        assert line.get_xdata().tolist() == [each[place] for each in points(found)]
        assert line.get_ydata().tolist() == list(range(sites))
    assert len(axes.lines) == 4
    names = [label.get_text() for label in axes.get_yticklabels()]
    shown = found["sites"][:: 1 + sites // LABELLED]
    assert len(names) == len(shown) <= LABELLED
    for label, site in zip(names, shown, strict=True):
        assert site["name"].endswith(label.removeprefix("…"))


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_the_page_in_a_browser(size, browser, tmp_path):  # noqa: F811
    found = report(27)
    write_analysis(tmp_path, found)
    assert json.loads((tmp_path / "report.json").read_text()) == found
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"file://{tmp_path / 'report.html'}")
    assert not said
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
    assert page.locator("figure > svg g[id^=removal] use").count() == 3 * 27
    assert page.locator("td.heat").count() == 3 * 27
    assert page.locator("td.heat").nth(2).inner_text() == "-0.50" and "it is <the> end" in page.inner_text("ul")
    page.close()
