"""Measure what grows with the number of images: the plan of a run, and the store that it makes.

    python scripts/benchmarks/scale.py --images 100000000 --folder /scratch

Makes paths, a plan and a store of that many synthetic images. No image is on the disk, and the
embeddings are short, so that 100 million rows need 8 GB. Each step runs in a process of its own,
which reports its time and the most memory that it needed beyond the imports. On a busy machine,
the seconds of the processor say more than those of the clock.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import argument_parser, positive, progress, report
from noop_worker import START, NoActor, NoSetup
from synthetic import SyntheticImages, path_of, paths, status, write_store

from extractor import FeatureStore
from extractor.lease.board import Board
from extractor.lease.lease import Lease, Receipt
from extractor.paths import PackedPaths
from extractor.store.format import MANIFEST, Manifest, listing_digest
from extractor.store.job import shard_images_for
from extractor.store.plan import Sight, Snapshot, StoredImages, plan_run
from extractor.store.writer import published_images
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify
from extractor.workers import local

DIM = 8
BATCH = 256
LOOKUPS = 1000
LEASES = 20_000
WORKERS = 8
RAY_WORKERS = 4
FOLDER = "store"


class Silent:
    """Hears of the progress of workers, and says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


class Steps:
    """The steps, each a method that returns figures.

    Args:
        images: The images.
        folder: Folder of the store.
        leases: Number of leases.
    """

    def __init__(self, images: SyntheticImages, folder: Path, leases: int) -> None:
        self.images = images
        self.leases = leases
        self.folder = folder
        self.random = np.random.default_rng(0)

    def paths(self) -> dict[str, Any]:
        """Hold all paths, as a listing does, and compute their digest."""
        held, listed = timed(lambda: PackedPaths(paths(self.images.count)))
        _, digested = timed(lambda: listing_digest(held))
        return {"list_seconds": listed, "digest_seconds": digested}

    def new_plan(self) -> dict[str, Any]:
        """Plan a run without a store."""
        snapshot = self._snapshot()
        plan, seconds = timed(lambda: plan_run(snapshot, StoredImages()))
        assert len(plan.todo) == self.images.count
        return {"seconds": seconds}

    def write(self) -> dict[str, Any]:
        """Write all shards, and publish them."""
        run, written = timed(lambda: write_store(self.images, self.folder))
        _, published = timed(run.publish)
        manifest = Manifest.read(self.folder / MANIFEST)
        return {
            "write_seconds": written,
            "publish_seconds": published,
            "manifest_bytes": (self.folder / MANIFEST).stat().st_size,
            "features_bytes": sum(shard.features.bytes for shard in manifest.shards),
            "index_bytes": sum(shard.index.bytes for shard in manifest.shards),
            "shards": len(manifest.shards),
        }

    def open(self) -> dict[str, Any]:
        """Open the store and read a row."""
        store, seconds = timed(lambda: FeatureStore.open(self.folder))
        _, row_seconds = timed(lambda: store[len(store) // 2])
        files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
        return {"seconds": seconds, "row_seconds": row_seconds, "open_files": files}

    def random_rows(self) -> dict[str, Any]:
        """Read rows from anywhere in the store, all in one call."""
        store = FeatureStore.open(self.folder)
        rows = self.random.integers(0, len(store), LOOKUPS)
        taken, seconds = timed(lambda: store[rows])
        assert taken.shape == (LOOKUPS, self.images.dim)
        return {"seconds": seconds, "rows": LOOKUPS}

    def ids(self) -> dict[str, Any]:
        """List all ids, then find the rows of some, twice."""
        store = FeatureStore.open(self.folder)
        ids, listed = timed(lambda: store.ids)
        wanted = ids[self.random.integers(0, len(ids), LOOKUPS)]
        _, first = timed(lambda: store.rows_of(wanted))
        _, second = timed(lambda: store.rows_of(wanted))
        return {"list_seconds": listed, "rows_of_seconds": [first, second]}

    def lookup(self) -> dict[str, Any]:
        """Find the rows of paths."""
        store = FeatureStore.open(self.folder)
        numbers = self.random.integers(0, self.images.count, LOOKUPS).tolist()
        row, first = timed(lambda: store.index_of(path_of(numbers[0])))
        assert row == numbers[0]
        found, rest = timed(lambda: [store.index_of(path_of(number)) for number in numbers[1:]])
        assert found == numbers[1:]
        return {"first_seconds": first, "next_seconds": rest / max(len(found), 1)}

    def select(self) -> dict[str, Any]:
        """Select by rows, and by a glob that one folder matches."""
        store = FeatureStore.open(self.folder)
        _, by_rows = timed(lambda: store.select(np.arange(0, len(store), 2)))
        folder = os.fsdecode(os.path.dirname(path_of(self.images.count // 2)))
        selected, by_glob = timed(lambda: store.select(f"{folder}/*"))
        assert 0 < len(selected) <= 1000
        return {"rows_seconds": by_rows, "glob_seconds": by_glob}

    def changes(self) -> dict[str, Any]:
        """Ask for all changes, as an index does that begins to follow the store."""
        store = FeatureStore.open(self.folder)
        changes, seconds = timed(lambda: store.changes_since(""))
        assert len(changes.added) == self.images.count
        return {"seconds": seconds}

    def next_plan(self) -> dict[str, Any]:
        """Plan a second run, which finds nothing to compute."""
        snapshot = self._snapshot()
        manifest = Manifest.read(self.folder / MANIFEST)
        stored, read = timed(lambda: published_images(self.folder, manifest, digests=False))
        plan, planned = timed(lambda: plan_run(snapshot, stored))
        assert not plan.todo
        assert plan.rows == self.images.count
        return {"read_seconds": read, "plan_seconds": planned}

    def verify(self) -> dict[str, Any]:
        """Check every byte of the store."""
        problems, seconds = timed(lambda: list(verify(self.folder)))
        assert not problems
        return {"seconds": seconds}

    def compact(self) -> dict[str, Any]:
        """Compact the store, which finds that it is compact."""
        (before, after), seconds = timed(lambda: compact(self.folder))
        assert before == after
        return {"seconds": seconds}

    def board(self) -> dict[str, Any]:
        """Hand out leases and settle them, without a worker."""
        (_, seconds) = timed(lambda: hand_out(self.leases, WORKERS))
        return {"leases": self.leases, "leases_per_second": self.leases / seconds}

    def processes(self) -> dict[str, Any]:
        """Hand out leases to processes that write nothing. Their memory is not counted."""
        board = Board(range(self.leases))
        listener: Any = Silent()
        setups: Any = [NoSetup(self.folder / f"crash-{i}") for i in range(WORKERS)]
        with mock.patch.object(local, "START", START):
            _, seconds = timed(local.LocalWorkers(setups, board, listener).run)
        assert board.is_done
        assert not board.failed
        rate = self.leases / seconds
        return {"leases": self.leases, "workers": WORKERS, "leases_per_second": rate}

    def ray(self) -> dict[str, Any]:
        """Hand out leases to Ray actors that write nothing. Their memory is not counted."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        from extractor.workers import ray_cluster, ray_workers

        ray.init(num_cpus=RAY_WORKERS, include_dashboard=False, log_to_driver=False)
        before = peak_megabytes()
        board = Board(range(self.leases))
        setup: Any = NoSetup(self.folder / "crash")
        listener: Any = Silent()
        with mock.patch.object(ray_workers, "ShardActor", NoActor):
            workers = ray_workers.RayWorkers(setup, ray_cluster.Demand(1, 0), board, listener)
            _, seconds = timed(workers.run)
        ray.shutdown()
        assert board.is_done
        assert not board.failed
        rate = self.leases / (seconds - workers.start_seconds)
        own = round(peak_megabytes() - before, 1)
        figures = {"workers": RAY_WORKERS, "leases_per_second": rate, "megabytes_beyond_ray": own}
        return {"leases": self.leases, "start_seconds": workers.start_seconds, **figures}

    def _snapshot(self) -> Snapshot:
        listed = PackedPaths(paths(self.images.count))
        sizes, mtimes = status(range(self.images.count))
        return Snapshot(listed, sizes, mtimes, lambda paths: [Sight.READABLE] * len(paths))


STEPS = (
    "paths",
    "new_plan",
    "write",
    "open",
    "random_rows",
    "ids",
    "lookup",
    "select",
    "changes",
    "next_plan",
    "verify",
    "compact",
    "board",
    "processes",
    "ray",
)
# Steps that need an extra, or as much memory as rows; run only if they are asked for.
OPTIONAL = ("verify", "compact", "ray")
DEFAULT_STEPS = tuple(step for step in STEPS if step not in OPTIONAL)


def hand_out(leases: int, workers: int) -> None:
    """Let workers take all leases in turn, with a second one ahead, and return their receipts."""
    board = Board(range(leases))
    waiting: deque[tuple[int, Lease]] = deque()
    for worker in range(workers):
        for ahead in (False, True):
            lease = board.take(worker, ahead=ahead)
            if lease is not None:
                waiting.append((worker, lease))
    while waiting:
        worker, lease = waiting.popleft()
        assert board.settle(Receipt(lease.shard, 1, 0, {}, 0.0, worker=worker))
        after = board.take(worker, ahead=True)
        if after is not None:
            waiting.append((worker, after))
    assert board.is_done


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a function returns, and the seconds that it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def main() -> None:
    """Run the steps and print the figures."""
    parser = argument_parser(__doc__, repeats=None)
    parser.add_argument("--images", type=positive, default=200_000)
    parser.add_argument("--dim", type=positive, default=DIM)
    parser.add_argument("--shard-images", type=positive, help="default: as a new store would")
    parser.add_argument("--leases", type=positive, default=LEASES)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=DEFAULT_STEPS, metavar="STEP")
    parser.add_argument("--folder", help="parent of the store (default: the system's for such)")
    parser.add_argument("--keep", help="folder of the store, which stays there for later steps")
    parser.add_argument("--one-step", choices=STEPS, help="run one step in this process")
    args = parser.parse_args()
    shard_images = args.shard_images or shard_images_for(args.images, BATCH)
    images = SyntheticImages(args.images, args.dim, shard_images)
    if args.one_step:
        print(json.dumps(run_step(Steps(images, Path(args.keep), args.leases), args.one_step)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures: dict[str, Any] = {"images": images.count, "dim": images.dim}
        store = args.keep or os.path.join(folder, FOLDER)
        for step in args.steps:
            figures[step] = in_process(step, images, store, args.leases)
            progress(f"{step}: {in_words(figures[step])}")
    report(figures, [f"{step:12} {in_words(figures[step])}" for step in args.steps], args.json)


def in_process(step: str, images: SyntheticImages, store: str, leases: int) -> dict[str, Any]:
    """Run a step in a process of its own."""
    command = [sys.executable, __file__, "--one-step", step, "--keep", store]
    command += ["--images", str(images.count), "--dim", str(images.dim)]
    command += ["--shard-images", str(images.shard_images), "--leases", str(leases)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"error": f"exit code {done.returncode}"}
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def run_step(steps: Steps, step: str) -> dict[str, Any]:
    """Run a step in this process, and return its figures with the memory that it took."""
    before = peak_megabytes()
    begun = time.process_time()
    figures: dict[str, Any] = getattr(steps, step)()
    busy = time.process_time() - begun
    return {**figures, "cpu_seconds": busy, "megabytes": round(peak_megabytes() - before, 1)}


def peak_megabytes() -> float:
    """Return the most memory that this process has had, mapped files included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def in_words(figures: dict[str, Any]) -> str:
    """Return figures as text."""
    return ", ".join(f"{name.replace('_', ' ')} {_short(v)}" for name, v in figures.items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(_short, value))
    if isinstance(value, float) and value < 1000:
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


if __name__ == "__main__":
    main()
