"""Measure search: exact against faiss in memory, an HNSW index, and a cold start of the command.

    python scripts/benchmarks/search.py                      # 1,000,000 x 512; 2 GB on the disk
    python scripts/benchmarks/search.py --rows 100000 --only exact
    python scripts/benchmarks/search.py --only index         # HNSW; 20 minutes on two cores

Makes a store of random unit vectors and one of clustered vectors. Both sides of a comparison take
turns in one process, so that a busy machine slows them alike.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import argument_parser, in_turns, median_ratio, positive, report, seconds, spread
from common import progress as say

from extractor import FeatureStore, Searcher
from extractor.search.knn import RowLengths, nearest
from extractor.store.claim import ClaimedFolder
from extractor.store.format import Description
from extractor.store.index import ImageRecord
from extractor.store.job import Job
from extractor.store.writer import rewrite

K = 10
SHARD_ROWS = 15_625
CLUSTER_ROWS = 500
CLUSTER_SPREAD = 0.5  # of the rows around their center, relative to the centers
INDEX_QUERIES = 1000

MEMORY = """
import sys
from pathlib import Path
import numpy as np
from extractor import FeatureStore

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0]) / 1024

store = FeatureStore.open(sys.argv[1])
queries = np.random.default_rng(1).standard_normal((100, store.dim))
before = anonymous()
store.search(queries, 10, metric="ip", exact=True)
print(anonymous(), anonymous() - before)
"""

COLD = """
import sys
from extractor.cli.main import main
code = main(["search", sys.argv[1], "row:17", "--exact", "--json"])
assert code == 0 and "torch" not in sys.modules
"""


def main() -> None:
    """Make the stores, measure, and print the figures."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=positive, default=1_000_000)
    parser.add_argument("--dim", type=positive, default=512)
    parser.add_argument("--only", choices=("exact", "index"), help="measure one of both")
    parser.add_argument("--folder", help="parent of the stores (default: /tmp)")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    figures: dict[str, Any] = {"rows": args.rows, "dim": args.dim}
    if args.only != "index":
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            out = Path(folder) / "random"
            write_store(out, args.rows, args.dim, lambda n: random.standard_normal((n, args.dim)))
            figures |= measure_exact(out, args.repeats)
            figures |= measure_processes(out, args.repeats)
    if args.only != "exact":
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            figures["index"] = measure_index(Path(folder) / "clustered", args.rows, args.dim)
    report(figures, lines_of(figures), args.json)


def write_store(
    out: Path, rows: int, dim: int, make: Callable[[int], np.ndarray[Any, Any]]
) -> None:
    """Write a store of rows of unit length, without images."""
    description = Description(
        backbone={"model": "benchmark", "sha256": "0" * 64},
        embedding={
            "definition": "pre-logits",
            "dim": dim,
            "shape": [dim],
            "dtype": "float32",
            "normalized": True,
        },
        preprocess={},
        computation={"precision": "float32", "device": "cpu", "batch_size": 1},
        root="/images",
        shard_images=SHARD_ROWS,
        software={},
    )
    with ClaimedFolder(out) as claim:
        run = rewrite(claim, Job(description, rows, "0" * 64))
        for number, first in enumerate(range(0, rows, SHARD_ROWS)):
            block = make(min(SHARD_ROWS, rows - first)).astype(np.float32)
            block /= np.linalg.norm(block, axis=1, keepdims=True)
            records = [
                ImageRecord(b"%05d/%09d.jpg" % (number, first + i), 1, 1, 1, 1, bytes(32))
                for i in range(len(block))
            ]
            with run.shard(number) as shard:
                shard.append(block, records)
                shard.finish()
        run.publish()


def measure_exact(out: Path, repeats: int) -> dict[str, Any]:
    """Compare exact search with ``faiss.IndexFlatIP`` in memory, with 1 and 100 queries."""
    import faiss

    store = FeatureStore.open(out)
    flat = faiss.IndexFlatIP(store.dim)
    for _, block in store.batches():
        flat.add(block)
    searcher, lengths = Searcher(store), RowLengths(len(store))
    figures = {}
    for count in (1, 100):
        queries = np.random.default_rng(count).standard_normal((count, store.dim))
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        narrow = queries.astype(np.float32)
        wide = narrow.astype(np.float64)

        def with_numpy(wide: Any = wide) -> object:
            return nearest(store.features, wide, K, metric="ip", library="numpy", lengths=lengths)

        sides: dict[str, Callable[[], object]] = {
            "IndexFlatIP": lambda narrow=narrow: flat.search(narrow, K),  # type: ignore[misc]
            "ip": lambda wide=wide: searcher.nearest(  # type: ignore[misc]
                wide, K, metric="ip", exact=True
            ),
            "ip, numpy": with_numpy,
            "cosine": lambda wide=wide: searcher.nearest(wide, K, exact=True),  # type: ignore[misc]
        }
        scores, rows = flat.search(narrow, K)
        found = searcher.nearest(wide, K, metric="ip", exact=True)
        with_numpy()
        timed: dict[str, Callable[[], float]] = {
            name: (lambda side=side: seconds(side))  # type: ignore[misc]
            for name, side in sides.items()
        }
        taken = in_turns(timed, repeats)
        figures[f"{count} queries"] = {
            "same_rows": bool(np.array_equal(rows, found.rows)),
            "largest_difference": float(np.abs(scores - found.scores).max()),
            "seconds": {name: spread(values) for name, values in taken.items()},
            "ratio": {
                name: median_ratio(values, taken["IndexFlatIP"]) for name, values in taken.items()
            },
        }
        say(f"{count} queries: {json.dumps(figures[f'{count} queries'])}")
    return figures


def measure_processes(out: Path, repeats: int) -> dict[str, Any]:
    """Return memory of a search, and the seconds of the command from a cold start."""
    words = [sys.executable, "-c", MEMORY, str(out)]
    whole, of_search = map(float, subprocess.check_output(words, text=True).split())

    def cold() -> float:
        command = [sys.executable, "-c", COLD, str(out)]
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True))

    return {
        "megabytes": {"process": whole, "search": of_search},
        "cold_start_seconds": spread([cold() for _ in range(repeats)]),
    }


def measure_index(out: Path, rows: int, dim: int) -> dict[str, Any]:
    """Build an HNSW index of clustered vectors; return its recall and its speed."""
    random = np.random.default_rng(2)
    centers = random.standard_normal((max(rows // CLUSTER_ROWS, 1), dim))

    def near_centers(count: int) -> np.ndarray[Any, Any]:
        noise = random.standard_normal((count, dim)) * CLUSTER_SPREAD
        return centers[random.integers(0, len(centers), count)] + noise

    write_store(out, rows, dim, near_centers)
    store = FeatureStore.open(out)
    started = time.perf_counter()
    entry = Searcher(store).build_index("hnsw").entry
    build_seconds = time.perf_counter() - started
    say(f"HNSW built in {build_seconds:.0f} s")
    queries = near_centers(INDEX_QUERIES)
    exact = store.search(queries, K, exact=True).rows
    searcher = Searcher(store.reopen())
    searcher.nearest(queries[:1], K)  # opens the index
    milliseconds, of_cpu = [], []  # other programs lengthen the first
    found = []
    for query in queries:
        started, cpu_started = time.perf_counter(), time.process_time()
        found.append(searcher.nearest(query[None], K).rows[0])
        milliseconds.append((time.perf_counter() - started) * 1000)
        of_cpu.append((time.process_time() - cpu_started) * 1000)
    shared = [len(set(a) & set(b)) / K for a, b in zip(found, exact, strict=True)]
    return {
        "build_seconds": build_seconds,
        "megabytes": entry.file.bytes / 2**20,
        "effort": entry.effort,
        "recall_printed": entry.recall,
        "recall_measured": statistics.mean(shared),
        "milliseconds": spread(milliseconds),
        "cpu_milliseconds": spread(of_cpu),
    }


def lines_of(figures: dict[str, Any]) -> list[str]:
    """Return the figures as text."""
    lines = [f"{figures['rows']:,} x {figures['dim']}, k = {K}"]
    for count in (1, 100):
        if f"{count} queries" not in figures:
            continue
        found = figures[f"{count} queries"]
        lines.append(
            f"{count} queries: same rows {found['same_rows']}, scores within "
            f"{found['largest_difference']:.1e} of faiss"
        )
        lines += [
            f"  {name:12} {values['median']:8.3f} s  {found['ratio'][name]:5.2f} x IndexFlatIP"
            for name, values in found["seconds"].items()
        ]
    if "megabytes" in figures:
        megabytes, cold = figures["megabytes"], figures["cold_start_seconds"]
        lines += [
            f"memory {megabytes['process']:.0f} MB beside the mapped rows, "
            f"{megabytes['search']:.0f} MB of it for the search",
            f"extract search STORE row:17 from a cold start: {cold['median']:.2f} s, without torch",
        ]
    if "index" in figures:
        index = figures["index"]
        lines.append(
            f"HNSW: built in {index['build_seconds']:.0f} s, {index['megabytes']:.0f} MB, "
            f"recall@10 {index['recall_measured']:.3f} ({index['recall_printed']:.3f} printed), "
            f"{index['milliseconds']['median']:.1f} ms a query, "
            f"{index['cpu_milliseconds']['median']:.1f} ms of them on the CPU"
        )
    return lines


if __name__ == "__main__":
    main()
