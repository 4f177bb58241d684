"""A store follows its folder: whatever happens to the images and to the runs, it ends right."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from models import mean_pixel, normalised
from PIL import Image

from extractor import FeatureStore, extract
from extractor.backbones import targets
from extractor.errors import InterruptedRunError, SourceError
from extractor.options import Options
from extractor.pipeline import Report
from extractor.store.format import STAGING, listing_digest
from extractor.store.verify import verify

EXAMPLES = int(os.environ.get("EXTRACTOR_TEST_EXAMPLES", "30"))
STEPS = 12
# Several shards and several batches a shard, even of few images.
SIZES: dict[str, Any] = {"shard_images": 3, "batch_size": 2, "workers": 1, "device": "cpu"}

DIED, SOURCE_ERROR, FAILED = 77, 78, 1
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

Colour = tuple[int, int, int]


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, options: Options) -> object:
        return mean_pixel(size=(8, 8) if model == "mean" else (4, 4))

    monkeypatch.setattr(targets, "load", load)


@dataclass(frozen=True)
class Version:
    """One state of a file; ``colour`` is None where it is no image."""

    colour: Colour | None
    side: int
    mtime_ns: int


class Folder:
    """A folder of images of one colour each; no two states of a file have size and time alike."""

    def __init__(self, place: Path):
        self.place = place
        self.files: dict[str, Version] = {}
        self.past: dict[str, list[Version]] = {}
        self._numbers = itertools.count(1)

    def write(self, name: str, *, corrupt: bool = False) -> None:
        """Add a file or replace one, with a colour that there never was."""
        number = next(self._numbers)
        colour = (number % 256, number * 7 % 256, number // 256 * 11)
        self._put(name, Version(None if corrupt else colour, 4 + number % 5, self._time(number)))

    def touch(self, name: str) -> None:
        """Change the time of a file and nothing else."""
        was = self.files[name]
        self._put(name, Version(was.colour, was.side, self._time(next(self._numbers))))

    def restore(self, name: str, version: Version) -> None:
        """Bring back what a file was before, with its time."""
        self._put(name, version)

    def delete(self, name: str) -> None:
        (self.place / name).unlink()
        self._remember(name, self.files.pop(name))

    @property
    def colours(self) -> dict[str, Colour]:
        """Those of the images that can be decoded."""
        return {name: one.colour for name, one in self.files.items() if one.colour is not None}

    @property
    def corrupt(self) -> set[str]:
        return set(self.files) - set(self.colours)

    def _time(self, number: int) -> int:
        return 1_700_000_000_000_000_000 + number

    def _put(self, name: str, version: Version) -> None:
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if version.colour is None:
            path.write_bytes(b"x" * version.side)
        else:
            Image.new("RGB", (version.side, 12 - version.side), version.colour).save(path)
        os.utime(path, ns=(version.mtime_ns, version.mtime_ns))
        if name in self.files:
            self._remember(name, self.files[name])
        self.files[name] = version

    def _remember(self, name: str, version: Version) -> None:
        self.past.setdefault(name, []).append(version)


def view(out: Path) -> dict[str, Colour] | None:
    """The colour of each row of a store, by path; None where there is no store."""
    if not (out / "store.json").exists() and not (out / STAGING / "store.json").exists():
        return None
    store = FeatureStore.open(out)
    rows = np.asarray(store.features)
    assert len(rows) == len(store.paths) == len(set(store.paths))
    zero, one = (np.array(normalised((level,) * 3)) for level in (0, 255))
    levels = (rows - zero) / (one - zero) * 255
    assert abs(levels - levels.round()).max(initial=0) < 0.01
    colours = [tuple(map(int, row)) for row in levels.round()]
    return dict(zip(store.paths, colours, strict=True))


def names_of_failures(out: Path) -> list[str]:
    return [failure["path"] for failure in FeatureStore.open(out).failures]


def check_files(out: Path) -> None:
    """See that a store is whole, that nothing is beside it, and that numpy alone reads it."""
    assert list(verify(out)) == []
    assert not (out / STAGING).exists()
    shards = FeatureStore.open(out).manifest.shards
    arrays = {path.name: np.load(path) for path in sorted((out / "features").glob("*"))}
    assert {name: len(array) for name, array in arrays.items()} == {
        Path(shard.features.name).name: shard.rows for shard in shards
    }
    assert all(shard.live_rows for shard in shards)


def published(out: Path) -> dict[str, bytes]:
    """Every file of a store, but for what a run is at work at."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    names = {path.relative_to(out): path for path in files}
    return {
        str(name): path.read_bytes() for name, path in names.items() if STAGING not in name.parts
    }


def after(batches: int) -> Callable[[], bool]:
    """Says yes when it is asked for the ``batches``-th time."""
    asked = iter(range(1, 10**9))
    return lambda: next(asked) >= batches


def in_child(action: Callable[[], object], when: int) -> int:
    """Run ``action`` in a process of its own that dies before its ``when``-th change of a file."""
    child = os.fork()
    if child == 0:
        try:
            steps = itertools.count(1)
            fsync = os.fsync

            def step() -> None:
                if next(steps) == when:
                    os._exit(DIED)

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if written or event in CHANGES:
                    step()

            def synced(descriptor: int) -> None:
                step()
                fsync(descriptor)

            os.fsync = synced
            sys.addaudithook(hook)
            action()
            os._exit(0)
        except SourceError:
            os._exit(SOURCE_ERROR)
        except BaseException:
            traceback.print_exc()
        os._exit(FAILED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---------------------------------------------------------------------------------------------
# Any order of changes and runs

NAMES = ["a.png", "b.png", "c.png", "d/a.png", "d/ü b.png", "e.png", "f.png", "g.png", "z.png"]


class Growth(RuleBasedStateMachine):
    """Changes images and runs over them; what the store must hold is worked out beside it."""

    def __init__(self, home: Path):
        super().__init__()
        self.home = home
        self.out = home / "out"
        self.folder = Folder(home / "in")
        self.folder.place.mkdir(parents=True)
        self.view: dict[str, Colour] | None = None  # of the store as it was last seen
        # States of files for which a row or failure is known to be in the published store.
        self.known: dict[str, Version] = {}
        # What else may have got a row: by runs that did not come to their end.
        self.begun: dict[str, set[Colour]] = {}
        self.done = 0  # images that a run was told to have done, if nothing changed since

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    # -- the images

    @initialize(bad=st.sets(st.sampled_from(NAMES[:7]), max_size=3))
    def begin(self, bad: set[str]) -> None:
        for name in NAMES[:7]:
            self.folder.write(name, corrupt=name in bad)

    @rule(name=st.sampled_from(NAMES), corrupt=st.sampled_from([False, False, True]))
    def add_or_change(self, name: str, corrupt: bool) -> None:
        self.folder.write(name, corrupt=corrupt)
        self.done = 0

    @precondition(lambda self: self.folder.corrupt)
    @rule(data=st.data())
    def mend(self, data: st.DataObject) -> None:
        for name in data.draw(st.sets(st.sampled_from(sorted(self.folder.corrupt)), min_size=1)):
            self.folder.write(name)
        self.done = 0

    @precondition(lambda self: self.folder.colours)
    @rule(data=st.data())
    def spoil(self, data: st.DataObject) -> None:
        for name in data.draw(st.sets(st.sampled_from(sorted(self.folder.colours)), min_size=1)):
            self.folder.write(name, corrupt=True)
        self.done = 0

    @precondition(lambda self: self.folder.files)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.folder.touch(data.draw(st.sampled_from(sorted(self.folder.files))))
        self.done = 0

    @precondition(lambda self: self.folder.files)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        for name in data.draw(st.sets(st.sampled_from(sorted(self.folder.files)), min_size=1)):
            self.folder.delete(name)
        self.done = 0

    @precondition(lambda self: self.folder.past)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.folder.past)))
        self.folder.restore(name, data.draw(st.sampled_from(self.folder.past[name])))
        self.done = 0

    # -- the runs

    @rule(
        keep=st.sampled_from([False, False, True]),
        retry=st.sampled_from([False, False, True]),
        check=st.sampled_from(["stat", "stat", "content"]),
    )
    def run(self, keep: bool, retry: bool, check: str) -> None:
        self.whole_run(keep_missing=keep, retry_failed=retry, check=check)

    @precondition(lambda self: self.view is not None)
    @rule()
    def run_anew(self) -> None:
        self.known.clear()
        self.whole_run(overwrite=True)

    @rule(batches=st.integers(1, 4), keep=st.booleans(), retry=st.booleans())
    def run_stopped(self, batches: int, keep: bool, retry: bool) -> None:
        self.whole_run(keep_missing=keep, retry_failed=retry, stop=after(batches))

    @rule(when=st.integers(1, 110), keep=st.sampled_from([False, False, True]))
    def run_killed(self, when: int, keep: bool) -> None:
        code = in_child(lambda: self.extract(keep_missing=keep), when)
        assert code in (0, DIED, SOURCE_ERROR)
        left = self.expected(keep)
        assert (code == SOURCE_ERROR) <= self.may_fail(keep)
        assert code != 0 or not self.must_fail(keep)
        self.begin_all()
        self.done = 0
        now = view(self.out)
        if now != self.view:
            assert now is not None
            self.check_view(now, left, keep)
            self.known = {p: v for p, v in self.known.items() if self.folder.files.get(p) == v}
            self.begun.clear()
        self.view = now

    def extract(self, **options: Any) -> Report:
        return extract(self.folder.place, "mean", self.out, **SIZES, **options)

    def whole_run(self, **options: Any) -> None:
        keep = options.get("keep_missing", False)
        before = published(self.out)
        expected = self.expected(keep)
        if options.get("retry_failed"):
            self.done = 0  # of these, some may be done again
        try:
            report = self.extract(**options)
        except InterruptedRunError as error:
            stopped_after, report = error.done, None
        except SourceError:
            stopped_after, report = 0, None
            self.done = 0
            assert self.may_fail(keep)
        if report is None:
            assert published(self.out) == before
            assert stopped_after >= self.done
            self.done = stopped_after
            self.begin_all()
            return
        assert not self.must_fail(keep)
        found = view(self.out)
        assert found is not None
        self.check_view(found, expected, keep)
        failures = names_of_failures(self.out)
        assert failures == sorted(self.folder.corrupt, key=os.fsencode)
        check_files(self.out)
        store = FeatureStore.open(self.out)
        assert (report.rows, report.failed) == (len(found), len(failures))
        paths = sorted(map(os.fsencode, [*found, *failures]))
        assert store.manifest.listing == listing_digest(paths)
        assert report.resumed >= self.done
        files = self.folder.files
        if not options.get("retry_failed"):
            new = [name for name in files if self.known.get(name) != files[name]]
            assert report.images - report.resumed <= len(new)
        if options.get("check") == "content":  # a row may stand that is of another time
            self.known = {p: v for p, v in self.known.items() if files.get(p) == v}
        else:
            self.known = dict(files)
        self.view = found
        self.begun.clear()
        self.done = 0
        self.check_idle(keep_missing=keep, check=options.get("check", "stat"))

    def check_idle(self, **options: Any) -> None:
        """Nothing changed, so a run has nothing to do and leaves every byte as it is."""
        before = published(self.out)
        assert self.extract(**options).resumed == len(self.folder.files)
        assert published(self.out) == before
        assert not (self.out / STAGING).exists()

    # -- what must be

    def expected(self, keep: bool) -> dict[str, Colour]:
        missing = {} if not keep or self.view is None else self.view
        kept = {name: it for name, it in missing.items() if name not in self.folder.files}
        return {**self.folder.colours, **kept}

    def check_view(self, found: dict[str, Colour], expected: dict[str, Colour], keep: bool) -> None:
        for name in set(found) | set(expected):
            colours = {expected.get(name)}
            if keep and name not in self.folder.files:
                colours |= self.begun.get(name, set())
            assert found.get(name) in colours, name

    def begin_all(self) -> None:
        for name, colour in self.folder.colours.items():
            self.begun.setdefault(name, set()).add(colour)

    def may_fail(self, keep: bool) -> bool:
        return not self.folder.files or not self.expected(keep)

    def must_fail(self, keep: bool) -> bool:
        begun = keep and bool(self.begun)
        return not self.folder.files or (not self.expected(keep) and not begun)


def test_a_store_follows_its_folder_whatever_happens(tmp_path: Path) -> None:
    numbers = itertools.count()
    run_state_machine_as_test(
        lambda: Growth(tmp_path / str(next(numbers))),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )
