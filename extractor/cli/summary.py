"""Summary of a run, as the command prints it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from extractor.text import counts_in_words, excluded_in_words, plural

if TYPE_CHECKING:
    from extractor.report import Report, StoreReport

__all__ = ["summary"]


def summary(report: Report) -> list[tuple[str, str]]:
    """Return what a run did, as rows of a name and a text."""
    rows = [row for store in report.stores for row in _store_rows(store)]
    rows += _run_rows(report)
    if report.passed_over:
        files = plural(report.passed_over, "file")
        rows.append(("skipped", f"{files}: {counts_in_words(report.skipped)}"))
    if report.excluded:
        total = excluded_in_words(report.excluded)
        rows.append(("excluded", f"{total}: {counts_in_words(report.excluded)}"))
    return rows


def _store_rows(store: StoreReport) -> Iterator[tuple[str, str]]:
    images = plural(store.rows + store.failed, "image")
    shape = " x ".join(str(axis) for axis in store.shape)
    yield "model", store.backbone
    yield "rows", f"{store.rows:,} of {images}, {shape} numbers each"
    if store.size:
        hint = "; --test-size takes it" if "; test size" in store.size else ""
        yield "image size", f"{store.size}{hint}"
    yield "store", f"{store.out}"
    if 0 < store.added < store.rows or store.changed or store.gone:
        yield "new", plural(store.added, "row")
    if store.changed or store.gone:
        changed = plural(store.changed, "changed image")
        gone = plural(store.gone, "removed image")
        yield "retired", f"rows of {changed} and {gone}; run extract compact to drop them"
    if store.failed:
        yield "failed", f"{plural(store.failed, 'image')}, listed in {store.out}/failures.jsonl"
        for path, reason in store.first_failures:
            yield "", f"{path}: {reason}"
        if store.failed > len(store.first_failures):
            yield "", "..."


def _run_rows(report: Report) -> Iterator[tuple[str, str]]:
    if report.resumed == report.images:
        changed = any(store.changed or store.gone for store in report.stores)
        yield "up to date", f"nothing to {'compute' if changed else 'do'}"
        yield "time", f"{report.seconds:.1f} s"
        return
    if report.resumed:
        yield "resumed", f"after {plural(report.resumed, 'image')}"
    yield "device", f"{report.device}, {_precision(report)}"
    total, loading = f"{report.seconds:.1f} s", f"{report.load_seconds:.1f} s"
    rate = f"{report.images_per_second:,.1f} images/s"
    yield "time", f"{total}, including {loading} to load and tune; then {rate}"
    if report.spent is not None and report.spent.bound:
        yield "", report.spent.bound


def _precision(report: Report) -> str:
    """Return the precision with its measured fidelity, and whether a network was compiled."""
    text = report.precision
    if report.least_cosine is not None:
        text += f" (cosine to float32 at least {report.least_cosine:.4f} on a sample)"
    return f"{text}, compiled" if report.is_compiled else text
