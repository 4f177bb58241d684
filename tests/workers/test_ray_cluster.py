"""Workers on a Ray cluster: what each one gets, and what is said where there is no cluster."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.networks import mean_pixel

from extractor import extract
from extractor.errors import ExtractorError, InstallationError, UsageError
from extractor.options import Options
from extractor.workers import ray_cluster as module
from extractor.workers import ray_workers
from extractor.workers.ray_cluster import (
    Demand,
    Node,
    demand_of_workers,
    device_of_cluster,
    ray_cluster,
    share_nodes,
)


@pytest.mark.parametrize(
    ("nodes", "options", "demand", "workers"),
    [
        ([Node(0, 0), Node(8, 0), Node(8, 0)], {}, Demand(8, 0), 2),
        ([Node(64, 0)], {}, Demand(16, 0), 4),
        ([Node(64, 0), Node(4, 0)], {}, Demand(4, 0), 17),
        ([Node(8, 0), Node(8, 0)], {"processes": 4}, Demand(2, 0), 8),
        ([Node(2, 0)], {"processes": 9}, Demand(1, 0), 2),
        ([], {}, Demand(1, 0), 0),
    ],
)
def test_cores_of_a_worker_without_gpus(
    nodes: list[Node], options: dict[str, Any], demand: Demand, workers: int
) -> None:
    found = share_nodes(Options(**options), nodes, "cpu")
    assert (found, found.fits(nodes)) == (demand, workers)


@pytest.mark.parametrize(
    ("nodes", "options", "demand", "workers"),
    [
        ([Node(4, 0), Node(8, 1)], {}, Demand(2, 1 / 4), 4),
        ([Node(16, 1), Node(16, 1)], {}, Demand(4, 1 / 4), 8),
        ([Node(96, 8)], {}, Demand(3, 1 / 4), 32),
        ([Node(96, 8)], {"processes": 1}, Demand(12, 1), 8),
        ([Node(4, 8)], {}, Demand(1, 1), 4),
        ([Node(16, 0)], {}, Demand(1, 1), 0),
    ],
)
def test_share_of_a_gpu(
    nodes: list[Node], options: dict[str, Any], demand: Demand, workers: int
) -> None:
    found = share_nodes(Options(**options), nodes, "cuda")
    assert (found, found.fits(nodes)) == (demand, workers)


@pytest.fixture
def with_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray seems to be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())


def test_a_missing_ray_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InstallationError, match=r"pip install 'backbone-extractor\[ray\]'"):
        extract(tmp_path, "resnet18", tmp_path / "out", engine="ray")


@pytest.mark.usefixtures("with_ray")
@pytest.mark.parametrize(
    ("error", "match"),
    [
        (ConnectionError("none"), "no Ray cluster runs on this machine; start one with ray start"),
        (
            RuntimeError("Version mismatch: 3.10\nand 3.12"),
            "differs: Version mismatch: 3.10 and 3",
        ),
        (ValueError("no node here"), r"cannot join .* \(no node here\); run the command on one of"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_refused(
    error: Exception, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    fake = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
    with pytest.raises(ExtractorError, match=match), ray_cluster(None):
        pass


@pytest.mark.usefixtures("with_ray")
def test_a_program_that_joined_a_cluster_stays_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))  # type: ignore[arg-type]
    with ray_cluster("127.0.0.1:1"):
        pass


def test_a_run_waits_for_the_first_node_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    joined = iter([[Node(0, 0)], [Node(0, 0), Node(4, 0)], [Node(4, 0), Node(8, 1)]])
    ticks: list[None] = []
    monkeypatch.setattr(module, "nodes_of_cluster", lambda: next(joined))
    monkeypatch.setattr(module, "TICK_SECONDS", 0)
    monkeypatch.setattr(module, "WAIT_SECONDS", -1)

    demand, nodes = demand_of_workers(Options(), "cuda", lambda: ticks.append(None))

    assert (demand, len(nodes)) == (Demand(2, 1 / 4), 2)
    assert len(ticks) == 2
    assert "waiting for a node with a GPU" in caplog.text


def test_one_gpu_of_a_machine_is_no_device_of_a_cluster() -> None:
    with pytest.raises(UsageError, match="got cuda:1, and the Ray cluster assigns GPUs"):
        device_of_cluster(Options(device="cuda:1"))


def test_a_model_of_the_caller_cannot_move_to_other_nodes(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded on the nodes of a Ray cluster"):
        extract(photos, mean_pixel(), tmp_path / "out", engine="ray")


@pytest.mark.usefixtures("with_ray")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "[::1]:1"])
def test_an_address_that_does_not_answer_is_refused(address: str) -> None:
    with (
        pytest.raises(ExtractorError, match=r"address: .* does not answer .*; check the address"),
        ray_cluster(address),
    ):
        pass


@pytest.mark.usefixtures("with_ray")
def test_what_answers_must_be_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 0)

    monkeypatch.setattr(subprocess, "run", never)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with (
            pytest.raises(ExtractorError, match=f"what answers at {address} is no Ray cluster"),
            ray_cluster(address),
        ):
            pass


@pytest.mark.usefixtures("with_ray")
def test_a_cluster_that_wants_a_token_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 1, b"", b"RPC error: InvalidAuthToken: ...")

    monkeypatch.setattr(subprocess, "run", refused)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with (
            pytest.raises(ExtractorError, match=f"cluster at {address} refuses .* its token"),
            ray_cluster(address),
        ):
            pass


def test_actor_that_cannot_start_is_told_by_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_errors = SimpleNamespace(OutOfMemoryError=MemoryError)
    monkeypatch.setattr(ray_workers, "_ray_errors", lambda: ray_errors)
    error = RuntimeError(
        "The actor died because of an error raised in its creation task, "
        "\x1b[36mray::ShardActor.__init__()\x1b[39m (pid=5)\n  File numpy.py\n"
        "\x1b[31mImportError: cannot import name 'array'\x1b[0m\n"
    )
    expected = "it could not start: ImportError: cannot import name 'array'"
    assert ray_workers._death_text(error) == expected
