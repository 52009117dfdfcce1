"""Rows for a table, and the one that is shown first."""

from nm_lightning.reporting.results import best_at_each_ratio, featured


def test_what_is_shown_first():
    def row(accuracy, parameters, ratio):
        return {"accuracy": accuracy, "parameters": parameters, "ratio": ratio, "removed": 0}

    before = {"accuracy": 0.9}
    rows = [row(0.895, 50, 0.5), row(0.893, 20, 0.8), row(0.892, 20, 0.8), row(0.7, 10, 0.9)]
    assert featured({"baseline": before, "results": rows}) is rows[1]
    assert featured({"baseline": before, "results": rows[3:]}) is rows[3]
    assert (
        featured({"baseline": {"accuracy": None}, "results": [row(None, 5, 0.1), row(None, 4, 0.2)]})["parameters"] == 4
    )
    assert best_at_each_ratio({"results": rows}) == {"0.5": rows[0], "0.8": rows[1], "0.9": rows[3]}
