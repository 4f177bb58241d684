"""The main job: ``extract [--model NAME] INPUT...``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from extractor.cli.console import Bar, logging_to, print_lines, warn
from extractor.cli.json_log import Events
from extractor.cli.parser import Command, parse
from extractor.cli.summary import summary
from extractor.errors import SourceError, UsageError
from extractor.flags import options_in
from extractor.options import Options
from extractor.system.process_tuning import freeze_imports, keep_freed_memory, spin_briefly
from extractor.version import __version__

if TYPE_CHECKING:
    from extractor.cli.signals import Stopping
    from extractor.images.listing import ImageList
    from extractor.report import Progress, Report

__all__ = ["extract"]


def extract(arguments: Sequence[str], stopping: Stopping, events: Events) -> int:
    """Run the main job and return its exit code.

    Raises:
        ExtractorError: it failed.
    """
    command = parse(arguments)
    options, own = command.options, command.own
    events.wanted = own.log_json
    for message in command.warnings:
        (events.warning if events.wanted else warn)(message)
    if bool(own.inputs) == bool(own.image_list):
        raise UsageError(
            "expected folders or images, or --list FILE, but not both; try: extract images/"
            if own.inputs
            else "no input; try: extract images/   (extract --help shows more)"
        )
    # Whatever can be wrong is found before torch is loaded, which takes seconds.
    from extractor.images.listing import list_images
    from extractor.run.preflight import check_output_folders
    from extractor.run.up_to_date import up_to_date_report

    models = list(own.model)
    if not all(models) or own.out == "":
        raise UsageError("got an empty name, expected a model and a folder for the store")
    check_output_folders(models, own.out, options)
    images = _read_list(own.image_list) if own.image_list else list_images(own.inputs)
    events.start(len(images), models, __version__)
    report = up_to_date_report(images, models, own.out, options)
    if report is None:
        report = _compute(images, command, stopping, events)
    events.end(report)
    if not own.quiet:
        print_lines(summary(report))
    return report.exit_code


def _compute(
    images: ImageList,
    command: Command,
    stopping: Stopping,
    events: Events,
) -> Report:
    options, own = command.options, command.own
    _keep_compiled()
    bar = Bar(quiet=own.quiet or events.wanted)
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
            list(own.model),
            own.out,
            **{name: getattr(options, name) for name in options_in(Options)},
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
