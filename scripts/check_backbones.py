#!/usr/bin/env python3
"""Check the embedding of every timm and torchvision model, and write the tables of models.

    scripts/check_backbones.py                     # all models; takes hours on a small machine
    scripts/check_backbones.py 'timm:resnet*'      # some models
    scripts/check_backbones.py --families          # the smallest of each family, in minutes

Each model is built twice: as its library builds it, and as the program builds it. Shapes are
compared on torch's meta device. Values are compared on the CPU in float32, if they fit in memory,
with the same weights and the smallest images that the model takes. The reference shares no code
with the program:

- timm: ``forward_head(forward_features(x), pre_logits=True)``;
- torchvision: the input of the last layer with weights, as a hook sees it;
- encoders without classifier: the mean of the output over all positions.

--results FILE keeps finished results, one JSON object per line, and skips them next time. --write
writes docs/backbones.md and extractor/models/catalog.tsv. --add keeps the models that these tables
already have.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import json
import math
import multiprocessing
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from extractor.models import from_timm, from_torchvision
from extractor.models.backbone import Backbone
from extractor.models.catalog import Catalog, Entry, outline, survey
from extractor.models.libraries import seeded
from extractor.models.load import load_backbone

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "backbones.md"
CATALOG = ROOT / "extractor" / "models" / "catalog.tsv"

TOLERANCE = 1e-4  # of the largest number in the embeddings
SIZES = (64, 96, 128, 160, 192, 224, 256)
BATCH = 2

NOT_FINITE = "the reference itself is constant or not finite"

PRE_LOGITS = "pre_logits of the untouched model"
HOOK = "input of the last layer with weights"
POOLED = "mean over positions"


@dataclass(frozen=True)
class Result:
    """Result of checking one model.

    Attributes:
        model: Full name of the model.
        entry: Its line of the catalog; empty if it cannot be built.
        rule: Reference that it was compared with.
        family: Module of the library that defines it.
        size: (height, width) of the images for comparing values; None if only shapes were compared.
        error: Largest difference, relative to the largest value.
        problem: Why the model is wrong; empty if it is correct.
        seconds: Duration of the check.
    """

    model: str
    entry: str
    rule: str
    family: str
    size: tuple[int, int] | None
    error: float | None
    problem: str
    seconds: float

    def to_line(self) -> str:
        """Return the result as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Result:
        """Read what :meth:`to_line` wrote."""
        content = json.loads(line)
        size = content["size"]
        return cls(**{**content, "size": None if size is None else (size[0], size[1])})


# ---------------------------------------------------------------------------------------------
# The models


def every_model() -> list[str]:
    """Return the full names of all models of both libraries."""
    return [f"timm:{name}" for name in from_timm.names()] + [
        f"torchvision:{name}" for name in from_torchvision.names()
    ]


def family(model: str) -> str:
    """Return the module of the library that defines a model."""
    library, _, name = model.partition(":")
    if library == "timm":
        return str(timm.models.model_entrypoint(name).__module__)
    return str(torchvision.models.get_model_builder(name).__module__)


def smallest_of_each_family() -> list[str]:
    """Return the model with the fewest parameters of each family, according to the catalog."""
    catalog = Catalog.read()
    # Of whichever version of the libraries the table is: building all models takes half a minute.
    lines = CATALOG.read_text("ascii").splitlines()[1:]
    parameters = {entry.model: entry.parameters for entry in map(Entry.from_line, lines)}
    smallest: dict[str, tuple[int, str]] = {}
    for model in every_model():
        candidate = parameters.get(model) or catalog.entry(model).parameters, model
        key = family(model)
        smallest[key] = min(smallest.get(key, candidate), candidate)
    return sorted(model for _, model in smallest.values())


# ---------------------------------------------------------------------------------------------
# The references


def untouched(model: str) -> nn.Module:
    """Build a model as its library does, with its classifiers."""
    library, _, name = model.partition(":")
    if library == "timm":
        return timm.create_model(name).eval()
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):  # as the library sets it for its own weights
        options = {"transform_input": True, "init_weights": False}
    if name.startswith("vit_"):
        entry = torchvision.models.get_model_weights(name).DEFAULT
        options = {"image_size": entry.meta["min_size"][0]}
    return torchvision.models.get_model(name, weights=None, **options).eval()


def reference(network: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Return (embeddings, name of the rule that they follow)."""
    if not type(network).__module__.startswith("timm."):
        return _input_of_last_layer(network, pixels), HOOK
    if not hasattr(network, "reset_classifier"):
        output = network(pixels)
        # (B, tokens, channels) of a transformer, (B, channels, rows, columns) of a convolution
        return output.mean((2, 3)) if output.ndim == 4 else output.mean(1), POOLED
    output = network.forward_head(network.forward_features(pixels), pre_logits=True)  # type: ignore[operator]
    return output.flatten(1) if output.shape[2:].numel() == 1 else output, PRE_LOGITS


def _input_of_last_layer(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for module in network.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        network(pixels)
    last = seen[-1]
    return last.mean((2, 3)) if last.ndim == 4 else last


# ---------------------------------------------------------------------------------------------
# The check


def check(model: str, *, values: bool = True, max_parameters: float = math.inf) -> Result:
    """Build a model twice and compare the embeddings."""
    started = time.perf_counter()
    entry, rule, size, error, problem = "", "", None, None, ""
    try:
        seen = survey(*model.split(":", 1))
        entry = seen.to_line()
        rule, problem = _check_shapes(model, seen)
        if values and not problem and seen.parameters <= max_parameters:
            size, error, problem = _check_values(model, seen)
    except Exception as fault:
        problem = f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"
    gc.collect()
    seconds = round(time.perf_counter() - started, 2)
    return Result(model, entry, rule, family(model), size, error, problem, seconds)


def _check_shapes(model: str, entry: Entry) -> tuple[str, str]:
    """(rule, problem) of a model that is built on the meta device."""
    backbone = outline(*model.split(":", 1))
    for name in backbone.heads:
        if not isinstance(backbone.module.get_submodule(name), nn.Identity):
            return "", f"{name} is no nn.Identity"
    with torch.inference_mode():
        try:
            with torch.device("meta"):
                network = untouched(model)
                pixels = torch.zeros(BATCH, 3, *entry.input_size)
            expected, rule = reference(network, pixels)
        except RuntimeError:
            return HOOK, ""  # cannot be built there: its values are checked all the same
    if expected.shape != (BATCH, entry.dim):
        return rule, f"reference {tuple(expected.shape)}, expected {(BATCH, entry.dim)}"
    return rule, ""


def _check_values(model: str, entry: Entry) -> tuple[tuple[int, int], float, str]:
    """(size of the images, relative error, problem)."""
    size, error, problem = _check_random(model, entry, 1.0)
    if problem == NOT_FINITE:  # very deep networks grow beyond all numbers
        size, error, problem = _check_random(model, entry, 0.5)
    return size, error, problem


def _check_random(model: str, entry: Entry, gain: float) -> tuple[tuple[int, int], float, str]:
    """As :func:`_check_values`, with weights that are drawn this much smaller than usual."""
    with quickly_initialized(gain):
        with seeded(0):  # for what is drawn past the block all the same
            network = untouched(model)
        # The program's order of summation: with random weights some networks are chaotic, and
        # another order alone changed EfficientNetV2-L by a tenth (in float64 by 2e-9).
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        size, expected = _at_smallest_size(network, entry.input_size)
        del network
        gc.collect()
        backbone = load_backbone(model, weights="random", device="cpu")
    got = backbone(_pixels(size))
    return size, *_compare(got, expected, backbone)


def _compare(got: torch.Tensor, expected: torch.Tensor, backbone: Backbone) -> tuple[float, str]:
    if got.shape != expected.shape or got.shape[1] != backbone.dim:
        return math.inf, f"embeddings {tuple(got.shape)}, reference {tuple(expected.shape)}"
    largest = float(expected.abs().max())
    if not math.isfinite(largest) or largest == 0 or float(expected.std()) == 0:
        return math.inf, NOT_FINITE
    error = float((got - expected).abs().max()) / largest
    return error, "" if error <= TOLERANCE else f"relative error {error:.2e}"


def _at_smallest_size(
    network: nn.Module, own: tuple[int, int]
) -> tuple[tuple[int, int], torch.Tensor]:
    """The reference for the smallest images that a network takes."""
    smaller = [(edge, edge) for edge in SIZES if edge < min(own)]
    for size in smaller:
        with contextlib.suppress(Exception), torch.inference_mode():
            expected, _ = reference(network, _pixels(size))
            if expected.isfinite().all() and expected.std() > 0:
                return size, expected
    with torch.inference_mode():
        return own, reference(network, _pixels(own))[0]


def _pixels(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(BATCH, 3, *size, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def quickly_initialized(gain: float) -> Iterator[None]:
    """Draw parameters from one block of numbers, since drawing each costs more than the check.

    The same for every tensor of a shape, so that two networks that are built alike are equal. The
    length of the block is a prime: rows of a matrix do not repeat.
    """
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))

    def draw(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        if tensor.device.type == "meta":
            return tensor
        fan_in = tensor[0].numel() if tensor.ndim > 1 else tensor.numel()
        with torch.no_grad():
            flat = torch.empty(tensor.numel())
            for start in range(0, flat.numel(), len(block)):
                piece = flat[start : start + len(block)]
                torch.mul(block[: len(piece)], gain * fan_in**-0.5, out=piece)
            return tensor.copy_(flat.view(tensor.shape))

    names = ("kaiming_normal_", "kaiming_uniform_", "normal_", "orthogonal_", "trunc_normal_")
    patched: list[tuple[Any, str]] = [
        (nn.init, name) for name in (*names, "uniform_", "xavier_normal_", "xavier_uniform_")
    ]
    patched.append((timm.layers.weight_init, "_trunc_normal_"))
    before: list[Callable[..., torch.Tensor]] = [getattr(module, name) for module, name in patched]
    try:
        for module, name in patched:
            setattr(module, name, draw)
        yield
    finally:
        for (module, name), function in zip(patched, before, strict=True):
            setattr(module, name, function)


# ---------------------------------------------------------------------------------------------
# The tables


def write_tables(results: list[Result]) -> None:
    """Write the catalog for the program and the table for people."""
    entries = [Entry.from_line(result.entry) for result in results if result.entry]
    CATALOG.write_text(Catalog(entries).to_text(), "ascii")
    TABLE.write_text(_table(results), "utf-8")


def _table(results: list[Result]) -> str:
    right = [result for result in results if not result.problem]
    by_value = [result for result in right if result.error is not None]
    by_shape = len(right) - len(by_value)
    rules = Counter(result.rule for result in right)
    versions = f"timm {timm.__version__}, torchvision {torchvision.__version__}"
    lines = [
        "# Backbones",
        "",
        "This page lists every architecture of timm and every classification model of",
        "torchvision. `scripts/check_backbones.py` writes it. The script builds each model twice,",
        "as its library does and as this program does, and compares the embeddings.",
        "",
        f"Versions: {versions}, torch {torch.__version__}. Of {len(results)} models,",
        f"{len(right)} are correct, {len(by_value)} of them by value. "
        "The largest relative error is "
        f"{max((r.error or 0 for r in by_value), default=0):.1e}."
        + (f" Only the shapes of {by_shape} large models were compared." if by_shape else ""),
        "",
        "| reference | models |",
        "|---|---|",
        *(f"| {rule} | {count} |" for rule, count in rules.most_common()),
        "",
    ]
    wrong = [result for result in results if result.problem]
    if wrong:
        lines += ["| wrong | reason |", "|---|---|"]
        lines += [f"| `{result.model}` | {result.problem} |" for result in wrong]
        lines.append("")
    lines += [
        "Parameters do not include classifiers. The last column shows the image size at which",
        "values were compared, and the largest difference relative to the largest value.",
        "",
        "| model | dim | input | parameters | heads replaced | verified |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(result) for result in results if result.entry]
    return "\n".join(lines) + "\n"


def results_of_tables() -> dict[str, Result]:
    """Read the results that the tables hold."""
    catalog = Catalog.read()
    results = {}
    for line in TABLE.read_text("utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        model, *_, verified = (cell.strip(" `") for cell in line.strip("|").split("|"))
        verified, _, pooled = verified.partition("; ")
        rule = pooled or (HOOK if model.startswith("torchvision:") else PRE_LOGITS)
        size, error = None, None
        if verified.startswith("value, "):
            _, edges, relative = verified.split(", ")
            height, width = edges.split(" x ")
            size, error = (int(height), int(width)), float(relative)
        problem = "wrong in the table" if verified == "WRONG" else ""
        line = catalog.entry(model).to_line()
        results[model] = Result(model, line, rule, family(model), size, error, problem, 0.0)
    return results


def _row(result: Result) -> str:
    entry = Entry.from_line(result.entry)
    height, width = entry.input_size
    names = ", ".join(f"`{name}`" for name in entry.heads) or "none left"
    verified = "shape"
    if result.problem:
        verified = "WRONG"
    elif result.size is not None and result.error is not None:
        verified = f"value, {result.size[0]} x {result.size[1]}, {result.error:.0e}"
    if result.rule == POOLED:
        names, verified = "no classifier", f"{verified}; {POOLED}"
    millions = f"{entry.parameters / 1e6:.1f} M"
    cells = (f"`{entry.model}`", entry.dim, f"{height} x {width}", millions, names, verified)
    return f"| {' | '.join(map(str, cells))} |"


# ---------------------------------------------------------------------------------------------


def main() -> int:
    """Check models, print problems, and write the tables on request."""
    options = _parser().parse_args()

    wanted = smallest_of_each_family() if options.families else every_model()
    globs = options.models or ["*"]
    wanted = [name for name in wanted if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
    known: dict[str, Result] = {}
    if options.results and options.results.exists():
        lines = options.results.read_text("utf-8").splitlines()
        known = {result.model: result for result in map(Result.from_line, lines)}

    def is_pending(model: str) -> bool:
        """Return whether there is something left to do for a model."""
        result = known.get(model)
        if result is None or options.shapes:
            return result is None
        small = not result.entry or (
            Entry.from_line(result.entry).parameters <= options.max_parameters
        )
        return bool(result.problem) or (result.error is None and small)

    def size(model: str) -> int:
        """Return the number of parameters if it is known: small models come first."""
        entry = known[model].entry if model in known else ""
        return Entry.from_line(entry).parameters if entry else 0

    left = sorted((model for model in wanted if is_pending(model)), key=size)
    tasks = [(model, not options.shapes, options.max_parameters) for model in left]
    with contextlib.ExitStack() as stack:
        keep = stack.enter_context(options.results.open("a")) if options.results else None
        for result in _results_of(tasks, options.jobs):
            known[result.model] = result
            state = result.problem or (
                "shape" if result.error is None else f"value {result.error:.1e}"
            )
            print(f"{result.model:60} {result.seconds:7.1f} s  {state}", flush=True)
            if keep is not None:
                print(result.to_line(), file=keep, flush=True)
    results = [known[model] for model in wanted if model in known]
    if options.add:
        known = {**results_of_tables(), **known}
        results = [known[model] for model in every_model() if model in known]
    wrong = [result for result in results if result.problem]
    print(f"{len(results) - len(wrong)} of {len(results)} right", file=sys.stderr)
    for result in wrong:
        print(f"WRONG {result.model}: {result.problem}", file=sys.stderr)
    if options.write:
        write_tables(results)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"largest process {peak:.1f} GiB", file=sys.stderr)
    return bool(wrong)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="globs of full names (default: all)")
    parser.add_argument("--families", action="store_true", help="the smallest of each family")
    parser.add_argument("--shapes", action="store_true", help="compare no values")
    parser.add_argument(
        "--max-parameters", type=float, default=1e9, help="compare values up to (default: 1e9)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--results", type=Path, help="file that keeps what is done")
    parser.add_argument("--write", action="store_true", help="write the tables")
    parser.add_argument("--add", action="store_true", help="keep the other entries of the tables")
    return parser


def _results_of(tasks: list[tuple[str, bool, float]], jobs: int) -> Iterator[Result]:
    # Processes are replaced after some models, and take the memory that networks leave with them.
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=_set_up, maxtasksperchild=50) as pool:
        yield from pool.imap_unordered(_task, tasks)


def _set_up() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _task(task: tuple[str, bool, float]) -> Result:
    model, values, max_parameters = task
    return check(model, values=values, max_parameters=max_parameters)


if __name__ == "__main__":
    sys.exit(main())
