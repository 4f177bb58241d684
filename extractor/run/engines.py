"""Who computes the shards of a run: this process, several on this machine, or a cluster."""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from extractor.compute.inputs import Inputs, device_of
from extractor.errors import DeviceError, StoreError
from extractor.lease.board import Board
from extractor.lease.lease import Receipt
from extractor.lease.paths_file import write_paths
from extractor.lease.sharing import Machine, WorkerSlot, on_first_device, share_out
from extractor.loading.crash_log import CrashLog
from extractor.loading.options import default_workers
from extractor.models.embedding import EmbeddingSpec, backbones_of, weights_of
from extractor.models.from_file import files_of_code
from extractor.options import Options, parse_devices
from extractor.report import WorkerReport
from extractor.run.leased import LeasedRun
from extractor.store.format import IN_FLIGHT, WORKERS
from extractor.system.cpu import available_cores
from extractor.system.devices import (
    device_errors,
    device_name,
    empty_cache,
    is_exclusive,
    resolve_device,
)
from extractor.system.memory import granted_memory
from extractor.system.timing import KINDS, Spent, Timer
from extractor.workers.local import LocalWorkers
from extractor.workers.opening import ShardOpener
from extractor.workers.pipeline import ShardPipeline
from extractor.workers.ray_cluster import demand_of_workers, device_of_cluster, ray_cluster
from extractor.workers.ray_workers import RayWorkers
from extractor.workers.worker import WorkerSetup

__all__ = ["Computation", "Computing", "compute", "device_elsewhere", "engine_for"]

log = logging.getLogger(__name__)

# In the folder of the workers: the slot of a machine for images above the share of their process.
LARGE_IMAGE = "large-image"


@dataclass(frozen=True)
class Computing:
    """With what a run computes its shards.

    Attributes:
        options: Options of the run.
        specs: Embedding of each store.
        inputs: Decodes the images.
        model_names: Names of the models; None where one is an object of the caller.
        root: Folder that the paths of the images are relative to.
        sample: Absolute paths of the images that precision and compilation were tried on.
        folder: Folder for files of this process; None is that of the run.
        paths: Folder of the paths of all images, if they are written already. Then other processes
            compute shards of the run, too, and keep those that they are computing.
    """

    options: Options
    specs: Sequence[EmbeddingSpec]
    inputs: Inputs
    model_names: Sequence[str] | None
    root: bytes
    sample: Sequence[bytes]
    folder: Path | None = None
    paths: Path | None = None


@dataclass(frozen=True)
class Computation:
    """What a run computed.

    Attributes:
        spent: Time by kind of work.
        workers: What each worker process did; empty if this process computed.
        start_seconds: Time until the first worker had loaded the models.
        threads: Number of threads of each process that computed on a CPU.
    """

    spent: Spent
    workers: tuple[WorkerReport, ...] = ()
    start_seconds: float = 0.0
    threads: int = field(default_factory=torch.get_num_threads)


@contextmanager
def engine_for(options: Options) -> Iterator[Options]:
    """Connect to what computes a run, and yield the options to load its models with here.

    Raises:
        DeviceError: ``devices`` names a GPU that this machine lacks.
        ExtractorError: No Ray cluster answers.
    """
    if options.engine == "local":
        here = on_first_device(options)
        if options.devices is not None:
            try:
                resolve_device(here.device)
            except DeviceError as error:
                advice = str(error).replace("--device cpu", "--devices cpu")
                raise DeviceError(f"devices: got {options.devices}; {advice}") from error
        yield here
        return
    with ray_cluster(options.address):
        device = device_of_cluster(options)
        is_here = device != "cuda" or torch.cuda.is_available()
        yield replace(options, device=device if is_here else "cpu")


def device_elsewhere(options: Options, specs: Sequence[EmbeddingSpec]) -> str:
    """Return the type of device that computes if this machine has none like it; else nothing."""
    if options.engine == "local":
        return ""
    device = device_of_cluster(options)
    return "" if device == device_of(specs).type else device


def compute(leased: LeasedRun, computing: Computing) -> Computation:
    """Compute the shards that the stores of a run lack.

    Raises:
        InterruptedRunError: The run should stop.
        ShardsFailedError: Some shards failed several times; all others are on the disk.
        ExtractorError: Nothing can be computed.
    """
    leased.on_tick()
    if computing.options.engine == "ray" and leased.shards:
        return _compute_on_cluster(leased, computing)
    slots = _slots(leased, computing)
    if slots:
        return _compute_in_processes(leased, computing, slots)
    return _compute_here(leased, computing)


def _slots(leased: LeasedRun, computing: Computing) -> list[WorkerSlot]:
    """Return the share of each worker process; none if this process computes."""
    options = computing.options
    is_named = computing.model_names is not None
    device = device_of(computing.specs)
    machine = Machine(
        available_cores(),
        torch.cuda.device_count(),
        str(device),
        torch.get_num_threads(),
        _least_gpu_bytes(options, device),
        _weight_bytes(computing.specs),
        is_exclusive(device),
        granted_memory()[1],
    )
    sharing = share_out(
        options,
        machine,
        images=leased.pending,
        shards=len(leased.shards),
        only_here="" if is_named else "a model of this process cannot be loaded in another one",
    )
    _check_same_kind(sharing.slots)
    if sharing.note:
        log.warning("%s", sharing.note)
    # One process that was asked for is a child of its own: this one survives what it does not.
    is_child = options.processes is not None and is_named and options.profile is None
    is_alone = len(sharing.slots) == 1 and not is_child
    return [] if is_alone or not leased.shards else list(sharing.slots)


def _compute_here(leased: LeasedRun, computing: Computing) -> Computation:
    """Compute the shards in this process."""
    specs = computing.specs
    inputs = replace(computing.inputs, timer=computing.inputs.timer or Timer())
    others = computing.paths is not None
    opener = ShardOpener(leased.plan, leased.full_paths, fails_if_busy=others)

    def after_batch(shard: int, done: int, failed: int) -> None:
        leased.on_batch(0, shard, done, failed)
        leased.on_tick()

    for index, each in enumerate(leased.plan.passes):
        stores = [store.spec for store in each.stores]
        crash_log = (computing.folder or each.stores[0].staging) / IN_FLIGHT
        pipeline = ShardPipeline(specs, inputs, crash_log, computing.model_names)
        leases = leased.leases(index)
        works = opener.open_free(leases) if others else map(opener.open, leases)
        pipeline.compute(works, stores, after_batch, leased.on_receipt)
    return Computation(_spent(leased.receipts, specs, inputs, processes=1))


def _compute_in_processes(
    leased: LeasedRun, computing: Computing, slots: Sequence[WorkerSlot]
) -> Computation:
    """Compute the shards in worker processes."""
    leased.has_workers = True
    inputs, folder = computing.inputs, _folder(leased, computing)
    _clear_device(computing.specs)
    setups = []
    for slot in slots:
        options = replace(
            inputs.options, device=slot.device, workers=slot.workers, threads=slot.threads
        )
        setups.append(
            replace(
                _setup(leased, computing),
                options=options,
                pixel_share=slot.max_pixels_share,
                processes=len(slots),
                crash_log=folder / f"{IN_FLIGHT}-{slot.worker}",
            )
        )
    board = Board(leased.shards)
    try:
        if computing.paths is None:
            write_paths(folder, leased.paths())
        workers = LocalWorkers(setups, board, leased)
        workers.run()
    finally:
        if not board.is_done:  # the decoder of a worker that did not end by itself may hang
            logs = [setup.crash_log for setup in setups]
            with suppress(StoreError):  # what ended the run matters more
                leased.keep_suspects(path for log in logs for path in CrashLog.read(log))
        shutil.rmtree(folder, ignore_errors=True)
    leased.check_failed(board.failed)
    inputs = replace(inputs, options=replace(inputs.options, workers=slots[0].workers))
    spent = _spent(leased.receipts, computing.specs, inputs, processes=len(slots))
    reports = _reports(leased.receipts, slots)
    return Computation(spent, reports, workers.start_seconds, slots[0].threads)


def _compute_on_cluster(leased: LeasedRun, computing: Computing) -> Computation:
    """Compute the shards on the nodes of a Ray cluster."""
    leased.has_workers = True
    asked, device = computing.options, device_of_cluster(computing.options)
    demand, nodes = demand_of_workers(asked, device, leased.on_tick)
    threads = asked.threads or demand.cores
    options = replace(
        asked,
        device=device,
        workers=asked.workers or default_workers(demand.cores, asked.decode),
        threads=threads,
    )
    of_node = max(map(demand.fits, ([node] for node in nodes)), default=1)
    share = max(options.max_pixels // max(of_node, 1), 1)
    processes = max(of_node, 1)
    setup = replace(
        _setup(leased, computing), options=options, pixel_share=share, processes=processes
    )
    board = Board(leased.shards)
    try:
        write_paths(setup.paths, leased.paths())
        workers = RayWorkers(setup, demand, board, leased)
        workers.run()
    finally:
        shutil.rmtree(setup.paths, ignore_errors=True)
    leased.check_failed(board.failed)
    inputs = replace(computing.inputs, options=options)
    count = max(len(workers.nodes), 1)
    spent = _spent(leased.receipts, computing.specs, inputs, processes=count)
    spent = replace(spent, cores=demand.cores, device=device)
    slots = [
        WorkerSlot(number, f"{device} of {node}", 0, 0, 0) for number, node in workers.nodes.items()
    ]
    reports = _reports(leased.receipts, slots)
    return Computation(spent, reports, workers.start_seconds, threads)


def _clear_device(specs: Sequence[EmbeddingSpec]) -> None:
    """Leave the memory of a GPU to the workers. This process computes nothing from now on."""
    device = device_of(specs)
    if device.type == "cuda":
        with device_errors(device):
            for backbone in backbones_of(specs):
                backbone.module.to("cpu")
            empty_cache(device)


def _setup(leased: LeasedRun, computing: Computing) -> WorkerSetup:
    """Return what all workers need to know of a run."""
    assert computing.model_names is not None
    folder = _folder(leased, computing)
    return WorkerSetup(
        models=tuple(computing.model_names),
        options=computing.inputs.options,
        weights=weights_of(computing.specs),
        plan=leased.plan,
        paths=computing.paths or folder,
        root=computing.root,
        batch_size=computing.inputs.batch_size,
        sample=tuple(computing.sample),
        suspects=tuple(computing.inputs.suspects),
        crash_log=folder / IN_FLIGHT,
        large_image_slot=folder / f"{LARGE_IMAGE}-{socket.gethostname()}",
        code=files_of_code(each.provenance.code for each in backbones_of(computing.specs)),
    )


def _gpus(options: Options) -> list[int]:
    """Return the numbers of the GPUs that ``--devices`` names, as far as they exist."""
    chosen, count = parse_devices(options.devices or "cpu"), torch.cuda.device_count()
    numbers = range(count) if chosen == "all" else () if chosen == "cpu" else chosen
    return [number for number in numbers if number < count]


def _check_same_kind(slots: Sequence[WorkerSlot]) -> None:
    """Check that the devices of the workers are of one kind: others round differently.

    Raises:
        DeviceError: They are not.
    """
    devices = [torch.device(name) for name in dict.fromkeys(slot.device for slot in slots)]
    if len(devices) < 2:
        return
    with device_errors(devices[0]):
        kinds = {device.index: device_name(device) for device in devices}
    first, kind = next(iter(kinds.items()))
    for other, name in kinds.items():
        if name != kind:
            same = ",".join(str(number) for number in kinds if kinds[number] == kind)
            raise DeviceError(
                f"devices: GPU {first} is {kind!r} and GPU {other} {name!r}, expected one kind, "
                f"since another one rounds differently; try --devices {same}"
            )


def _least_gpu_bytes(options: Options, device: torch.device) -> int:
    """Return the least memory that a GPU has for this run; 0 if a CPU computes.

    Other programs may hold a part of it. This counts for the device that this process has loaded
    the models to. To ask others would take memory there.

    Raises:
        DeviceError: A GPU of the run does not answer.
    """
    if device.type != "cuda":
        return 0
    with device_errors(device):
        free, _ = torch.cuda.mem_get_info(device)
        own = free + torch.cuda.memory_reserved(device)
        gpus = [torch.cuda.get_device_properties(number) for number in _gpus(options)]
    return min([own, *(gpu.total_memory for gpu in gpus)])


def _weight_bytes(specs: Sequence[EmbeddingSpec]) -> int:
    """Return the size of the weights of all backbones."""
    modules = {id(each.module): each.module for each in backbones_of(specs)}
    return sum(weight.nbytes for module in modules.values() for weight in module.parameters())


def _folder(leased: LeasedRun, computing: Computing) -> Path:
    return computing.folder or leased.plan.passes[0].stores[0].staging / WORKERS


def _spent(
    receipts: Sequence[Receipt], specs: Sequence[EmbeddingSpec], inputs: Inputs, *, processes: int
) -> Spent:
    readers: dict[int, int] = {}
    for receipt in receipts:
        readers[receipt.worker] = max(receipt.readers, readers.get(receipt.worker, 0))
    return Spent(
        sum(receipt.images for receipt in receipts),
        inputs.workers,
        max(available_cores() // processes, 1),
        max(readers.values(), default=0),
        device_of(specs).type,
        inputs.options.decode,
        {kind: sum(receipt.seconds[kind] for receipt in receipts) for kind in KINDS},
        sum(receipt.wall_seconds for receipt in receipts),
        processes,
    )


def _reports(receipts: Sequence[Receipt], slots: Sequence[WorkerSlot]) -> tuple[WorkerReport, ...]:
    """Return what each worker did."""
    reports = []
    for slot in slots:
        own = [receipt for receipt in receipts if receipt.worker == slot.worker]
        computing = sum(each.seconds["model"] + each.seconds["transfer"] for each in own)
        images = sum(each.images for each in own)
        seconds = sum(each.wall_seconds for each in own)
        reports.append(WorkerReport(slot.device, images, seconds, computing))
    return tuple(reports)
