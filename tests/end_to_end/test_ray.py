"""Runs on a Ray cluster on this machine: the same bytes as one process, whatever dies."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.stores import content

from extractor import extract
from extractor.errors import ExtractorError, InterruptedRunError
from extractor.report import Progress, Report

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

IMAGES = 96
NETWORK = """
import os, signal, time
from pathlib import Path
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, pixels):
        time.sleep(0.1)
        return self.fc(pixels.mean((2, 3)))

def build():
    return Network()
"""
MEMORY = 80 * 2**20  # of each node's object store, which is not used


class Ray:
    """A cluster whose nodes have one core each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        quick = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 3,
        }
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": MEMORY,
            "_system_config": quick,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self.nodes = [self.add(), self.add()]

    def add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=MEMORY)

    def remove(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Ray]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("OMP_NUM_THREADS", "1")
        started = Ray()
        yield started
        started.shutdown()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(IMAGES):
        Image.new("RGB", (8, 8), (i, 255 - i, 7)).save(folder / f"{i:03}.png")
    (folder / "050.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Callable[..., Report]:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/network.py").write_text(NETWORK, "utf-8")

    def run(out: str, **options: Any) -> Report:
        return extract(
            images,
            model=f"{tmp_path}/code/network.py:build",
            out=tmp_path / out,
            batch_size=4,
            image_size=8,
            shard_images=8,
            precision="float32",
            compile="off",
            threads=1,
            max_failure_rate=0.5,
            **options,
        )

    return run


def once(after: int, action: Callable[[], object]) -> Callable[[Progress], None]:
    """Return a callback that acts in the background, once so many images are done."""
    threads: list[threading.Thread] = []

    def progress(now: Progress) -> None:
        if now.phase == "computing" and now.done >= after and not threads:
            threads.append(threading.Thread(target=action))
            threads[0].start()

    return progress


def workers() -> list[int]:
    """Processes of the actors."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::ShardActor"):
            found.append(int(process.name))
    return found


def test_a_run_on_a_cluster_makes_the_bytes_of_one_process(
    cluster: Ray, run: Callable[..., Report], tmp_path: Path
) -> None:
    run("one")
    before = signal.getsignal(signal.SIGTERM)

    report = run("ray", engine="ray", address=cluster.address)

    assert content(tmp_path / "ray") == content(tmp_path / "one")
    assert len(report.workers) == 2
    assert sum(worker.images for worker in report.workers) == IMAGES
    assert signal.getsignal(signal.SIGTERM) == before  # Ray has one of its own


def test_a_killed_actor_costs_no_rows(
    cluster: Ray, run: Callable[..., Report], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("one")

    def kill() -> None:
        os.kill(workers()[0], signal.SIGKILL)

    run("ray", engine="ray", address=cluster.address, progress=once(16, kill))

    assert content(tmp_path / "ray") == content(tmp_path / "one")
    assert "its process died, maybe out of memory); another one takes its place" in caplog.text


def test_a_removed_node_costs_no_rows(
    cluster: Ray, run: Callable[..., Report], tmp_path: Path
) -> None:
    run("one")
    node = cluster.add()

    run(
        "ray", engine="ray", address=cluster.address, progress=once(8, lambda: cluster.remove(node))
    )

    assert content(tmp_path / "ray") == content(tmp_path / "one")


def test_an_interrupted_run_resumes_in_one_process(
    cluster: Ray, run: Callable[..., Report], tmp_path: Path
) -> None:
    run("one")

    def stop(now: Progress) -> None:
        if now.phase == "computing" and now.done >= 24:
            raise InterruptedRunError(now.done, now.total)

    with pytest.raises(InterruptedRunError, match="stopped after"):
        run("ray", engine="ray", address=cluster.address, progress=stop)
    assert not workers()
    report = run("ray")

    assert report.resumed >= 24
    assert content(tmp_path / "ray") == content(tmp_path / "one")


def test_a_network_that_differs_between_nodes_is_refused(
    cluster: Ray, run: Callable[..., Report], tmp_path: Path
) -> None:
    code = tmp_path / "code/network.py"

    def change(now: Progress) -> None:
        if now.phase == "computing":
            code.write_text(NETWORK + "# changed\n", "utf-8")

    with pytest.raises(ExtractorError, match=r"node .* cannot take part: .*\(backbone.code: "):
        run("ray", engine="ray", address=cluster.address, progress=change)
