"""Devices, processes and cores of one machine, shared out between workers. Pure; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from extractor.errors import DeviceError, UsageError
from extractor.loading.options import default_workers
from extractor.options import Options, parse_devices
from extractor.text import plural

__all__ = ["Machine", "Sharing", "WorkerSlot", "on_first_device", "processes_per_gpu", "share_out"]

# The decoding threads of a process, and the thread that launches kernels, take turns at Python's
# lock. So few threads in many processes decode most; see extractor.loading.options. The thread that
# launches kernels needs little of a core.
CORES_PER_GPU_PROCESS = 2
MAX_PROCESSES_PER_GPU = 8

# What one process needs of a GPU: context and activations with batches of 256 in half precision,
# and the weights twice, since they are copied as they are loaded.
BYTES_PER_GPU_PROCESS = 6 * 2**30
COPIES_OF_WEIGHTS = 2
MAX_PROCESSES_UNKNOWN_GPU = 4

# What one process on a GPU needs of the machine's memory beside its weights: torch with CUDA and
# its libraries, and buffers (an estimate, to be measured).
HOST_BYTES_PER_GPU_PROCESS = 3 * 2**30

# On a CPU the forward pass takes most of the time, and it holds no lock. Its threads gain little
# beyond 16 (an estimate, to be measured on such a machine).
CORES_PER_CPU_PROCESS = 16

# Below that, the start of further processes (importing torch, loading the weights) costs more
# than they save: 9 s, in which one process embeds 10,000 images.
MIN_IMAGES_FOR_PROCESSES = 10_000


@dataclass(frozen=True)
class Machine:
    """What there is to share out.

    Attributes:
        cores: Number of cores that this process may use.
        gpus: Number of CUDA devices that torch sees.
        device: Device that the run computes on unless ``--devices`` names several, such as
            ``cuda:0``.
        threads: Number of threads that torch computes with by itself, at most one per core.
        gpu_bytes: Least memory that a GPU has for the run; 0 if that is not known.
        weight_bytes: Size of the weights that each process loads.
        is_exclusive: Whether a GPU lets only one process use it.
        free_bytes: Memory of the machine that this run may still use.
    """

    cores: int
    gpus: int
    device: str
    threads: int
    gpu_bytes: int = 0
    weight_bytes: int = 0
    is_exclusive: bool = False
    free_bytes: float = math.inf


@dataclass(frozen=True)
class WorkerSlot:
    """Share of one worker.

    Attributes:
        worker: Number of the worker, from 0.
        device: Device that it computes on, such as ``cuda:1``.
        workers: Number of its decoding threads.
        threads: Number of threads that compute on a CPU. It is the same for all workers of a run,
            since it can change the last bits of a row.
        max_pixels_share: Number of pixels that it may decode at once without asking the others.
    """

    worker: int
    device: str
    workers: int
    threads: int
    max_pixels_share: int


@dataclass(frozen=True)
class Sharing:
    """All workers of a run on one machine.

    Attributes:
        slots: Share of each worker. One alone computes in the process of the run itself.
        note: Sentence for the log if there are fewer workers than were asked for; else empty.
    """

    slots: tuple[WorkerSlot, ...]
    note: str = ""


def share_out(
    options: Options, machine: Machine, *, images: int, shards: int, only_here: str = ""
) -> Sharing:
    """Return the workers of a run on one machine.

    Args:
        options: Options of the run.
        machine: What there is to share out.
        images: Number of images to compute.
        shards: Number of shards to compute.
        only_here: Why the run cannot leave its own process; empty if it can.

    Raises:
        DeviceError: A device does not exist.
        UsageError: Several processes were asked for, and the run cannot leave its own.
    """
    devices = _devices(options, machine)
    if options.processes is not None:
        processes = options.processes
    elif only_here or options.profile is not None or images < MIN_IMAGES_FOR_PROCESSES:
        processes = 1
    else:
        processes = _default_processes(devices, machine)
    asked = processes * len(devices)
    if asked > 1 and (only_here or options.profile is not None):
        reason = only_here or "--profile traces one process"
        raise UsageError(f"got {asked} processes, expected 1: {reason}; try --processes 1")
    count = max(min(asked, shards), 1)
    slots = tuple(
        _slot(worker, devices[worker % len(devices)], count, options, machine)
        for worker in range(count)
    )
    return Sharing(slots, _note(asked, count, shards, options))


def on_first_device(options: Options) -> Options:
    """Return the options of a run with the first of its devices as the only one."""
    if options.devices is None:
        return options
    chosen = parse_devices(options.devices)
    device = chosen if chosen == "cpu" else "cuda" if chosen == "all" else f"cuda:{chosen[0]}"
    return replace(options, devices=None, device=device)


def _devices(options: Options, machine: Machine) -> tuple[str, ...]:
    if options.devices is None:
        return (machine.device,)
    chosen = parse_devices(options.devices)
    if chosen == "cpu":
        return ("cpu",)
    if not machine.gpus:
        raise DeviceError(
            f"devices: got {options.devices}, and torch sees no GPU; check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or use --devices cpu"
        )
    numbers = range(machine.gpus) if chosen == "all" else chosen
    missing = [number for number in numbers if number >= machine.gpus]
    if missing:
        last = machine.gpus - 1
        visible = f"GPUs 0 to {last} are" if last else "GPU 0 is"
        raise DeviceError(
            f"devices: there is no GPU {missing[0]}; only {visible} visible; check "
            "CUDA_VISIBLE_DEVICES, or use --devices all"
        )
    return tuple(f"cuda:{number}" for number in numbers)


def _default_processes(devices: tuple[str, ...], machine: Machine) -> int:
    """Return the number of processes on each device of a long run."""
    if devices[0] == "cpu":
        return max(machine.cores // CORES_PER_CPU_PROCESS, 1)
    if devices[0].startswith("cuda") and not machine.is_exclusive:
        needed = HOST_BYTES_PER_GPU_PROCESS + machine.weight_bytes
        fitting = max(machine.free_bytes / needed / len(devices), 1)
        count = processes_per_gpu(
            machine.cores // len(devices), machine.gpu_bytes, machine.weight_bytes
        )
        return int(min(count, fitting))
    return 1  # Apple's GPU shares its memory with the cores, and was not measured


def processes_per_gpu(cores: int, gpu_bytes: int = 0, weight_bytes: int = 0) -> int:
    """Return how many processes share a GPU in a long run.

    Args:
        cores: Number of cores for this GPU.
        gpu_bytes: Memory of the GPU; 0 if that is not known.
        weight_bytes: Size of the weights that each process loads.
    """
    needed = BYTES_PER_GPU_PROCESS + COPIES_OF_WEIGHTS * weight_bytes
    fitting = gpu_bytes // needed if gpu_bytes else MAX_PROCESSES_UNKNOWN_GPU
    return max(min(cores // CORES_PER_GPU_PROCESS, MAX_PROCESSES_PER_GPU, fitting), 1)


def _slot(worker: int, device: str, count: int, options: Options, machine: Machine) -> WorkerSlot:
    cores = machine.cores // count + (worker < machine.cores % count)
    return WorkerSlot(
        worker,
        device,
        workers=options.workers or default_workers(cores, options.decode),
        threads=options.threads or max(machine.threads // count, 1),
        max_pixels_share=max(options.max_pixels // count, 1),
    )


def _note(asked: int, count: int, shards: int, options: Options) -> str:
    is_asked = options.processes is not None or options.devices is not None
    if count == asked or not is_asked or not shards:
        return ""
    started = plural(count, "process", "processes")
    return (
        f"{started} instead of {asked}: there {'is' if shards == 1 else 'are'} only "
        f"{plural(shards, 'shard')} to compute; a smaller --shard-images makes more of them"
    )
