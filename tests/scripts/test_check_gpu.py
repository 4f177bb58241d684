"""The checks of a GPU, rehearsed on the CPU: each passes, and fails when the program is broken."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import correctness
import numpy as np
import pytest
import run_checks
import torch
from PIL import Image
from run_checks import Check
from setting import Result, Setting
from support.pictures import noise

from extractor.compute import embed
from extractor.loading.nvjpeg import NvjpegDecoder
from extractor.models.backbone import Backbone

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_gpu.sh"


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(6):
        noise(seed, 120, 160).save(photos / f"{seed}.jpg", quality=90)
    setting = Setting("cpu", True, str(tmp_path / "out"), str(photos))
    setting.scratch.mkdir(parents=True)
    return setting


def outcomes(check: Callable[[Setting], Iterator[Result]], setting: Setting) -> list[bool | None]:
    results = list(check(setting))
    for result in results:
        setting.record("check", result)  # has no values that JSON lacks
    assert setting.results_of("check") == results
    return [result.is_right for result in results]


# ---------------------------------------------------------------------------------------------
# The runner

FAKE = """
import os, subprocess, sys, time
from setting import Result
def passes(setting):
    yield Result("fine", True, "1")
def also_passes(setting):
    yield Result("fine", True, "1")
def fails(setting):
    yield Result("one", True, "1")
    yield Result("two", False, "2")
def crashes(setting):
    yield Result("before", True, "1")
    os.abort()
def raises(setting):
    yield Result("before", True, "1")
    raise ValueError("no such thing")
def says_nothing(setting):
    return iter(())
def hangs(setting):
    yield Result("before", True, "1")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    open(setting.out + "/child", "w").write(str(child.pid))
    time.sleep(1000)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "correctness.py").write_text(FAKE)
    (tmp_path / "performance.py").write_text(FAKE)
    folder = Path(run_checks.__file__).parent
    # Python looks for modules in the folder of the script first.
    for name in ("run_checks.py", "setting.py"):
        (tmp_path / name).write_text((folder / name).read_text().replace("parents[2]", "parent"))
    monkeypatch.setattr(run_checks, "__file__", str(tmp_path / "run_checks.py"))
    monkeypatch.setattr(run_checks, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(run_checks, "_make_images", lambda *_: None)
    monkeypatch.setattr(run_checks, "REHEARSAL", 1)


def main_with(
    monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], **parts: Sequence[Check]
) -> int:
    checks = {"correctness": tuple(parts["correctness"]), "performance": ()}
    checks["performance"] = tuple(parts.get("performance", [Check("passes", 60)]))
    monkeypatch.setattr(run_checks, "CHECKS", checks)
    return run_checks.main(arguments)


@pytest.mark.usefixtures("fake")
def test_a_failed_check_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("fails", "crashes", "raises", "says_nothing")
    checks = [Check(name, 60) for name in names]
    out = tmp_path / "out"
    assert main_with(monkeypatch, ["--rehearse", str(out)], correctness=checks) == 1
    written = json.loads((out / "results.json").read_text())
    found = {
        name: [(result["is_right"], result["detail"]) for result in results]
        for name, results in written.items()
    }
    assert found == {
        "fails": [(True, "1"), (False, "2")],
        "crashes": [(True, "1"), (False, found["crashes"][1][1])],
        "raises": [(True, "1"), (False, "exit code 1: ValueError: no such thing")],
        "says_nothing": [(False, "reported nothing")],
        "passes": [(True, "1")],
    }
    assert found["crashes"][1][1].startswith("exit code -6")
    table = capsys.readouterr().out.partition("\ncorrectness\n")[2].splitlines()
    assert [line.split()[0] for line in table if line.startswith("  ")] == [
        *("ok", "FAILED", "ok", "FAILED", "ok", "FAILED", "FAILED", "ok")
    ]


@pytest.mark.usefixtures("fake")
def test_a_hanging_check_ends_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main_with(monkeypatch, ["--rehearse", str(out)], correctness=[Check("hangs", 2)]) == 1
    found = json.loads((out / "results.json").read_text())["hangs"]
    assert [result["detail"] for result in found] == ["1", "stopped after 2 s"]
    with pytest.raises(ProcessLookupError, match="No such process"):
        _wait_until_gone(int((out / "child").read_text()))


def _wait_until_gone(process: int) -> None:
    for _ in range(1000):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            raise ProcessLookupError("No such process")
        os.kill(process, 0)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_runner_that_is_killed_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    code = (
        "import run_checks as r; hangs = (r.Check('hangs', 600),);"
        "r.CHECKS = {'correctness': hangs, 'performance': ()}; r._make_images = print;"
        f"r.main(['--rehearse', {str(out)!r}])"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (out / "child").exists() or not (out / "child").read_text():
        assert time.monotonic() < deadline, "nothing was started"
        time.sleep(0.02)
    grandchild = int((out / "child").read_text())
    child = int(Path(f"/proc/{grandchild}/stat").read_text().rpartition(")")[2].split()[1])
    runner.send_signal(number)
    assert runner.wait(10) == -number
    deadline = time.monotonic() + 20
    for process in (child, grandchild):
        while _is_alive(process):
            assert time.monotonic() < deadline, "a process is left"
            time.sleep(0.02)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("arguments", "correctness", "performance", "code"),
    [
        ([], "passes", "also_passes", 0),
        ([], "passes", "raises", 0),  # a figure is missing, and the table says so
        (["--rehearse"], "passes", "raises", 1),  # a typo
        (["--only", "performance"], "raises", "passes", 0),
        (["--only", "correctness"], "raises", "passes", 1),
    ],
)
def test_exit_code_is_that_of_correctness(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    correctness: str,
    performance: str,
    code: int,
) -> None:
    checks = {"correctness": [Check(correctness, 60)], "performance": [Check(performance, 60)]}
    assert main_with(monkeypatch, [*arguments, str(tmp_path / "out")], **checks) == code


@pytest.mark.usefixtures("fake")
def test_checks_without_time_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_checks, "LIMITS", {"correctness": 0.05, "performance": 60})
    out = tmp_path / "out"
    arguments = ["--rehearse", "--only", "correctness", str(out)]
    assert main_with(monkeypatch, arguments, correctness=[Check("raises", 60)]) == 0
    (result,) = json.loads((out / "results.json").read_text())["raises"]
    assert result["detail"] == "left out: no time left"


@pytest.mark.slow
def test_rehearsal_passes(tmp_path: Path) -> None:
    command = [str(SCRIPT), "--rehearse", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == [check.name for part in run_checks.CHECKS.values() for check in part]
    assert all(results.values())
    assert not (tmp_path / "out" / "scratch").exists()


def test_every_check_has_a_function() -> None:
    import performance

    modules = {"correctness": correctness, "performance": performance}
    for part, checks in run_checks.CHECKS.items():
        for check in checks:
            assert callable(getattr(modules[part], check.name))
        assert sum(check.seconds for check in checks) >= run_checks.LIMITS[part]


@pytest.mark.parametrize(
    ("seconds", "names"),
    [(170, ("few_cores", "rivals", "extract_others")), (150, ("stores",)), (150, ("float64",))],
)
def test_checks_that_a_short_visit_left_out_fit_into_the_next(
    seconds: float, names: tuple[str, ...]
) -> None:
    """Measurements follow each other; checks of correctness run side by side."""
    limits = {check.name: check.seconds for part in run_checks.CHECKS.values() for check in part}
    assert sum(limits[name] for name in names) <= seconds


def test_share_is_that_of_the_best_run() -> None:
    rates = {
        "M resnet50": 100.0,
        "M resnet50, compiled": 200.0,
        "D 1 thread": 50.0,
        "D 2 processes of 1 thread": 150.0,
        "extract resnet50, 1 process": 60.0,
        "extract resnet50, 4 processes": 120.0,
        "extract vit, 1 process": 7.0,  # its M is missing
        "timm-tuned resnet50": 500.0,
    }
    results = [Result(name, None, "", {"images_per_second": r}) for name, r in rates.items()]
    left_out = [Result("M vit", None, "left out: no time left")]
    assert run_checks.shares({"a": results, "b": left_out}) == [
        "resnet50: 120 images/s are 0.80 of min(D 150, M 200)"
    ]


def test_missing_packages_are_named(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"hypothesis", "fastapi", "httpx"}
    find_spec = correctness.importlib.util.find_spec
    monkeypatch.setattr(
        correctness.importlib.util,
        "find_spec",
        lambda name: None if name in missing else find_spec(name),
    )
    files, left_out = correctness.cuda_test_files()
    assert "tests/loading/test_nvjpeg.py" in files
    for file in left_out:
        assert "hypothesis" in (SCRIPT.parents[1] / file).read_text()
    missing.add("pytest")
    (result,) = correctness.tests(setting)
    assert (result.is_right, result.detail) == (None, "needs pytest, which is not installed")


# ---------------------------------------------------------------------------------------------
# Each check can fail


@pytest.mark.slow
def test_float64_check_sees_half_precision(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcomes(correctness.float64, setting) == [True, True]
    broken = Setting(setting.device, True, f"{setting.out}-broken", setting.photos)
    broken.scratch.mkdir(parents=True)
    extract = correctness.extract

    def rounded(*args: Any, **options: Any) -> Any:
        return extract(*args, **{**options, "precision": "bfloat16"})

    monkeypatch.setattr(correctness, "extract", rounded)
    assert outcomes(correctness.float64, broken) == [False, False]


@pytest.mark.slow
def test_views_check_sees_a_picture_alone(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = correctness.extract

    def alone(*args: Any, **options: Any) -> Any:
        return extract(*args, **{**options, "augment": None})

    monkeypatch.setattr(correctness, "extract", alone)
    assert outcomes(correctness.views, setting) == [False]


@pytest.mark.parametrize(
    ("ends", "code"), [("return", 0), ("raise", 1), ("exit", 1), ("kill", -signal.SIGKILL)]
)
def test_exit_code_of_a_copy_says_how_it_ended(ends: str, code: int) -> None:
    def work() -> None:
        if ends == "raise":
            raise ValueError("in the copy")
        if ends == "exit":
            raise SystemExit(0)  # the work is not done
        if ends == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

    assert correctness._exit_code(correctness._fork(work)) == code


@pytest.mark.parametrize("is_early", [False, True])
def test_poison_check_sees_an_early_release(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, is_early: bool
) -> None:
    def early(step: Any, pictures: Any, release: Callable[[], None]) -> Any:
        release()
        return step.in_parts(pictures)

    if is_early:
        monkeypatch.setattr(embed._Step, "in_fitting_parts", early)
    assert outcomes(correctness.poison, setting) == [not is_early]


def test_bytes_check_sees_one_byte_and_no_shards(setting: Setting) -> None:
    first, second = setting.scratch / "a", setting.scratch / "b"
    with setting.links("bytes", 8) as images:
        settings = {"weights": "random", "device": "cpu", "precision": "float32"}
        correctness.extract(images, "test_resnet", first, image_size=32, **settings)
        correctness.extract(images, "test_resnet", second, image_size=32, **settings)
    assert correctness.same_bytes("x", first, second).is_right
    (shard,) = second.rglob("*.npy")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert not correctness.same_bytes("x", first, second).is_right
    shard.unlink()
    assert not correctness.same_bytes("x", first, second).is_right


@pytest.mark.parametrize("is_full", [True, False])
def test_memory_check_sees_that_nothing_ran_out(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    if not is_full:
        monkeypatch.setattr(
            correctness, "little_memory", lambda *_: torch.inference_mode(mode=False)
        )
    assert outcomes(correctness.memory, setting) == [is_full]


@pytest.mark.slow
def test_error_check_sees_flags_that_are_not_restored(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    extract = correctness.extract

    def careless(*args: Any, **options: Any) -> Any:
        torch.backends.cudnn.allow_tf32 = False
        return extract(*args, **options)

    try:
        assert outcomes(correctness.error, setting) == [True]
        for path in setting.scratch.iterdir():
            path.rename(path.with_name(f"old-{path.name}"))
        monkeypatch.setattr(correctness, "extract", careless)
        Path(setting.out, "check.jsonl").unlink()
        assert outcomes(correctness.error, setting) == [False]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("is_folding", [True, False])
def test_folding_check_sees_a_network_that_stays(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, is_folding: bool
) -> None:
    if not is_folding:
        monkeypatch.setattr(Backbone, "fold", lambda backbone: backbone)
    assert outcomes(correctness.folding, setting) == [is_folding]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "word", "is_right"), [(1000, "trusted", True), (0, "refused", True), (80, "", False)]
)
def test_nvjpeg_check_accepts_right_and_refusing_decoders_only(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, start: int, word: str, is_right: bool
) -> None:
    """The decoder is wrong from the image ``start`` on."""
    seen = 0
    stand_in = correctness._stand_in_decoder

    @contextmanager
    def wrong(setting: Setting) -> Iterator[None]:
        with stand_in(setting):
            right = NvjpegDecoder._nvjpeg

            def decode(decoder: NvjpegDecoder, encoded: list[torch.Tensor]) -> list[torch.Tensor]:
                nonlocal seen
                images = right(decoder, encoded)
                seen += len(images)
                return [255 - image for image in images] if seen > start else images

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(NvjpegDecoder, "_nvjpeg", decode)
                yield

    monkeypatch.setattr(correctness, "_stand_in_decoder", wrong)
    (result,) = correctness.nvjpeg(setting)
    assert result.is_right is is_right
    assert word in result.detail


def test_rows_are_checked_to_be_there(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "black"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    preprocess = correctness.Preprocess((8, 8), "squash", (8, 8), "bilinear", (0,) * 3, (1,) * 3)
    network = Backbone.from_module(
        correctness.Extremes(), head=None, preprocess=preprocess, device="cpu"
    )
    correctness.extract(folder, network, tmp_path / "store")
    with pytest.raises(AssertionError, match="a row is zero"):
        correctness.rows_of(tmp_path / "store")


def test_relative_error_is_that_of_the_worst_row() -> None:
    exact = np.array([[3.0, 4.0], [0.0, 10.0]])
    rows = np.array([[3.0, 4.0], [1.0, 10.0]])
    assert correctness.relative_error(rows, exact) == pytest.approx(0.1)


# ---------------------------------------------------------------------------------------------
# What only a device runs, on a simulated one


@pytest.fixture
def cuda(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> tuple[Setting, list[object]]:
    """Setting of a device with 1,000 bytes of memory, and what is called on it."""
    calls: list[object] = []

    def replace(name: str, value: Any = None) -> None:
        real = getattr(torch.cuda, name)  # it exists

        def call(*args: Any, **options: Any) -> Any:
            inspect.signature(real).bind(*args, **options)
            calls.append((name, *args))
            return value

        monkeypatch.setattr(torch.cuda, name, call)

    replace("max_memory_reserved", 500)
    replace("empty_cache")
    replace("get_device_properties", SimpleNamespace(total_memory=1000))
    replace("set_per_process_memory_fraction")
    replace("synchronize")
    replace("memory_allocated", 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert callable(torch.cuda._sleep)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(("_sleep", cycles)))
    return Setting("cuda", False, setting.out, setting.photos), calls


def test_little_memory_is_a_part_of_what_was_needed(cuda: tuple[Setting, list[object]]) -> None:
    setting, calls = cuda
    with correctness.little_memory(setting, torch.nn.Identity(), 4):
        assert calls[-1] == ("set_per_process_memory_fraction", 0.3)
    assert calls[-1] == ("set_per_process_memory_fraction", 1.0)
    assert correctness._allocated(setting) == 7
    assert calls[-2:] == [("synchronize",), ("memory_allocated",)]


def test_delayed_copies_sleep_where_pictures_are_copied(
    cuda: tuple[Setting, list[object]],
) -> None:
    _, calls = cuda
    pictures = correctness.Slow((torch.zeros(2), torch.ones(2)))
    assert pictures[1].sum() == 2
    assert calls == []
    assert [float(picture.sum()) for picture in pictures] == [0, 2]
    assert [call[0] for call in calls] == ["_sleep"]
