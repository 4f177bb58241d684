"""Measures a run beside what bounds it, and beside what people use instead, turn by turn.

    python scripts/benchmarks/throughput.py images/ --model resnet50 --weights random --repeats 3

Every measurement is a process of its own, all sides take turns, and the medians are compared:
single figures of a busy machine mean little. Rates are images per second from the first image
that is opened to the last embedding that is there (for this program: written to the store);
loading the libraries and the model is left out on all sides.

What bounds a run: D images/s of decoding alone with all cores, and M images/s of the model alone
on images that are decoded already, in the fastest configuration whose embeddings all have a cosine
of at least 0.999 to those of float32. On a CPU both share the cores, and no run can be faster than
1 / (1/D + 1/M); a GPU computes beside them, and the limit is the smaller of the two. A run pads its
last batch, so a small folder keeps it from the limit: take some hundred images, or ``--copies``.

What people use instead:

- common-recipe: what most projects copy: torchvision's ``ImageFolder`` and ``DataLoader`` with two
  worker processes, the model's own evaluation transform on PIL images, ``torch.no_grad``, float32
- timm: its ``ImageDataset`` and ``create_loader`` with a worker process a core, channels last,
  ``torch.inference_mode``, float32
- timm-tuned: the same in bfloat16 on a CPU, float16 on a GPU
- img2vec_pytorch: ``get_vec`` on lists of 32 PIL images, where it has the architecture
- transformers: its pipeline ``image-feature-extraction`` around the model of timm, in batches of 32
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from extractor.system.process_tuning import freeze_imports, keep_freed_memory, spin_briefly

# The libraries are imported by the processes that measure, and not by the one that compares: a
# process begins with the peak of memory of the one that started it.

OURS = ("decode", "model", "extract")
# What they are compared with, and the library that each needs.
RIVALS = {
    "common-recipe": "torchvision",
    "timm": "timm",
    "timm-tuned": "timm",
    "img2vec_pytorch": "img2vec_pytorch",
    "transformers": "transformers",
}
COPY = "copy-{:05d}"  # of the folder of images
FIRST_COPY = COPY.format(0)

VERSIONS = ("torch", "torchvision", "timm", "pillow", "img2vec_pytorch", "transformers")

PRECISIONS = {
    "cpu": ("float32", "bfloat16", "mixed"),
    "cuda": ("float32", "float16", "bfloat16"),
    "mps": ("float32", "float16"),
}
LEAST_COSINE = 0.999
CONFIGURATION_FIGURES = ("images_per_second", "least_cosine", "compile_seconds", "reason")


@dataclass(frozen=True)
class Configuration:
    """How the model computes, and what came of it; ``reason`` says why nothing did."""

    precision: str
    compiled: bool
    images_per_second: float = 0.0
    least_cosine: float = 0.0
    compile_seconds: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.precision} {'compiled' if self.compiled else 'eager'}"


@dataclass
class Results:
    """All figures of a run of the benchmark.

    Attributes:
        sides: of each side the figures of every turn.
        missing: why a side has none.
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
        return int(self.sides["extract"][0]["images"])

    def rates(self, side: str) -> list[float]:
        return [figures["images_per_second"] for figures in self.sides[side]]

    def median(self, side: str) -> float:
        return statistics.median(self.rates(side))

    def limit_of(self, decode: float, model: float) -> float:
        """What no run can exceed, from the rates of its two parts."""
        if self.machine["device"] == "cpu":
            return 1 / (1 / decode + 1 / model)
        return min(decode, model)

    @property
    def limit(self) -> float:
        return self.limit_of(self.median("decode"), self.median("model"))

    @property
    def shares(self) -> list[float]:
        """Of the limit that ``extract`` reaches, turn by turn."""
        turns = zip(self.rates("decode"), self.rates("model"), self.rates("extract"), strict=True)
        return [ours / self.limit_of(decode, model) for decode, model, ours in turns]

    def ratios(self, rival: str) -> list[float]:
        """How many times as fast as a rival ``extract`` is, turn by turn."""
        pairs = zip(self.rates("extract"), self.rates(rival), strict=True)
        return [ours / theirs for ours, theirs in pairs]

    @property
    def rivals(self) -> list[str]:
        return [side for side in self.sides if side in RIVALS]

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as JSON types, with what follows from them.

        ``rates`` has the images/s of every side (``decode``, ``model``, ``extract`` and the
        rivals) as ``{"median": ..., "min": ..., "max": ...}``.
        """
        sides = {side: self.rates(side) for side in self.sides}
        return {
            **asdict(self),
            "images": self.images,
            "rates": {
                side: {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
                for side, rates in sides.items()
            },
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
    """Measures sides in processes of their own."""

    def __init__(self, options: argparse.Namespace, images: Path, scratch: Path) -> None:
        self._task = {**vars(options), "images": str(images), "reference": str(scratch / "float32")}
        # Compiled code from before would make compiling look quick.
        self._compiler_cache = str(scratch / "compiled")

    def __call__(self, side: str, **changes: Any) -> dict[str, Any]:
        """The figures of one side, or ``reason``: why there are none."""
        task = json.dumps({**self._task, "side": side, **changes})
        environment = dict(os.environ)
        if side == "model":
            environment["TORCHINDUCTOR_CACHE_DIR"] = self._compiler_cache
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, self._task["images"], "--side", task],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
        )
        seconds = time.perf_counter() - started
        figures = _last_line(done)
        told = figures.get("reason") or f"{figures.get('images_per_second', 0):.1f} images/s"
        if side != "machine":
            which = f"{side}, {Configuration(**changes).name}" if changes else side
            print(f"{which}: {told}, {seconds:.0f} s", file=sys.stderr)
        return figures if "reason" in figures else {**figures, "process_seconds": seconds}

    def needed(self, side: str, **changes: Any) -> dict[str, Any]:
        """The same of a side without which there is nothing to compare."""
        figures = self(side, **changes)
        if "reason" in figures:
            raise SystemExit(f"{side}: {figures['reason']}")
        return figures


def _last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    if done.returncode == 0 and done.stdout.strip():
        return dict(json.loads(done.stdout.splitlines()[-1]))
    told = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return {"reason": f"failed: exit code {done.returncode}: {told[:100]}"}


def run_turns(options: argparse.Namespace, runner: Runner) -> Results:
    """Measure all sides, one after the other, as often as asked for."""
    machine = runner.needed("machine")
    machine = {"cpu": _cpu_name(), **{key: machine[key] for key in ("cores", "device", "gpu")}}
    results = Results(options.model, options.weights, options.repeats, machine, _versions())
    rivals = []
    for rival, library in RIVALS.items():
        if rival in options.without:
            results.missing[rival] = "left out"
        elif importlib.util.find_spec(library) is None:
            results.missing[rival] = "not installed"
        else:
            rivals.append(rival)
    for turn in range(options.repeats):
        print(f"turn {turn + 1} of {options.repeats}", file=sys.stderr)
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
    """Measure the best configuration; in the first turn all, to learn which one it is."""
    if results.best is not None:
        best = results.best
        return runner.needed("model", precision=best.precision, compiled=best.compiled)
    every: list[dict[str, Any]] = []
    for precision in PRECISIONS[results.machine["device"].partition(":")[0]]:
        for compiled in (False,) if eager else (False, True):
            measure = runner if every else runner.needed  # the first is what others are compared to
            figures = measure("model", precision=precision, compiled=compiled)
            told = {key: figures[key] for key in CONFIGURATION_FIGURES if key in figures}
            results.configurations.append(Configuration(precision, compiled, **told))
            every.append(figures)
    faithful = [
        (place, one)
        for place, one in enumerate(results.configurations)
        if not one.reason and one.least_cosine >= LEAST_COSINE
    ]
    place, results.best = max(faithful, key=lambda pair: pair[1].images_per_second)
    return every[place]


def _cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for library in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


@contextmanager
def copies_of(folder: Path, copies: int) -> Iterator[Path]:
    """A folder in which every image of ``folder`` is ``copies`` times, as links."""
    if copies == 1:
        yield folder
        return
    with tempfile.TemporaryDirectory() as repeated:
        for number in range(copies):
            os.symlink(os.path.abspath(folder), Path(repeated) / COPY.format(number))
        yield Path(repeated)


def read_once(folder: Path) -> None:
    """Read all files, so that the first side does not wait for a disk that others need no more."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file, open(os.devnull, "wb") as nowhere:
                shutil.copyfileobj(file, nowhere)


# ---------------------------------------------------------------------------------------------
# Showing

COLUMNS = ("images/s", "least", "most", "of limit", "ratio", "process s", "peak MiB")


def show(results: Results) -> None:
    """Print the tables."""
    machine = results.machine
    print(
        f"{results.model}, weights {results.weights}, {results.images} images, "
        f"{results.repeats} turns"
    )
    device = f"{machine['device']} {machine['gpu']}".strip()
    print(f"{machine['cpu']}, {machine['cores']} cores, device {device}")
    print(", ".join(f"{library} {version}" for library, version in results.versions.items()))
    print("\n" + _row("model alone", ("images/s", "least cos", "compile s")))
    for one in results.configurations:
        print(_configuration_row(one))
    print("\n" + _row("", COLUMNS))
    for part in ("decode", "model"):
        print(_row(part, _spread(results.rates(part))))
    print(_row("limit", (f"{results.limit:.1f}",)))
    for side in ("extract", *results.rivals):
        print(_side_row(results, side))
    for rival, reason in results.missing.items():
        print(f"  {rival:20} {reason}")
    formula = "1 / (1/decode + 1/model)" if machine["device"] == "cpu" else "min(decode, model)"
    if results.best is not None:
        print(f"\nmodel: {results.best.name}, the fastest with a cosine of {LEAST_COSINE} or more")
    print(f"limit: {formula}")
    print("ratio: extract to this side, the median of the turns")
    print("peak MiB: of the main process; worker processes come on top of it")


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:20}" + "".join(f" {cell:>9}" for cell in cells)


def _spread(rates: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{rate:.1f}" for rate in (statistics.median(rates), min(rates), max(rates)))


def _configuration_row(one: Configuration) -> str:
    if one.reason:
        return f"  {one.name:20} {one.reason}"
    compiling = "-" if one.compile_seconds is None else f"{one.compile_seconds:.1f}"
    cells = (f"{one.images_per_second:.1f}", f"{one.least_cosine:.6f}", compiling)
    return _row(one.name, cells)


def _side_row(results: Results, side: str) -> str:
    turns = results.sides[side]
    ratio = f"{statistics.median(results.ratios(side)):.2f}" if side in RIVALS else ""
    seconds = statistics.median(figures["process_seconds"] for figures in turns)
    peak = max(figures["peak_mib"] for figures in turns)
    share = f"{results.median(side) / results.limit:.0%}"
    row = _row(side, (*_spread(results.rates(side)), share, ratio, f"{seconds:.1f}", f"{peak:.0f}"))
    images = turns[0]["images"]
    return row if images == results.images else f"{row}   ({images} images)"


def plot(results: Results, file: str) -> None:
    """Draw the rates as bars, and the limit as a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{file} was not drawn, since matplotlib is not installed", file=sys.stderr)
        return
    sides = ["extract", *results.rivals]
    figure = Figure(figsize=(8, 1.5 + 0.5 * len(sides)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(sides, [results.median(side) for side in sides], color="tab:gray")
    bars[0].set_color("tab:blue")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(results.limit, color="tab:red", linestyle="--")
    axes.set_xlim(0, 1.1 * max(results.limit, *map(results.median, sides)))
    axes.annotate(
        f"limit {results.limit:.1f}",
        (results.limit, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        color="tab:red",
        ha="center",
    )
    axes.invert_yaxis()
    axes.set_xlabel("images/s")
    where = results.machine["gpu"] or f"{results.machine['cpu']}, {results.machine['cores']} cores"
    axes.set_title(f"{results.model}, {results.images} images, {where}", pad=20, fontsize="medium")
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure, and show what came of it."""
    options = _parser().parse_args()
    if options.side:
        task = argparse.Namespace(**json.loads(options.side))
        if task.side in OURS:  # as the command does
            keep_freed_memory()
            spin_briefly()  # before torch is imported, which the next lines do
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
    if options.plot:
        plot(results, options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="of extract")
    parser.add_argument("--compile", help="of extract; by default it is not told")
    parser.add_argument(
        "--eager", action="store_true", help="do not try torch.compile on the model alone"
    )
    parser.add_argument("--copies", type=_positive, default=1, help="take every image so often")
    parser.add_argument("--repeats", type=_positive, default=3)
    parser.add_argument(
        "--without", nargs="+", action="extend", choices=RIVALS, default=[], help="leave these out"
    )
    parser.add_argument("--json", metavar="FILE", help="all figures, for a program; - prints them")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the rates; needs matplotlib")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
    return int(text)


if __name__ == "__main__":
    main()
