"""Run all checks of a GPU, each in a process of its own with a time limit, and print one table.

``scripts/check_gpu.sh`` calls this. Checks of correctness run side by side, measurements one after
the other. Each result is in OUT_FOLDER as soon as it is known. Imports no torch.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from setting import ROOT, Result, Setting

LIMITS = {"correctness": 150.0, "performance": 240.0}  # seconds of each part
SIDE_BY_SIDE = 5  # checks of correctness; each is a process with a context on the device
LOOK_SECONDS = 0.2  # between two looks whether the runner is still there
LEAST_SECONDS = 5.0  # what a process needs to import torch; without them a check is left out
REHEARSAL = 4  # times these limits, for a small and busy machine


@dataclass(frozen=True)
class Check:
    """A function of ``correctness.py`` or ``performance.py``, and its time limit."""

    name: str
    seconds: float


# What matters most comes first; what does not fit is left out from the end.
CHECKS = {
    "correctness": (
        Check("versions", 40),
        Check("tests", 125),
        Check("stores", 110),
        Check("float64", 60),
        Check("views", 60),
        Check("poison", 60),
        Check("memory", 60),
        Check("error", 60),
        Check("folding", 60),
        Check("nvjpeg", 60),
        Check("fidelity", 80),
    ),
    "performance": (
        Check("model_eager", 60),
        Check("decode_threads", 40),
        Check("decode_processes", 60),
        Check("extract_resnet", 75),
        Check("extract_transformer", 40),
        Check("few_cores", 60),
        Check("rivals", 40),
        Check("extract_others", 70),
        Check("model_compiled", 100),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    options = _parser().parse_args(arguments)
    if options.child:
        part, name, setting, runner = json.loads(options.child)
        _end_with(runner)
        _child(part, name, Setting(**setting))
        return 0
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.jsonl"), *out.glob("*.log")):
        old.unlink()
    shutil.rmtree(out / "scratch", ignore_errors=True)
    started = time.monotonic()
    setting = _setting(out, is_rehearsal=options.rehearse)
    results: dict[str, list[Result]] = {}
    for part, checks in _chosen(options.only).items():
        begun = started if not results else time.monotonic()
        factor = REHEARSAL if options.rehearse else 1
        _run_part(part, checks, setting, begun + factor * LIMITS[part], results)
        print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)
    shutil.rmtree(out / "scratch", ignore_errors=True)
    print_table(results)
    print(f"results: {out}")
    checked = results if options.rehearse else [c.name for c in CHECKS["correctness"]]
    has_failed = any(
        result.is_right is False for name in checked for result in results.get(name, ())
    )
    return 1 if has_failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog="check_gpu.sh")
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu-results"))
    names = [*LIMITS, *(check.name for checks in CHECKS.values() for check in checks)]
    parser.add_argument(
        "--only", choices=names, action="append", metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with stand-ins")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _chosen(names: Sequence[str] | None) -> dict[str, list[Check]]:
    """Return the checks of each part that are named, by themselves or by their part."""
    chosen = {
        part: [check for check in checks if not names or {part, check.name} & set(names)]
        for part, checks in CHECKS.items()
    }
    return {part: checks for part, checks in chosen.items() if checks}


def _setting(out: Path, *, is_rehearsal: bool) -> Setting:
    data = os.environ.get("EXTRACTOR_TEST_DATA", "")
    photos = Path(data, "photos")
    if is_rehearsal or not data or not photos.is_dir():
        photos = out / "scratch" / "photos"
        _make_images(photos, 16 if is_rehearsal else 96)
    weights = "" if is_rehearsal or not data else str(Path(data, "weights"))
    device = "cpu" if is_rehearsal else "cuda"
    return Setting(device, is_rehearsal, str(out), str(photos), weights)


def _make_images(folder: Path, count: int) -> None:
    """Draw images in parts, one process per core."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _DRAW, str(folder), str(start), str(count)],
            cwd=ROOT / "scripts",
        )
        for start in range(_cores())
    ]
    if any(process.wait() for process in processes):
        raise SystemExit("the images could not be drawn")


_DRAW = f"""
import sys
from pathlib import Path
from make_images import KINDS, picture
folder, start, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
for i in range(start, count, {len(os.sched_getaffinity(0))}):
    picture(KINDS[i % len(KINDS)], i).save(folder / f"{{i:05d}}.jpg", quality=90)
"""


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _run_part(
    part: str,
    checks: Sequence[Check],
    setting: Setting,
    deadline: float,
    results: dict[str, list[Result]],
) -> None:
    """Run checks of a part until the deadline."""

    lock = threading.Lock()

    def run(check: Check) -> None:
        found = run_check(part, check, setting, deadline - time.monotonic())
        with lock:
            results[check.name] = found
            summary = {name: [asdict(result) for result in of] for name, of in results.items()}
            text = json.dumps(summary, indent=1)
            Path(setting.out, "results.json").write_text(f"{text}\n", "utf-8")

    results.update({check.name: [] for check in checks})  # in this order
    if checks[0].name == "versions":  # nothing works without a device that computes
        run(checks[0])
        checks = checks[1:]
    is_alone = part == "performance" and not setting.is_rehearsal
    at_a_time = 1 if is_alone else min(SIDE_BY_SIDE, _cores())
    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(run, checks))


def run_check(part: str, check: Check, setting: Setting, seconds_left: float) -> list[Result]:
    """Run a check in a process, and return its results; how it ended badly is one of them."""
    factor = REHEARSAL if setting.is_rehearsal else 1
    limit = min(factor * check.seconds, seconds_left)
    if limit < LEAST_SECONDS:
        return [Result(check.name, None, "left out: no time left")]
    started = time.monotonic()
    task = json.dumps([part, check.name, asdict(setting), os.getpid()])
    log = Path(setting.out, f"{check.name}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", task],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(setting),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # the process, and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = setting.results_of(check.name)
    if code is None:
        found.append(Result(check.name, False, f"stopped after {limit:.0f} s"))
    elif code != 0:
        last = (log.read_text("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        found.append(Result(check.name, False, f"exit code {code}: {last[:150]}"))
    elif not found:
        found.append(Result(check.name, False, "reported nothing"))
    _show(found, time.monotonic() - started)
    return found


def _environment(setting: Setting) -> dict[str, str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if setting.is_rehearsal:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def _end_with(runner: int) -> None:
    """Kill this process and all that it starts once the runner is gone, however that ended."""

    def watch() -> None:
        while os.getppid() == runner:
            time.sleep(LOOK_SECONDS)
        os.killpg(0, signal.SIGKILL)  # run_check() has made it the first process of its group

    threading.Thread(target=watch, name="runner", daemon=True).start()


def _child(part: str, name: str, setting: Setting) -> None:
    setting.scratch.mkdir(parents=True, exist_ok=True)
    if part == "performance":
        sys.path.insert(0, str(ROOT))
        process_tuning = importlib.import_module("extractor.system.process_tuning")
        process_tuning.keep_freed_memory()  # as the command does
        process_tuning.spin_briefly()
    for result in getattr(importlib.import_module(part), name)(setting):
        setting.record(name, result)


def _show(results: Sequence[Result], seconds: float) -> None:
    for result in results:
        print(f"{_row(result)}  ({seconds:.0f} s)", flush=True)


def _row(result: Result) -> str:
    word = {True: "ok", False: "FAILED", None: "-"}[result.is_right]
    return f"  {word:6}  {result.name:44} {result.detail}"


def print_table(results: dict[str, list[Result]]) -> None:
    """Print all results, part by part."""
    for part, checks in CHECKS.items():
        rows = [_row(result) for check in checks for result in results.get(check.name, ())]
        if rows:
            print("\n".join(["", part, *rows]))
    print("\n".join(["", *shares(results)]), flush=True)


def shares(results: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return for each model the share of its limit, min(D, M), that the best run reaches."""
    best: dict[tuple[str, str], float] = {}
    for result in itertools.chain.from_iterable(results.values()):
        side, _, model = result.name.partition(",")[0].partition(" ")
        side, model = ("D", "") if side == "D" else (side, model)
        rate = result.figures.get("images_per_second", 0.0)
        best[side, model] = max(best.get((side, model), 0.0), rate)
    decode = best.get(("D", ""), 0.0)
    lines = []
    for (side, model), rate in best.items():
        alone = best.get(("M", model), 0.0)
        if side == "extract" and rate and alone and decode:
            limit = min(decode, alone)
            lines.append(
                f"{model}: {rate:,.0f} images/s are {rate / limit:.2f} of min(D {decode:,.0f}, "
                f"M {alone:,.0f})"
            )
    return lines


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all checks at once, see _end_with()
    raise SystemExit(main())
