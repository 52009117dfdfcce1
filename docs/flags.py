"""The table of compress.py's flags, from the parser itself: `python docs/flags.py` writes it into docs/compress.md."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from nm_lightning.cli.compress import parser_of_flags  # noqa: E402


def table() -> str:
    """A row for each flag, with the help that `--help` prints."""
    rows = ["| flag | meaning (default) |", "| --- | --- |"]
    for action in parser_of_flags()._actions:
        flags = " ".join(f"`{flag}`" for flag in action.option_strings if flag.startswith("--"))
        if flags != "`--help`":
            rows.append(f"| {flags} | {action.help} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    page = DOCS / "compress.md"
    page.write_text(
        re.sub(r"^\| flag \|.*?\n(?=\n)", lambda _: table(), page.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
