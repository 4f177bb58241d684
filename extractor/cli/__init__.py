"""The command ``extract``: words to options, one library call, and what a person sees of it."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence

from extractor.cli import models, run, stores
from extractor.cli.console import say
from extractor.cli.signals import EndedError, Stopping
from extractor.errors import ExtractorError, InterruptedRunError, UsageError

__all__ = ["main"]

# Exit codes of what went wrong.
FAILED = 1
WRONG_USAGE = 2

# First words that are no folder but a command of their own.
VERBS = {
    "models": models.list_models,
    "download": models.download,
    "info": stores.info,
    "verify": stores.verify,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``arguments`` default to those of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = VERBS.get(words[0]) if words else None
    # Of libraries, about code that the user did not write.
    warnings.simplefilter("ignore")
    stopping = Stopping()
    with stopping.listening():
        try:
            return run.extract(words, stopping) if verb is None else verb(words[1:])
        except InterruptedRunError as error:
            say(
                f"extract: {stopping.how}; {error.done} of {error.total} images are done and kept, "
                "the same command goes on there"
            )
            return stopping.exit_code
        except UsageError as error:
            return _complain(error, WRONG_USAGE)
        except ExtractorError as error:
            return _complain(error, FAILED)
        except (EndedError, KeyboardInterrupt):
            say(f"extract: {stopping.how}; what was done is kept, the same command goes on there")
            return stopping.exit_code
        except Exception:
            traceback.print_exc()
            say("extract: this is a fault of the program; please report it with the lines above")
            return FAILED


def _complain(error: ExtractorError, code: int) -> int:
    say(f"extract: {error}")
    return code
