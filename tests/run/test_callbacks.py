"""What a scheduler may rely on: ``progress`` and ``stop`` of a run, and its report as JSON."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.callbacks import EARLY_CALLS, computed, stop_after
from support.networks import mean_pixel

from extractor import (
    DecodeError,
    FeatureStore,
    InterruptedRunError,
    Progress,
    StoreNotFoundError,
    extract,
)
from extractor.models import embedding
from extractor.models.backbone import Backbone
from extractor.report import Phase, Report
from extractor.upkeep.verify import verify

PHASES = get_args(Phase)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were loaded, in order."""
    names: list[str] = []

    def load(model: str, *_: object) -> Backbone:
        names.append(model)
        return mean_pixel(size=(24, 32) if model == "mean" else (16, 16))

    monkeypatch.setattr(embedding, "load", load)
    return names


@pytest.fixture
def run(photos: Path, tmp_path: Path, loads: list[str]) -> Callable[..., Report]:
    def run(**arguments: Any) -> Report:
        return extract(photos, "mean", tmp_path / "out", batch_size=4, **arguments)

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------------------------
# Progress


def test_phases_begin_in_order_and_count_images(run: Callable[..., Report]) -> None:
    updates: list[Progress] = []
    run(progress=updates.append)
    assert updates == [
        Progress(0, 0, 0, "listing"),
        Progress(0, 11, 0, "loading"),
        Progress(0, 11, 0, "tuning"),
        *(Progress(done, 11, 0, "computing") for done in (0, 4, 8, 11)),
        Progress(11, 11, 0, "publishing"),
    ]


@pytest.mark.parametrize("ends_by", ["stop", "progress"])
def test_ended_run_gives_back_settings_of_the_process(
    run: Callable[..., Report], ends_by: str
) -> None:
    """Even while its exception is at hand, as in a notebook, which keeps all local values."""

    def fail(progress: Progress) -> None:
        inside.append(torch.backends.cudnn.allow_tf32)
        if progress.done == 8:
            raise KeyboardInterrupt("enough")

    inside: list[bool] = []
    ends = {"stop": stop_after(2), "progress": fail}
    with pytest.raises(
        (InterruptedRunError, KeyboardInterrupt), match=r"enough|after 8 of 11"
    ) as e:
        run(**{ends_by: ends[ends_by]})
    assert torch.backends.cudnn.allow_tf32
    assert ends_by == "stop" or not inside[-1]
    assert e.value is not None


def test_progress_of_a_run_with_nothing_to_do_reaches_its_end(run: Callable[..., Report]) -> None:
    run()
    updates: list[Progress] = []
    run(progress=updates.append)
    assert tuple(progress.phase for progress in updates) == PHASES
    assert computed(updates) == [11]


def test_callback_that_blocks_only_delays(run: Callable[..., Report]) -> None:
    def block(progress: Progress) -> None:
        if 0 < progress.done < 11 and progress.phase == "computing":
            time.sleep(1.1)

    report = run(progress=block, image_timeout=1.0, workers=2)
    assert (report.rows, report.failed) == (11, 0)


# ---------------------------------------------------------------------------------------------
# Stopping


@pytest.mark.parametrize("call", range(1, EARLY_CALLS + 1))
@pytest.mark.parametrize("grows", [False, True])
def test_stop_before_the_first_batch_leaves_the_output_as_it_was(
    run: Callable[..., Report],
    photos: Path,
    tmp_path: Path,
    loads: list[str],
    call: int,
    grows: bool,
) -> None:
    if grows:
        hidden = (photos / "00.png").rename(tmp_path / "00.png")
        run()
        hidden.rename(photos / "00.png")
        loads.clear()
    before = files_of(tmp_path / "out")
    message = "stopped after" if call == EARLY_CALLS else "stopped before the first image"
    with pytest.raises(InterruptedRunError, match=message) as caught:
        run(stop=stop_after(call - EARLY_CALLS))
    assert caught.value.done == (10 if grows and call == EARLY_CALLS else 0)
    assert bool(loads) == (PHASES[call - 1] in ("tuning", "computing"))
    assert files_of(tmp_path / "out") == before
    assert (tmp_path / "out").exists() == grows
    assert run().rows == 11


def test_stop_is_not_asked_once_all_rows_are_computed(run: Callable[..., Report]) -> None:
    assert run(stop=stop_after(3)).rows == 11  # 11 images are three batches


# ---------------------------------------------------------------------------------------------
# Callbacks that raise


ERRORS = (
    ImportError("No module named 'torch'", name="torch"),
    OSError(28, "No space left on device"),
    StopIteration(),
    KeyboardInterrupt(),
)


@pytest.mark.parametrize(
    ("name", "phase", "error"),
    [
        *(("progress", phase, ERRORS[0]) for phase in PHASES),
        *(("stop", phase, ERRORS[0]) for phase in PHASES[:-1]),
        *(("progress", phase, error) for phase in PHASES[-2:] for error in ERRORS[1:]),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_callback_that_raises_ends_the_run_with_its_own_exception(
    run: Callable[..., Report], tmp_path: Path, name: str, phase: Phase, error: BaseException
) -> None:
    phases: list[Phase] = []

    def progress(update: Progress) -> None:
        # The second call of a phase, if it has several: then a batch is worth keeping.
        is_kept = update.phase != "computing" or update.done > 0
        phases.append(update.phase if is_kept else "tuning")
        fail("progress")

    def fail(caller: str) -> bool:
        if caller == name and phases[-1] == phase:
            raise error
        return False

    with pytest.raises(type(error)) as caught:
        run(progress=progress, stop=lambda: fail("stop"))
    assert caught.value is error
    with pytest.raises(StoreNotFoundError, match=r"is not (a store|finished)"):
        FeatureStore.open(tmp_path / "out")
    report = run()  # the store is not locked, and its work is kept
    assert report.resumed == {"computing": 4, "publishing": 11}.get(phase, 0)
    assert (report.rows, list(verify(tmp_path / "out"))) == (11, [])


# ---------------------------------------------------------------------------------------------
# Reports and errors as data


def test_report_is_json_and_agrees_with_run_json(
    photos: Path, tmp_path: Path, loads: list[str]
) -> None:
    (photos / "00.png").write_text("bad")
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff out"))
    report = extract(photos, ["mean", "small"], out, batch_size=4)
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (content["exit_code"], content["images"], content["resumed"]) == (3, 11, 0)
    assert [store["out"] for store in content["stores"]] == [str(out / m) for m in loads]
    for store in content["stores"]:
        recorded = json.loads(Path(store["out"], "run.json").read_text())
        for name, count in recorded["counts"].items():
            assert {**content, **store}[name] == count, name
        assert (store["rows"], store["failures"], store["shape"]) == (10, 1, [3])
        assert store["first_failures"][0][0] == "00.png"
        assert recorded["spent"] == content["spent"]


def test_report_of_a_run_with_nothing_to_do_is_json(run: Callable[..., Report]) -> None:
    run()
    content = json.loads(json.dumps(run().as_dict(), allow_nan=False))
    assert (content["exit_code"], content["resumed"], content["stores"][0]["added"]) == (0, 11, 0)


def test_errors_survive_a_pool_of_processes() -> None:
    decode = DecodeError("truncated", "image 3: cut")
    decode.index = 3
    for error in (
        decode,
        InterruptedRunError(4, 11),
        InterruptedRunError(0, 0, is_computing=False),
    ):
        copied = pickle.loads(pickle.dumps(error))
        assert type(copied) is type(error)
        assert (str(copied), vars(copied)) == (str(error), vars(error))
