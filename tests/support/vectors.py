"""Rows with known directions, and stores of them whose files are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from extractor.reading.reader import FeatureStore
from extractor.store.index import ImageRecord

OpenStore = Callable[..., FeatureStore]


def turned(*degrees: float) -> np.ndarray:
    """Return rows of length 1 to n that point in directions of a plane."""
    angles = np.radians(degrees)
    lengths = np.arange(1, len(degrees) + 1)[:, None]
    return np.asarray(np.stack([np.cos(angles), np.sin(angles)], 1) * lengths, np.float32)


def noisy(count: int, copies: int, dim: int, seed: int = 0) -> np.ndarray:
    """Return rows, some of which are nearly a copy of another one."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((count, dim))
    to, of = random.permutation(count)[:copies], random.integers(0, count, copies)
    rows[to] = rows[of] * 3 + 0.1 * random.standard_normal((copies, dim))
    return rows.astype(np.float32)


@pytest.fixture
def make_store(tmp_path: Path, write_store: Callable[..., Path]) -> OpenStore:
    """Makes a store of rows, and of files with a given content, size in pixels and age."""

    def make(
        rows: np.ndarray,
        name: str = "store",
        *,
        contents: Sequence[str] | None = None,
        widths: Sequence[int] | None = None,
        mtimes: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> FeatureStore:
        count = len(rows)
        records = [
            ImageRecord(
                (names[i] if names else f"{i:05d}.jpg").encode(),
                100 + i,
                mtimes[i] if mtimes else 10**18,
                widths[i] if widths else 20,
                10,
                sha256((contents[i] if contents else f"{name} {i}").encode()).digest(),
            )
            for i in range(count)
        ]
        cuts = [slice(0, count // 2), slice(count // 2, count)]
        cuts = [cut for cut in cuts if cut.start < cut.stop]
        out = write_store(
            tmp_path / name,
            [rows[cut] for cut in cuts],
            records=[records[cut] for cut in cuts],
            dim=rows.shape[1],
        )
        return FeatureStore.open(out)

    return make
