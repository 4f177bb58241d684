"""What models there are, and their weights: ``extract models`` and ``extract download``."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from extractor.cli.console import logging_to, print_lines, say, warn
from extractor.errors import ModelError, WeightsError

if TYPE_CHECKING:
    from extractor.models.backbone import Backbone

__all__ = ["download", "list_models"]

LISTING = """\
List the models of timm and torchvision: what one embedding holds, what images they take, and
which published weights there are. A * stands at weights that are on this machine.

  extract models 'resnet*'          those whose names fit
  extract models show resnet50      one of them, with its heads and layers
"""

FETCHING = """\
Fetch the weights of models into the caches that timm and torchvision use, for a machine that will
have no network. What is there already is not fetched again.
"""

# How deep `show` lists modules: resnet50 has layer3.5 on the second level.
DEPTH = 2


def list_models(arguments: Sequence[str]) -> int:
    """Print a table of models, or one of them whole; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="extract models",
        description=LISTING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("glob", nargs="?", default="*", help="such as 'resnet*' or 'timm:vit_*'")
    parser.add_argument("--json", action="store_true", help="for programs")
    if arguments[:1] == ["show"]:
        parser = argparse.ArgumentParser(prog="extract models show")
        parser.add_argument("name", help="of the model, as for --model")
        parser.add_argument("--json", action="store_true", help="for programs")
        parsed = parser.parse_args(arguments[1:])
        with logging_to(warn):
            found = _whole(parsed.name)
        print_lines([json.dumps(found, indent=2)] if parsed.json else _page(found))
        return 0
    parsed = parser.parse_args(arguments)
    with logging_to(warn):
        rows = _rows(parsed.glob)
    print_lines([json.dumps(rows, indent=2)] if parsed.json else _table(rows))
    return 0


def download(arguments: Sequence[str]) -> int:
    """Fetch weights and print where they lie; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="extract download",
        description=FETCHING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="of a model, as for --model")
    parser.add_argument(
        "--weights", default="default", metavar="TAG", help="of the library (default: its default)"
    )
    parsed = parser.parse_args(arguments)
    from extractor.models import load
    from extractor.models.weight_files import sha256_of_weights

    failed = 0
    with logging_to(warn):
        for name in parsed.names:
            try:
                found = load.fetch(name, parsed.weights)
                print_lines([f"{name}: {found.path} (sha256 {sha256_of_weights(found)})"])
            except (ModelError, WeightsError) as error:
                say(f"extract: {error}")
                failed += 1
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------


def _rows(glob: str) -> list[dict[str, Any]]:
    from extractor.models import from_timm, from_torchvision
    from extractor.models.catalog import Catalog

    catalog, rows = Catalog.read(), []
    for library, room in (("timm", from_timm), ("torchvision", from_torchvision)):
        for name in room.names():
            full = f"{library}:{name}"
            if not (fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(full, glob)):
                continue
            entry = catalog.entry(full)
            rows.append(
                {
                    "model": full,
                    "name": name,
                    "source": library,
                    "dim": entry.dim,
                    "parameters": entry.parameters,
                    "input_size": list(entry.input_size),
                    "weights": [
                        {"tag": tag, "cached": None if cached is None else str(cached.path)}
                        for tag, cached in room.known_weights(name)
                    ],
                }
            )
    if not rows:
        hint = "see extract models" if "*" in glob else f"try a glob such as '*{glob}*'"
        raise ModelError(f"no model fits {glob!r}; {hint}")
    return rows


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
    return " ".join(f"{one['tag']}{'*' if one['cached'] else ''}" for one in known) or "none"


def _whole(name: str) -> dict[str, Any]:
    from extractor.models import from_timm, from_torchvision, load
    from extractor.models.catalog import outline

    library, own_name = load.resolve_name(name)
    if library == "file" or own_name.startswith(from_timm.SCHEMES):
        backbone, known = load.load_backbone(name, device="cpu"), []
    else:
        if library == "timm":  # with a tag, which must be one that there is
            own_name = from_timm.full_name(own_name).partition(".")[0]
        backbone = outline(library, own_name)
        known = (from_timm if library == "timm" else from_torchvision).known_weights(own_name)
    return {
        "model": backbone.provenance.model,
        "library_version": backbone.provenance.library_version,
        "dim": backbone.dim,
        "definition": backbone.outputs[0].definition,
        "parameters": sum(value.numel() for value in backbone.module.parameters()),
        "heads": list(backbone.heads),
        "preprocess": backbone.preprocess.as_dict(),
        "weights": [
            {"tag": tag, "cached": None if cached is None else str(cached.path)}
            for tag, cached in known
        ],
        "layers": _layers(backbone),
    }


def _layers(backbone: Backbone) -> list[dict[str, Any]]:
    """Names of the modules down to :data:`DEPTH`, and what each gives for one image."""
    from extractor.network.taps import output_shapes

    given = output_shapes(backbone.module, backbone.preprocess.input_size)
    return [
        {"layer": name, "kind": type(module).__name__, "shape": given.get(name)}
        for name, module in backbone.module.named_modules()
        if name and name.count(".") < DEPTH and (not given or name in given)
    ]


def _page(found: dict[str, Any]) -> list[str]:
    pixels = found["preprocess"]
    height, width = pixels["input_size"]
    definition = {"pre-logits": "", "pooled-features": " (it has no classifier)"}
    lines = [
        ("model", found["model"]),
        ("embedding", f"{found['dim']} numbers, {found['definition']}"),
        ("parameters", _millions(found["parameters"])),
        ("heads", ", ".join(found["heads"]) or f"none{definition.get(found['definition'], '')}"),
        ("images", f"{height} x {width}, {pixels['interpolation']}, resize {pixels['resize']}"),
        ("mean, std", f"{pixels['mean']}, {pixels['std']}"),
        ("weights", _tags(found["weights"])),
    ]
    page = [f"{name:12} {text}" for name, text in lines]
    page += ["", "layers, for --layer and --bypass; each holds more, such as NAME.0"]
    names = [one["layer"] for one in found["layers"]]
    wide = max(map(len, names), default=0)
    for one in found["layers"]:
        shape = one["shape"]
        size = "" if shape is None else " x ".join(map(str, shape))
        page.append(f"  {one['layer']:{wide}}  {size:18} {one['kind']}".rstrip())
    return page
