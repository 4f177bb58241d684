"""The main job: ``extract [--model NAME] INPUT...``."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from extractor.cli import environment
from extractor.cli.console import Bar, logging_to, print_lines, warn
from extractor.cli.json_log import Events
from extractor.errors import SourceError, UsageError
from extractor.options import (
    CHECKS,
    COMPILES,
    DECODES,
    DEFAULT_MODEL,
    DTYPES,
    POOLS,
    PRECISIONS,
    Options,
    planned_stores,
    store_folders,
)
from extractor.preprocess import FITS, INTERPOLATIONS
from extractor.system.process_tuning import freeze_imports, keep_freed_memory, spin_briefly
from extractor.version import __version__

if TYPE_CHECKING:
    from extractor.cli.signals import Stopping
    from extractor.images.listing import ImageList
    from extractor.report import Progress, Report

__all__ = ["build_parser", "extract"]

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
  extract -m resnet50 --layer layer3 --pool gem images/       an inner layer, pooled
  extract -m resnet50 -m vit_base_patch16_224 images/         two stores, each image read once
  extract -m resnet50+vit_base_patch16_224 images/            both in one vector
  find images -name '*.jpg' | extract --list -      any list of files

other commands (a folder of such a name is written ./models):
  extract models [GLOB]                             what models there are
  extract models show NAME                          one of them, with its layers
  extract download NAME...                          fetch weights, for a machine without network
  extract info STORE                                how a store was made
  extract verify STORE                              whether every byte of it is right
  extract compact STORE                             rewrite it without rows of images that went

Every flag can stand in the environment: EXTRACTOR_BATCH_SIZE=64 is --batch-size 64.

exit codes: 0 every image is in the store; 1 failed, nothing was added; 2 wrong usage; 3 the store
is complete but some images failed; 130 and 143 interrupted: the same command goes on.
"""


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
        action="append",
        metavar="NAME",
        help="timm:NAME, torchvision:NAME, or NAME: timm's where it has one; hf-hub:ORG/NAME, "
        "local-dir:PATH, FILE.py:FUNCTION; A+B joins two; several fill a store each "
        f"(default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--weights",
        default=default.weights,
        metavar="WEIGHTS",
        help="default, random, a tag of the library, a file, or hf-hub:ORG/NAME",
    )
    parser.add_argument(
        "--weights-key",
        metavar="KEY",
        help="which state dict of a checkpoint with several, such as model_ema",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        help="of random weights, and of what a FILE.py:FUNCTION draws (default: %(default)s)",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        help="folder of the store, or of several stores (default: features/<model>)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the store in OUT once the new one is complete",
    )

    group = parser.add_argument_group("the embeddings")
    group.add_argument(
        "--layer",
        dest="layers",
        action="append",
        metavar="LAYER",
        help="take the output of this module instead of the pre-logits: a dotted name, a glob, or "
        "a negative number of a block; several fill a store each",
    )
    group.add_argument(
        "--pool",
        default=default.pool,
        metavar="POOL",
        help=f"how a layer's positions become one vector: {', '.join(POOLS)} or gem:POWER "
        "(default: %(default)s)",
    )
    group.add_argument("--concat", action="store_true", help="join several layers to one vector")
    group.add_argument(
        "--bypass",
        action="append",
        metavar="MODULE",
        help="put nn.Identity in the place of a module, to see what it contributes; repeatable",
    )
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

    group = parser.add_argument_group("the pixels (default: the model's own evaluation transform)")
    group.add_argument("--image-size", type=_image_size, metavar="N", help="N or HEIGHTxWIDTH")
    group.add_argument(
        "--crop-pct", type=float, metavar="SHARE", help="of the resized picture that the crop keeps"
    )
    group.add_argument("--resize", choices=FITS, help="what happens to what does not fit")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="filter of the resize")
    group.add_argument("--mean", type=_three, metavar="R,G,B", help="of pixels of 0 to 1")
    group.add_argument("--std", type=_three, metavar="R,G,B", help="of pixels of 0 to 1")

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
        help="of the model; mixed is bfloat16 with the sensitive layers in float32 (default: "
        "%(default)s, the fastest that keeps a cosine of 0.999 to float32 on some of the images)",
    )
    group.add_argument(
        "--compile",
        choices=COMPILES,
        default=default.compile,
        help="torch.compile the model (default: %(default)s, where there are images enough to "
        "repay it)",
    )
    group.add_argument(
        "--decode",
        choices=DECODES,
        default=default.decode,
        help="scaled: a JPEG much larger than the model's input at a half, a quarter or an eighth "
        "of its size; exact: every pixel; gpu: plain JPEGs by the CUDA device that computes "
        "(default: %(default)s)",
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
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads that the network computes with on a CPU (default: torch's own number, at "
        "most one a core)",
    )

    group = parser.add_argument_group("images that are there already, and hostile ones")
    group.add_argument(
        "--check",
        choices=CHECKS,
        default=default.check,
        help="how an image is compared with what it was: stat, by size and time, or content, by "
        "SHA-256 (default: %(default)s)",
    )
    group.add_argument(
        "--keep-missing",
        action="store_true",
        help="keep the rows of images that are no longer there",
    )
    group.add_argument(
        "--retry-failed", action="store_true", help="try unchanged images again that failed"
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        default=default.max_pixels,
        metavar="N",
        help="an image of more fails before it is decoded (default: %(default)s)",
    )
    group.add_argument(
        "--image-timeout",
        type=float,
        default=default.image_timeout,
        metavar="SECONDS",
        help="after which the decoding of an image is given up (default: %(default)g)",
    )

    group = parser.add_argument_group("the run")
    group.add_argument(
        "--max-failure-rate",
        type=float,
        default=default.max_failure_rate,
        metavar="R",
        help="exit with 0 if no more than this share of the images failed, 0 to 1 (default: 0)",
    )
    group.add_argument(
        "--no-lock",
        dest="lock",
        action="store_false",
        help="write where files cannot be locked; see to it yourself that no second run does",
    )
    group.add_argument(
        "--log-json", action="store_true", help="one JSON object a line on stderr, no bar"
    )
    group.add_argument(
        "--profile",
        metavar="FILE",
        help="write there what each thread did when, for chrome://tracing or Perfetto",
    )
    group.add_argument("--quiet", action="store_true", help="no bar and no summary, only errors")
    parser.add_argument("--version", action="version", version=f"extract {__version__}")
    return parser


def _image_size(text: str) -> int | tuple[int, int]:
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected N or HEIGHTxWIDTH, in pixels")
    height, by, width = text.partition("x")
    return (int(height), int(width)) if by else int(height)


def _three(text: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected three numbers such as 0.485,0.456,0.406"
        ) from error
    return red, green, blue


def extract(arguments: Sequence[str], stopping: Stopping, events: Events) -> int:
    """Run the main job and return its exit code.

    Raises:
        ExtractorError: it failed.
    """
    parsed = environment.parse(build_parser(), arguments)
    events.wanted = parsed.log_json
    for odd in parsed.odd_variables:
        (events.warning if events.wanted else warn)(odd)
    if bool(parsed.inputs) == bool(parsed.list):
        raise UsageError(
            "expected folders or images, or --list FILE, but not both; try: extract images/"
            if parsed.inputs
            else "no input; try: extract images/   (extract --help shows more)"
        )
    options = options_of(parsed)
    # Whatever can be wrong is found before torch is loaded, which takes seconds.
    from extractor.images.listing import list_images
    from extractor.run.run_json import nothing_to_do
    from extractor.store.publish import check_place

    models = parsed.model or [DEFAULT_MODEL]
    if not all(models) or parsed.out == "":
        raise UsageError("got an empty name, expected a model and a folder for the store")
    for folder in store_folders(parsed.out, planned_stores(models, options) or []):
        check_place(Path(folder), occupied=True, locked=True)
    images = _read_list(parsed.list) if parsed.list else list_images(parsed.inputs)
    events.start(len(images), models, __version__)
    report = nothing_to_do(images, models, parsed.out, options)
    if report is None:
        report = _compute(images, models, parsed, options, stopping, events)
    events.end(report)
    if not parsed.quiet:
        print_lines(summary(report))
    return report.exit_code


def _compute(
    images: ImageList,
    models: Sequence[str],
    parsed: argparse.Namespace,
    options: Options,
    stopping: Stopping,
    events: Events,
) -> Report:
    _keep_compiled()
    bar = Bar(quiet=parsed.quiet or events.wanted)
    with bar, events.alone(), logging_to(events.warning if events.wanted else bar.warn):
        keep_freed_memory()
        spin_briefly()  # before torch is imported, which the next lines do
        with freeze_imports():
            from extractor import api as pipeline
            from extractor.images.budget import allow_pixels

        allow_pixels(options.max_pixels)

        def show(progress: Progress) -> None:
            stopping.graceful = True  # from now on a batch is worth waiting for
            bar.update(progress)
            events.progress(progress)

        return pipeline.extract(
            images,
            models,
            parsed.out,
            **{name: getattr(options, name) for name in Options.__dataclass_fields__},
            progress=show,
            stop=stopping,
        )


def _keep_compiled() -> None:
    """Keep what is compiled for the next run, and not where others could leave code to run."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(caches, "extractor", "compiled")
    with contextlib.suppress(OSError):  # no home that can be written: torch has a folder of its own
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)


def options_of(parsed: argparse.Namespace) -> Options:
    """The options that were typed, checked.

    Raises:
        UsageError: a value out of its range.
    """
    default = Options()
    given = {name: getattr(parsed, name) for name in Options.__dataclass_fields__}
    # What can be repeated is None where it is not given at all.
    return Options(
        **{
            name: getattr(default, name) if value is None else value
            for name, value in given.items()
        }
    )


def _read_list(name: str) -> ImageList:
    from extractor.images.listing import read_list

    if name == "-":
        if sys.stdin is None:
            raise UsageError("--list -: standard input is closed")
        return read_list(sys.stdin.buffer, "standard input")
    try:
        with open(name, "rb") as file:
            return read_list(file, name)
    except OSError as error:
        raise SourceError(f"cannot read the list {name}: {error.strerror}") from error


def _how(report: Report) -> str:
    """The precision that was computed in, what it costs, and whether a network was compiled."""
    how = report.precision
    if report.least_cosine is not None:
        how += f" (cosine to float32 at least {report.least_cosine:.4f} where it was tried)"
    return f"{how}, compiled" if report.is_compiled else how


def summary(report: Report) -> list[str]:
    """What a run did, in a few lines."""
    lines = []
    for store in report.stores:
        shape = " x ".join(str(axis) for axis in store.shape)
        lines += [
            ("model", store.backbone),
            ("rows", f"{store.rows} of {store.rows + store.failed} images, {shape} numbers each"),
            ("store", f"{store.out}"),
        ]
        if 0 < store.added < store.rows or store.changed or store.gone:
            lines.append(("new", f"{store.added} rows"))
        if store.changed or store.gone:
            of = f"{store.changed} images that changed, {store.gone} that are no longer there"
            lines.append(("retired", f"rows of {of}; extract compact removes them"))
        if store.failed:
            where = f"listed in {store.out}/failures.jsonl"
            lines.append(("failed", f"{store.failed} images, {where}"))
            lines += [("", f"{path}: {reason}") for path, reason in store.first_failures]
            if store.failed > len(store.first_failures):
                lines.append(("", "..."))
    if report.resumed == report.images:
        changed = any(store.changed or store.gone for store in report.stores)
        what = "to compute" if changed else "to do"
        lines.append((f"nothing {what}", "all of it was there already"))
        lines.append(("time", f"{report.seconds:.1f} s"))
    else:
        if report.resumed:
            lines.append(("resumed", f"{report.resumed} images were done already"))
        time = f"{report.seconds:.1f} s, of these {report.load_seconds:.1f} s to load and tune"
        lines += [
            ("device", f"{report.device}, {_how(report)}"),
            ("time", f"{time}; then {report.images_per_second:.1f} images/s"),
        ]
        if report.spent is not None and report.spent.bound:
            lines.append(("", report.spent.bound))
    if report.passed_over:
        lines.append(("passed over", f"{report.passed_over} files that are no images"))
    return [f"{name:13} {text}" for name, text in lines]
