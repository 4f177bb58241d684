"""Measure a run beside its upper bound, and beside what people use instead, turn by turn.

    python scripts/benchmarks/throughput.py images/ --model resnet50 --weights random --repeats 3

Every measurement is a process of its own. All sides take turns and their medians are compared:
single figures of a busy machine mean little. Rates are images per second from opening the first
image to the last embedding in memory (for this program: in the store). Loading the libraries and
the model does not count on any side.

The upper bound follows from D images/s of decoding alone with all cores, and M images/s of the
model alone on decoded images, in its fastest configuration whose embeddings all have a cosine of at
least 0.999 to those of float32. On a CPU both share the cores, and no run can be faster than
1 / (1/D + 1/M). A GPU computes beside them, and the limit is the smaller of the two. A run pads its
last batch, so a small folder keeps it from the limit: take some hundred images, or ``--copies``.

What people use instead:

- common-recipe: what most projects copy: torchvision's ``ImageFolder`` and ``DataLoader`` with two
  worker processes, the model's own evaluation transform on PIL images, ``torch.no_grad``, float32
- timm: its ``ImageDataset`` and ``create_loader`` with one worker process per core, channels last,
  ``torch.inference_mode``, float32
- timm-tuned: the same in bfloat16 on a CPU, in float16 on a GPU
- img2vec_pytorch: ``get_vec`` on lists of 32 PIL images, if it has the architecture
- transformers: its pipeline ``image-feature-extraction`` around timm's model, in batches of 32
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import (
    argument_parser,
    copies_of,
    cpu_name,
    positive,
    progress,
    read_once,
    spread,
    versions,
)

from extractor.system.process_tuning import freeze_imports, keep_freed_memory, spin_briefly
from extractor.text import plural

# Only the processes that measure import the libraries, not the one that compares: a process starts
# with the peak memory of its parent.

OURS = ("decode", "model", "extract")
# Each rival, and the library that it needs.
RIVALS = {
    "common-recipe": "torchvision",
    "timm": "timm",
    "timm-tuned": "timm",
    "img2vec_pytorch": "img2vec_pytorch",
    "transformers": "transformers",
}

PRECISIONS = {
    "cpu": ("float32", "bfloat16", "mixed"),
    "cuda": ("float32", "float16", "bfloat16"),
    "mps": ("float32", "float16"),
}
LEAST_COSINE = 0.999
CONFIGURATION_FIGURES = ("images_per_second", "least_cosine", "compile_seconds", "reason")


@dataclass(frozen=True)
class Configuration:
    """A precision, compiled or not, with its figures or the reason why there are none."""

    precision: str
    compiled: bool
    images_per_second: float = 0.0
    least_cosine: float = 0.0
    compile_seconds: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Name such as ``bfloat16 compiled``."""
        return f"{self.precision} {'compiled' if self.compiled else 'eager'}"


@dataclass
class Results:
    """All figures of the benchmark.

    Attributes:
        model: Name of the model.
        weights: ``default``, ``random``, a tag or a file.
        repeats: Number of turns.
        machine: Processor, cores, device and GPU.
        versions: Versions of Python and the libraries.
        configurations: Precisions of the model alone, tried in the first turn.
        best: The fastest of them that is faithful.
        sides: Figures of each side, one entry per turn.
        missing: Reason why a side has no figures.
    """

    model: str
    weights: str
    repeats: int
    machine: dict[str, Any]
    versions: dict[str, str]
    configurations: list[Configuration] = field(default_factory=list)
    best: Configuration | None = None
    sides: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.sides["extract"][0]["images"])

    def rates(self, side: str) -> list[float]:
        """Return the images/s of a side, one entry per turn."""
        return [figures["images_per_second"] for figures in self.sides[side]]

    def median(self, side: str) -> float:
        """Return the median images/s of a side."""
        return statistics.median(self.rates(side))

    def limit_of(self, decode: float, model: float) -> float:
        """Return the images/s that no run can exceed, from the rates of its two parts."""
        if self.machine["device"] == "cpu":
            return 1 / (1 / decode + 1 / model)
        return min(decode, model)

    @property
    def limit(self) -> float:
        """Images/s that no run can exceed, from the medians."""
        return self.limit_of(self.median("decode"), self.median("model"))

    @property
    def shares(self) -> list[float]:
        """Share of the limit that ``extract`` reaches in each turn."""
        turns = zip(self.rates("decode"), self.rates("model"), self.rates("extract"), strict=True)
        return [ours / self.limit_of(decode, model) for decode, model, ours in turns]

    def ratios(self, rival: str) -> list[float]:
        """Return the rate of ``extract`` divided by that of a rival, for each turn."""
        pairs = zip(self.rates("extract"), self.rates(rival), strict=True)
        return [ours / theirs for ours, theirs in pairs]

    @property
    def rivals(self) -> list[str]:
        """Names of the rivals with figures."""
        return [side for side in self.sides if side in RIVALS]

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as JSON types, with what follows from them.

        ``rates`` has the images/s of every side (``decode``, ``model``, ``extract`` and the
        rivals) as ``{"median": ..., "min": ..., "max": ...}``.
        """
        return {
            **asdict(self),
            "images": self.images,
            "rates": {side: spread(self.rates(side)) for side in self.sides},
            "decode": self.median("decode"),
            "model_alone": self.median("model"),
            "limit": self.limit,
            "extract": self.median("extract"),
            "share": self.median("extract") / self.limit,
            "shares": self.shares,
            "ratios": {rival: self.ratios(rival) for rival in self.rivals},
        }


# ---------------------------------------------------------------------------------------------
# Measuring


class Runner:
    """Measures each side in a process of its own."""

    def __init__(self, options: argparse.Namespace, images: Path, scratch: Path) -> None:
        self._task = {**vars(options), "images": str(images), "reference": str(scratch / "float32")}
        # A fresh cache: compiled code of an earlier run would make compiling look quick.
        self._compiler_cache = str(scratch / "compiled")

    def __call__(self, side: str, **changes: Any) -> dict[str, Any]:
        """Return the figures of one side, or ``reason`` if there are none."""
        task = json.dumps({**self._task, "side": side, **changes})
        environment = dict(os.environ)
        if side == "model":
            environment["TORCHINDUCTOR_CACHE_DIR"] = self._compiler_cache
        started = time.perf_counter()
        process = subprocess.run(
            [sys.executable, __file__, self._task["images"], "--side", task],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
        )
        seconds = time.perf_counter() - started
        figures = _last_line(process)
        outcome = figures.get("reason") or f"{figures.get('images_per_second', 0):.1f} images/s"
        if side != "machine":
            name = f"{side}, {Configuration(**changes).name}" if changes else side
            progress(f"{name}: {outcome}, {seconds:.0f} s")
        return figures if "reason" in figures else {**figures, "process_seconds": seconds}

    def needed(self, side: str, **changes: Any) -> dict[str, Any]:
        """Return the figures of a side that the comparison cannot do without."""
        figures = self(side, **changes)
        if "reason" in figures:
            raise SystemExit(f"{side}: {figures['reason']}")
        return figures


def _last_line(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    if process.returncode == 0 and process.stdout.strip():
        return dict(json.loads(process.stdout.splitlines()[-1]))
    message = (process.stderr.strip().splitlines() or ["no message"])[-1]
    return {"reason": f"failed: exit code {process.returncode}: {message[:100]}"}


def run_turns(options: argparse.Namespace, runner: Runner) -> Results:
    """Measure all sides one after the other, ``--repeats`` times."""
    found = runner.needed("machine")
    machine = {"cpu": cpu_name(), **{key: found[key] for key in ("cores", "device", "gpu")}}
    results = Results(options.model, options.weights, options.repeats, machine, versions())
    rivals = []
    for rival, library in RIVALS.items():
        if rival in options.without:
            results.missing[rival] = "left out"
        elif importlib.util.find_spec(library) is None:
            results.missing[rival] = "not installed"
        else:
            rivals.append(rival)
    for turn in range(options.repeats):
        progress(f"turn {turn + 1} of {options.repeats}")
        results.sides.setdefault("decode", []).append(runner.needed("decode"))
        model = _model_alone(runner, results, eager=options.eager)
        results.sides.setdefault("model", []).append(model)
        results.sides.setdefault("extract", []).append(runner.needed("extract"))
        for rival in [rival for rival in rivals if rival not in results.missing]:
            figures = runner(rival)
            if "reason" in figures:
                results.missing[rival] = figures["reason"]
                results.sides.pop(rival, None)
            else:
                results.sides.setdefault(rival, []).append(figures)
    return results


def _model_alone(runner: Runner, results: Results, *, eager: bool) -> dict[str, Any]:
    """Measure the best configuration; in the first turn all of them, to find the best."""
    if results.best is not None:
        best = results.best
        return runner.needed("model", precision=best.precision, compiled=best.compiled)
    tried: list[dict[str, Any]] = []
    for precision in PRECISIONS[results.machine["device"].partition(":")[0]]:
        for compiled in (False,) if eager else (False, True):
            measure = runner if tried else runner.needed  # the first is the reference of the others
            figures = measure("model", precision=precision, compiled=compiled)
            known = {key: figures[key] for key in CONFIGURATION_FIGURES if key in figures}
            results.configurations.append(Configuration(precision, compiled, **known))
            tried.append(figures)
    faithful = [
        (index, configuration)
        for index, configuration in enumerate(results.configurations)
        if not configuration.reason and configuration.least_cosine >= LEAST_COSINE
    ]
    index, results.best = max(faithful, key=lambda pair: pair[1].images_per_second)
    return tried[index]


# ---------------------------------------------------------------------------------------------
# Showing

COLUMNS = ("images/s", "least", "most", "of limit", "ratio", "process s", "peak MiB")


def show(results: Results) -> None:
    """Print the tables."""
    machine = results.machine
    print(
        f"{results.model}, weights {results.weights}, {plural(results.images, 'image')}, "
        f"{plural(results.repeats, 'turn')}"
    )
    device = f"{machine['device']} {machine['gpu']}".strip()
    print(f"{machine['cpu']}, {plural(machine['cores'], 'core')}, device {device}")
    print(", ".join(f"{library} {version}" for library, version in results.versions.items()))
    print("\n" + _row("model alone", ("images/s", "least cos", "compile s")))
    for configuration in results.configurations:
        print(_configuration_row(configuration))
    print("\n" + _row("", COLUMNS))
    for part in ("decode", "model"):
        print(_row(part, _spread_cells(results.rates(part))))
    print(_row("limit", (f"{results.limit:.1f}",)))
    for side in ("extract", *results.rivals):
        print(_side_row(results, side))
    for rival, reason in results.missing.items():
        print(f"  {rival:20} {reason}")
    formula = "1 / (1/decode + 1/model)" if machine["device"] == "cpu" else "min(decode, model)"
    if results.best is not None:
        print(f"\nmodel: {results.best.name}, the fastest with a cosine of at least {LEAST_COSINE}")
    print(f"limit: {formula}")
    print("ratio: images/s of extract divided by this side, median of the turns")
    print("peak MiB: main process only, without worker processes")


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:20}" + "".join(f" {cell:>9}" for cell in cells)


def _spread_cells(rates: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{rate:.1f}" for rate in (statistics.median(rates), min(rates), max(rates)))


def _configuration_row(configuration: Configuration) -> str:
    name, seconds = configuration.name, configuration.compile_seconds
    if configuration.reason:
        return f"  {name:20} {configuration.reason}"
    cells = (
        f"{configuration.images_per_second:.1f}",
        f"{configuration.least_cosine:.6f}",
        "-" if seconds is None else f"{seconds:.1f}",
    )
    return _row(name, cells)


def _side_row(results: Results, side: str) -> str:
    turns = results.sides[side]
    ratio = f"{statistics.median(results.ratios(side)):.2f}" if side in RIVALS else ""
    seconds = statistics.median(figures["process_seconds"] for figures in turns)
    peak = max(figures["peak_mib"] for figures in turns)
    share = f"{results.median(side) / results.limit:.0%}"
    row = _row(
        side, (*_spread_cells(results.rates(side)), share, ratio, f"{seconds:.1f}", f"{peak:.0f}")
    )
    images = turns[0]["images"]
    return row if images == results.images else f"{row}   ({images} images)"


def main() -> None:
    """Measure, and show the figures."""
    options = _parser().parse_args()
    if options.side:
        task = argparse.Namespace(**json.loads(options.side))
        if task.side in OURS:  # as the extract command does
            keep_freed_memory()
            spin_briefly()  # before the next lines import torch
            with freeze_imports():
                import extractor.api  # noqa: F401
        from rivals import measure

        print(json.dumps(measure(task)))
        return
    read_once(options.images)
    with (
        tempfile.TemporaryDirectory() as scratch,
        copies_of(options.images, options.copies) as images,
    ):
        results = run_turns(options, Runner(options, images, Path(scratch)))
    if options.json:
        text = json.dumps(results.as_dict(), indent=2) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    if options.json != "-":
        show(results)


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__)
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="option of extract")
    parser.add_argument("--compile", help="option of extract (default: its own)")
    parser.add_argument(
        "--eager", action="store_true", help="do not compile the model when it is measured alone"
    )
    parser.add_argument("--copies", type=positive, default=1, help="use each image this often")
    parser.add_argument(
        "--without", nargs="+", action="extend", choices=RIVALS, default=[], help="rivals to skip"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
