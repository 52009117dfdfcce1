"""What compress.py's flags are, from the settings themselves: `python docs/flags.py` writes it for parser and reader.

That is settings.json, which the parser reads, and the table in docs/compress.md.
"""

import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from nm_lightning.cli.compress import parser_of_flags  # noqa: E402
from nm_lightning.cli.flags import TABLE, described  # noqa: E402


def table() -> str:
    """A row for each flag, with the help that `--help` prints."""
    rows = ["| flag | meaning (default) |", "| --- | --- |"]
    for action in parser_of_flags()._actions:
        flags = " ".join(f"`{flag}`" for flag in action.option_strings if flag.startswith("--"))
        if flags != "`--help`":
            rows.append(f"| {flags} | {action.help} |")
    return "\n".join(rows) + "\n"


def settings() -> str:
    """The settings as JSON."""
    return json.dumps(described(), indent=2) + "\n"


if __name__ == "__main__":
    TABLE.write_text(settings())
    page = DOCS / "compress.md"
    page.write_text(
        re.sub(r"^\| flag \|.*?\n(?=\n)", lambda _: table(), page.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
