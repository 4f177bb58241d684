"""Where the time of a run goes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from extractor import extract
from extractor.errors import UsageError
from extractor.system.timing import KINDS, Spent, Timer


def spent(
    device: str = "mps",
    decode_mode: str = "scaled",
    readers: int = 0,
    cores: int = 2,
    **seconds: float,
) -> Spent:
    all_seconds = {**dict.fromkeys(KINDS, 0.0), **seconds}
    return Spent(1000, 2, cores, readers, device, decode_mode, all_seconds)


@pytest.mark.parametrize(
    ("spent", "expected"),
    [
        (
            spent(decode=4.0, model=0.25, idle=2.0, read=0.1),
            "bound by decoding: 2 threads decode 500 images/s, the model could do 4,000; add cores",
        ),
        (  # two threads that share a core
            spent(decode=4.0, model=0.25, idle=2.0, read=0.1, cores=1),
            "bound by decoding: 2 threads decode 250 images/s, the model could do 4,000; add cores",
        ),
        (
            spent(decode=4.0, model=0.25, idle=2.0, read=0.1, cores=4),
            "bound by decoding: 2 threads decode 500 images/s, the model could do 4,000; use more "
            "--workers",
        ),
        (
            spent(decode=4.0, model=0.25, idle=2.0, read=0.1, device="cuda"),
            "bound by decoding: 2 threads decode 500 images/s, the model could do 4,000; add cores "
            "or the experimental --decode gpu",
        ),
        (  # files that the GPU cannot decode
            spent(decode=4.0, model=0.25, idle=2.0, read=0.1, device="cuda", decode_mode="gpu"),
            "bound by decoding: 2 threads decode 500 images/s, the model could do 4,000; add cores",
        ),
        (
            spent(decode=2.0, model=8.0, read=0.1, device="cpu"),
            "bound by the model: it embeds 125 images/s, 2 threads could decode 1,000; try a "
            "smaller model or a GPU",
        ),
        (
            spent(decode=2.0, model=2.5, transfer=5.5, read=0.1),
            "bound by the model: it embeds 125 images/s, 2 threads could decode 1,000; try a "
            "smaller model or a faster GPU",
        ),
        (
            spent(decode=2.0, model=1.0, read=80.0, idle=39.0),
            "bound by reading: 25 images/s come from the disk, the rest could do 1,000; read from "
            "a faster disk, or use more --workers",
        ),
        # 32 readers read 32 files at a time.
        (
            spent(decode=2.0, model=2.0, read=16.0, readers=32),
            "bound by the model: it embeds 500 images/s, 2 threads could decode 1,000; try a "
            "smaller model or a faster GPU",
        ),
        (
            spent(decode=1.0, model=1.0, write=20.0),
            "bound by writing: the disk takes 50 rows/s; write to a faster disk",
        ),
        (spent(decode=0.5, model=0.5), ""),  # too little to tell
        (spent(), ""),
    ],
)
def test_bound_names_bottleneck_with_advice(spent: Spent, expected: str) -> None:
    assert spent.bound == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (  # 3,500 images/s, of 9,000 and 12,000 that are possible
            {},
            "bound by Python's lock: one process handles 3,500 images/s, 16 threads could decode "
            "9,000 and the model embed 12,000; use more --processes",
        ),
        ({"read": 45.0}, "bound by Python's lock"),  # its threads wait for the lock in between
        ({"read": 45.0, "readers": 16}, "bound by reading: 3,733 images/s"),  # a slow disk
        ({"read": 9.0, "readers": 16}, "bound by Python's lock"),
        ({"decode": 42.0}, "bound by decoding: 16 threads decode 4,000 images/s"),  # busy: 0.875
        ({"model": 2.5}, "bound by the model: it embeds 4,200 images/s"),  # busy: 0.83
        ({"write": 2.0, "idle": 0.1}, "bound by writing"),
        ({"wall": 8.0}, "bound by decoding"),  # 1,312 images/s: something else keeps it waiting
        ({"wall": 0.0}, "bound by decoding"),  # not known
        # One after the other, a CPU can do 5,143 images/s.
        ({"device": "cpu"}, "bound by Python's lock"),
        ({"device": "cpu", "wall": 2.5}, "bound by decoding"),
    ],
)
def test_lock_binds_if_nothing_else_is_busy(changes: dict[str, Any], expected: str) -> None:
    values = {"read": 1.0, "write": 0.1, "idle": 2.0, "decode": 16 * 10_500 / 9_000}
    values |= {"model": 10_500 / 12_000, "wall": 3.0, "readers": 0, "device": "cuda"} | changes
    wall, readers, device = (values.pop(name) for name in ("wall", "readers", "device"))
    seconds = {**dict.fromkeys(KINDS, 0.0), **values}
    made = Spent(10_500, 16, 16, readers, device, "scaled", seconds, wall)
    assert made.bound.startswith(expected)
    # Four such processes at a time do four times as much in all.
    four = Spent(
        42_000,
        *(16, 16, readers, device, "scaled"),
        {kind: 4 * value for kind, value in seconds.items()},
        4 * wall,
        processes=4,
    )
    assert four.bound.split(":")[0] == made.bound.split(":")[0]
    if not changes:
        assert four.bound == (
            "bound by Python's lock: the processes handle 14,000 images/s, 64 threads could decode "
            "36,000 and the model embed 48,000; use more --processes"
        )


def test_timer_sums_all_threads() -> None:
    timer = Timer(trace=True)

    def work() -> None:
        for _ in range(100):
            timer.add("decode", 1.0, 0.5, counted=0.25)

    threads = [threading.Thread(target=work, name=f"decode-{i}") for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timer.seconds == {**dict.fromkeys(KINDS, 0.0), "decode": 100.0}
    events = json.loads(timer.chrome_trace())["traceEvents"]
    assert sum(event["ph"] == "X" and event["dur"] == 5e5 for event in events) == 400


def test_report_and_profile_account_for_time(photos: Path, tmp_path: Path) -> None:
    profile = tmp_path / "trace.json"
    report = extract(
        photos,
        "torchvision:squeezenet1_1",
        tmp_path / "out",
        weights="random",
        image_size=64,
        batch_size=4,
        workers=2,
        device="cpu",
        profile=profile,
    )
    assert report.spent is not None
    assert report.spent.images == 11
    seconds = report.spent.seconds
    assert all(seconds[kind] > 0 for kind in ("read", "decode", "model", "write", "idle"))
    assert sum(seconds[kind] for kind in ("model", "write", "idle")) <= report.seconds
    assert 0 < report.spent.wall_seconds <= report.seconds
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["spent"]["threads"] == 2
    assert list(record["spent"])[2:] == list(KINDS)

    events = json.loads(profile.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    kinds = [(names[event["tid"]], event["name"]) for event in events if event["ph"] == "X"]
    assert sum(kind == "decode" for _, kind in kinds) == 11
    assert {name for name, kind in kinds if kind == "decode"} <= {"decode-0", "decode-1"}
    assert sum(kind == "model" for _, kind in kinds) == 3
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")


def test_profile_without_folder_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"profile: there is no folder for the file '.*trace'"):
        extract(tmp_path, profile=tmp_path / "none" / "trace")


@pytest.mark.parametrize("name", ["", "."])
def test_profile_that_is_no_file_is_refused_early(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"profile: got '.*', expected the name of a file"):
        extract(tmp_path, profile=name)


def test_up_to_date_store_has_no_bottleneck(photos: Path, tmp_path: Path) -> None:
    settings = {"weights": "random", "image_size": 64, "device": "cpu"}
    extract(photos, "torchvision:squeezenet1_1", tmp_path / "out", **settings)  # type: ignore[arg-type]
    again = extract(photos, "torchvision:squeezenet1_1", tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert again.spent is not None
    assert again.spent.bound == ""
