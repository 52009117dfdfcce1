"""Bad input ends in one line on stderr and exit status 2, the argument parser's too."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from nm_lightning.errors import InputError, RankLost

alike = True  # whether the processes of one machine meet the same errors, so that the first of them says it for all


def fail(message: str, status: int = 2) -> NoReturn:
    """Print the message's essence as one line and exit."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip()] or ["bad input"]
    line = lines[-1] if "Traceback" in message else " ".join(lines)
    if not alike or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        print(f"error: {line.removeprefix('nm_lightning.errors.InputError: ')}", file=sys.stderr)
    raise SystemExit(status)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser without the usage text before an error."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message alone."""
        fail(f"{message} (see --help)")


def _is_bad_input(error: BaseException) -> bool:
    """Ours, or Lightning's, which need not have been imported."""
    lightning = sys.modules.get("pytorch_lightning.utilities.exceptions")
    return isinstance(error, (InputError, *([lightning.MisconfigurationException] if lightning else [])))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn `InputError` into one line, and a termination signal into an ordinary exit that cleans up."""
    global alike

    def terminate(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before: Callable | int | None = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except InputError as error:
        fail(str(error))
    except RankLost as error:
        alike = True
        fail(str(error), status=1)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not _is_bad_input(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        fail(str(cause))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
