"""The summary that the command prints: what a run did, in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extractor.report import Report

__all__ = ["summary"]


def _how(report: Report) -> str:
    """The precision that was computed in, what it costs, and whether a network was compiled."""
    how = report.precision
    if report.least_cosine is not None:
        how += f" (cosine to float32 at least {report.least_cosine:.4f} where it was tried)"
    return f"{how}, compiled" if report.is_compiled else how


def summary(report: Report) -> list[str]:
    """What a run did, in a few lines."""
    lines = []
    for store in report.stores:
        shape = " x ".join(str(axis) for axis in store.shape)
        lines += [
            ("model", store.backbone),
            ("rows", f"{store.rows} of {store.rows + store.failed} images, {shape} numbers each"),
            ("store", f"{store.out}"),
        ]
        if 0 < store.added < store.rows or store.changed or store.gone:
            lines.append(("new", f"{store.added} rows"))
        if store.changed or store.gone:
            of = f"{store.changed} images that changed, {store.gone} that are no longer there"
            lines.append(("retired", f"rows of {of}; extract compact removes them"))
        if store.failed:
            where = f"listed in {store.out}/failures.jsonl"
            lines.append(("failed", f"{store.failed} images, {where}"))
            lines += [("", f"{path}: {reason}") for path, reason in store.first_failures]
            if store.failed > len(store.first_failures):
                lines.append(("", "..."))
    if report.resumed == report.images:
        changed = any(store.changed or store.gone for store in report.stores)
        what = "to compute" if changed else "to do"
        lines.append((f"nothing {what}", "all of it was there already"))
        lines.append(("time", f"{report.seconds:.1f} s"))
    else:
        if report.resumed:
            lines.append(("resumed", f"{report.resumed} images were done already"))
        time = f"{report.seconds:.1f} s, of these {report.load_seconds:.1f} s to load and tune"
        lines += [
            ("device", f"{report.device}, {_how(report)}"),
            ("time", f"{time}; then {report.images_per_second:.1f} images/s"),
        ]
        if report.spent is not None and report.spent.bound:
            lines.append(("", report.spent.bound))
    if report.passed_over:
        lines.append(("passed over", f"{report.passed_over} files that are no images"))
    return [f"{name:13} {text}" for name, text in lines]
