"""The command ``extract``: words to options, one library call, and what a person sees of it."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from extractor.errors import ExtractorError, SourceError, UsageError
from extractor.options import (
    DEFAULT_MODEL,
    DTYPES,
    PRECISIONS,
    Options,
    check_failure_rate,
    default_out,
)
from extractor.version import __version__

if TYPE_CHECKING:
    from extractor.pipeline import Progress, Report
    from extractor.sources import ImageList

__all__ = ["build_parser", "main"]

# Exit codes; 130 and 143 are 128 plus the number of the signal that ended the run.
OK = 0
FAILED = 1
WRONG_USAGE = 2
SOME_IMAGES_FAILED = 3

DESCRIPTION = """\
Turn images into embeddings: load a pretrained timm or torchvision backbone, put nn.Identity where
its classifier was, run folders of images through it, and leave a store of plain .npy files whose
row i belongs to image i.
"""

EPILOG = """\
examples:
  extract images/                                   resnet50 of timm -> features/resnet50/
  extract -m torchvision:vgg16 images/ -o vgg/      another model, another place
  extract -m resnet50 --weights mine.pth images/    your own weights
  find images -name '*.jpg' | extract --list -      any list of files

exit codes: 0 every image is in the store; 1 failed, nothing was added; 2 wrong usage; 3 the store
is complete but some images failed; 130 and 143 interrupted.
"""


class _Terminated(BaseException):
    """SIGTERM; like KeyboardInterrupt no error of the program."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``arguments`` default to those of the process."""
    options = build_parser().parse_args(arguments)
    warnings.simplefilter("ignore")  # of libraries, about code that the user did not write
    with _terminable():
        try:
            return _extract(options)
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
            _say("extract: this is a fault of the program; please report it with the lines above")
            return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The command's words; every default comes from :class:`extractor.options.Options`."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="extract",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="a folder, walked recursively, or an image"
    )
    parser.add_argument(
        "--list",
        metavar="FILE",
        help="read the paths of the images from a file, one a line (- for standard input)",
    )
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="timm:NAME, torchvision:NAME, or NAME: timm's where it has one (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        default=default.weights,
        metavar="WEIGHTS",
        help="default, random, a tag of the library, or a .pth or .safetensors file",
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="of random weights (default: %(default)s)"
    )
    parser.add_argument(
        "-o", "--out", metavar="OUT", help="folder of the store (default: features/<model>)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the store in OUT once the new one is complete",
    )

    group = parser.add_argument_group("the embeddings")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default=default.dtype,
        help="what is stored (default: %(default)s)",
    )
    group.add_argument("--normalize", action="store_true", help="scale each to unit length")
    group.add_argument(
        "--shard-images",
        type=int,
        default=default.shard_images,
        metavar="N",
        help="images of one .npy file (default: %(default)s)",
    )

    group = parser.add_argument_group("the computation")
    group.add_argument(
        "--device",
        default=default.device,
        help="auto (a GPU where there is one), cpu, cuda, cuda:N, mps (default: %(default)s)",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=default.precision,
        help="of the model (default: %(default)s, which is float32)",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=int,
        metavar="N",
        help="images in one forward pass (default: by device)",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=int,
        metavar="N",
        help="decoding threads (default: one a core)",
    )

    group = parser.add_argument_group("the run")
    group.add_argument(
        "--max-failure-rate",
        type=float,
        default=0.0,
        metavar="R",
        help="exit with 0 if no more than this share of the images failed, 0 to 1 (default: 0)",
    )
    group.add_argument("--quiet", action="store_true", help="no bar and no summary, only errors")
    parser.add_argument("--version", action="version", version=f"extract {__version__}")
    return parser


def _extract(options: argparse.Namespace) -> int:
    accepted = check_failure_rate(options.max_failure_rate)
    if bool(options.inputs) == bool(options.list):
        raise UsageError(
            "expected folders or images, or --list FILE, but not both; try: extract images/"
            if options.inputs
            else "no input; try: extract images/   (extract --help shows more)"
        )
    checked = Options(**{name: getattr(options, name) for name in Options.__dataclass_fields__})
    # Whatever can be wrong is found before torch is loaded, which takes seconds.
    from extractor.sources import list_images
    from extractor.store.writer import check_place

    out = Path(default_out(options.model) if options.out is None else options.out)
    if not options.model or options.out == "":
        raise UsageError("got an empty name, expected a model and a folder for the store")
    check_place(out, overwrite=options.overwrite)
    images = _read_list(options.list) if options.list else list_images(options.inputs)

    bar = _Bar(quiet=options.quiet)
    with bar, _logging_to(bar.write):
        from extractor.devices import keep_freed_memory
        from extractor.pipeline import extract

        keep_freed_memory()
        report = extract(
            images,
            options.model,
            out,
            **{name: getattr(checked, name) for name in Options.__dataclass_fields__},
            progress=bar.update,
        )
    if not options.quiet:
        _summarize(report)
    return OK if report.failure_rate <= accepted else SOME_IMAGES_FAILED


def _read_list(name: str) -> ImageList:
    from extractor.sources import read_list

    if name == "-":
        if sys.stdin is None:
            raise UsageError("--list -: standard input is closed")
        return read_list(sys.stdin.buffer, "standard input")
    try:
        with open(name, "rb") as file:
            return read_list(file, name)
    except OSError as error:
        raise SourceError(f"cannot read the list {name}: {error.strerror}") from error


def _summarize(report: Report) -> None:
    rows = f"{report.rows} of {report.images} images"
    lines = [
        ("model", f"{report.backbone}"),
        ("device", f"{report.device}, {report.precision}"),
        ("rows", f"{rows}, {report.dim} numbers each"),
        (
            "time",
            f"{report.seconds:.1f} s, of these {report.load_seconds:.1f} s to load the model; then "
            f"{report.images_per_second:.1f} images/s",
        ),
        ("store", f"{report.out}"),
    ]
    if report.passed_over:
        lines.append(("passed over", f"{report.passed_over} files that are no images"))
    if report.failed:
        lines.append(("failed", f"{report.failed} images, listed in {report.out}/failures.jsonl"))
        lines += [("", f"{path}: {reason}") for path, reason in report.first_failures]
        if report.failed > len(report.first_failures):
            lines.append(("", "..."))
    try:
        for name, text in lines:
            print(f"{name:12} {_printable(text)}")
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:  # the store is complete all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _say(f"extract: cannot print the summary: {error.strerror}")


class _Bar:
    """A tqdm bar on stderr: images, images/s, time left, failures; nothing without a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        if self._shown:
            print("loading the model ...", end="", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._clear()

    def update(self, progress: Progress) -> None:
        if not self._shown:
            return
        if self._bar is None:
            from tqdm import tqdm

            width = os.get_terminal_size(sys.stderr.fileno()).columns
            self._clear()
            self._bar = tqdm(
                total=progress.total,
                unit="img",
                smoothing=0.1,
                dynamic_ncols=width > 0,
                ncols=None if width else 80,  # some terminals do not know their size
                nrows=None if width else 24,
            )
        self._bar.set_postfix(failed=progress.failed, refresh=False)
        self._bar.update(progress.done - self._bar.n)

    def write(self, text: str) -> None:
        """Print a line on stderr above the bar."""
        if self._bar is not None:
            self._bar.write(_printable(text), file=sys.stderr)
        else:
            self._clear()
            _say(text)

    def _clear(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class _Handler(logging.Handler):
    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(f"extract: {record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def _logging_to(write: Callable[[str], None]) -> Iterator[None]:
    """Show the package's own warnings; what other libraries log is theirs."""
    logger = logging.getLogger("extractor")
    handler = _Handler(write)
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


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
    _say(f"extract: {how}; nothing was added, the same command starts again")
    return code


def _complain(error: ExtractorError, code: int) -> int:
    _say(f"extract: {error}")
    return code


def _say(text: str) -> None:
    print(_printable(text), file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    """Text that any terminal takes: names of files may hold bytes that are no characters."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
