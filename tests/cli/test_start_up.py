"""Facts about what is imported before it is needed: nothing heavy for a look at the flags or at the package."""

import subprocess
import sys

import pytest

from tests import ROOT

HEAVY = ("torch", "pytorch_lightning", "sklearn", "torchvision", "wandb", "matplotlib")
SCRIPT = "import sys, runpy; sys.argv = {words!r}\ntry:\n    {code}\nexcept SystemExit:\n    pass\n" + (
    f"print(sorted(set(sys.modules) & set({HEAVY})))"
)


@pytest.mark.parametrize(
    ("code", "words", "loads"),
    [
        ("runpy.run_path('compress.py', run_name='__main__')", ["compress.py", "--help"], []),
        ("runpy.run_path('compress.py', run_name='__main__')", ["compress.py", "--ratio", "half"], []),
        ("runpy.run_path('compress.py', run_name='__main__')", ["compress.py", "--widths", "1", "a=2"], []),
        ("import nm_lightning", [], []),
        ("from nm_lightning import compress", [], ["torch"]),
    ],
)
def test_nothing_heavy_is_imported_for(code, words, loads):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(code=code, words=words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == str(loads), done.stderr


def test_the_package_names_what_it_has():
    import nm_lightning

    assert {*nm_lightning.__all__} <= set(dir(nm_lightning))
    with pytest.raises(AttributeError, match="no attribute 'melt'"):
        _ = nm_lightning.melt
