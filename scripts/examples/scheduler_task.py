"""One task of a scheduler: scheduler_task.py IMAGES MODEL OUT [STOP].

Stops once a file STOP exists, and prints the report as JSON. Exit code 75: try again later.
"""

import json
import sys
from pathlib import Path

from extractor import (
    ExtractorError,
    InterruptedRunError,
    Progress,
    StoreBusyError,
    UsageError,
    extract,
)

TRY_LATER = 75


def show(progress: Progress) -> None:
    print(f"{progress.phase} {progress.done}/{progress.total}", file=sys.stderr)


def main(images: str, model: str, out: str, stop: str = "stop") -> int:
    try:
        report = extract(images, model, out, progress=show, stop=Path(stop).exists)
    except (InterruptedRunError, StoreBusyError) as error:
        print(error, file=sys.stderr)
        return TRY_LATER
    except ExtractorError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(json.dumps(report.as_dict()))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
