"""What is in a store and whether it is right: ``extract info`` and ``extract verify``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extractor.cli.console import logging_to, print_lines, warn
from extractor.errors import UsageError

if TYPE_CHECKING:
    from extractor.store.reader import FeatureStore

__all__ = ["compact", "info", "verify"]

# Problems that are printed; a store that was cut may have one for each row.
SHOWN = 100


def info(arguments: Sequence[str]) -> int:
    """Print what a store's manifest says; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="extract info", description="Show what a store holds and how it was made."
    )
    parser.add_argument("store", metavar="STORE", help="its folder")
    parser.add_argument("--json", action="store_true", help="the manifest itself, for programs")
    parsed = parser.parse_args(arguments)
    from extractor.store.reader import FeatureStore

    store = FeatureStore.open(parsed.store)
    if parsed.json:
        print_lines([store.manifest.to_json().rstrip("\n")])
    else:
        print_lines(_page(store))
    return 0


def _page(store: FeatureStore) -> list[str]:
    manifest = store.manifest
    made, embedding = manifest.description, manifest.description.embedding
    parts = made.backbone.get("parts", [made.backbone])
    shape = " x ".join(map(str, made.shape))
    what = embedding.get("layer") and f" {embedding['layer']}, pool {embedding['pool'] or 'none'}"
    lines = [("store", str(store.path)), ("made", manifest.created)]
    for part in parts:
        weights = f"{part.get('weights')} {part.get('tag', '')}"
        lines += [
            ("model", f"{part['model']} ({part.get('library', '')} {part.get('library_version')})"),
            ("weights", f"{weights.rstrip()}, sha256 {part['sha256']}"),
            ("identity", ", ".join([*part.get("heads", []), *part.get("bypassed", [])]) or "none"),
        ]
    unit = ", unit length" if embedding.get("normalized") else ""
    lines += [
        ("embedding", f"{embedding['definition']}{what or ''}, {shape}, {made.dtype}{unit}"),
        ("computed", _computed(made.computation)),
        ("images", f"{manifest.images}: {manifest.rows} rows, {manifest.failed} failures"),
        ("retired", f"{manifest.retired} rows; extract compact removes them"),
        ("root", ascii(made.root)[1:-1]),
        ("shards", f"{len(manifest.shards)}, of {made.shard_images} images"),
        ("software", ", ".join(f"{key} {value}" for key, value in made.software.items())),
    ]
    lines = [line for line in lines if line[0] != "retired" or manifest.retired]
    return [f"{name:10} {text}" for name, text in lines]


def _computed(computation: Mapping[str, Any]) -> str:
    told = [f"{key.replace('_', ' ')} {value}" for key, value in computation.items() if value]
    return ", ".join(told).replace("compiled True", "compiled")


def compact(arguments: Sequence[str]) -> int:
    """Rewrite a store without retired rows; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="extract compact",
        description="Rewrite a store without the rows of images that changed or went since, sorted "
        "by path as a fresh one. The old store stands until the new one is complete, so there must "
        "be room for both.",
    )
    parser.add_argument("store", metavar="STORE", help="its folder")
    parser.add_argument(
        "--no-lock", dest="lock", action="store_false", help="where files cannot be locked"
    )
    parsed = parser.parse_args(arguments)
    from extractor.run.run_json import follow
    from extractor.store.compact import compact as rewrite

    folder = Path(parsed.store)
    before, after = rewrite(folder, lock=parsed.lock)
    if after.checksum == before.checksum:
        print_lines([f"{folder} is compact: {after.rows} rows"])
        return 0
    follow(folder, before, after)
    shards = f"{len(before.shards)} shards are {len(after.shards)}"
    print_lines([f"{folder}: {after.rows} rows, {before.retired} retired ones removed, {shards}"])
    return 0


def verify(arguments: Sequence[str]) -> int:
    """Look at every byte of a store; returns 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="extract verify",
        description="Look at every byte of a store: sizes, checksums, shapes, row counts, values.",
    )
    parser.add_argument("store", metavar="STORE", help="its folder")
    parser.add_argument("--images", action="store_true", help="look at the image files, too")
    parser.add_argument("--root", metavar="FOLDER", help="where the images are now")
    parser.add_argument("--recompute", type=int, metavar="N", help="draw N rows again and compare")
    parser.add_argument("--weights", metavar="FILE", help="for --recompute, of the user's own")
    parser.add_argument("--device", default="auto", help="for --recompute (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    if parsed.recompute is not None and parsed.recompute < 1:
        raise UsageError(f"recompute: got {parsed.recompute}, expected 1 or more")
    from extractor.store.reader import FeatureStore
    from extractor.store.verify import verify as problems_of
    from extractor.store.verify import verify_images

    folder = Path(parsed.store)
    problems = list(problems_of(folder))
    if not problems and parsed.images:
        problems += verify_images(folder, parsed.root)
    if not problems and parsed.recompute:
        from extractor.run.recompute import recompute

        with logging_to(warn):
            store = FeatureStore.open(folder)
            problems += recompute(
                store, parsed.recompute, weights=parsed.weights, device=parsed.device
            )
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    print_lines([*problems[:SHOWN], *more])
    if not problems:
        manifest = FeatureStore.open(folder).manifest
        print_lines([f"{folder} is right: {manifest.rows} rows, {manifest.failed} failures"])
    return 1 if problems else 0
