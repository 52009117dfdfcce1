"""The one progress bar."""

from collections.abc import Iterable
from typing import TypeVar

from rich import get_console
from rich.progress import track

T = TypeVar("T")


def progress(work: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
    """The same items, with a bar on a terminal while they are taken; nothing elsewhere, and nothing is left of it."""
    return track(work, title, total, transient=True, disable=not get_console().is_terminal)
