"""Commands that read a store: ``extract info``, ``extract verify`` and ``extract compact``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extractor.errors import UsageError
from extractor.options import Options
from extractor.terminal.console import Bar, logging_to, print_lines, warn
from extractor.terminal.parser import Parser
from extractor.text import plural

if TYPE_CHECKING:
    from extractor.reading.reader import FeatureStore
    from extractor.store.format import Description

__all__ = ["compact", "compact_parser", "info", "info_parser", "verify", "verify_parser"]

# A truncated store may have one problem per row; more lines than this help nobody.
MAX_PROBLEMS_SHOWN = 100


def info_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract info``."""
    parser = Parser(prog="extract info", description="Show what a store holds and how it was made.")
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    return parser


def info(arguments: Sequence[str]) -> int:
    """Print what a store's manifest says; return the exit code."""
    parsed = info_parser().parse_args(arguments)
    from extractor.reading.reader import FeatureStore

    store = FeatureStore.open(parsed.store)
    if parsed.json:
        print_lines([store.manifest.to_json().rstrip("\n")])
    else:
        print_lines(_page(store))
    return 0


def _page(store: FeatureStore) -> list[str]:
    manifest = store.manifest
    lines = [
        ("store", str(store.path)),
        ("made", manifest.created),
        *_model_lines(manifest.description.backbone),
        ("embedding", _embedding(store)),
        *_transform_lines(manifest.description),
        ("computed", _computation(manifest.description.computation)),
        (
            "images",
            f"{manifest.images:,}: {plural(manifest.rows, 'row')}, "
            f"{plural(manifest.failed, 'failure')}",
        ),
    ]
    if manifest.retired:
        retired = plural(manifest.retired, "row")
        lines.append(("retired", f"{retired}; run extract compact to remove them"))
    shard_images = plural(manifest.description.shard_images, "image")
    software = manifest.description.software.items()
    lines += [
        ("root", ascii(manifest.description.root)[1:-1]),
        ("shards", f"{len(manifest.shards)}, each of up to {shard_images}"),
        ("software", ", ".join(f"{name} {version}" for name, version in software)),
    ]
    return [f"{name:10} {text}" for name, text in lines]


def _model_lines(backbone: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for part in backbone.get("parts", [backbone]):
        library = f"{part.get('library', '')} {part.get('library_version')}"
        weights = f"{part.get('weights')} {part.get('tag', '')}".rstrip()
        replaced = [*part.get("heads", []), *part.get("bypassed", [])]
        lines += [
            ("model", f"{part['model']} ({library})"),
            ("weights", f"{weights}, sha256 {part['sha256']}"),
            ("identity", ", ".join(replaced) or "none"),
        ]
        if part.get("kept_heads"):
            lines.append(("kept heads", ", ".join(part["kept_heads"])))
    return lines


def _embedding(store: FeatureStore) -> str:
    description = store.manifest.description
    embedding = description.embedding
    layer = embedding.get("layer")
    parts = [
        f"{embedding['definition']} {layer}" if layer else embedding["definition"],
        f"pool {embedding['pool'] or 'none'}" if layer else "",
        " x ".join(map(str, description.shape)),
        description.dtype,
        *_views(embedding),
        "unit length" if embedding.get("normalized") else "",
    ]
    return ", ".join(filter(None, parts))


def _transform_lines(description: Description) -> list[tuple[str, str]]:
    """Return what ``extract transform`` did, from which store, and what it was fitted on."""
    made = description.transform
    if made is None:
        return []
    unit = "unit length" if made["normalize"] else ""
    kept = f"PCA {made['of']['dim']} to {made['pca']}" if made["pca"] is not None else ""
    again = unit if kept else ""
    steps = [unit, kept, "whitening" if made["whiten"] else "", again]
    shown = ", ".join(filter(None, steps)) or f"{made['of']['dtype']} to {description.dtype}"
    fit = made["fit"]
    lines = [("transform", shown), ("source", ascii(made["source"]["store"])[1:-1])]
    if fit is not None:
        lines.append(("fitted on", f"{plural(fit['rows'], 'row')} of {ascii(fit['store'])[1:-1]}"))
    return lines


def _views(embedding: Mapping[str, Any]) -> list[str]:
    """Return which views of an image were averaged, in words."""
    flip = "mean with the mirror image" if embedding.get("augment") == "flip" else ""
    factors = " and ".join(f"{scale:g}" for scale in embedding.get("scales", ()))
    return [flip, factors and f"mean over scales {factors}"]


def _computation(computation: Mapping[str, Any]) -> str:
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in computation.items() if value]
    return ", ".join(parts).replace("compiled True", "compiled")


def compact_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract compact``."""
    parser = Parser(
        prog="extract compact",
        description="Rewrite a store without the rows of images that changed or went, sorted by "
        "path like a new store. The old store stays until the new one is complete, so the disk "
        "needs room for both.",
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument(
        "--no-lock",
        dest="lock",
        action="store_false",
        help="write to a file system without file locks",
    )
    return parser


def compact(arguments: Sequence[str]) -> int:
    """Rewrite a store without retired rows; return the exit code."""
    parsed = compact_parser().parse_args(arguments)
    from extractor.run.run_json import relink_run_json
    from extractor.upkeep.compact import compact as rewrite

    folder = Path(parsed.store)
    with Bar(quiet=False, status="opening the store ...", unit="row") as bar:
        progress = bar.follow({"reading": "checking every byte ..."})
        before, after = rewrite(folder, lock=parsed.lock, progress=progress)
    if after.checksum == before.checksum:
        print_lines([f"{folder}: already compact ({plural(after.rows, 'row')})"])
        return 0
    relink_run_json(folder, before, after)
    shards = f"{plural(len(before.shards), 'shard')} into {len(after.shards)}"
    removed = f"{plural(before.retired, 'row')} removed, {after.rows:,} left"
    print_lines([f"{folder}: compacted {shards}; {removed}"])
    return 0


def verify_parser() -> argparse.ArgumentParser:
    """Return the parser of ``extract verify``."""
    parser = Parser(
        prog="extract verify",
        description="Check every byte of a store: sizes, checksums, shapes, row counts and values.",
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument("--images", action="store_true", help="check the image files, too")
    parser.add_argument("--root", metavar="FOLDER", help="where the images are now")
    parser.add_argument(
        "--recompute", type=int, metavar="N", help="compute N random rows again and compare"
    )
    parser.add_argument("--weights", metavar="FILE", help="your own weights, for --recompute")
    parser.add_argument(
        "--device",
        default=Options().device,
        help="device for --recompute (default: %(default)s)",
    )
    return parser


def verify(arguments: Sequence[str]) -> int:
    """Check every byte of a store; return 1 if there is a problem, else 0."""
    parsed = verify_parser().parse_args(arguments)
    if parsed.recompute is not None and parsed.recompute < 1:
        raise UsageError(f"recompute: got {parsed.recompute}, expected 1 or more")
    problems = _problems(Path(parsed.store), parsed)
    hidden = len(problems) - MAX_PROBLEMS_SHOWN
    more = [f"and {plural(hidden, 'more problem')}"] if hidden > 0 else []
    print_lines([*problems[:MAX_PROBLEMS_SHOWN], *more])
    if problems:
        return 1
    from extractor.reading.reader import FeatureStore

    manifest = FeatureStore.open(parsed.store).manifest
    counts = f"{plural(manifest.rows, 'row')}, {plural(manifest.failed, 'failure')}"
    print_lines([f"{parsed.store}: OK ({counts})"])
    return 0


def _problems(folder: Path, parsed: argparse.Namespace) -> list[str]:
    """Return one sentence per problem; later checks run only if the earlier ones found none."""
    from extractor.reading.reader import FeatureStore
    from extractor.upkeep.verify import verify as problems_of
    from extractor.upkeep.verify import verify_images

    with Bar(quiet=False, status="opening the store ...", unit="row") as bar:
        problems = list(problems_of(folder, bar.follow({})))
    if not problems and parsed.images:
        with Bar(quiet=False, status="opening the images ...", unit="image") as bar:
            problems += verify_images(folder, parsed.root, bar.follow({}))
    if not problems and parsed.recompute:
        from extractor.run.recompute import recompute

        with logging_to(warn):
            store = FeatureStore.open(folder)
            problems += recompute(
                store, parsed.recompute, weights=parsed.weights, device=parsed.device
            )
    return problems
