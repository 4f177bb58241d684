"""Entry point of the command: verbs, signals, and errors to messages and exit codes."""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

from extractor.cli import (
    compare,
    doctor,
    duplicates,
    evaluate,
    export,
    extract,
    map,
    models,
    outliers,
    search,
    stores,
    transform,
    view,
)
from extractor.errors import (
    DeviceError,
    ExtractorError,
    InstallationError,
    InterruptedRunError,
    UsageError,
)
from extractor.system.installation import explain_import
from extractor.terminal.console import say
from extractor.terminal.json_log import Events
from extractor.terminal.signals import NAMES, EndedError, Stopping
from extractor.text import plural

__all__ = ["main", "process"]

# Exit codes of errors, as in the table EXIT_CODES of extractor.terminal.parser.
FAILED = 1
USAGE_ERROR = 2
RESUME = "Run the same command to resume."
SIMILAR = 0.7  # of words that may be the same one, mistyped

# Keeps an error of a device, and with it the tensors of its frames. A broken GPU refuses to free
# them, and torch then aborts the process. So it ends without doing that.
_broken: list[DeviceError] = []

# A first word with a meaning of its own; a folder of the same name is written ./models.
VERBS = {
    "models": models.list_models,
    "download": models.download,
    "info": stores.info,
    "verify": stores.verify,
    "compact": stores.compact,
    "evaluate": evaluate.evaluate,
    "compare": compare.compare,
    "export": export.export,
    "transform": transform.transform,
    "map": map.map_rows,
    "search": search.search,
    "index": search.index,
    "view": view.view,
    "duplicates": duplicates.duplicates,
    "outliers": outliers.outliers,
    "doctor": doctor.doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``arguments`` default to those of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = VERBS.get(words[0]) if words else None
    warnings.simplefilter("ignore")  # they concern the code of libraries, not the user
    stopping, events = Stopping(), Events()
    try:
        with stopping.listening():  # a signal while a message is written changes no exit code
            if verb is not None:
                _check_no_empty_word(words)
                return verb(words[1:])
            _check_first(words)
            return extract.extract(words, stopping, events)
    except InterruptedRunError as error:
        saved = f"{error.done:,} of {plural(error.total, 'image')} saved. {RESUME}"
        return _interrupted(stopping, events, saved, done=error.done, total=error.total)
    except UsageError as error:
        return _complain(error, USAGE_ERROR, events)
    except ExtractorError as error:
        return _complain(error, FAILED, events)
    except (EndedError, KeyboardInterrupt):
        is_run = verb in (None, compare.compare)
        again = f"finished batches are saved. {RESUME}" if is_run else "run it again"
        return _interrupted(stopping, events, again)
    except Exception as error:
        if (problem := explain_import(error)) != "":
            return _complain(InstallationError(problem), FAILED, events)
        return _report_bug(error, events)


def _check_no_empty_word(words: Sequence[str]) -> None:
    """Check that no variable of a script was empty, which would name the current folder.

    Raises:
        UsageError: A word is empty.
    """
    if "" in words:
        before = words[words.index("") - 1]
        raise UsageError(
            f"got an empty word after {before}, expected the name of a store, a file or a value"
        )


def _check_first(words: Sequence[str]) -> None:
    """Check that the first word is no mistyped verb.

    Raises:
        UsageError: It is neither a folder nor an image, and nearly a verb.
    """
    if not words or words[0].startswith("-") or os.path.lexists(words[0]):
        return
    if close := difflib.get_close_matches(words[0], VERBS, 1, SIMILAR):
        raise UsageError(f"{words[0]}: no such folder or image; did you mean extract {close[0]}?")


def process() -> int:
    """Run the command as a process; a signal after its work is done changes no exit code."""
    for number in NAMES:  # ignored before main() listens and after it returns
        signal.signal(number, signal.SIG_IGN)
    code = main()
    if _broken:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    return code


def _report_bug(error: Exception, events: Events) -> int:
    if events.wanted:
        lines = traceback.format_exc()
        events.write("error", kind=type(error).__name__, message=lines, exit_code=FAILED)
    else:
        traceback.print_exc()
        say("extract: this is a bug; please report it with the lines above")
    return FAILED


def _complain(error: ExtractorError, code: int, events: Events) -> int:
    if isinstance(error, DeviceError):
        _broken.append(error)
    if events.wanted:
        events.write("error", kind=type(error).__name__, message=str(error), exit_code=code)
    else:
        say(f"extract: {error}")
    return code


def _interrupted(stopping: Stopping, events: Events, what_now: str, **counts: int) -> int:
    message = f"{stopping.reason}: {what_now}"
    if events.wanted:
        events.write("interrupted", message=message, **counts, exit_code=stopping.exit_code)
    else:
        say(f"extract: {message}")
    return stopping.exit_code
