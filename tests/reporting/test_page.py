"""The page, in a browser and as Markdown."""

import json
import shutil

import pytest

from nm_lightning.reporting.page import html, markdown

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.xdist_group("grid")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(size, scheme, grid, browser):
    folder, report = grid
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{folder / 'report.html'}")
    assert not said
    assert [url for url in asked if not url.startswith("data:")] == [f"file://{folder / 'report.html'}"]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
    drawn = page.evaluate("(e => [e.width, e.height])(document.querySelector('figure svg').getBoundingClientRect())")
    assert min(drawn) > 150
    assert page.locator("figure > svg g[id^=curve] use").count() == len(report["results"]) == 12
    assert page.locator("figure > svg g[id^=curve] > path").count() == 6
    assert page.locator("details[open] .layer").count() == 3  # the head and two layers
    text = page.inner_text("main")
    for row in report["results"]:
        assert f"{100 * row['accuracy']:.2f}" in text
    assert report["command"] in text and report["versions"]["torch"] in text
    back = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (sum(back) < 150) == (scheme == "dark")
    page.close()


def test_one_ratio_is_drawn_as_bars_and_a_reason_is_one_line(grid, browser, tmp_path):
    report = json.loads(json.dumps(grid[1]))
    report["results"] = [row for row in report["results"] if row["ratio"] == 0.5]
    added = "added to the neurons of {}: --scope all shrinks them"
    layers = ["a.1", "a.10", "b"]
    report["left_alone"] = {own: added.format(", ".join(name for name in layers if name != own)) for own in layers}
    report["left_alone"]["ip3"] = "its neurons are the network's outputs"
    (tmp_path / "report.html").write_text(html(report))
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(f"file://{tmp_path / 'report.html'}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
    assert page.locator("figure > svg g[id^=bar]").count() == 1 + len(report["results"]) == 7
    assert page.locator("figure > svg g[id^=curve]").count() == 0
    drawn = page.locator("figure").inner_text()
    for accuracy in [report["baseline"]["accuracy"], *(row["accuracy"] for row in report["results"])]:
        assert f"{100 * accuracy:.2f}" in drawn
    lines = [line for line in page.locator("ul").inner_text().splitlines() if "left alone" in line]
    assert lines == [
        f"3 layers were left alone: {added.format('others')}",
        "ip3 was left alone: its neurons are the network's outputs",
    ]
    assert f"- a.1, a.10, b left alone: {added.format('others')}\n" in markdown(report)
    page.close()


def test_a_row_without_a_command_has_the_callbacks_yaml(grid):
    """What no name stands for, as a criterion that was passed as an object, is shown as it is."""
    _, report = grid
    report = json.loads(json.dumps(report))
    report["results"] = report["results"][:1]
    report["results"][0]["command"] = ""
    assert "      - class_path: nm_lightning.callbacks.NeuronMergeCallback\n" in markdown(report)
    assert "NeuronMergeCallback" in html(report)
    report["results"][0]["recipe"]["criterion"] = {"name": "Mine"}
    assert "        name: Mine\n" in markdown(report) and "NeuronMergeCallback" not in html(report)


def test_a_page_of_a_network_with_strange_names(grid):
    _, report = grid
    report = json.loads(json.dumps(report))
    report["title"] = "<script>alert(1)</script>"
    report["results"][0]["sites"][0]["name"] = 'a"b<c'
    for row in (report["baseline"], *report["results"]):
        row["accuracy"] = None
    page = html(report)
    assert "<script>" not in page and 'a"b<c' not in page
    assert "accuracy" not in markdown(report).splitlines()[0]


def test_markdown_has_the_numbers(grid):
    folder, report = grid
    text = (folder / "report.md").read_text()
    for row in report["results"]:
        assert f"| {row['method']} | {row['criterion']} | {row['ratio']:g} | {100 * row['accuracy']:.2f} |" in text
