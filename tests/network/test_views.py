from __future__ import annotations

import pytest
import torch

from extractor.network.views import ONE_VIEW, Views


def test_pixels_have_one_view_by_default() -> None:
    pixels = torch.rand(2, 3, 4, 6)
    (view,) = ONE_VIEW.of(pixels)
    assert view is pixels
    assert ONE_VIEW.as_dict() == {}


def test_flip_mirrors_left_and_right_only() -> None:
    pixels = torch.arange(12.0).reshape(1, 3, 2, 2)
    first, second = Views(flip=True).of(pixels)
    assert first is pixels
    assert second[0, 0].tolist() == [[1, 0], [3, 2]]


def test_half_the_size_weights_pixels_by_their_distance() -> None:
    # The filter of width 4 has weights 1 3 3 1, of which the border cuts off the first or last.
    pixels = torch.tensor([0.0, 7.0, 14.0, 28.0]).expand(1, 3, 4, 4)
    (view,) = Views(scales=(0.5,)).of(pixels)
    left, right = (3 * 0 + 3 * 7 + 14) / 7, (7 + 3 * 14 + 3 * 28) / 7
    expected = torch.tensor([left, right]).expand(1, 3, 2, 2)
    torch.testing.assert_close(view, expected)


def test_double_the_size_interpolates_between_centers() -> None:
    pixels = torch.tensor([0.0, 4.0]).expand(1, 3, 2, 2)
    (view,) = Views(scales=(2.0,)).of(pixels)
    torch.testing.assert_close(view, torch.tensor([0.0, 1.0, 3.0, 4.0]).expand(1, 3, 4, 4))


def test_half_precision_is_resized_in_float32() -> None:
    pixels = torch.rand(1, 3, 8, 8).bfloat16()
    whole, small = Views(scales=(1.0, 0.5)).of(pixels)
    assert whole is pixels
    (expected,) = Views(scales=(0.5,)).of(pixels.float())
    assert torch.equal(small, expected)


@pytest.mark.parametrize(
    "views", [ONE_VIEW, Views(True), Views(scales=(2.0,)), Views(True, (1.0, 0.5))]
)
def test_manifest_entries_describe_the_views(views: Views) -> None:
    assert Views.from_mapping({"dim": 3, **views.as_dict()}) == views
    assert len(list(views.of(torch.rand(1, 3, 4, 4)))) == views.count


def test_sizes_are_rounded_and_at_least_one_pixel() -> None:
    assert Views(scales=(1.4, 0.1)).sizes((5, 3)) == [(7, 4), (1, 1)]
