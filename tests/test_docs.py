"""The documents' code runs as it stands there, and their pictures and links exist."""

import importlib.util
import re
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import setuptools

from nm_lightning.compression.settings import Budget, Criterion, Method, Refinement
from tests import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", ["tutorial", "extending"])
def test_code_blocks_run(page, in_tmp):
    """One block after the other, in one namespace."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    names = {"__name__": page}
    with ExitStack() as stack:
        for kind in (Method, Criterion, Budget, Refinement):
            stack.enter_context(patch.dict(kind.known))  # what a page adds goes again
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page}.md, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_what_the_documents_call_exists():
    """Every flag and every target of make that a document names."""
    from nm_lightning.cli import compress

    text = "\n".join(page.read_text() for page in PAGES)
    flags = [flag for action in compress.parser_of_flags()._actions for flag in action.option_strings]
    known = " ".join(f'"{flag}"' for flag in flags)
    known += "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    known += "".join((ROOT / "nm_lightning" / "cli" / f"{name}.py").read_text() for name in ("dashboard", "train"))
    theirs = {"nnodes", "nproc_per_node", "node_rank", "master_addr", "master_port", "seed_everything"}
    for flag in set(re.findall(r"(?<![\w-])--([a-z_]+)(?![\w.-])", text)) - theirs:
        assert f'"--{flag}"' in known or flag in ("config", "help"), flag
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make ([a-z]+)`", text):
        assert target in targets, target


def test_the_flags_table_is_the_parsers():
    """`python docs/flags.py` writes it."""
    spec = importlib.util.spec_from_file_location("flags", ROOT / "docs" / "flags.py")
    flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags)
    assert flags.table() in (ROOT / "docs" / "compress.md").read_text()
    assert flags.settings() == flags.TABLE.read_text()


def test_a_wheel_holds_every_package():
    found = setuptools.find_packages(str(ROOT), include=["nm_lightning*"])
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    assert sorted(re.findall(r'"(.*)"', listed)) == sorted([*found, "nm_lightning.configs"])
