"""What compress.py prints."""

import json

from tests.cli import GRID, run


def test_quiet_and_json(trained, tmp_path, capsys):
    run(trained, tmp_path / "quiet", "--ratio", "0.5", "--quiet")
    assert capsys.readouterr().out == ""
    report = run(trained, tmp_path / "json", "--ratio", "0.5", "--json")
    assert json.loads(capsys.readouterr().out) == report


def test_the_terminal_says_little(trained, tmp_path, capsys):
    run(trained, tmp_path / "out", *GRID)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("again: ")]
    assert len(lines) <= 12 + 3 + 15  # a line for each result, the table's head and original, 15 more
    assert max(map(len, lines[3:])) <= 80 + len(str(tmp_path))
    assert "\x1b" not in "".join(lines)
