"""The main job: ``extract [--model NAME] INPUT...``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from extractor.cli.summary import summary, warnings
from extractor.errors import SourceError, UsageError
from extractor.flags import options_in
from extractor.options import Options
from extractor.system.process_tuning import freeze_imports, keep_freed_memory, spin_briefly
from extractor.terminal.console import Bar, OutputError, logging_to, print_table, warn
from extractor.terminal.json_log import Events
from extractor.terminal.parser import Command, CommandOptions, parse
from extractor.version import __version__

if TYPE_CHECKING:
    from extractor.images.listing import ImageList
    from extractor.parts.request import UnlistedImages
    from extractor.report import Progress, Report
    from extractor.terminal.signals import Stopping

__all__ = ["extract", "run"]


def extract(arguments: Sequence[str], stopping: Stopping, events: Events) -> int:
    """Run the main job and return its exit code.

    Raises:
        ExtractorError: The run failed.
    """
    return run(parse(arguments), stopping, events).exit_code


def run(command: Command, stopping: Stopping, events: Events) -> Report:
    """Run a parsed command line, print what it did, and return it.

    Raises:
        ExtractorError: The run failed.
    """
    own = command.own
    events.wanted = own.log_json
    for message in command.warnings:
        (events.warning if events.wanted else warn)(message)
    _check(command)
    # Everything above and up to here happens without torch, which takes seconds to load.
    from extractor.report import Progress
    from extractor.run.up_to_date import up_to_date_report

    models, part = list(own.model), command.options.part
    if part is not None:  # another part may have listed the images
        events.start(None, models, __version__)
        report = _compute(_unlisted_images(command, events), command, stopping, events)
    else:
        images = _images(own, list(command.options.exclude), events)
        events.start(len(images), models, __version__)
        known = up_to_date_report(images, models, own.out, command.options)
        report = known or _compute(images, command, stopping, events)
        if known is not None:
            failed = max(store.failed for store in report.stores)
            events.progress(Progress(len(images), len(images), failed))
    if events.wanted or own.quiet:
        for message in warnings(report):
            (events.warning if events.wanted else warn)(message)
    events.end(report)
    if not own.quiet:
        try:
            print_table(summary(report))
        except OutputError as error:  # the rows are stored
            warn(str(error))
    return report


def _check(command: Command) -> None:
    """Check the command line and the output folders.

    Raises:
        ExtractorError: The run could not succeed.
    """
    own = command.own
    if not own.inputs and not own.image_list:
        raise UsageError("no input; try: extract images/   (extract --help shows more)")
    if own.inputs and own.image_list:
        raise UsageError("got both INPUT and --list, expected one of them; try: extract images/")
    if not all(own.model):
        raise UsageError("model: got an empty name; try: extract --model resnet50 images/")
    if own.out == "":
        raise UsageError("out: got an empty name, expected a folder for the store")
    from extractor.run.preflight import check_output_folders

    check_output_folders(list(own.model), own.out, command.options)


def _compute(
    images: ImageList | UnlistedImages, command: Command, stopping: Stopping, events: Events
) -> Report:
    options, own = command.options, command.own
    _keep_compiled()
    bar = Bar(quiet=own.quiet or events.wanted)
    write, names_worker = (events.warning, True) if events.wanted else (bar.warn, False)
    with bar, events.alone(), logging_to(write, names_worker=names_worker):
        keep_freed_memory()
        spin_briefly()  # takes effect only before torch is imported, which the next lines do
        # Ray would print the logs of a node that dies. A warning says what a run needs to know.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
        with freeze_imports():
            from extractor import api
            from extractor.images.budget import allow_pixels

        allow_pixels(options.max_pixels)

        def show(progress: Progress) -> None:
            if progress.phase == "listing" and options.part is None:  # done before the call
                return
            events.progress(progress)
            if progress.phase == "computing":
                stopping.graceful = True  # from now on there is a batch worth finishing
                bar.update(progress)

        arguments: Any = {name: getattr(options, name) for name in options_in(Options)}
        inputs: Any = images
        return api.extract(
            inputs, list(own.model), own.out, progress=show, stop=stopping, **arguments
        )


def _keep_compiled() -> None:
    """Keep compiled code for the next run, in a folder where nobody else can leave code."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(caches, "extractor", "compiled")
    if not os.path.isabs(folder):  # without HOME, and for a user without a name, "~" stays
        return
    with contextlib.suppress(OSError):  # no writable home; torch has a default folder
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)


def _unlisted_images(command: Command, events: Events) -> UnlistedImages:
    """Return the images for a part, which lists them only if no other one has."""
    from extractor.parts.request import UnlistedImages

    own, exclude = command.own, list(command.options.exclude)
    identity = [os.path.abspath(name) for name in own.inputs]
    if own.image_list == "-":
        identity = ["standard input"]
    elif own.image_list:
        name = own.image_list
        try:
            status = os.stat(name)
        except OSError as error:
            raise SourceError(f"cannot read the list {name}: {error.strerror}") from error
        identity = [os.path.abspath(name), str(status.st_size), str(status.st_mtime_ns)]
    return UnlistedImages(identity, lambda: _images(own, exclude, events))


def _images(own: CommandOptions, exclude: Sequence[str], events: Events) -> ImageList:
    """List the images.

    Raises:
        SourceError: They cannot be listed.
        UsageError: Standard input should be read but is closed.
    """
    from extractor.images.listing import list_images, read_list

    name = own.image_list
    left_out = events.left_out if events.wanted else None
    if not name:
        return list_images(own.inputs, exclude=exclude, left_out=left_out)
    if name == "-":
        if sys.stdin is None:
            raise UsageError("--list -: standard input is closed")
        return read_list(sys.stdin.buffer, "standard input", exclude=exclude, left_out=left_out)
    try:
        with open(name, "rb") as file:
            return read_list(file, name, exclude=exclude, left_out=left_out)
    except OSError as error:
        raise SourceError(f"cannot read the list {name}: {error.strerror}") from error
