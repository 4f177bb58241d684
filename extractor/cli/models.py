"""Commands about models: ``extract models``, ``extract models show`` and ``extract download``."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from extractor.errors import ModelError, WeightsError
from extractor.options import Options
from extractor.terminal.console import Bar, logging_to, print_lines, say, warn
from extractor.terminal.parser import Parser

if TYPE_CHECKING:
    from extractor.models.backbone import Backbone

__all__ = ["download", "download_parser", "list_models", "list_parser", "show_parser"]

LIST_DESCRIPTION = """\
List the models of timm and torchvision with the size of an embedding, the number of parameters, the
input size and the published weights. A * marks weights that are on this machine.

  extract models 'resnet*'          list the models whose names match
  extract models show resnet50      show one model with its heads and layers
"""

DOWNLOAD_DESCRIPTION = """\
Download the weights of models into the caches of timm and torchvision, for example before a job on
a machine without network. Weights that are in the cache are not downloaded again.
"""

# Number of name components shown by `models show`; the second level has resnet50's layer3.5.
DEPTH = 2
RENAMED_SHOWN = 3
SMALLER = 0.71  # a scale to try
SCALES = {True: "any, with --scales", False: "1 only", None: "unknown"}


def list_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract models``."""
    parser = Parser(
        prog="extract models",
        description=LIST_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "glob",
        metavar="GLOB",
        nargs="?",
        default="*",
        help="pattern of model names, such as 'resnet*' or 'timm:vit_*' (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def show_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract models show``."""
    parser = Parser(
        prog="extract models show",
        description="Show one model with its heads, its weights and the shapes of its layers.",
    )
    parser.add_argument("name", metavar="NAME", help="model name, as for --model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def download_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract download``."""
    parser = Parser(
        prog="extract download",
        description=DOWNLOAD_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="model name, as for --model")
    parser.add_argument(
        "--weights",
        default=Options().weights,
        metavar="TAG",
        help="tag of the weights (default: the library's default)",
    )
    return parser


def list_models(arguments: Sequence[str]) -> int:
    """Print a table of models, or one of them in detail; return the exit code."""
    if arguments[:1] == ["show"]:
        return _show(arguments[1:])
    parsed = list_parser().parse_args(arguments)
    with Bar(quiet=False, status="listing models ...", unit="model") as bar, logging_to(bar.warn):
        rows = _rows(parsed.glob, bar.follow({}))
    print_lines([json.dumps(rows, indent=2)] if parsed.json else _table(rows))
    return 0


def _show(arguments: Sequence[str]) -> int:
    parsed = show_parser().parse_args(arguments)
    with logging_to(warn):
        details = _details(parsed.name)
    print_lines([json.dumps(details, indent=2)] if parsed.json else _page(details))
    return 0


def download(arguments: Sequence[str]) -> int:
    """Download weights and print their paths; return the exit code."""
    parsed = download_parser().parse_args(arguments)
    from extractor.models import load

    failed = 0
    with logging_to(warn):
        for name in parsed.names:
            try:
                found = load.fetch(name, parsed.weights)
                digest = found.sha256()
                source = f"{found.package}, " if found.package else ""
                print_lines([f"{name}: {found.path} ({source}sha256 {digest})"])
            except (ModelError, WeightsError) as error:
                say(f"extract: {error}")
                failed += 1
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------


def _rows(glob: str, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    from extractor.models import from_timm, from_torchvision
    from extractor.models.catalog import Catalog

    catalog, rows = Catalog.read(), []
    chosen = [
        (library, module, name)
        for library, module in (("timm", from_timm), ("torchvision", from_torchvision))
        for name in module.names()
        if any(fnmatch.fnmatchcase(each, glob) for each in _spellings(library, name))
    ]
    for done, (library, module, name) in enumerate(chosen, 1):
        full = f"{library}:{name}"
        entry = catalog.entry(full)  # built here if the table is of another release of the library
        rows.append(
            {
                "model": full,
                "name": name,
                "source": library,
                "dim": entry.dim,
                "parameters": entry.parameters,
                "input_size": list(entry.input_size),
                "weights": _weights(module.known_weights(name)),
            }
        )
        progress("listing", done, len(chosen))
    if not rows:
        raise ModelError(f"no model matches {glob!r}; {_no_match_hint(glob)}")
    return rows


def _spellings(library: str, name: str) -> tuple[str, ...]:
    return name, f"{library}:{name}", f"{library}/{name}"


def _no_match_hint(glob: str) -> str:
    from extractor.models import from_timm

    replaced = from_timm.deprecated_names()
    name = glob.removeprefix("timm:")
    renamed = [f"{old} is now {now}" for old, now in replaced.items() if fnmatch.fnmatch(old, name)]
    if renamed:
        more = ", ..." if len(renamed) > RENAMED_SHOWN else ""
        return f"timm renamed {', '.join(renamed[:RENAMED_SHOWN])}{more}"
    return "run extract models to list all" if "*" in glob else f"try a glob such as '*{glob}*'"


def _weights(known: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"tag": tag, "cached": None if cached is None else str(cached.path)}
        for tag, cached in known
    ]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [("model", "dim", "parameters", "input", "weights (* on this machine)")]
    cells += [
        (
            row["model"],
            str(row["dim"]),
            _millions(row["parameters"]),
            "x".join(map(str, row["input_size"])),
            _tags(row["weights"]),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = []
    for model, *numbers, tags in cells:
        aligned = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([f"{model:{widths[0]}}", *aligned, tags]))
    return lines


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M"


def _tags(known: list[dict[str, Any]]) -> str:
    return " ".join(f"{each['tag']}{'*' if each['cached'] else ''}" for each in known) or "none"


def _details(name: str) -> dict[str, Any]:
    from extractor.models import from_timm, from_torchvision, load
    from extractor.models.catalog import outline

    library, own_name = load.resolve_name(name)
    if library == "file" or own_name.startswith(from_timm.SCHEMES):
        backbone, known = load.load_backbone(name, device="cpu"), []
    else:
        if library == "timm":  # the name may end with a tag, which must exist
            own_name = from_timm.full_name(own_name)
        backbone = outline(library, own_name)
        own_name = backbone.provenance.model.partition(":")[2]
        known = (from_timm if library == "timm" else from_torchvision).known_weights(own_name)
    return {
        "model": backbone.provenance.model,
        "library_version": backbone.provenance.library_version,
        "dim": backbone.dim,
        "definition": backbone.outputs[0].definition,
        "parameters": sum(value.numel() for value in backbone.module.parameters()),
        "heads": list(backbone.heads),
        "preprocess": backbone.preprocess.as_dict(),
        "test_preprocess": backbone.evaluations[1].as_dict() if backbone.evaluations else None,
        "other_sizes": _takes_other_sizes(backbone),
        "weights": _weights(known),
        "layers": _layers(backbone),
    }


def _takes_other_sizes(backbone: Backbone) -> bool | None:
    """Return whether the network also embeds smaller images; None if it cannot be tried."""
    import torch

    from extractor.models.load import with_views
    from extractor.network.probe import PROBE_IMAGES
    from extractor.network.views import Views

    size = backbone.preprocess.input_size
    weight = next(backbone.module.parameters(), torch.zeros(()))
    tried = replace(backbone, device=weight.device)  # perhaps the meta device
    try:
        tried.embed(torch.zeros(PROBE_IMAGES, 3, *size))
    except Exception:  # some networks need values
        return None
    try:
        with_views(tried, Views(scales=(1.0, SMALLER)), Options())
    except ModelError:
        return False
    return True


def _layers(backbone: Backbone) -> list[dict[str, Any]]:
    """Return the modules down to :data:`DEPTH`, with the shape of each output for one image."""
    from extractor.network.taps import output_shapes

    shapes = output_shapes(backbone.module, backbone.preprocess.input_size)
    return [
        {"layer": name, "kind": type(module).__name__, "shape": shapes.get(name)}
        for name, module in backbone.module.named_modules()
        if name and name.count(".") < DEPTH and (not shapes or name in shapes)
    ]


def _test_size(pixels: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if pixels is None:
        return []
    return [("test size", f"{_size(pixels)}; use --test-size")]


def _size(pixels: Mapping[str, Any]) -> str:
    (height, width), (resized_height, resized_width) = pixels["input_size"], pixels["resize_size"]
    return f"{height} x {width}, resize {pixels['resize']} to {resized_height} x {resized_width}"


def _page(details: dict[str, Any]) -> list[str]:
    pixels = details["preprocess"]
    definition = {"pre-logits": "", "pooled-features": " (it has no classifier)"}
    lines = [
        ("model", details["model"]),
        ("embedding", f"{details['dim']} numbers, {details['definition']}"),
        ("parameters", _millions(details["parameters"])),
        (
            "heads",
            ", ".join(details["heads"]) or f"none{definition.get(details['definition'], '')}",
        ),
        ("images", f"{_size(pixels)}, {pixels['interpolation']}"),
        *_test_size(details["test_preprocess"]),
        ("scales", SCALES[details["other_sizes"]]),
        ("mean, std", f"{pixels['mean']}, {pixels['std']}"),
        ("weights", _tags(details["weights"])),
    ]
    page = [f"{name:12} {text}" for name, text in lines]
    page += ["", "layers for --layer and --bypass; deeper ones, such as NAME.0, work as well"]
    widest = max((len(layer["layer"]) for layer in details["layers"]), default=0)
    for layer in details["layers"]:
        shape = layer["shape"]
        size = "" if shape is None else " x ".join(map(str, shape))
        page.append(f"  {layer['layer']:{widest}}  {size:18} {layer['kind']}".rstrip())
    return page
