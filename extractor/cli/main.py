"""The command ``extract``: words to options, one library call, and what a person sees of it."""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

from extractor.cli import extract as run
from extractor.cli import models, stores
from extractor.cli.console import say
from extractor.cli.json_log import Events
from extractor.cli.signals import NAMES, EndedError, Stopping
from extractor.errors import ExtractorError, InterruptedRunError, UsageError

__all__ = ["main", "process"]

# Exit codes of what went wrong.
FAILED = 1
WRONG_USAGE = 2

# First words that are no folder but a command of their own.
VERBS = {
    "models": models.list_models,
    "download": models.download,
    "info": stores.info,
    "verify": stores.verify,
    "compact": stores.compact,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``arguments`` default to those of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = VERBS.get(words[0]) if words else None
    # Of libraries, about code that the user did not write.
    warnings.simplefilter("ignore")
    stopping, events = Stopping(), Events()
    with stopping.listening():
        try:
            return run.extract(words, stopping, events) if verb is None else verb(words[1:])
        except InterruptedRunError as error:
            kept = f"{error.done} of {error.total} images are done and kept"
            return _interrupted(stopping, events, kept, done=error.done, total=error.total)
        except UsageError as error:
            return _complain(error, WRONG_USAGE, events)
        except ExtractorError as error:
            return _complain(error, FAILED, events)
        except (EndedError, KeyboardInterrupt):
            return _interrupted(stopping, events, "what was done is kept")
        except Exception as error:
            told = "this is a fault of the program; please report it with the lines above"
            if events.wanted:
                told = traceback.format_exc()
                events.write("error", kind=type(error).__name__, message=told, exit_code=FAILED)
            else:
                traceback.print_exc()
                say(f"extract: {told}")
            return FAILED


def process() -> int:
    """The command as a process: what ends it after its work is done changes no exit code."""
    for number in NAMES:  # until main listens, which is at once, and again when it is done
        signal.signal(number, signal.SIG_IGN)
    return main()


def _complain(error: ExtractorError, code: int, events: Events) -> int:
    if events.wanted:
        events.write("error", kind=type(error).__name__, message=str(error), exit_code=code)
    else:
        say(f"extract: {error}")
    return code


def _interrupted(stopping: Stopping, events: Events, kept: str, **counts: int) -> int:
    message = f"{stopping.how}; {kept}, the same command goes on there"
    if events.wanted:
        code = {"exit_code": stopping.exit_code}
        events.write("interrupted", message=message, **counts, **code)
    else:
        say(f"extract: {message}")
    return stopping.exit_code
