"""Fixtures of small stores."""

from __future__ import annotations

from support.stores import (
    checked,
    describe_store,
    fill,
    fixed_time,
    make_records,
    parts,
    tree,
    write_store,
)

__all__ = [
    "checked",
    "describe_store",
    "fill",
    "fixed_time",
    "make_records",
    "parts",
    "tree",
    "write_store",
]
