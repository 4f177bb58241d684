"""An external index that is fed only by ``changes_since`` equals the store after every step."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from PIL import Image
from support.callbacks import stop_after
from support.networks import mean_pixel

from extractor import FeatureStore, extract
from extractor.errors import InterruptedRunError
from extractor.models import embedding
from extractor.store.index import read_images
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

# Several shards and several batches a shard, even of few images.
SIZES: dict[str, Any] = {"shard_images": 3, "batch_size": 2, "workers": 1, "device": "cpu"}
NAMES = ["a.png", "b.png", "c.png", "d/a.png", "d/ü b.png", "e.png", "f.png", "g.png"]
START = 1_700_000_000_000_000_000  # modification time of the first file, in nanoseconds


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_: mean_pixel(size=(4, 4)))


class Index:
    """An index of another program: what it knows of each id, and the state that it has seen."""

    def __init__(self) -> None:
        self.token = ""
        self.rows: dict[int, tuple[str, bytes]] = {}

    def sync(self, store: FeatureStore) -> None:
        """Follow a store; what is gone and what is new must fit what is known."""
        changes = store.changes_since(self.token)
        for row_id in changes.removed.tolist():
            del self.rows[row_id]
        assert not self.rows.keys() & set(changes.added.tolist())
        assert set(changes.moved.tolist()) <= self.rows.keys()
        moved = set(changes.moved.tolist())
        stayed = {path for row_id, (path, _) in self.rows.items() if row_id not in moved}
        assert not stayed & {store.paths[row] for row in store.rows_of(changes.added)}
        for row_id in [*changes.added.tolist(), *changes.moved.tolist()]:
            self.rows[row_id] = entry(store, row_id)
        self.token = changes.token


def entry(store: FeatureStore, row_id: int) -> tuple[str, bytes]:
    (row,) = store.rows_of([row_id])
    return store.paths[row], np.asarray(store.features[int(row)]).tobytes()


class Sync(RuleBasedStateMachine):
    """Changes images, runs and compacts, at random."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.out = home / "out"
        self.folder = home / "in"
        self.home = home
        self.folder.mkdir(parents=True)
        self.clock = 0
        self.index = Index()
        self.slow_index = Index()  # syncs now and then
        self.contents: dict[int, tuple[bytes, bytes]] = {}  # digest and vector of each id ever

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    # -- the images

    @initialize(names=st.sets(st.sampled_from(NAMES), min_size=1))
    def begin(self, names: set[str]) -> None:
        self.write(names, bad=False)

    @rule(
        names=st.sets(st.sampled_from(NAMES), min_size=1), bad=st.sampled_from([False] * 3 + [True])
    )
    def write(self, names: set[str], bad: bool) -> None:
        for name in sorted(names):
            self.clock += 1
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if bad:
                path.write_bytes(b"no image")
            else:
                color = (self.clock % 256, self.clock * 7 % 256, self.clock // 256)
                Image.new("RGB", (4 + self.clock % 3, 4), color).save(path)
            self.stamp(path)

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1))
    def delete(self, names: set[str]) -> None:
        for name in sorted(names):
            (self.folder / name).unlink(missing_ok=True)

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1))
    def touch(self, names: set[str]) -> None:
        for name in sorted(names):
            if (self.folder / name).exists():
                self.clock += 1
                self.stamp(self.folder / name)

    @rule(name=st.sampled_from(NAMES), to=st.sampled_from(NAMES))
    def rename(self, name: str, to: str) -> None:
        if (self.folder / name).exists():
            if self.is_published:  # whatever else changed, this change comes alone
                self.run("stat", 0)
            (self.folder / to).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).rename(self.folder / to)
            self.run("stat", 0)

    @rule(name=st.sampled_from(NAMES), to=st.sampled_from(NAMES))
    def swap(self, name: str, to: str) -> None:
        first, second = self.folder / name, self.folder / to
        if first != second and first.exists() and second.exists():
            first.rename(self.home / "other")
            second.rename(first)
            (self.home / "other").rename(second)

    @rule(name=st.sampled_from(NAMES), to=st.sampled_from(NAMES))
    def copy(self, name: str, to: str) -> None:
        if name != to and (self.folder / name).exists():
            (self.folder / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.folder / name, self.folder / to)

    def stamp(self, path: Path) -> None:
        os.utime(path, ns=(START + self.clock, START + self.clock))

    # -- the store

    @rule(check=st.sampled_from(["stat", "stat", "content"]), stop=st.sampled_from([0, 0, 0, 1, 2]))
    def run(self, check: str, stop: int) -> None:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        if all(path.read_bytes() == b"no image" for path in files):  # a run needs one image
            self.write({NAMES[0]}, bad=False)
        options: dict[str, Any] = {"check": check, "retire": True}
        if stop:
            options["stop"] = stop_after(stop)
            with contextlib.suppress(InterruptedRunError):
                extract(self.folder, "mean", self.out, **SIZES, **options)
            del options["stop"]
        unknown = None if stop else self.count_unknown()
        report = extract(self.folder, "mean", self.out, **SIZES, **options)
        assert unknown is None or report.images - report.resumed <= unknown
        self.check()

    def count_unknown(self) -> int:
        """Return how many images a run may compute: no row in the files has their content."""
        files = Counter(path.read_bytes() for path in self.folder.rglob("*.png"))
        rows: Counter[bytes] = Counter()
        if (self.out / "store.json").exists():
            for shard in FeatureStore.open(self.out).manifest.shards:
                rows.update(read_images(self.out / shard.index.name).digests)
        return sum(max(n - rows[sha256(content).digest()], 0) for content, n in files.items())

    @rule(overwrite=st.sampled_from([False] * 5 + [True]))
    def rewrite(self, overwrite: bool) -> None:
        if not self.is_published:
            return
        if overwrite:
            self.write({NAMES[0]}, bad=False)
            extract(self.folder, "mean", self.out, **SIZES, overwrite=True)
        else:
            before = FeatureStore.open(self.out)
            expected = {int(i): entry(before, int(i)) for i in before.ids}
            compact(self.out)
            store = FeatureStore.open(self.out)
            assert {int(i): entry(store, int(i)) for i in store.ids} == expected
            assert not store.changes_since(before.token)
        self.check()

    @property
    def is_published(self) -> bool:
        return (self.out / "store.json").exists()

    @rule()
    def sync_late(self) -> None:
        if self.is_published:
            store = FeatureStore.open(self.out)
            self.slow_index.sync(store)
            assert self.slow_index.rows == {int(i): entry(store, int(i)) for i in store.ids}

    def check(self) -> None:
        store = FeatureStore.open(self.out)
        assert list(verify(self.out)) == []
        self.index.sync(store)
        assert self.index.rows == {int(i): entry(store, int(i)) for i in store.ids}
        assert self.index.token == store.token
        digests = store.column("sha256")
        for row, row_id in enumerate(store.ids.tolist()):
            content = digests[row], np.asarray(store.features[row]).tobytes()
            assert self.contents.setdefault(row_id, content) == content  # for ever


def follow(home: Path, *, examples: int, steps: int) -> None:
    numbers = itertools.count()
    run_state_machine_as_test(
        lambda: Sync(home / str(next(numbers))),  # type: ignore[arg-type]
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],  # the folder of a failing example shows what happened
        ),
    )


def test_index_fed_by_changes_equals_the_store(tmp_path: Path) -> None:
    follow(tmp_path, examples=10, steps=15)


def draw_images(folder: Path, names: Iterable[str], *, color: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names, 1):
        Image.new("RGB", (4, 4), (number * 9, color, 5)).save(folder / name)
        os.utime(folder / name, ns=(START + number + color, START + number + color))


def ids(out: Path) -> dict[str, int]:
    store = FeatureStore.open(out)
    return dict(zip(store.paths, store.ids.tolist(), strict=True))


def stopped(folder: Path, out: Path, **options: Any) -> None:
    """Run until two batches are done: three images."""
    done = [0]
    with pytest.raises(InterruptedRunError, match="repeat the same call to resume"):
        extract(
            folder,
            "mean",
            out,
            **SIZES,
            **options,
            progress=lambda now: done.append(now.done),
            stop=lambda: done[-1] >= 3,
        )


def test_interrupted_run_gives_the_ids_of_an_uninterrupted_one(tmp_path: Path) -> None:
    draw_images(tmp_path / "in", [f"{i}.png" for i in range(8)])
    extract(tmp_path / "in", "mean", tmp_path / "whole", **SIZES)
    stopped(tmp_path / "in", tmp_path / "out")
    extract(tmp_path / "in", "mean", tmp_path / "out", **SIZES)
    assert ids(tmp_path / "out") == ids(tmp_path / "whole") == {f"{i}.png": i for i in range(8)}


def test_run_after_a_sealed_one_uses_none_of_its_ids(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(8)]
    draw_images(tmp_path / "in", names)
    stopped(tmp_path / "in", tmp_path / "out")
    draw_images(tmp_path / "in", names[:1], color=7)
    extract(tmp_path / "in", "mean", tmp_path / "out", **SIZES)
    found = ids(tmp_path / "out")
    assert list(verify(tmp_path / "out")) == []
    assert [found[f"{i}.png"] for i in range(1, 3)] == [1, 2]
    assert min(row_id for name, row_id in found.items() if name not in ("1.png", "2.png")) >= 3
    assert len(set(found.values())) == 8


def test_failures_leave_gaps_and_shift_no_other_shard(tmp_path: Path) -> None:
    draw_images(tmp_path / "in", [f"{i}.png" for i in range(8)])
    (tmp_path / "in" / "1.png").write_bytes(b"no image")
    extract(tmp_path / "in", "mean", tmp_path / "out", **SIZES)
    expected = {"0.png": 0, "2.png": 1, **{f"{i}.png": i for i in range(3, 8)}}
    assert ids(tmp_path / "out") == expected
    draw_images(tmp_path / "in", ["9.png"])
    extract(tmp_path / "in", "mean", tmp_path / "out", **SIZES)
    assert ids(tmp_path / "out") == {**expected, "9.png": 8}


def test_two_stores_of_one_run_have_the_same_ids(tmp_path: Path) -> None:
    draw_images(tmp_path / "in", [f"{i}.png" for i in range(4)])
    extract(tmp_path / "in", ["one", "two"], tmp_path / "out", **SIZES)
    one, two = (ids(path.parent) for path in sorted((tmp_path / "out").glob("*/store.json")))
    assert one == two == {f"{i}.png": i for i in range(4)}


def test_overwritten_store_uses_no_id_again(tmp_path: Path) -> None:
    draw_images(tmp_path / "in", ["a.png", "b.png"])
    extract(tmp_path / "in", "mean", tmp_path / "out", **SIZES)
    stopped_names = [f"{i}.png" for i in range(8)]
    draw_images(tmp_path / "in", stopped_names)
    stopped(tmp_path / "in", tmp_path / "out", overwrite=True)
    extract(tmp_path / "in", "mean", tmp_path / "out", **SIZES, overwrite=True)
    assert sorted(ids(tmp_path / "out").values()) == list(range(2, 12))


class Vectors:
    """Methods of a faiss index with ids."""

    def __init__(self) -> None:
        self.rows: dict[int, list[float]] = {}

    def remove_ids(self, ids: np.ndarray) -> None:
        for row_id in ids.tolist():
            del self.rows[row_id]

    def add_with_ids(self, rows: np.ndarray, ids: np.ndarray) -> None:
        self.rows.update(zip(ids.tolist(), rows.tolist(), strict=True))


def test_documented_lines_sync_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = Path(__file__).parents[2] / "docs" / "guide-retrieval.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "changes_since" in block)
    monkeypatch.chdir(tmp_path)
    index, out = Vectors(), Path("features/tf_efficientnet_lite0")
    names = {"np": np, "FeatureStore": FeatureStore, "index": index, "paths": {}, "token": ""}
    for change in (["a.png", "b.png"], ["b.png", "c.png"], []):
        draw_images(tmp_path / "in", change, color=len(index.rows))
        if not change:
            (tmp_path / "in" / "a.png").rename(tmp_path / "in" / "z.png")
        extract(tmp_path / "in", "mean", out, **SIZES)
        exec(code, names)
        store = FeatureStore.open(out)
        rows = np.asarray(store.features).tolist()
        assert index.rows == dict(zip(store.ids.tolist(), rows, strict=True))
        paths = {row_id: names["paths"][row_id] for row_id in store.ids.tolist()}  # type: ignore[index]
        assert paths == dict(zip(store.ids.tolist(), store.paths, strict=True))


@pytest.mark.slow
def test_index_fed_by_changes_equals_the_store_after_many_steps(tmp_path: Path) -> None:
    examples = int(os.environ.get("EXTRACTOR_TEST_EXAMPLES", "15"))
    follow(tmp_path, examples=examples, steps=40)
