"""Options of the loader are checked where they are made."""

from __future__ import annotations

import pytest

from extractor.loading.options import LoaderOptions


@pytest.mark.parametrize(
    ("name", "batch_size", "workers"), [("batch_size", 0, 1), ("workers", 1, 0)]
)
def test_numbers_below_one_are_refused(name: str, batch_size: int, workers: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        LoaderOptions(batch_size, workers)
