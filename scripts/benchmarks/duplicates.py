"""Measure the search for duplicates: time, memory, and how many planted pairs it finds.

    python scripts/benchmarks/duplicates.py                  # 1,000,000 x 512; 2 GB on the disk
    python scripts/benchmarks/duplicates.py --rows 200000    # compared exactly

Makes a store of clustered vectors. A fiftieth of them are nearly equal to an earlier one. The
search runs twice: the second time, it takes the pairs that the first one kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import argument_parser, positive, report
from common import progress as say
from search import CLUSTER_ROWS, CLUSTER_SPREAD, write_store

from extractor.analysis.duplicates import DEFAULT_THRESHOLD

SHARE = 50  # one row of so many is a copy
LOWEST = 0.97  # similarity of a copy; some are below the threshold
BANK_ROWS = 2000  # earlier rows that copies are made of

SEARCH = """
import json, sys, time
from pathlib import Path
import numpy as np
from extractor import find_duplicates

started, busy = time.perf_counter(), time.process_time()
found = find_duplicates(sys.argv[1])
seconds, busy = time.perf_counter() - started, time.process_time() - busy
status = Path("/proc/self/status").read_text().splitlines()
peak = int(dict(line.split(":", 1) for line in status)["VmHWM"].split()[0]) / 1024
group = np.full(len(found.store), -1)
starts = found._table.starts
group[found._table.rows] = np.repeat(np.arange(len(found)), np.diff(starts))
pairs = np.load(sys.argv[2])
together = (group[pairs[:, 0]] == group[pairs[:, 1]]) & (group[pairs[:, 0]] >= 0)
print(json.dumps({
    "seconds": seconds, "cpu_seconds": busy, "peak_megabytes": peak, "method": found.method,
    "recall": found.recall,
    "recall_pairs": found.recall_pairs, "groups": len(found), "redundant": found.redundant,
    "planted": len(pairs), "planted_found": float(together.mean()),
}))
"""


class Planted:
    """Rows around centers, some of which are nearly equal to an earlier row.

    Args:
        rows: Number of rows.
        dim: Number of values in a row.
    """

    def __init__(self, rows: int, dim: int) -> None:
        self._random = np.random.default_rng(0)
        count = max(rows // CLUSTER_ROWS, 1)
        self._centers = self._random.standard_normal((count, dim), np.float32)
        self._bank: list[npt.NDArray[np.float32]] = []
        self._bank_rows: list[npt.NDArray[np.int64]] = []
        self._next = 0
        self.pairs: list[npt.NDArray[np.int64]] = []

    def block(self, count: int) -> npt.NDArray[np.float32]:
        """Return the next rows, ``(count, dim)``."""
        random, dim = self._random, self._centers.shape[1]
        noise = random.standard_normal((count, dim), np.float32) * np.float32(CLUSTER_SPREAD)
        block = self._centers[random.integers(0, len(self._centers), count)] + noise
        if self._bank:
            copies = random.permutation(count)[: count // SHARE]
            part = random.integers(0, len(self._bank), len(copies))
            at = random.integers(0, BANK_ROWS, len(copies))
            for copy, number, row in zip(copies, part, at, strict=True):
                self._plant(block, int(copy), self._bank[number][row], self._bank_rows[number][row])
        kept = random.permutation(count)[:BANK_ROWS]
        if len(kept) == BANK_ROWS:
            self._bank = [*self._bank[-15:], block[kept].copy()]
            self._bank_rows = [*self._bank_rows[-15:], self._next + kept]
        self._next += count
        return block

    def _plant(self, block: Any, copy: int, source: Any, row: Any) -> None:
        away = self._random.standard_normal(len(source))
        unit = source / np.linalg.norm(source)
        away -= (away @ unit) * unit
        cosine = self._random.uniform(LOWEST, 1)
        block[copy] = cosine * unit + np.sqrt(1 - cosine**2) * away / np.linalg.norm(away)
        if cosine > DEFAULT_THRESHOLD + 1e-5:
            self.pairs.append(np.array([row, self._next + copy]))


def main() -> None:
    """Make the store, search it twice, and print the figures."""
    parser = argument_parser(__doc__, repeats=None)
    parser.add_argument("--rows", type=positive, default=1_000_000)
    parser.add_argument("--dim", type=positive, default=512)
    parser.add_argument("--folder", help="parent of the store (default: /tmp)")
    args = parser.parse_args()
    figures: dict[str, Any] = {"rows": args.rows, "dim": args.dim}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        planted = Planted(args.rows, args.dim)
        write_store(Path(folder) / "out", args.rows, args.dim, planted.block)
        np.save(Path(folder) / "pairs.npy", np.array(planted.pairs))
        words = [sys.executable, "-c", SEARCH, f"{folder}/out", f"{folder}/pairs.npy"]
        for name in ("first", "again"):
            figures[name] = json.loads(subprocess.check_output(words, text=True))
            say(f"{name}: {json.dumps(figures[name])}")
    report(figures, lines_of(figures), args.json)


def lines_of(figures: dict[str, Any]) -> list[str]:
    """Return the figures as text."""
    first, again = figures["first"], figures["again"]
    recall = "" if first["recall"] is None else f", recall {first['recall']:.4f} printed"
    return [
        f"{figures['rows']:,} x {figures['dim']}: {first['method']}{recall}",
        f"{first['seconds']:.0f} s ({first['cpu_seconds']:.0f} s of the processor), again "
        f"{again['seconds']:.0f} s; at most {first['peak_megabytes']:.0f} MB, mapped rows included",
        f"{first['planted_found']:.4f} of {first['planted']:,} planted pairs found, "
        f"{first['groups']:,} groups",
    ]


if __name__ == "__main__":
    main()
