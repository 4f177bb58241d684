"""Summary of a run, as the command prints it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from extractor.text import counts_in_words, excluded_in_words, plural

if TYPE_CHECKING:
    from extractor.report import Report, StoreReport

__all__ = ["summary", "warnings"]

FOLDERS_SHOWN = 5


def summary(report: Report) -> list[tuple[str, str]]:
    """Return what a run did, as rows of a name and a text."""
    of_store = _part_rows if report.missing_shards else _store_rows
    rows = [row for store in report.stores for row in of_store(store)]
    if report.part:
        rows.append(("part", _part(report)))
    rows += _unlisted_rows(report)
    rows += _run_rows(report)
    if report.passed_over:
        files = plural(report.passed_over, "file")
        rows.append(("skipped", f"{files}: {counts_in_words(report.skipped)}"))
    if report.excluded:
        total = excluded_in_words(report.excluded)
        rows.append(("excluded", f"{total}: {counts_in_words(report.excluded)}"))
    return rows


def warnings(report: Report) -> list[str]:
    """Return what a person should know even if the summary is not printed."""
    messages = [f"cannot list {text}" for label, text in _unlisted_rows(report) if label]
    for store in report.stores:
        messages += [f"{store.out}: {text}" for _, text in _kept_rows(store)]
    return messages


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
    if store.moved:
        yield "moved", f"{plural(store.moved, 'image')}; the rows are kept"
    if store.changed or store.gone:
        changed = plural(store.changed, "changed image")
        gone = plural(store.gone, "removed image")
        yield "retired", f"rows of {changed} and {gone}; run extract compact to drop them"
    yield from _kept_rows(store)
    if store.failed:
        yield "failed", f"{plural(store.failed, 'image')}, listed in {store.out}/failures.jsonl"
        for path, reason in store.first_failures:
            yield "", f"{path}: {reason}"
        if store.failed > len(store.first_failures):
            yield "", "..."


def _part_rows(store: StoreReport) -> Iterator[tuple[str, str]]:
    """Yield what a part did for a store that is not complete yet."""
    images = plural(store.rows + store.failed, "image")
    yield "model", store.backbone
    yield "rows", f"{store.rows:,} of {images} of this part"
    yield "store", f"{store.out}, not complete yet"
    if store.failed:
        yield "failed", plural(store.failed, "image")
        for path, reason in store.first_failures:
            yield "", f"{path}: {reason}"
        if store.failed > len(store.first_failures):
            yield "", "..."


def _part(report: Report) -> str:
    """Return how far the other parts are."""
    if not report.shards:
        return f"{report.part}; nothing was left to compute"
    if not report.missing_shards:
        return f"{report.part} is done, and so are all others"
    verb = "is" if report.missing_shards == 1 else "are"
    missing = f"{report.missing_shards:,} of {plural(report.shards, 'shard')} {verb} missing"
    return f"{report.part} is done; {missing}"


def _kept_rows(store: StoreReport) -> Iterator[tuple[str, str]]:
    if store.unseen:
        rows = plural(store.unseen, "row")
        yield "not seen", f"images of {rows} could not be read; the rows are kept"
    if store.vanished:
        gone = f"images of {plural(store.vanished, 'row')} are gone from the disk"
        yield "missing", f"{gone}; the rows are kept. If you deleted the images, add --retire"


def _unlisted_rows(report: Report) -> Iterator[tuple[str, str]]:
    for path, reason in report.unlisted[:FOLDERS_SHOWN]:
        yield "not listed", f"{path}: {reason}"
    if len(report.unlisted) > FOLDERS_SHOWN:
        yield "", "..."


def _run_rows(report: Report) -> Iterator[tuple[str, str]]:
    if report.resumed == report.images:
        changed = any(store.changed or store.gone or store.moved for store in report.stores)
        yield "up to date", f"nothing to {'compute' if changed else 'do'}"
        yield "time", f"{report.seconds:.1f} s"
        return
    if report.resumed:
        yield "resumed", f"after {plural(report.resumed, 'image')}"
    yield "device", f"{report.device}, {_precision(report)}"
    total, loading = f"{report.seconds:.1f} s", f"{report.load_seconds:.1f} s"
    rate = f"{report.images_per_second:,.1f} images/s"
    yield "time", f"{total}, including {loading} to load and tune; then {rate}"
    if report.workers:
        yield "workers", _workers(report)
    if report.spent is not None and report.spent.bound:
        yield "", report.spent.bound


def _workers(report: Report) -> str:
    """Return how fast the worker processes were, and how busy they kept their devices."""
    rates = sorted(worker.images_per_second for worker in report.workers)
    slow, fast = (f"{rate:,.1f}" for rate in (rates[0], rates[-1]))
    each = slow if slow == fast else f"{slow} to {fast}"
    busy = ", ".join(f"{device} busy {share:.0%}" for device, share in report.busy.items())
    count = plural(len(rates), "process", "processes")
    return f"{count}, {each} images/s each; {busy}"


def _precision(report: Report) -> str:
    """Return the precision with its measured fidelity, and whether a network was compiled."""
    text = report.precision
    if report.least_cosine is not None:
        text += f" (cosine to float32 at least {report.least_cosine:.4f} on a sample)"
    return f"{text}, compiled" if report.is_compiled else text
