"""The benchmark of large stores runs, and its stores are like those of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import SyntheticImages, path_of, paths, write_store

from extractor.reading.reader import FeatureStore
from extractor.store.index import index_bytes, read_records
from extractor.upkeep.verify import verify

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "scale.py"


def test_synthetic_paths_ascend_and_are_those_of_their_numbers() -> None:
    listed = list(paths(70_000))
    assert listed == sorted(set(listed))
    assert [listed[i] for i in (0, 999, 1000, 69_999)] == list(map(path_of, (0, 999, 1000, 69_999)))
    assert path_of(1_234_567) == b"photos/001234/img_001234567.jpg"


def test_synthetic_store_is_like_that_of_a_run(tmp_path: Path) -> None:
    write_store(SyntheticImages(2500, 4, 1024), tmp_path / "out").publish()
    assert list(verify(tmp_path / "out")) == []
    store = FeatureStore.open(tmp_path / "out")
    assert store.features.shape == (2500, 4)
    assert store.features.dtype == np.float16
    assert [len(part) for part in store.features.parts] == [1024, 1024, 452]
    assert list(map(str.encode, store.paths)) == list(paths(2500))
    index = tmp_path / "out" / "images" / "00002.parquet"
    records = read_records(index)
    assert index.read_bytes() == index_bytes(records)


@pytest.mark.slow
def test_scale_benchmark_reports_every_step(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--images", "3000", "--shard-images", "1024"]
    command += ["--folder", str(tmp_path), "--leases", "50", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    steps = [figures[name] for name in figures if name not in ("machine", "versions")][2:]
    assert len(steps) >= 11
    assert {"verify", "compact", "ray"}.isdisjoint(figures)
    assert not [step for step in steps if "error" in step or step["megabytes"] < 0]
    assert figures["write"]["shards"] == 3
    assert figures["board"]["leases"] == 50
