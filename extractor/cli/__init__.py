"""The command ``extract``: words to options, one library call, and what a person sees of it."""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from extractor.cli import models, run
from extractor.cli.console import say
from extractor.errors import ExtractorError, UsageError

__all__ = ["main"]

# Exit codes of what went wrong; 130 and 143 are 128 plus the number of the signal.
FAILED = 1
WRONG_USAGE = 2

# First words that are no folder but a command of their own.
VERBS = {"models": models.list_models, "download": models.download}


class _Terminated(BaseException):
    """SIGTERM; like KeyboardInterrupt no error of the program."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``arguments`` default to those of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = VERBS.get(words[0]) if words else None
    # Of libraries, about code that the user did not write.
    warnings.simplefilter("ignore")
    with _terminable():
        try:
            return run.extract(words) if verb is None else verb(words[1:])
        except UsageError as error:
            return _complain(error, WRONG_USAGE)
        except ExtractorError as error:
            return _complain(error, FAILED)
        except KeyboardInterrupt:
            return _interrupted("interrupted", 128 + signal.SIGINT)
        except _Terminated:
            return _interrupted("terminated", 128 + signal.SIGTERM)
        except Exception:
            traceback.print_exc()
            say("extract: this is a fault of the program; please report it with the lines above")
            return FAILED


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that what was begun is cleaned up."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: whoever calls from there handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(how: str, code: int) -> int:
    say(f"extract: {how}; nothing was added, the same command starts again")
    return code


def _complain(error: ExtractorError, code: int) -> int:
    say(f"extract: {error}")
    return code
