"""One part of a job array: its share of a plan that all parts have in common.

No process directs the others. The first part lists the images and leaves the plan in the staging
folder; each part computes its shards; the one that finds all shards finished publishes the stores.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from extractor.compute.inputs import Inputs
from extractor.errors import ShardBusyError, StoreBusyError, StoreError, UsageError
from extractor.images.listing import ImageList, Input
from extractor.lease.describe import describe
from extractor.lease.parts import Part, parse_part
from extractor.lease.paths_file import write_paths
from extractor.lease.suspects import Suspects, load_suspects
from extractor.loading.crash_log import CrashLog
from extractor.models.embedding import EmbeddingSpec, Model
from extractor.models.naming import store_folders
from extractor.options import Options
from extractor.parts.output import PlannedOutput
from extractor.parts.plan import PartPlan, PlannedImages, PlannedStore, order_folder, state_of
from extractor.parts.request import UnlistedImages, differences, part_request
from extractor.report import Progress, Report
from extractor.run.callbacks import Callbacks
from extractor.run.leased import LeasedRun
from extractor.run.output import StoreOutput
from extractor.run.preflight import check_has_rows
from extractor.run.session import Session
from extractor.run.sizes import choose_sizes
from extractor.run.snapshot import unlisted_folders
from extractor.store.atomic import store_errors, sync, sync_folder
from extractor.store.claim import ClaimedFolder, SharedFolder
from extractor.store.format import IN_FLIGHT, PLAN_PATHS, STAGING, WORKERS
from extractor.store.lock import TELL_SECONDS, Lock, ShardLock, this_process
from extractor.system.cpu import compute_threads
from extractor.system.timing import Timer

__all__ = ["PartSession"]

log = logging.getLogger(__name__)

Images: TypeAlias = "Input | Iterable[Input] | ImageList | UnlistedImages"
Folders = Sequence[ClaimedFolder | SharedFolder]
DIFFERENCES_SHOWN = 3
POLL_SECONDS = 1.0  # between two looks at the shards that other processes compute


class PartSession(Session):
    """A run that computes one part of the shards, beside other parts of the same run.

    Args:
        models: Names of models, or loaded backbones.
        out: Folder of the store, or of several stores; None for ``features/<name>``.
        options: Options of the run, with a part.

    Raises:
        UsageError: The models do not fit the options, or there is no such part.
        StoreError: A store cannot be written.
    """

    def __init__(self, models: Sequence[Model], out: str | None, options: Options) -> None:
        self._part = parse_part(options.part or "", os.environ)
        if options.overwrite:
            raise UsageError(
                "part: got overwrite, too, and each part would start over; remove the old store, "
                "or choose another --out"
            )
        self._threads = 0
        self._tuned: Sequence[EmbeddingSpec] | None = None
        super().__init__(models, out, options)

    def _run(self, images: Images, callbacks: Callbacks) -> Report:
        """Compute the part, publish the stores if it was the last one, and return the report."""
        if not isinstance(images, str | bytes | os.PathLike | ImageList | UnlistedImages):
            images = tuple(images)
        callbacks.report(Progress(0, 0, 0, "loading"))
        specs = self.load()
        callbacks.report(Progress(0, 0, 0, "tuning"))
        folders = [Path(each) for each in store_folders(self._out, [s.name for s in specs])]
        request = part_request(images, self._models, self._options)
        with compute_threads(self._options.threads):
            report = None
            while report is None:
                report = self._compute_part(folders, specs, request, callbacks)
                if report is None:
                    with _claimed(folders) as claims:
                        report = self._leave_plan(images, specs, claims, request, callbacks)
            if report.part and not report.missing_shards:
                callbacks.publishing()
                report = self._publish_all(folders, request, report)
        return replace(report, part=str(self._part))

    def _leave_plan(
        self,
        images: Images,
        specs: Sequence[EmbeddingSpec],
        claims: Sequence[ClaimedFolder],
        request: Mapping[str, Any],
        callbacks: Callbacks,
    ) -> Report | None:
        """List and compare, and leave the plan; return a report if nothing is to be computed."""
        if PartPlan.read(claims) is not None:
            return None  # another part was faster
        callbacks.report(Progress(0, 0, 0, "listing"))
        listed = self.list_images(images.read() if isinstance(images, UnlistedImages) else images)
        sizes = choose_sizes(specs, claims, listed, self._options)
        suspects = load_suspects(claim.staging for claim in claims)
        for claim in claims:  # nobody computes now
            shutil.rmtree(claim.staging / WORKERS, ignore_errors=True)
        inputs = Inputs(self._here, sizes.batch_size, suspects, Timer())
        tuned = self.choose_precision(specs, claims, listed, inputs)
        self._tuned = tuned
        outputs = self.compare(tuned, claims, listed, sizes)
        self.check_space(outputs)
        leased = LeasedRun(outputs, listed, callbacks)
        if not leased.plan.passes:
            computation = self._compute(leased, self._computing(tuned, inputs, listed))
            check_has_rows(outputs)
            self._clock.end("compute")
            report = self._make_report(listed, tuned, self.publish(outputs), 0, computation)
            self._write_run_json(report, tuned, computation.threads)
            return report
        home = leased.plan.passes[0].stores[0].spec
        with store_errors(claims[home].out):
            stores = _write_paths(leased, outputs, claims, home)
            plan = PartPlan(
                request,
                os.fsdecode(listed.root),
                len(listed),
                sizes.batch_size,
                stores,
                home,
                listed.passed_over,
                listed.skipped,
                listed.excluded,
                unlisted_folders(listed),
            )
            for claim, output in zip(claims, outputs, strict=True):
                if not output.is_up_to_date:
                    plan.write(claim.staging)
        return None

    def _compute_part(
        self,
        folders: Sequence[Path],
        specs: Sequence[EmbeddingSpec],
        request: Mapping[str, Any],
        callbacks: Callbacks,
    ) -> Report | None:
        """Compute the shards of this part; return None if there is no plan."""
        with ExitStack() as stack:
            shared = [stack.enter_context(SharedFolder(folder)) for folder in folders]
            plan = PartPlan.read(shared)
            if plan is None:
                return None
            _check_same(shared[plan.home].out, plan, request)
            folder = stack.enter_context(_own_folder(shared[plan.home].staging, self._part))
            suspects = _harvest(folder, [each.staging for each in shared])
            self._crash_folder = folder
            timer = Timer(trace=self._options.profile is not None)
            inputs = Inputs(self._here, plan.batch_size, suspects, timer)
            images = PlannedImages.of(plan, shared)
            if self._tuned is None:
                self._tuned = self.choose_precision(specs, shared, images, inputs)
            outputs = self._planned(plan, images, shared)
            leased = LeasedRun(outputs, images, callbacks, self._part)
            pending = leased.pending
            computing = self._computing([output.spec for output in outputs], inputs, images)
            paths = plan.paths(shared)
            computing = replace(computing, folder=folder, paths=paths)
            computation = self._compute(leased, computing)
            while _wait_for_own(leased, outputs):
                computation = self._compute(leased, computing)
            self._threads = computation.threads
            self._clock.end("compute", start=computation.start_seconds)
            missing = sum(output.count_missing() for output in outputs)
            stores = tuple(o.part_report(leased.own_shards_of(o)) for o in outputs)
        report = self._make_report(images, computing.specs, stores, pending, computation)
        return replace(
            report,
            images=leased.images,
            resumed=leased.images - pending,
            part=str(self._part),
            shards=sum(output.shards for output in outputs if output.is_planned),
            missing_shards=missing,
        )

    def _publish_all(
        self,
        folders: Sequence[Path],
        request: Mapping[str, Any],
        report: Report,
    ) -> Report:
        """Publish the stores unless another part was faster, and report what they hold."""
        with _claimed(folders) as claims:
            plan = PartPlan.read(claims)
            if plan is None or plan.request != request:
                return report
            for claim in claims:
                if claim.staged_job() is not None:
                    claim.keep_work()
            outputs = self._planned(plan, PlannedImages.of(plan, claims), claims)
            missing = sum(output.count_missing() for output in outputs)
            if missing:  # a power cut destroyed files
                return replace(report, missing_shards=missing)
            check_has_rows(outputs)
            stores = self.publish(outputs)
        self._clock.end("publish")
        report = replace(
            report,
            stores=stores,
            images=plan.images,
            resumed=plan.images - (report.images - report.resumed),
            passed_over=plan.passed_over,
            skipped=plan.skipped,
            excluded=plan.excluded,
            unlisted=tuple((path, reason) for path, reason in plan.unlisted),
            seconds=sum(self._clock.seconds.values()),
        )
        self._write_run_json(report, [output.spec for output in outputs], self._threads)
        return report

    def _planned(
        self,
        plan: PartPlan,
        images: PlannedImages,
        folders: Folders,
    ) -> list[PlannedOutput]:
        """Return the stores as the plan has them."""
        assert self._tuned is not None
        outputs = []
        for index, (folder, spec) in enumerate(zip(folders, self._tuned, strict=True)):
            planned = plan.stores[index]
            options = replace(self._options, shard_images=planned.shard_images)
            description = describe(spec, options, images.root, plan.batch_size)
            lines = order_folder(plan.paths(folders), index)
            output = PlannedOutput(folder, spec, description, images, planned, options, lines)
            outputs.append(output)
        return outputs


@contextlib.contextmanager
def _claimed(folders: Sequence[Path]) -> Iterator[list[ClaimedFolder]]:
    """Claim folders; wait while parts compute, and while another one plans or publishes."""
    with ExitStack() as stack:
        yield [stack.enter_context(ClaimedFolder(f, extend=True, waits=True)) for f in folders]


def _check_same(out: Path, plan: PartPlan, request: Mapping[str, Any]) -> None:
    """Check that a part belongs to the run whose plan is there.

    Raises:
        StoreError: It belongs to another run.
    """
    different = differences(plan.request, request)
    if different:
        shown = "; ".join(different[:DIFFERENCES_SHOWN])
        raise StoreError(
            f"{out} holds parts of another run ({shown}); give all parts the same inputs, models "
            f"and options, choose another --out, or discard that run: rm -r {out / STAGING}"
        )


def _write_paths(
    leased: LeasedRun, outputs: Sequence[StoreOutput], claims: Sequence[ClaimedFolder], home: int
) -> list[PlannedStore]:
    """Write the paths of all images to compute, and return the stores for the plan."""
    paths = claims[home].staging / PLAN_PATHS
    shutil.rmtree(paths, ignore_errors=True)
    written = [write_paths(paths, leased.paths()).folder]
    starts, start = {}, 0
    for each in leased.plan.passes:
        starts.update(dict.fromkeys((store.spec for store in each.stores), start))
        start += each.images
    stores = []
    for index, (claim, output) in enumerate(zip(claims, outputs, strict=True)):
        lines = None if output.is_up_to_date else output.lines
        if lines is not None:
            written.append(write_paths(order_folder(paths, index), lines).folder)
        stores.append(
            PlannedStore(
                state_of(claim),
                output.is_up_to_date,
                starts.get(index, -1),
                len(output.todo),
                output.shard_images,
                output.listing,
                lines is not None,
                output.plan,
            )
        )
    for folder in written:
        for path in folder.iterdir():
            if path.is_file():
                with path.open("rb") as file:
                    sync(file.fileno())
        sync_folder(folder)
    return stores


def _wait_for_own(leased: LeasedRun, outputs: Sequence[PlannedOutput]) -> bool:
    """Wait while other processes compute shards of this part, such as an earlier start of it.

    They may die, and nobody else computes these shards. A process does not wait for itself.

    Returns:
        Whether shards are left to compute.

    Raises:
        InterruptedRunError: The run should stop.
    """
    tell_at = time.monotonic() + TELL_SECONDS
    while leased.shards and (busy := _busy(leased)) is not None:
        if f"by {this_process()};" in str(busy):
            return False
        if time.monotonic() > tell_at:
            tell_at = float("inf")
            log.warning("waiting: %s", str(busy).partition(";")[0])
        time.sleep(POLL_SECONDS)
        leased.on_tick()
    for output in outputs:
        output.count_missing()  # from now on, shards that others finished are finished here
    return bool(leased.shards)


def _busy(leased: LeasedRun) -> ShardBusyError | None:
    """Return who computes the shards that are left; None if one of them is free."""
    busy = None
    for pass_index, index, _ in map(leased.plan.__getitem__, leased.shards):
        stores = leased.plan.passes[pass_index].stores
        try:
            for store in stores:
                ShardLock(store.staging, store.first + index).check()
        except ShardBusyError as error:
            busy = error
        else:
            return None
    return busy


@contextlib.contextmanager
def _own_folder(staging: Path, part: Part) -> Iterator[Path]:
    """Make a folder for files of this process; it stays if the process dies."""
    folder = staging / WORKERS / f"part-{part.index + 1}-{part.count}"
    with ExitStack() as stack, store_errors(staging.parent):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(Lock(folder / "lock"))
        except (StoreBusyError, FileNotFoundError):  # the same part runs twice
            folder = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
            folder.mkdir(parents=True)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _harvest(folder: Path, staging: Sequence[Path]) -> frozenset[bytes]:
    """Return all suspects; an earlier process of the same part may have died of some."""
    logs = list(folder.glob(f"{IN_FLIGHT}*"))
    new = {path for each in logs for path in CrashLog.read(each)}
    known = {path for each in staging if each.is_dir() for path in Suspects(each).add(new)}
    for each in logs:
        each.unlink(missing_ok=True)
    return frozenset(known)
