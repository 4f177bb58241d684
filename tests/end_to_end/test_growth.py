"""A store follows its folder: whatever happens to the images and to the runs, it ends right."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
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
from PIL import Image
from support.callbacks import stop_after as after
from support.dying import DIED, exit_code
from support.networks import mean_pixel, normalized

from extractor import FeatureStore, extract
from extractor.api import Report
from extractor.errors import InterruptedRunError, SourceError, StoreError
from extractor.lease import describe as describe_module
from extractor.lease.software import software_versions
from extractor.models import embedding
from extractor.options import Options
from extractor.store.format import STAGING, listing_digest
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

EXAMPLES = int(os.environ.get("EXTRACTOR_TEST_EXAMPLES", "8"))
STEPS = 12
STRIDE = int(os.environ.get("EXTRACTOR_TEST_STRIDE", "3"))  # from one step to die at to the next
# Several shards and several batches a shard, even of few images.
SIZES: dict[str, Any] = {"shard_images": 3, "batch_size": 2, "workers": 1, "device": "cpu"}

SOURCE_ERROR = 78  # exit code of a child whose images cannot be listed

Color = tuple[int, int, int]


@pytest.fixture(autouse=True)
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, options: Options, *_: object) -> object:
        return mean_pixel(size=(8, 8) if model == "mean" else (4, 4))

    monkeypatch.setattr(embedding, "load", load)


@dataclass(frozen=True)
class Version:
    """One state of a file; ``color`` is None where it is no image."""

    color: Color | None
    side: int
    mtime_ns: int


class Folder:
    """A folder of images of one color each; no two states of a file have size and time alike."""

    def __init__(self, path: Path):
        self.path = path
        self.files: dict[str, Version] = {}
        self.past: dict[str, list[Version]] = {}
        self._numbers = itertools.count(1)

    def write(self, name: str, *, corrupt: bool = False) -> None:
        """Add a file or replace one, with a color that there never was."""
        number = next(self._numbers)
        color = (number % 256, number * 7 % 256, number // 256 * 11)
        self._put(name, Version(None if corrupt else color, 4 + number % 5, self._time(number)))

    def touch(self, name: str) -> None:
        """Change the time of a file and nothing else."""
        was = self.files[name]
        self._put(name, Version(was.color, was.side, self._time(next(self._numbers))))

    def restore(self, name: str, version: Version) -> None:
        """Bring back what a file was before, with its time."""
        self._put(name, version)

    def rename(self, name: str, other: str) -> None:
        """Give a file the name of another one, which gets that of the first if there is one."""
        moved, replaced = self.files[name], self.files.get(other)
        self.delete(name)
        if replaced is not None:
            self._put(name, replaced)
        self._put(other, moved)

    def delete(self, name: str) -> None:
        (self.path / name).unlink()
        self._remember(name, self.files.pop(name))

    @property
    def colors(self) -> dict[str, Color]:
        """Those of the images that can be decoded."""
        return {name: one.color for name, one in self.files.items() if one.color is not None}

    @property
    def corrupt(self) -> set[str]:
        return set(self.files) - set(self.colors)

    def _time(self, number: int) -> int:
        return 1_700_000_000_000_000_000 + number

    def _put(self, name: str, version: Version) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if version.color is None:
            path.write_bytes(b"x" * version.side)
        else:
            Image.new("RGB", (version.side, 12 - version.side), version.color).save(path)
        os.utime(path, ns=(version.mtime_ns, version.mtime_ns))
        if name in self.files:
            self._remember(name, self.files[name])
        self.files[name] = version

    def _remember(self, name: str, version: Version) -> None:
        self.past.setdefault(name, []).append(version)


def view(out: Path) -> dict[str, Color] | None:
    """The color of each row of a store, by path; None where there is no store."""
    if not (out / "store.json").exists() and not (out / STAGING / "store.json").exists():
        return None
    store = FeatureStore.open(out)
    rows = np.asarray(store.features)
    assert len(rows) == len(store.paths) == len(set(store.paths))
    zero, one = (np.array(normalized((level,) * 3)) for level in (0, 255))
    levels = (rows - zero) / (one - zero) * 255
    assert abs(levels - levels.round()).max(initial=0) < 0.01
    colors = [(int(r), int(g), int(b)) for r, g, b in levels.round()]
    return dict(zip(store.paths, colors, strict=True))


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


def published(out: Path) -> dict[str, bytes]:
    """Every file of a store; not what a run is at work at, nor what it tells of itself."""
    files = {path.relative_to(out): path for path in sorted(out.rglob("*")) if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in files.items()
        if STAGING not in name.parts and name.name != "run.json"
    }


def in_child(
    action: Callable[[], object], when: int, counts: Callable[[], bool] = lambda: True
) -> int:
    """Run ``action`` in a process of its own that dies before its ``when``-th change of a file.

    Args:
        counts: is asked before every change whether it is one of them.
    """
    steps = itertools.count(1)

    def at_step(_: int) -> None:
        if counts() and next(steps) == when:
            os._exit(DIED)

    def act() -> None:
        try:
            action()
        except SourceError:
            os._exit(SOURCE_ERROR)

    return exit_code(act, at_step)


# ---------------------------------------------------------------------------------------------
# Any order of changes and runs

NAMES = ["a.png", "b.png", "c.png", "d/a.png", "d/ü b.png", "e.png", "f.png", "g.png", "z.png"]

CHANGES_OF_IMAGES = ["write", "mend", "spoil", "touch", "delete", "restore", "rename"]
FIRST = ["", "mend", *NAMES]


class Growth(RuleBasedStateMachine):
    """Changes images and runs over them; what the store must hold is worked out beside it."""

    def __init__(self, home: Path):
        super().__init__()
        self.home = home
        self.out = home / "out"
        self.folder = Folder(home / "in")
        self.folder.path.mkdir(parents=True)
        self.view: dict[str, Color] | None = None  # of the store as it was last seen
        # States of files for which a row or failure is known to be in the published store.
        self.known: dict[str, Version] = {}
        # What else may have got a row: by runs that did not come to their end.
        self.begun: dict[str, set[Color]] = {}
        self.done = 0  # images that a run was told to have done, if nothing changed since
        self.contents: set[tuple[Color | None, int]] = set()  # with a row in the files of the store

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    # -- the images

    @initialize(bad=st.sets(st.sampled_from(NAMES[:7]), max_size=3))
    def begin(self, bad: set[str]) -> None:
        for name in NAMES[:7]:
            self.folder.write(name, corrupt=name in bad)

    @rule(what=st.sampled_from(CHANGES_OF_IMAGES), data=st.data())
    def change_images(self, what: str, data: st.DataObject) -> None:
        folder = self.folder
        names = {"write": NAMES, "mend": folder.corrupt, "spoil": folder.colors}
        names["restore"] = folder.past
        candidates = sorted(names.get(what, folder.files))
        some = st.sets(st.sampled_from(candidates), min_size=1) if candidates else st.just(set())
        for name in sorted(data.draw(some)):
            if what == "rename" and name not in folder.files:
                continue
            if what == "restore":
                folder.restore(name, data.draw(st.sampled_from(folder.past[name])))
            elif what == "rename":
                folder.rename(name, data.draw(st.sampled_from([p for p in NAMES if p != name])))
            elif what in ("touch", "delete"):
                getattr(folder, what)(name)
            else:
                folder.write(name, corrupt=what == "spoil")
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
        self.contents.clear()
        self.done = 0
        self.whole_run(overwrite=True)

    @rule(
        first=st.sampled_from(FIRST),
        batches=st.integers(1, 4),
        keep=st.booleans(),
        retry=st.booleans(),
    )
    def run_stopped(self, first: str, batches: int, keep: bool, retry: bool) -> None:
        self.change(first)
        self.whole_run(keep_missing=keep, retry_failed=retry, stop=after(batches))

    @rule(
        first=st.sampled_from(FIRST),
        when=st.integers(1, 120),
        publishing=st.booleans(),
        keep=st.sampled_from([False, False, True]),
    )
    def run_killed(self, first: str, when: int, publishing: bool, keep: bool) -> None:
        self.change(first)
        if publishing:  # few steps, each with a state of its own
            staged, when = self.out / STAGING / "store.json", when % 16 + 1
            code = in_child(lambda: self.extract(keep_missing=keep), when, staged.exists)
        else:
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

    def change(self, what: str) -> None:
        """Change images right before a run, so that there is something to do."""
        names = {"": [], "mend": sorted(self.folder.corrupt)}.get(what, [what])
        for name in names:
            self.folder.write(name)
        self.done = 0 if names else self.done

    def extract(self, **options: Any) -> Report:
        return extract(self.folder.path, "mean", self.out, **SIZES, **options)

    def whole_run(self, **options: Any) -> None:
        keep = options.get("keep_missing", False)
        before = published(self.out)
        staged = [self.out / STAGING / name for name in ("store.json", "replaced.json")]
        is_halfway = any(path.exists() for path in staged)
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
            # A run that died while it published is brought to its end first.
            assert is_halfway or published(self.out) == before
            assert view(self.out) == self.view
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
            contents = Counter((file.color, file.side) for file in files.values())
            new = [
                name
                for name, file in files.items()
                if self.known.get(name) != file
                and not self.has_row_elsewhere((file.color, file.side), contents)
            ]
            assert report.images - report.resumed <= len(new)
        if options.get("check") == "content":  # a row may stand that is of another time
            self.known = {p: v for p, v in self.known.items() if files.get(p) == v}
        else:
            self.known = dict(files)
        self.contents |= {(file.color, file.side) for file in files.values() if file.color}
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

    def expected(self, keep: bool) -> dict[str, Color]:
        missing = {} if not keep or self.view is None else self.view
        kept = {name: it for name, it in missing.items() if name not in self.folder.files}
        return {**self.folder.colors, **kept}

    def check_view(self, found: dict[str, Color], expected: dict[str, Color], keep: bool) -> None:
        for name in set(found) | set(expected):
            colors = {expected.get(name)}
            if keep and name not in self.folder.files:
                colors |= self.begun.get(name, set())
                if expected.get(name) in self.folder.colors.values():
                    colors.add(None)  # the row moved along
            assert found.get(name) in colors, name

    def has_row_elsewhere(
        self, content: tuple[Color | None, int], contents: Counter[tuple[Color | None, int]]
    ) -> bool:
        """Return whether a content has a row that its only image takes over."""
        return content in self.contents and contents[content] == 1

    def begin_all(self) -> None:
        for name, color in self.folder.colors.items():
            self.begun.setdefault(name, set()).add(color)

    def may_fail(self, keep: bool) -> bool:
        return not self.folder.files or not self.expected(keep)

    def must_fail(self, keep: bool) -> bool:
        begun = keep and bool(self.begun)
        return not self.folder.files or (not self.expected(keep) and not begun)


def test_store_follows_any_history_of_its_folder(tmp_path: Path) -> None:
    numbers = itertools.count()
    run_state_machine_as_test(
        lambda: Growth(tmp_path / str(next(numbers))),  # type: ignore[arg-type]
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )


# ---------------------------------------------------------------------------------------------
# One law each


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Seven images: three shards, the last of them with one."""
    made = Folder(tmp_path / "in")
    for name in NAMES[:7]:
        made.write(name)
    return made


def run(folder: Folder, out: Path, **options: Any) -> Report:
    return extract(folder.path, "mean", out, **SIZES | options)


def test_only_new_and_changed_images_are_computed(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    folder.write("c.png")
    folder.write("z.png")
    folder.delete("a.png")
    report = run(folder, out)
    (store,) = report.stores
    assert (report.resumed, store.added, store.changed, store.gone) == (5, 2, 1, 1)
    assert view(out) == folder.colors
    check_files(out)


def test_run_without_changes_writes_no_byte(folder: Folder, tmp_path: Path) -> None:
    folder.write("b.png", corrupt=True)
    run(folder, tmp_path / "out")

    def stamps() -> dict[str, tuple[int, int]]:
        files = {name: (tmp_path / "out" / name).stat() for name in published(tmp_path / "out")}
        return {name: (status.st_ino, status.st_mtime_ns) for name, status in files.items()}

    before = stamps()
    assert run(folder, tmp_path / "out").resumed == 7
    assert stamps() == before
    check_files(tmp_path / "out")


def test_run_without_a_batch_size_takes_that_of_the_store(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    settings = {name: value for name, value in SIZES.items() if name != "batch_size"}
    folder.write("new.png")
    (store,) = extract(folder.path, "mean", out, **settings).stores
    assert (store.added, store.store.manifest.description.computation["batch_size"]) == (1, 2)
    folder.write("newer.png")
    with pytest.raises(InterruptedRunError, match="stopped"):
        extract(folder.path, "mean", tmp_path / "other", **SIZES, stop=after(1))
    report = extract(folder.path, "mean", tmp_path / "other", **settings)
    assert (report.resumed, report.rows) == (2, 9)
    with pytest.raises(
        StoreError, match=r"batch_size: 2 there, 3 now\); extend it with --batch-size 2, replace"
    ):
        extract(folder.path, "mean", out, **settings, batch_size=3)
    report = extract(folder.path, "mean", out, **settings, overwrite=True)
    assert report.store.manifest.description.computation["batch_size"] == 3  # that of a shard


def test_refused_options_are_named_with_their_values(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, dtype="float16")
    with pytest.raises(
        StoreError,
        match=r"finished store made with other options .* extend it with --dtype float16, without "
        r"--normalize, with --shard-images 3, replace it with --overwrite, or choose another --out",
    ):
        run(folder, out, normalize=True, shard_images=4)
    with pytest.raises(StoreError, match=r"something else .* repeat the earlier command"):
        extract(folder.path, "small", out, **SIZES)


def test_update_of_software_is_reported_and_keeps_rows(
    folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    run(folder, out)
    before = published(out)
    now = software_versions() | {"pillow": "99.1"}
    monkeypatch.setattr(describe_module, "software_versions", lambda: now)
    assert run(folder, out).resumed == 7
    assert published(out) == before  # nothing was computed, so the old versions made all rows
    assert caplog.messages == []
    folder.write("new.png")
    (store,) = run(folder, out).stores
    assert (store.added, store.changed) == (1, 0)
    assert FeatureStore.open(out).manifest.description.software == now
    (message,) = caplog.messages
    assert message == f"{out} was made with pillow {version('pillow')}, now 99.1"


def test_store_of_another_gpu_grows_with_a_warning(
    folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    run(folder, out)  # as an older program did on any device
    assert "device_name" not in FeatureStore.open(out).manifest.description.computation
    for number, gpu in enumerate(("NVIDIA A100", "NVIDIA H100")):
        monkeypatch.setattr(describe_module, "device_name", lambda _, gpu=gpu: gpu)
        folder.write(f"new-{number}.png")
        (store,) = run(folder, out).stores
        assert (store.added, store.changed) == (1, 0)
        manifest = FeatureStore.open(out).manifest
        assert manifest.description.computation["device_name"] == gpu
    assert caplog.messages == [f"{out} was made with GPU NVIDIA A100, now NVIDIA H100"]


def test_content_check_skips_touched_image(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    for name in folder.files:
        folder.touch(name)
    before = published(out)
    assert run(folder, out, check="content").resumed == 7
    learned = published(out)
    changed = {name for name in before if before[name] != learned[name]}
    indexes = {name for name in before if name.startswith("images/")}
    assert changed == {"store.json", "history.jsonl", *indexes}
    assert run(folder, out).resumed == 7
    assert published(out) == learned


def test_content_check_finds_change_of_same_size_and_time(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = folder.path / "b.bmp"
    for color in [(1, 2, 3), (4, 5, 6)]:
        Image.new("RGB", (5, 5), color).save(path)
        os.utime(path, ns=(10**18, 10**18))
        if color == (1, 2, 3):
            run(folder, out)
    assert run(folder, out).resumed == 8  # sizes and times do not tell
    assert view(out) == {**folder.colors, "b.bmp": (1, 2, 3)}
    report = run(folder, out, check="content")
    assert (report.resumed, report.stores[0].changed) == (7, 1)
    assert view(out) == {**folder.colors, "b.bmp": (4, 5, 6)}
    check_files(out)


def test_returning_image_reuses_its_row(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    was = folder.files["b.png"]
    for change in (lambda: folder.delete("b.png"), lambda: folder.write("b.png")):
        change()
        run(folder, out)
        assert view(out) == folder.colors
        folder.restore("b.png", was)
        report = run(folder, out)
        assert (report.resumed, report.stores[0].added) == (7, 0)
        assert view(out) == folder.colors
        check_files(out)


@pytest.mark.parametrize("retry", [False, True])
def test_retry_failed_retries_failed_image(folder: Folder, tmp_path: Path, retry: bool) -> None:
    out = tmp_path / "out"
    folder.write("b.png", corrupt=True)
    folder.write("e.png", corrupt=True)
    run(folder, out)
    report = run(folder, out, retry_failed=retry)
    assert (report.resumed, report.rows, report.failed) == (5 if retry else 7, 5, 2)
    # What made it fail is over, and nothing of the file tells.
    path = folder.path / "b.png"
    was = path.stat()
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "right.ppm")
    right = (tmp_path / "right.ppm").read_bytes()
    path.write_bytes(b"y" * len(right))
    os.utime(path, ns=(was.st_mtime_ns, was.st_mtime_ns))
    assert run(folder, out).resumed == 6  # another size
    path.write_bytes(right)
    os.utime(path, ns=(was.st_mtime_ns, was.st_mtime_ns))
    assert run(folder, out, retry_failed=retry).failed == (1 if retry else 2)
    expected = {**folder.colors, "b.png": (9, 8, 7)} if retry else folder.colors
    assert view(out) == expected
    check_files(out)


@pytest.mark.parametrize("change", ["touch", "write"])
def test_changed_file_retries_failed_image(folder: Folder, tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    folder.write("b.png", corrupt=True)
    run(folder, out)
    getattr(folder, change)("b.png")
    report = run(folder, out)
    assert (report.resumed, report.failed) == (6, 1 if change == "touch" else 0)
    assert names_of_failures(out) == sorted(folder.corrupt)
    assert view(out) == folder.colors
    check_files(out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_image_is_retried_once_readable(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder.path / "b.png").chmod(0)
    run(folder, out)
    assert names_of_failures(out) == ["b.png"]
    assert run(folder, out).resumed == 7  # it still cannot
    (folder.path / "b.png").chmod(0o644)
    report = run(folder, out)
    assert (report.resumed, report.failed) == (6, 0)
    assert view(out) == folder.colors
    check_files(out)


def test_dangling_link_is_retried_once_it_resolves(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder.path / "link.png").symlink_to(tmp_path / "later.png")
    run(folder, out)
    assert names_of_failures(out) == ["link.png"]
    assert run(folder, out).resumed == 8
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "later.png")
    report = run(folder, out)
    assert (report.resumed, report.failed) == (7, 0)
    assert view(out) == {**folder.colors, "link.png": (9, 8, 7)}


def test_keep_missing_keeps_rows_until_a_run_without_it(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    before = view(out)
    assert before is not None
    folder.delete("a.png")
    folder.delete("d/a.png")
    folder.write("b.png")
    report = run(folder, out, keep_missing=True)
    (store,) = report.stores
    assert (report.rows, store.added, store.changed, store.gone) == (7, 1, 1, 0)
    kept = {name: before[name] for name in ("a.png", "d/a.png")}
    assert view(out) == {**folder.colors, **kept}
    check_files(out)
    folder.write("a.png")  # one of them is there again, as another
    run(folder, out, keep_missing=True)
    assert view(out) == {**folder.colors, "d/a.png": before["d/a.png"]}
    report = run(folder, out)
    assert (report.rows, report.stores[0].gone, report.stores[0].added) == (6, 1, 0)
    assert view(out) == folder.colors
    # What was given up is not kept later.
    run(folder, out, keep_missing=True)
    assert view(out) == folder.colors
    check_files(out)


def test_rows_of_missing_images_alone_form_a_store(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    before = view(out)
    assert before is not None
    for name in list(folder.files)[1:]:
        folder.delete(name)
    folder.write("a.png", corrupt=True)
    report = run(folder, out, keep_missing=True)
    assert (report.rows, report.failed) == (6, 1)
    del before["a.png"]
    assert view(out) == before
    check_files(out)


def test_open_reader_keeps_its_rows_while_store_grows(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder.write("f.png", corrupt=True)
    run(folder, out)
    old = folder.colors
    reader = FeatureStore.open(out)
    for name in ("b.png", "g.png"):  # one of a shard retires, one comes
        folder.write(name)
        run(folder, out)
    assert view(out) == folder.colors
    assert len(reader) == len(old)
    assert dict(zip(reader.paths, reader.column("mtime_ns"), strict=True)).keys() == old.keys()
    for name, color in old.items():
        assert np.allclose(reader[reader.index_of(name)], normalized(color), atol=1e-4), name


def test_each_of_two_stores_gets_its_missing_rows(folder: Folder, tmp_path: Path) -> None:
    models = ["mean", "small"]
    settings: dict[str, Any] = {**SIZES, "shard_images": 2}
    outs = [tmp_path / "out" / model for model in models]
    for change in [lambda: None, lambda: folder.write("c.png"), lambda: folder.delete("a.png")]:
        change()
        extract(folder.path, ["mean"], outs[0], **settings)  # finished, the other is not
        if outs[1].exists():
            for name in ("z.png", "g.png", "e.png"):
                folder.write(name)
            with pytest.raises(InterruptedRunError, match=r"stopped after \d of \d"):
                extract(folder.path, ["small"], outs[1], **settings, stop=after(1))
        report = extract(folder.path, models, tmp_path / "out", **settings)
        for out, store in zip(outs, report.stores, strict=True):
            assert view(out) == folder.colors
            assert (store.rows, store.failed) == (len(folder.files), 0)
            check_files(out)
        assert extract(folder.path, models, tmp_path / "out", **settings).resumed == len(
            folder.files
        )


def test_two_stores_with_different_gaps_end_equal(folder: Folder, tmp_path: Path) -> None:
    models = ["mean", "small"]
    folder.write("b.png", corrupt=True)
    extract(folder.path, models, tmp_path / "out", **SIZES)
    folder.write("b.png")
    folder.write("z.png", corrupt=True)
    extract(folder.path, ["small"], tmp_path / "out/small", **SIZES)
    folder.write("c.png")
    report = extract(folder.path, models, tmp_path / "out", **SIZES)
    assert [store.added for store in report.stores] == [2, 1]
    assert report.resumed == 5  # the worst of them
    for model in models:
        assert view(tmp_path / "out" / model) == folder.colors
        assert names_of_failures(tmp_path / "out" / model) == ["z.png"]
        check_files(tmp_path / "out" / model)


@pytest.mark.parametrize("interrupted", [False, True])
def test_folder_without_images_leaves_store_unchanged(
    folder: Folder, tmp_path: Path, interrupted: bool
) -> None:
    out = tmp_path / "out"
    run(folder, out)
    before, old = published(out), view(out)
    if interrupted:
        for name in list(folder.files):
            folder.write(name)
        with pytest.raises(InterruptedRunError, match="stopped after 3 of 7"):
            run(folder, out, stop=after(2))
    for name in list(folder.files):
        folder.write(name, corrupt=True)
    for _ in range(2):
        with pytest.raises(SourceError, match="no embedding from 7 images"):
            run(folder, out)
        assert published(out) == before
        check_files(out)
    assert view(out) == old
    folder.write("b.png")
    report = run(folder, out)
    assert (report.rows, report.failed) == (1, 6)
    assert view(out) == folder.colors
    check_files(out)


def test_shards_without_live_rows_stay_until_compact(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)

    def shards() -> list[int]:
        numbers = [shard.shard for shard in FeatureStore.open(out).manifest.shards]
        for name in ("features", "images"):
            assert [int(path.stem) for path in sorted((out / name).iterdir())] == numbers
        return numbers

    assert shards() == [0, 1, 2]
    first = (out / "features/00000.npy").read_bytes()
    for name in ("b.png", "a.png", "c.png"):
        folder.write(name)
        run(folder, out)
        assert view(out) == folder.colors
        check_files(out)
    folder.delete("f.png")  # alone in its shard
    run(folder, out)
    assert view(out) == folder.colors
    assert shards() == [0, 1, 2, 3, 4, 5]
    assert (out / "features/00000.npy").read_bytes() == first
    empty = [shard.shard for shard in FeatureStore.open(out).manifest.shards if not shard.live_rows]
    assert empty == [0, 2]
    assert run(folder, out).resumed == 6
    rows = FeatureStore.open(out)
    assert np.array_equal(rows.features[[0, -1]], np.asarray(rows.features)[[0, -1]])
    compact(out)
    assert view(out) == folder.colors
    assert shards() == [0, 1]
    check_files(out)


def test_resumed_run_keeps_rows_that_are_still_valid(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InterruptedRunError, match="stopped after 5 of 7"):
        run(folder, out, stop=after(3))
    folder.write("a.png")
    folder.write("z.png")
    folder.write("b.png", corrupt=True)
    report = run(folder, out)
    assert (report.resumed, report.rows, report.failed) == (3, 7, 1)
    assert view(out) == folder.colors
    assert names_of_failures(out) == ["b.png"]
    check_files(out)


def test_image_repaired_after_interruption_gets_its_row(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("a.png", "b.png"):
        folder.write(name, corrupt=True)
    with pytest.raises(InterruptedRunError, match="stopped after 2 of 7"):
        run(folder, out, stop=after(1))
    for name in list(folder.files):
        folder.write(name, corrupt=name not in ("a.png", "b.png"))
    with pytest.raises(InterruptedRunError, match="stopped after 2 of 7"):
        run(folder, out, stop=after(1))
    report = run(folder, out)
    assert (report.resumed, report.rows, report.failed) == (2, 2, 5)
    assert view(out) == folder.colors
    check_files(out)


def test_run_resumes_after_death_at_any_step_of_growing(tmp_path: Path) -> None:
    template = Folder(tmp_path / "in")
    for name in NAMES[:4]:
        template.write(name)
    run(template, tmp_path / "template")
    old = view(tmp_path / "template")
    for name in ("a.png", "b.png", "e.png"):
        template.write(name)
    template.delete("c.png")  # of the first shard no row is left
    outcomes = []
    for when in itertools.count(1, STRIDE):
        out = tmp_path / "out"
        shutil.copytree(tmp_path / "template", out)
        code = in_child(lambda out=out: run(template, out), when)
        found = view(out)
        outcomes.append((code, found == template.colors))
        assert found in (old, template.colors), when
        report = run(template, out)
        assert report.rows == len(template.colors), when
        assert view(out) == template.colors, when
        check_files(out)
        shutil.rmtree(out)
        if code != DIED:
            break
    assert code == 0
    assert len(outcomes) > 40 // STRIDE
    stages = [stage for stage, _ in itertools.groupby(outcomes)]
    assert stages == [(DIED, False), (DIED, True), (0, True)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 300),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(bytes(2000)),
        lambda path: path.write_text(path.read_text().replace('"rows": 3', '"rows": 2')),
        lambda path: path.write_text(path.read_text().replace('"counts"', '"count"')),
    ],
)
def test_store_with_a_damaged_manifest_is_only_overwritten(
    folder: Folder, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    out = tmp_path / "out"
    run(folder, out)
    damage(out / "store.json")
    before = published(out)
    with pytest.raises(StoreError, match=r"store\.json is .*damaged.* --overwrite, or choose"):
        run(folder, out)
    assert published(out) == before
    for name in (*NAMES[3:6],):
        folder.delete(name)
    run(folder, out, overwrite=True)
    assert view(out) == folder.colors
    assert len(list((out / "features").iterdir())) == 2  # of three before
    check_files(out)


def test_overwrite_does_not_take_files_of_others_for_a_damaged_store(
    folder: Folder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(folder, out)
    for text, message in (
        ('{"format": "other"}', "is not the manifest of a store"),
        ('{"format": "extractor-store", "version": 9}', "has format version 9"),
    ):
        (out / "store.json").write_text(text)
        with pytest.raises(StoreError, match=message):
            run(folder, out, overwrite=True)
    (out / "store.json").write_text("")
    for name in ("notes.txt", "features/thesis.npy"):
        (out / name).write_text("precious")
        before = published(out)
        with pytest.raises(StoreError, match=rf"not part of .* store \({name}\); move them away"):
            run(folder, out, overwrite=True)
        assert published(out) == before
        (out / name).unlink()
    shutil.rmtree(out / "features")
    shutil.rmtree(out / "images")
    for name in ("failures.jsonl", "history.jsonl"):
        (out / name).unlink()
    with pytest.raises(StoreError, match=r"store\.json is not JSON"):
        run(folder, out, overwrite=True)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": lambda path: os.truncate(path, 10),
}


@pytest.mark.parametrize("name", ["features/00000.npy", "images/00000.parquet", "failures.jsonl"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("grown", [False, True])
def test_damaged_store_is_neither_up_to_date_nor_extended(
    folder: Folder, tmp_path: Path, name: str, damage: str, grown: bool
) -> None:
    out = tmp_path / "out"
    folder.write("broken.png", corrupt=True)
    run(folder, out)
    DAMAGES[damage](out / name)
    if grown:
        folder.write("new.png")
    with pytest.raises(StoreError, match=f"{name} .*; restore the file, or start .* --overwrite"):
        run(folder, out)
    assert run(folder, out, overwrite=True).failed == 1
    assert view(out) == folder.colors
