"""Results appear when they are complete. What a process works on until then, it holds by a lock.

The kernel drops the lock when the process ends, however it ends, so that the next one can tell what is left over.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def hold(path: Path) -> int:
    """Lock a file or a folder until `os.close` of the descriptor that is returned, or the process' end.

    Raises:
        BlockingIOError: another one holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks: nobody can tell, nothing is swept
        pass
    return descriptor


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process is in such a block for the same folder: each waits for its turn. The folder is not held."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sweep(folder: Path, pattern: str) -> list[Path]:
    """Remove what dead processes left in a folder under names that match; returns what living ones hold there."""
    living = []
    for path in folder.iterdir():
        if not re.fullmatch(pattern, path.name):
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        except BlockingIOError:
            living.append(path)
        except OSError:
            pass
        finally:
            os.close(descriptor)
    return living


def reason(error: BaseException) -> str:
    """Why something could not be written, in a few words."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0][:200]
