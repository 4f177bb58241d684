"""Near pairs of a store, kept beside it, so that only new rows have to be compared."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extractor.analysis.unit_rows import Numbers
from extractor.search.derived import ShardKey, derived_folders, publishing, shard_keys
from extractor.store.atomic import write_atomically
from extractor.store.format import Manifest

__all__ = ["NAME", "KeptPairs"]

log = logging.getLogger(__name__)

NAME = "duplicates.npz"
FORMAT = "extractor-near-pairs"
VERSION = 1


@dataclass(frozen=True)
class KeptPairs:
    """Near pairs among all rows in the files of some shards, retired rows included.

    Attributes:
        shards: The shards. Rows are numbered through their files, in this order.
        threshold: Least similarity of a pair.
        compared: Number of sampled pairs that were found by clusters.
        sampled: Number of sampled pairs; 0 if all rows were compared with each other.
        is_exact: Whether all rows were compared with each other.
        is_complete: Whether these are all pairs, not only those that join the groups of these rows.
        left: ``(n,)`` numbers of rows.
        right: ``(n,)`` numbers of rows.
        similarities: ``(n,)`` cosine similarities.
    """

    shards: tuple[ShardKey, ...]
    threshold: float
    compared: int
    sampled: int
    is_exact: bool
    is_complete: bool
    left: Numbers
    right: Numbers
    similarities: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        """Check the arrays.

        Raises:
            ValueError: They do not fit together, or name rows that do not exist.
        """
        count, shape = self.rows, self.left.shape
        if self.similarities.dtype != np.float64 or not 0 < self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold}, {self.similarities.dtype}")
        if self.left.ndim != 1 or not self.right.shape == self.similarities.shape == shape:
            raise ValueError("arrays of different lengths")
        for numbers in (self.left, self.right):
            if numbers.dtype != np.int64 or (len(numbers) and not numbers.min() >= 0):
                raise ValueError("no numbers of rows")
            if len(numbers) and numbers.max() >= count:
                raise ValueError(f"row {numbers.max()} of {count}")

    @property
    def rows(self) -> int:
        """Number of rows, retired ones included."""
        return sum(rows for _, _, rows in self.shards)

    @classmethod
    def load(cls, out: Path, manifest: Manifest, threshold: float) -> KeptPairs | None:
        """Return the pairs kept for a store that hold for a threshold; None if there are none.

        A file of other shards, or that cannot be read, does not count.
        """
        known = set(shard_keys(manifest))
        for folder in derived_folders(out):
            try:
                kept = cls._read(folder / NAME)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except Exception as error:  # numpy parses headers as Python and raises anything
                log.warning("%s is left out: %s", folder / NAME, error)
                continue
            if kept.threshold <= threshold and known.issuperset(kept.shards):
                return kept
        return None

    @classmethod
    def _read(cls, path: Path) -> KeptPairs:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            if (about["format"], about["version"]) != (FORMAT, VERSION):
                raise ValueError("it has another format")
            return cls(
                tuple((int(n), str(d), int(r)) for n, d, r in about["shards"]),
                float(about["threshold"]),
                int(about["compared"]),
                int(about["sampled"]),
                is_exact=bool(about["is_exact"]),
                is_complete=True,
                left=arrays["left"],
                right=arrays["right"],
                similarities=arrays["similarities"],
            )

    def save(self, out: Path) -> None:
        """Keep the pairs in the store, or in the user's cache if the store is read-only."""
        about = {
            "format": FORMAT,
            "version": VERSION,
            "shards": self.shards,
            "threshold": self.threshold,
            "compared": self.compared,
            "sampled": self.sampled,
            "is_exact": self.is_exact,
        }
        content = io.BytesIO()
        np.savez(
            content,
            about=np.array(json.dumps(about)),
            left=self.left,
            right=self.right,
            similarities=self.similarities,
        )
        problem = ""
        for folder in derived_folders(out):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with publishing(folder):
                    write_atomically(folder / NAME, content.getvalue())
            except OSError as error:
                problem = problem or f"{folder}: {error.strerror or error}"
            else:
                return
        log.warning("near pairs are not kept for the next time (%s)", problem)
