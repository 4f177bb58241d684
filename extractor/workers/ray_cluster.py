"""A Ray cluster: how this process joins it, and what its nodes have for workers."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from extractor.errors import ExtractorError, InstallationError, UsageError
from extractor.lease.sharing import CORES_PER_CPU_PROCESS, processes_per_gpu
from extractor.models.from_file import path_without_models
from extractor.options import Options
from extractor.text import first_line, plural

__all__ = [
    "Demand",
    "Node",
    "demand_of_workers",
    "device_of_cluster",
    "nodes_of_cluster",
    "ray_cluster",
    "share_nodes",
]

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
WAIT_SECONDS = 15.0  # for a node, before the user is told
CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 60.0  # importing Ray takes seconds on a busy machine

# The command ``ray``, found where this process finds it, whatever lies in the current folder.
RAY_COMMAND = (
    "import sys; sys.path[:] = {path!r}; from ray.scripts.scripts import main; sys.exit(main())"
)


@contextlib.contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connect this process to a running cluster during a block. Never starts one.

    A program that is connected already stays so.

    Args:
        address: ``HOST:PORT``, or ``auto`` for the cluster that this machine is in. None asks the
            environment variable ``RAY_ADDRESS``, and then does the same as ``auto``.

    Raises:
        InstallationError: Ray is missing.
        ExtractorError: No cluster answers, or it refuses this process.
    """
    if importlib.util.find_spec("ray") is None:
        raise InstallationError(
            "engine: ray is not installed; install it with pip install 'backbone-extractor[ray]'"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto":
        _check_answers(address)
    import ray

    with _kept_signal_handler():
        _connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        raise ExtractorError(
            "engine: no Ray cluster runs on this machine; start one with ray start --head, join "
            "one with ray start --address=HOST:PORT, or name one with --address"
        ) from error
    except Exception as error:  # Ray has no class for it
        text = str(error)
        if "ersion mismatch" in text:
            line = " ".join(text.split())
            raise InstallationError(f"engine: the cluster at {address} differs: {line}") from error
        raise ExtractorError(
            f"engine: cannot join the Ray cluster at {address} ({first_line(error)}); run the "
            "command on one of its nodes"
        ) from error


def _check_answers(address: str) -> None:
    """Check that a cluster answers at an address; Ray itself would try for minutes.

    Raises:
        ExtractorError: Nothing answers, or something else than Ray.
    """
    host, _, port = address.rpartition(":")
    advice = "check the address, and that ray start --head runs there"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ExtractorError(f"address: {address} does not answer ({error}); {advice}") from error
    code = RAY_COMMAND.format(path=path_without_models())
    command = [sys.executable, "-c", code, "health-check", "--address", address]
    try:
        answered = subprocess.run(
            [*command, "--skip-version-check"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HEALTH_SECONDS,
        )
        is_healthy = not answered.returncode
        wants_token = b"InvalidAuthToken" in answered.stderr
    except subprocess.TimeoutExpired:
        is_healthy = wants_token = False
    if wants_token:
        raise ExtractorError(
            f"address: the Ray cluster at {address} refuses this process without its token; set "
            "RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )
    if not is_healthy:
        raise ExtractorError(f"address: what answers at {address} is no Ray cluster; {advice}")


@contextlib.contextmanager
def _kept_signal_handler() -> Iterator[None]:
    """Keep this program's handler of SIGTERM, which ``ray.init`` replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Node:
    """What a node has for workers."""

    cores: int
    gpus: int


@dataclass(frozen=True)
class Demand:
    """What each worker of a run needs; the same everywhere, since rows may depend on threads.

    Attributes:
        cores: Number of cores.
        gpus: Share of a GPU; 0 on a CPU.
    """

    cores: int
    gpus: float

    def __str__(self) -> str:
        cores = plural(self.cores, "free core")
        return f"{cores} and a GPU" if self.gpus else cores

    def fits(self, nodes: Sequence[Node]) -> int:
        """Return how many workers fit on the nodes."""
        counts = []
        for node in nodes:
            count = node.cores // self.cores
            counts.append(min(count, int(node.gpus / self.gpus + 1e-6)) if self.gpus else count)
        return sum(counts)


def share_nodes(options: Options, nodes: Sequence[Node], device: str) -> Demand:
    """Return what each worker needs.

    The node with the fewest cores decides, so that every node has a worker.

    Args:
        options: Options of the run. ``processes`` is per GPU, or per node on a CPU.
        nodes: Nodes of the cluster.
        device: Type of the device.
    """
    if device == "cuda":
        able = [node for node in nodes if node.gpus and node.cores] or [Node(1, 1)]
        of_gpu = max(min(node.cores // node.gpus for node in able), 1)
        processes = options.processes or processes_per_gpu(of_gpu)
        return Demand(max(of_gpu // processes, 1), 1 / processes)
    least = min((node.cores for node in nodes if node.cores), default=1)
    if options.processes is not None:
        return Demand(max(least // options.processes, 1), 0)
    return Demand(min(least, CORES_PER_CPU_PROCESS), 0)


def demand_of_workers(
    options: Options, device: str, on_tick: Callable[[], None] = lambda: None
) -> tuple[Demand, list[Node]]:
    """Return what each worker needs on the cluster as it is now, and its nodes.

    Waits for the first node of the kind: the nodes of a new cluster join it one after the other.

    Args:
        options: Options of the run.
        device: Type of the device.
        on_tick: Called while it waits; may raise an exception to stop.
    """
    nodes = _wait_for_nodes(device, on_tick)
    return share_nodes(options, nodes, device), nodes


def _wait_for_nodes(device: str, on_tick: Callable[[], None]) -> list[Node]:
    """Return the nodes, as soon as one of them has room for a worker."""
    warned = time.monotonic()
    while True:
        nodes = nodes_of_cluster()
        if any(node.cores and (node.gpus or device != "cuda") for node in nodes):
            return nodes
        if time.monotonic() - warned > WAIT_SECONDS:
            warned = time.monotonic()
            log.warning("waiting for a node with %s", "a GPU" if device == "cuda" else "a core")
        time.sleep(TICK_SECONDS)
        on_tick()


def nodes_of_cluster() -> list[Node]:
    """Return the nodes that are alive."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources]


def device_of_cluster(options: Options) -> str:
    """Return the type of device that the workers compute on.

    ``auto`` is a GPU if a node that has joined by now has one.

    Raises:
        UsageError: The options name one GPU of a machine.
    """
    if options.device == "auto":
        nodes = _wait_for_nodes("cpu", lambda: None)
        return "cuda" if any(node.gpus for node in nodes) else "cpu"
    if ":" in options.device:
        raise UsageError(
            f"device: got {options.device}, and the Ray cluster assigns GPUs to workers; use "
            "--device cuda"
        )
    return options.device
