"""What a run leaves for programs: run.json, events, nothing to do; and a store made compact."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.callbacks import stop_after
from support.commands import run_python
from support.networks import mean_pixel
from support.pictures import noise

from extractor import FeatureStore, extract
from extractor.cli import main as cli
from extractor.errors import InterruptedRunError, StoreError, UsageError
from extractor.images.listing import list_images
from extractor.models import embedding
from extractor.models.backbone import Backbone
from extractor.options import Options
from extractor.report import Progress
from extractor.run.run_json import request_of
from extractor.run.up_to_date import up_to_date_report
from extractor.terminal import json_log
from extractor.terminal.json_log import Events
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded, in order."""
    names: list[str] = []

    def load(model: str, options: Options, *_: object) -> Backbone:
        names.append(model)
        return mean_pixel()

    monkeypatch.setattr(embedding, "load", load)
    return names


def run(photos: Path, out: Path, *more: str) -> int:
    return cli.main(["-m", "mean", str(photos), "-o", str(out), "-b", "2", *more])


def files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---------------------------------------------------------------------------------------------
# Nothing to do


def test_up_to_date_run_loads_no_model_and_writes_nothing(
    photos: Path, tmp_path: Path, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(photos, tmp_path / "out") == 0
    before = files(tmp_path / "out")
    capsys.readouterr()
    assert run(photos, tmp_path / "out") == 0
    assert loads == ["mean"]
    assert files(tmp_path / "out") == before
    output = capsys.readouterr().out
    assert "up to date    nothing to do" in output
    assert "11 of 11 images" in output


def test_up_to_date_run_imports_no_torch(photos: Path, tmp_path: Path) -> None:
    assert run(photos, tmp_path / "out") == 0
    code = (
        "import sys; from extractor.cli import main as cli; "
        f"code = cli.main(['-m', 'mean', {str(photos)!r}, '-o', {str(tmp_path / 'out')!r}, "
        "'-b', '2']); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


@pytest.mark.parametrize(
    "more",
    [
        ["--normalize"],
        ["--dtype", "float16"],
        ["--seed", "4"],
        ["--image-size", "32"],
        ["-b", "3"],
        ["--overwrite"],
    ],
    ids=" ".join,
)
def test_changed_request_is_never_up_to_date(
    photos: Path, tmp_path: Path, loads: list[str], more: list[str]
) -> None:
    assert run(photos, tmp_path / "out") == 0
    run(photos, tmp_path / "out", *more)
    assert loads == ["mean", "mean"]


def test_options_without_effect_on_rows_stay_up_to_date(
    photos: Path, tmp_path: Path, loads: list[str]
) -> None:
    assert run(photos, tmp_path / "out") == 0
    assert run(photos, tmp_path / "out", "-j", "3", "--check", "content", "--keep-missing") == 0
    assert loads == ["mean"]


@pytest.mark.parametrize("change", ["new", "changed", "gone", "staged", "run.json", "store.json"])
def test_any_change_is_noticed(photos: Path, tmp_path: Path, loads: list[str], change: str) -> None:
    out = tmp_path / "out"
    assert run(photos, out) == 0
    if change == "new":
        noise(1, 9, 9).save(photos / "new.png")
    elif change == "changed":
        noise(99, 9, 9).save(photos / "00.png")
    elif change == "gone":
        (photos / "00.png").unlink()
    elif change == "staged":
        (out / ".extractor-partial").mkdir()
    else:
        text = (out / change).read_text()
        (out / change).write_text(text.replace('"float32"', '"float16"', 1))
        if change == "store.json":
            text = (out / change).read_text()
            (out / change).write_text(text.replace('"created": "2', '"created": "3'))
    run(photos, out)
    assert loads == ["mean", "mean"]


@pytest.mark.parametrize("change", ["weights", "config", "commit", "gone"])
def test_other_weights_of_the_same_name_are_noticed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    hub = tmp_path / "models--timm--mean"
    folder = hub / "snapshots/abc"
    folder.mkdir(parents=True)
    (hub / "refs").mkdir()
    files = [folder / "model.safetensors", folder / "config.json", hub / "refs/main"]
    for file in files:
        file.write_bytes(b"one")
    loaded = []

    def load(model: str, options: Options, *_: object) -> Backbone:
        loaded.append(model)
        backbone = mean_pixel()
        return replace(backbone, provenance=replace(backbone.provenance, file=str(files[0])))

    monkeypatch.setattr(embedding, "load", load)
    assert run(photos, tmp_path / "out") == 0
    assert run(photos, tmp_path / "out") == 0
    assert len(loaded) == 1
    if change == "gone":
        files[0].unlink()
    else:
        os.utime(files[["weights", "config", "commit"].index(change)], ns=(7, 7))
    run(photos, tmp_path / "out")
    assert len(loaded) == 2


@pytest.mark.parametrize("again", ["the same", "grown"])
def test_damaged_index_is_a_one_sentence_error(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], again: str
) -> None:
    out = tmp_path / "out"
    assert run(photos, out) == 0
    name = out / "images/00000.parquet"
    name.write_bytes(b"x" * name.stat().st_size)
    if again == "grown":
        noise(1, 9, 9).save(photos / "new.png")
    capsys.readouterr()
    assert run(photos, out) == 1
    assert "images/00000.parquet cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("index", [-1, 130])
def test_damaged_store_is_not_compacted(photos: Path, tmp_path: Path, index: int) -> None:
    out = tmp_path / "out"
    grown(photos, out)
    name = sorted((out / "features").iterdir())[0]
    data = bytearray(name.read_bytes())
    data[index] ^= 1
    name.write_bytes(data)
    before = files(out)
    with pytest.raises(StoreError, match=r"is damaged \(features/00000.npy: content changed"):
        compact(out)
    assert files(out) == before


@pytest.mark.parametrize("name", ["HF_HOME", "TORCH_HOME"])
def test_another_cache_is_noticed(
    photos: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert run(photos, tmp_path / "out") == 0
    monkeypatch.setenv(name, str(tmp_path))
    assert run(photos, tmp_path / "out") == 0
    assert loads == ["mean", "mean"]


def test_users_own_code_is_never_up_to_date() -> None:
    assert request_of(["my.py:tiny"], Options()) is None
    assert request_of(["resnet18+my.py:tiny"], Options()) is None


def test_failed_images_are_reported_again(photos: Path, tmp_path: Path, loads: list[str]) -> None:
    (photos / "00.png").write_text("bad")
    assert run(photos, tmp_path / "out") == 3
    assert run(photos, tmp_path / "out") == 3
    assert run(photos, tmp_path / "out", "--max-failure-rate", "0.5") == 0
    assert loads == ["mean"]
    assert run(photos, tmp_path / "out", "--retry-failed") == 3
    assert loads == ["mean", "mean"]


def test_run_is_up_to_date_only_if_all_its_stores_are(
    photos: Path, tmp_path: Path, loads: list[str]
) -> None:
    models = ["mean", "other"]
    options = Options(batch_size=2)
    extract(photos, models, tmp_path / "out", batch_size=2)
    images = list_images(photos)
    report = up_to_date_report(images, models, str(tmp_path / "out"), options)
    assert report is not None
    assert [store.rows for store in report.stores] == [11, 11]
    (tmp_path / "out/other/store.json").unlink()
    assert up_to_date_report(images, models, str(tmp_path / "out"), options) is None


def test_excluded_images_are_retired_and_come_back(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert extract(photos, "mean", out).rows == 11
    less = extract(photos, "mean", out, exclude=["00.png"])
    assert (less.rows, less.stores[0].gone, less.excluded) == (10, 1, {"00.png": 1})
    assert "00.png" not in less.store.paths
    images = list_images(photos, exclude=["00.png"])
    report = up_to_date_report(images, ["mean"], str(out), Options(exclude=["00.png"]))
    assert report is not None
    assert report.excluded == {"00.png": 1}
    assert up_to_date_report(list_images(photos), ["mean"], str(out), Options()) is None
    assert extract(photos, "mean", out).rows == 11


def test_patterns_do_not_apply_to_a_list_that_was_made_with_others(
    photos: Path, tmp_path: Path
) -> None:
    images = list_images(photos, exclude=["00.png"])
    assert extract(images, "mean", tmp_path / "out").rows == 10
    assert extract(images, "mean", tmp_path / "out", exclude=["00.png"]).rows == 10
    with pytest.raises(UsageError, match="exclude: does not apply to an ImageList; try list_ima"):
        extract(images, "mean", tmp_path / "out", exclude=["01.png"])


# ---------------------------------------------------------------------------------------------
# run.json and events


def test_run_json_holds_request_and_result(photos: Path, tmp_path: Path) -> None:
    (photos / "00.png").write_text("bad")
    assert run(photos, tmp_path / "out", "--max-failure-rate", "0.1") == 0
    content = json.loads((tmp_path / "out/run.json").read_text("ascii"))
    counts = {"images": 11, "resumed": 0, "passed_over": 0, "rows": 10, "failures": 1}
    kept = {"unseen": 0, "vanished": 0}
    assert content["counts"] == {**counts, "added": 10, "changed": 0, "moved": 0, "gone": 0, **kept}
    assert content["exit_code"] == 0
    assert content["options"]["max_failure_rate"] == 0.1
    assert content["request"]["models"] == ["mean"]
    stages = ["list", "load", "tune", "compare", "compute", "publish"]
    assert list(content["seconds"]) == stages
    assert content["started"] <= content["ended"]
    assert content["process"] == os.getpid()
    assert content["store"] == FeatureStore.open(tmp_path / "out").manifest.checksum
    assert not list(verify(tmp_path / "out"))
    text = (tmp_path / "out/run.json").read_text().replace('"exit_code": 0', '"exit_code": 1')
    (tmp_path / "out/run.json").write_text(text)
    assert list(verify(tmp_path / "out")) == [
        "run.json: was changed, its own checksum does not match"
    ]


def events_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_events_are_one_json_object_a_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "00.png").write_text("bad")
    assert run(photos, tmp_path / "out", "--log-json", "--quiet") == 3
    output = capsys.readouterr()
    assert output.out == ""
    events = events_of(output.err)
    assert [one["event"] for one in events] == ["start", *["progress"] * 5, "end"]
    assert (events[0]["images"], events[0]["models"]) == (11, ["mean"])
    assert [(one["phase"], one["done"], one["failed"]) for one in events[1:6]] == [
        ("loading", 0, 0),
        ("tuning", 0, 0),
        ("computing", 0, 0),
        ("computing", 11, 1),
        ("publishing", 11, 1),
    ]
    assert events[-1]["exit_code"] == 3
    assert events[-1]["stores"] == [
        {
            "out": str(tmp_path / "out"),
            "rows": 10,
            "failures": 1,
            "added": 10,
            "changed": 0,
            "moved": 0,
            "gone": 0,
            "unseen": 0,
            "vanished": 0,
        }
    ]


def test_events_name_what_is_left_out_in_batches(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(json_log, "PATHS_PER_EVENT", 2)
    for name in ("a.txt", "b.txt", "c.xmp", "00_thumb.png"):
        (photos / name).write_text("text")
    (photos / "@eaDir").mkdir()
    words = ["--log-json", "--quiet", "--exclude", "*_thumb.png"]
    for _ in range(2):  # the second run finds nothing to do
        assert run(photos, tmp_path / "out", *words) == 0
        events = events_of(capsys.readouterr().err)
        skipped = [one["paths"] for one in events if one["event"] == "skipped"]
        assert sorted(map(len, skipped)) == [1, 2]
        assert sorted(itertools.chain(*skipped)) == ["a.txt", "b.txt", "c.xmp"]
        excluded = [one["paths"] for one in events if one["event"] == "excluded"]
        assert sorted(itertools.chain(*excluded)) == ["00_thumb.png", "@eaDir/"]
        assert [one["event"] for one in events[:4]].index("start") == 3
        assert events[-1]["skipped"] == {".txt": 2, ".xmp": 1}
        assert events[-1]["excluded"] == {"*_thumb.png": 1, "@eaDir/": 1}
    content = json.loads((tmp_path / "out/run.json").read_text("ascii"))
    assert content["skipped"] == {".txt": 2, ".xmp": 1}
    assert content["excluded"] == {"*_thumb.png": 1, "@eaDir/": 1}
    assert content["options"]["exclude"] == ["*_thumb.png"]


def test_summary_says_what_was_left_out(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.txt", "b.txt", "c.xmp", "00_thumb.png"):
        (photos / name).write_text("text")
    (photos / "@eaDir").mkdir()
    assert run(photos, tmp_path / "out", "--exclude", "*_thumb.png", "--exclude", "x") == 0
    output = capsys.readouterr().out
    assert "skipped       3 files: 2 .txt, 1 .xmp\n" in output
    assert "excluded      1 file and 1 folder: 1 *_thumb.png, 1 @eaDir/, 0 x\n" in output


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["/no/such/folder"], 1, "SourceError"),
        (["a", "--list", "b"], 2, "UsageError"),
        (["PHOTOS", "--dtype", "float16", "-b", "2", "-o", "OUT"], 1, "StoreError"),
    ],
)
def test_error_event_holds_the_exit_code(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    kind: str,
) -> None:
    assert run(photos, tmp_path / "out", "--quiet") == 0
    named = {"PHOTOS": str(photos), "OUT": str(tmp_path / "out")}
    words = [named.get(word, word) for word in words]
    assert cli.main(["-m", "mean", "--log-json", *words]) == code
    last = events_of(capsys.readouterr().err)[-1]
    assert (last["event"], last["kind"], last["exit_code"]) == ("error", kind, code)


def test_internal_error_is_an_event(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(embedding, "load", broken)
    assert run(photos, tmp_path / "out", "--log-json") == 1
    last = events_of(capsys.readouterr().err)[-1]
    assert (last["event"], last["kind"], last["exit_code"]) == ("error", "ZeroDivisionError", 1)
    assert "Traceback" in last["message"]


def test_library_output_is_an_event(photos: Path, tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
from extractor.cli import main as cli
from extractor.models import embedding
from support.commands import run_python
from support.networks import mean_pixel

def noisy(*_):
    os.write(2, b"TIFFFillStrip: Read error\\n")
    return mean_pixel()

embedding.load = noisy
sys.exit(cli.main())
"""
    words = ["--log-json", "--quiet", "-m", "mean", str(photos), "-o", str(tmp_path / "out")]
    done = run_python("-c", code, *words)
    assert done.returncode == 0, done.stderr
    events = events_of(done.stderr)
    (written,) = [event for event in events if event["event"] == "output"]
    assert written["message"] == "TIFFFillStrip: Read error"
    assert events[-1]["event"] == "end"


def test_progress_events_come_every_ten_seconds_and_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = iter([0.0, 4.0, 9.0, 11.0, 12.0, 22.0, 23.0])
    events = Events(clock=lambda: next(times))
    events.wanted = True
    for done in (0, 40, 90, 110, 120, 220, 230):
        events.progress(Progress(done, 230, 0))
    output = events_of(capsys.readouterr().err)
    assert [one["done"] for one in output] == [0, 110, 220, 230]
    assert [one["images_per_second"] for one in output] == [None, 10, 10, 10]


# ---------------------------------------------------------------------------------------------
# Compact


def grown(photos: Path, out: Path, **options: Any) -> None:
    """A store that grew twice: with rows that are retired, and images that failed."""
    settings = {"batch_size": 2, "shard_images": 4, **options}
    (photos / "05bad.png").write_text("bad")
    extract(photos, "mean", out, **settings)
    for index, name in enumerate(["000.png", "045.png", "zz.png"]):
        noise(index, 9, 9).save(photos / name)
    (photos / "00.png").unlink()
    extract(photos, "mean", out, **settings)
    noise(9, 9, 9).save(photos / "000.png")
    (photos / "10bad.png").write_text("bad")
    os.utime(photos / "000.png", ns=(5, 5))
    extract(photos, "mean", out, **settings)


def test_compacted_store_equals_fresh_store(photos: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    grown(photos, out)
    assert FeatureStore.open(out).manifest.retired > 0
    before, after = compact(out)
    assert (before.retired, after.retired) == (2, 0)
    extract(photos, "mean", fresh, batch_size=2, shard_images=4)
    expected, found = files(fresh), files(out)
    for one in (expected, found):
        for name in ("run.json", "store.json", "history.jsonl"):
            del one[name]
    for name in [name for name in found if name.endswith(".parquet")]:
        # Its rows came in other runs, so that they have other ids.
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(found.pop(name)))
        fresh_table = pyarrow.parquet.read_table(pyarrow.BufferReader(expected.pop(name)))
        assert table.drop_columns(["id"]).equals(fresh_table)
    assert found == expected
    assert not list(verify(out))
    assert compact(out) == (after, after)


def test_run_after_compact_is_up_to_date(
    photos: Path, tmp_path: Path, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(photos, out) == 0
    noise(1, 9, 9).save(photos / "00.png")
    os.utime(photos / "00.png", ns=(5, 5))
    assert run(photos, out) == 0
    assert cli.main(["info", str(out)]) == 0
    assert "1 row; run extract compact to remove them" in capsys.readouterr().out
    assert cli.main(["compact", str(out)]) == 0
    assert "compacted 2 shards into 1; 1 row removed, 11 left" in capsys.readouterr().out
    assert cli.main(["compact", str(out)]) == 0
    assert "already compact (11 rows)" in capsys.readouterr().out
    loads.clear()
    assert run(photos, out) == 0
    assert loads == []


def test_store_with_interrupted_run_is_not_compacted(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(photos, "mean", out, batch_size=2)
    for index in range(4):
        noise(index, 9, 9).save(photos / f"new{index}.png")
    with pytest.raises(InterruptedRunError, match="stopped after 13"):
        extract(photos, "mean", out, batch_size=2, stop=stop_after(1))
    with pytest.raises(StoreError, match="holds an interrupted run; resume it first"):
        compact(out)
    with pytest.raises(StoreError, match="is not a store"):
        compact(tmp_path / "nothing")


def test_readers_survive_growing_and_compacting(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(photos, "mean", out, batch_size=2, shard_images=3)
    stop = threading.Event()
    seen: list[int] = []
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            try:
                store = FeatureStore.open(out)
                rows, paths, failures = np.array(store.features), store.paths, store.failures
                if len(rows) != len(paths) or failures or not np.isfinite(rows).all():
                    wrong.append((len(rows), len(paths), failures))
                seen.append(len(rows))
            except StoreError as error:
                # It was replaced between opening and reading; opening again must do.
                if "call reopen()" not in str(error):
                    wrong.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for index in range(12):
            noise(index, 9, 9).save(photos / f"new{index}.png")
            if index % 3 == 2:
                (photos / f"new{index - 1}.png").unlink()
            extract(photos, "mean", out, batch_size=2, shard_images=3)
            if index % 4 == 3:
                compact(out)
            if index % 5 == 4:
                extract(photos, "mean", out, batch_size=2, shard_images=3, overwrite=True)
    finally:
        stop.set()
        reader.join()
    assert not wrong
    assert len(set(seen)) > 3
    assert sorted(FeatureStore.open(out).paths) == [
        os.fsdecode(path) for path in list_images(photos).paths
    ]
