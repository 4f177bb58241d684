"""Options of the loader are checked where they are made."""

from __future__ import annotations

import pytest

from extractor.loading.options import LoaderOptions


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("batch_size", (0, 1, None)), ("workers", (1, 0, None)), ("pixel_share", (1, 1, 0))],
)
def test_numbers_below_one_are_refused(name: str, numbers: tuple[int, int, int | None]) -> None:
    batch_size, workers, share = numbers
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        LoaderOptions(batch_size, workers, pixel_share=share)
