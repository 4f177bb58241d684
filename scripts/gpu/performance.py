"""Measurements on a GPU, one function each; in a rehearsal on the CPU with small networks.

Each function yields results as it has them. The sides are those of ``throughput.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from setting import ROOT, Result, Setting

from extractor import extract
from extractor.system.cpu import available_cores
from extractor.text import plural

MODELS = ("resnet50", "vit_base_patch16_224", "convnext_base", "vit_large_patch14_224")
STAND_INS = ("test_resnet", "test_vit")
TINY = f"{Path(__file__).with_name('tiny_network.py')}:network"
EXTRACT_IMAGES = 2**15  # four shards for each of eight processes
OTHER_IMAGES = 2**14  # of large models, which compute long enough
FEW_CORES_IMAGES = 3 * 2**12  # more than a run in one process has
SAMPLE_SECONDS = 0.2  # between two looks at the GPU
READY, GO = "ready", "go"

# A process that decodes when its siblings do: it says that it is ready and waits for the start.
DECODE = """
import json, sys, time
from argparse import Namespace
from pathlib import Path
task = json.loads(sys.argv[1])
from extractor.system.process_tuning import keep_freed_memory
keep_freed_memory()
import rivals
ready, go = Path(task["folder"], "ready-" + str(task["number"])), Path(task["folder"], "go")
ready.touch()
while not go.exists():
    time.sleep(0.01)
print(json.dumps(rivals.measure(Namespace(**task))))
"""


def task_of(setting: Setting, side: str, images: Path, model: str, **changes: Any) -> Any:
    """Return a task of ``rivals.py``."""
    fields: dict[str, Any] = {
        "side": side,
        "images": str(images),
        "model": model,
        "weights": "random",
        "device": setting.device,
        "precision": setting.pick("float16", "float32"),
        "compiled": False,
        "compile": "off",
        "reference": str(setting.scratch / f"reference-{Path(model).name}"),
        "workers": available_cores(),
    }
    return argparse.Namespace(**{**fields, **changes})


def measured(name: str, task: Any) -> Result:
    """Measure a side in this process."""
    import rivals

    return result_of(name, rivals.measure(task))


def result_of(name: str, figures: dict[str, Any]) -> Result:
    """Return the figures of a side as a result."""
    if "reason" in figures:
        has_failed = figures["reason"].startswith("failed")
        return Result(name, False if has_failed else None, figures["reason"], figures)
    detail = f"{figures['images_per_second']:,.0f} images/s"
    if "least_cosine" in figures:
        detail += f", least cosine {figures['least_cosine']:.5f}"
    if figures.get("compile_seconds"):
        detail += f", compiled in {figures['compile_seconds']:.0f} s"
    return Result(name, None, detail, figures)


# ---------------------------------------------------------------------------------------------
# The two parts of a run


def model_eager(setting: Setting) -> Iterator[Result]:
    """M: models alone, eager."""
    for model in setting.pick(MODELS, STAND_INS):
        with setting.links(f"eager-{model}", 128) as images:
            yield measured(f"M {model}", task_of(setting, "model", images, model))


def model_compiled(setting: Setting) -> Iterator[Result]:
    """M: models alone, compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(setting.scratch / "compiled")
    for number, model in enumerate(setting.pick(MODELS, (TINY,))):
        with setting.links(f"compiled-{number}", 128) as images:
            weights = setting.pick("random", "default")
            task = task_of(setting, "model", images, model, compiled=True, weights=weights)
            yield measured(f"M {Path(model).name}, compiled", task)


def decode_threads(setting: Setting) -> Iterator[Result]:
    """D: decoding alone, by the number of threads."""
    model = setting.network
    for threads in setting.pick((15, 8, 4, 1), (2, 1)):
        count = setting.pick(1000 + 500 * threads, 64)
        with setting.links(f"decode-{threads}", count) as images:
            task = task_of(setting, "decode", images, model, workers=threads)
            yield measured(f"D {plural(threads, 'thread')}", task)


def decode_processes(setting: Setting) -> Iterator[Result]:
    """D: decoding alone, by the number of processes that share the cores."""
    for processes in setting.pick((8,), (2,)):
        threads = max(available_cores() // processes, 1)
        with setting.links(f"share-{processes}", setting.pick(32_000 // processes, 64)) as images:
            yield _side_by_side(setting, images, processes, threads)


def _side_by_side(setting: Setting, images: Path, processes: int, threads: int) -> Result:
    """Decode the same images in several processes that start together."""
    children = []
    for number in range(processes):
        task = vars(task_of(setting, "decode", images, setting.network, workers=threads))
        task |= {"folder": str(setting.scratch), "number": f"{processes}-{number}"}
        command = [sys.executable, "-c", DECODE, json.dumps(task)]
        children.append(
            subprocess.Popen(
                command, cwd=ROOT / "scripts" / "benchmarks", stdout=subprocess.PIPE, text=True
            )
        )
    go = setting.scratch / GO
    while sum(1 for _ in setting.scratch.glob(f"{READY}-{processes}-*")) < processes:
        if any(child.poll() is not None for child in children):
            break
        time.sleep(0.01)
    go.touch()
    outputs = [child.communicate()[0] for child in children]
    go.unlink()
    figures = [json.loads(output.splitlines()[-1]) for output in outputs]
    reasons = [each["reason"] for each in figures if "reason" in each]
    total = {"images_per_second": sum(each.get("images_per_second", 0) for each in figures)}
    name = f"D {processes} processes of {plural(threads, 'thread')}"
    return result_of(name, {"reason": reasons[0]} if reasons else total)


# ---------------------------------------------------------------------------------------------
# Whole runs


def extract_resnet(setting: Setting) -> Iterator[Result]:
    """``extract`` with the network that needs most images, and with JPEGs decoded on the GPU."""
    processes = setting.pick((None,), (1, 2))
    yield from _extract(setting, setting.pick(MODELS[0], STAND_INS[0]), processes)
    if not setting.is_rehearsal:
        yield from _extract(setting, MODELS[0], (None,), decode="gpu")


def extract_transformer(setting: Setting) -> Iterator[Result]:
    """``extract`` with a usual transformer."""
    processes = setting.pick((None,), (1,))
    yield from _extract(setting, setting.pick(MODELS[1], STAND_INS[1]), processes)


def extract_others(setting: Setting) -> Iterator[Result]:
    """``extract`` with the other models, the largest first."""
    for model in setting.pick(tuple(reversed(MODELS[2:])), ()):
        yield from _extract(setting, model, (None,), count=OTHER_IMAGES)
    if setting.is_rehearsal:
        yield Result("extract with other models", None, "the same code as above")


def few_cores(setting: Setting) -> Iterator[Result]:
    """``extract`` on four cores, which decode the JPEGs or leave that to the GPU."""
    model, cores = setting.pick((MODELS[0], 4), (STAND_INS[0], 1))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    for options in setting.pick(({}, {"decode": "gpu"}), ({},)):
        count = FEW_CORES_IMAGES
        yield from _extract(setting, model, (None,), count=count, cores=cores, **options)


def _extract(
    setting: Setting,
    model: str,
    processes: Sequence[int | None],
    *,
    count: int = EXTRACT_IMAGES,
    cores: int | None = None,
    **options: Any,
) -> Iterator[Result]:
    count = setting.pick(count, 64)
    label = "".join(f", {key} {value}" for key, value in options.items())
    label += f", {plural(cores, 'core')}" if cores else ""
    case = f"{model}-{label.replace(', ', '-').replace(' ', '-')}"
    with setting.links(case, count) as images:
        for number in processes:
            out = setting.scratch / f"extract-{case}-{number}"
            with busy_share(setting) as busy:
                report = extract(
                    images,
                    model,
                    out,
                    weights="random",
                    device=setting.device,
                    precision=setting.pick("float16", "float32"),
                    compile="off",
                    processes=number,
                    shard_images=setting.pick(None, 32),
                    **options,
                )
            seconds = report.seconds - report.load_seconds
            busy = busy[-max(int(seconds / SAMPLE_SECONDS), 1) :]
            found = {
                "images": report.images,
                "images_per_second": report.images_per_second,
                "busy": busy,
                "workers": [worker.as_dict() for worker in report.workers],
                "spent": report.spent and report.spent.as_dict(),
            }
            started = max(len(report.workers), 1)
            name = f"extract {model}, {plural(started, 'process', 'processes')}{label}"
            result = result_of(name, found)
            shares = f", GPU busy {sum(busy) / len(busy):.0f} %" if busy else ""
            yield Result(result.name, None, result.detail + shares, result.figures)


@contextmanager
def busy_share(setting: Setting) -> Iterator[list[int]]:
    """Yield a list that receives how busy the GPU is, in percent, several times per second."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms"]
    stand_in = [sys.executable, "-uc", "import time\nwhile True: print(50); time.sleep(0.2)"]
    milliseconds = str(int(1000 * SAMPLE_SECONDS))
    shares: list[int] = []
    try:
        sampler = subprocess.Popen(
            setting.pick([*query, milliseconds], stand_in), stdout=subprocess.PIPE, text=True
        )
    except OSError:
        yield shares
        return
    assert sampler.stdout is not None
    lines = sampler.stdout

    def collect() -> None:
        for line in lines:
            if line.strip().isdigit():
                shares.append(int(line))

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    try:
        yield shares
    finally:
        sampler.kill()
        sampler.wait()
        reader.join()


def rivals(setting: Setting) -> Iterator[Result]:
    """What people use instead: timm's loader in half precision, and the common recipe."""
    sides = (("timm-tuned", 4000), ("common-recipe", 800))
    for model in setting.pick(MODELS[:2], STAND_INS[:1]):
        for side, count in sides:
            with setting.links(f"{side}-{model}", setting.pick(count, 64)) as images:
                yield measured(f"{side} {model}", task_of(setting, side, images, model))
                torch.cuda.empty_cache()
