"""Backbones that average several views of an image, and the stores that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import MEAN, STD, normalized
from torch import nn

from extractor import Backbone, Extractor, FeatureStore, Options, Preprocess, StoreError, extract
from extractor.cli import stores
from extractor.errors import ModelError, UsageError
from extractor.lease.describe import describe
from extractor.models import backbone as backbone_module
from extractor.models.embedding import EmbeddingPart, EmbeddingSpec, load_specs
from extractor.models.load import with_changes
from extractor.network.memory import Fit

SIZE = (24, 32)
RESNET: dict[str, Any] = {"weights": "random", "device": "cpu", "image_size": 64}


class LeftHalf(nn.Module):
    """Mean red, green and blue of the left half, and the height of the image."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        left = pixels[..., : pixels.shape[3] // 2].mean((2, 3))
        return torch.cat([left, torch.full_like(left[:, :1], pixels.shape[2])], 1)


class OneSize(nn.Module):
    """A network for images of one size, as transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.AdaptiveAvgPool2d(1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert tuple(pixels.shape[2:]) == SIZE, "this is not my size"
        return self.stem(pixels).flatten(1)


def left_half(**options: Any) -> Backbone:
    preprocess = Preprocess(SIZE, "squash", SIZE, "bilinear", MEAN, STD)
    backbone = Backbone.from_module(LeftHalf(), head=None, preprocess=preprocess, device="cpu")
    return with_changes(backbone, Options(**options))


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """A folder with one image: its left half is black, its right half white."""
    picture = Image.new("RGB", (SIZE[1], SIZE[0]), (0, 0, 0))
    picture.paste((255, 255, 255), (SIZE[1] // 2, 0, SIZE[1], SIZE[0]))
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / "a.png")
    return tmp_path / "images"


def embedding(black: float, height: float) -> list[float]:
    """Return the mean of black and white pixels, ``black`` of them black, and the height."""
    pairs = zip(normalized((0, 0, 0)), normalized((255, 255, 255)), strict=True)
    return [*(black * dark + (1 - black) * light for dark, light in pairs), height]


def pixels_of(levels: list[float]) -> torch.Tensor:
    return torch.tensor(levels).expand(1, 3, *SIZE[:1], len(levels))


def test_flip_is_the_mean_of_an_image_and_its_mirror_image() -> None:
    pixels = pixels_of([1.0] * 16 + [5.0] * 16)
    assert left_half()(pixels).tolist() == [[1, 1, 1, 24]]
    assert left_half(augment="flip")(pixels).tolist() == [[3, 3, 3, 24]]


def test_scales_are_the_mean_over_the_sizes() -> None:
    pixels = pixels_of([2.0] * 32)
    backbone = left_half(scales=(1, 0.71, 0.5))  # 24, 17 and 12 pixels high
    torch.testing.assert_close(backbone(pixels), torch.tensor([[2, 2, 2, 53 / 3]]))
    only = left_half(scales=(0.5,))
    assert only(pixels).tolist() == [[2, 2, 2, 12]]


def test_flip_and_scales_are_the_mean_of_all_views() -> None:
    backbone = left_half(augment="flip", scales=(1, 0.5))
    assert backbone.views.count == 4
    assert backbone.size_text == "24 x 32 (resize 24 x 32); mean of 4 views"
    pixels = pixels_of([1.0] * 16 + [5.0] * 16)
    torch.testing.assert_close(backbone(pixels)[:, 3], torch.tensor([18.0]))
    torch.testing.assert_close(backbone(pixels)[:, :3], torch.full((1, 3), 3.0))


def test_options_leave_the_views_of_a_loaded_backbone() -> None:
    backbone = left_half(augment="flip", scales=(1, 0.5))
    assert with_changes(backbone, Options()).views == backbone.views
    assert with_changes(left_half(augment="flip"), Options(scales=(1, 0.5))).views == backbone.views


def test_a_store_and_its_queries_average_the_same_views(halves: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"augment": "flip", "scales": [1, 0.5]}
    store = extract(halves, left_half(), tmp_path / "s", **chosen).store
    expected = [embedding(0.5, 18)]
    np.testing.assert_allclose(store.features[:], expected, rtol=1e-5, atol=1e-6)
    assert store.manifest.description.embedding["augment"] == "flip"
    assert store.manifest.description.embedding["scales"] == [1.0, 0.5]
    assert (store.info.augment, store.info.scales) == ("flip", (1.0, 0.5))
    for backbone in (left_half(), left_half(**chosen)):
        with Extractor.for_store(store, backbone=backbone, exact=True) as embed:
            np.testing.assert_array_equal(embed([halves / "a.png"]), store.features[:])
    with Extractor(left_half(), **chosen) as embed:
        np.testing.assert_allclose(embed([halves / "a.png"]), expected, rtol=1e-5, atol=1e-6)


def test_the_mean_is_scaled_to_unit_length(halves: Path, tmp_path: Path) -> None:
    store = extract(halves, left_half(), tmp_path / "s", augment="flip", normalize=True).store
    mean = np.array([embedding(0.5, 24)])
    np.testing.assert_allclose(store.features[:], mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("made", "now", "match"),
    [
        (
            {"augment": "flip"},
            {},
            r'augment: "flip" there, null now\); extend it with --augment fl',
        ),
        ({}, {"augment": "flip"}, "extend it without --augment"),
        ({"scales": (1, 0.5)}, {}, "extend it with --scales 1,0.5"),
        ({}, {"scales": (1, 0.5)}, "extend it without --scales"),
        ({"scales": (1, 0.5)}, {"scales": (1, 0.71)}, "extend it with --scales 1,0.5"),
    ],
)
def test_a_store_does_not_grow_with_other_views(
    halves: Path, tmp_path: Path, made: dict[str, Any], now: dict[str, Any], match: str
) -> None:
    extract(halves, left_half(), tmp_path / "s", **made)
    with pytest.raises(StoreError, match=match):
        extract(halves, left_half(), tmp_path / "s", **now)
    assert extract(halves, left_half(), tmp_path / "s", **made).stores[0].rows == 1


def test_a_store_without_other_views_names_none(halves: Path, tmp_path: Path) -> None:
    store = extract(halves, left_half(), tmp_path / "s", scales=(1,)).store
    assert not {"augment", "scales"} & set(store.manifest.description.embedding)
    assert (store.info.augment, store.info.scales) == ("", (1.0,))


def test_info_names_the_views(
    halves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(halves, left_half(), tmp_path / "s", augment="flip", scales=(0.5, 1))
    assert stores.info([str(tmp_path / "s")]) == 0
    assert "mean with the mirror image, mean over scales 1 and 0.5" in capsys.readouterr().out


def test_a_network_of_one_size_is_refused_before_a_run() -> None:
    preprocess = Preprocess(SIZE, "squash", SIZE, "bilinear", MEAN, STD)
    backbone = Backbone.from_module(OneSize(), head=None, preprocess=preprocess, device="cpu")
    match = (
        r"scales: module:OneSize takes images of 24 x 32 pixels, not of 17 x 23 \(this is not my "
        r"size\); leave --scales out"
    )
    with pytest.raises(ModelError, match=match):
        load_specs([backbone], Options(scales=(1, 0.71)))
    assert with_changes(backbone, Options(augment="flip")).views.flip


def test_an_embedding_that_grows_with_the_image_is_refused() -> None:
    preprocess = Preprocess(SIZE, "squash", SIZE, "bilinear", MEAN, STD)
    backbone = Backbone.from_module(nn.Flatten(), head=None, preprocess=preprocess, device="cpu")
    with pytest.raises(ModelError, match=r"returned \(3, 576\), expected \(3, 2304\)"):
        with_changes(backbone, Options(scales=(1, 0.5)))


def test_maps_of_several_views_are_refused() -> None:
    with pytest.raises(UsageError, match="pool: none keeps positions, which differ from view"):
        Options(layers=["layer4"], pool="none", augment="flip")
    (spec,) = load_specs(["torchvision:resnet18"], Options(augment="flip", fuse="off", **RESNET))
    with pytest.raises(UsageError, match="pool: maps and tokens differ from view to view"):
        spec.backbones[0].at_layers(["layer4"], "none")


def test_layers_are_the_means_over_the_views() -> None:
    chosen: dict[str, Any] = {"layers": ["layer1", "layer2"], "pool": "max", "fuse": "off"}
    chosen |= RESNET
    plain = load_specs(["torchvision:resnet18"], Options(**chosen))[0].backbones[0]
    options = Options(augment="flip", scales=(1, 0.5), **chosen)
    viewed = load_specs(["torchvision:resnet18"], options)[0].backbones[0]
    pixels = torch.rand(2, 3, 64, 64)
    small = nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    views = [plain.embed(each) for x in (pixels, small) for each in (x, x.flip(3))]
    for index, output in enumerate(viewed.embed(pixels)):
        expected = torch.stack([view[index] for view in views]).mean(0)
        torch.testing.assert_close(output, expected)


def test_networks_are_fused_as_without_views() -> None:
    plain = load_specs(["torchvision:resnet18"], Options(**RESNET))[0].backbones[0]
    options = Options(augment="flip", scales=(1, 0.5), **RESNET)
    viewed = load_specs(["torchvision:resnet18"], options)[0].backbones[0]
    assert plain.folded == viewed.folded
    assert plain.folded


def test_memory_is_estimated_for_the_largest_view(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fit(embedder: Backbone, size: tuple[int, int], wanted: int, **_: int) -> Fit:
        asked.append((size, embedder.views.count))
        return Fit(wanted, 0, 0.0)

    monkeypatch.setattr(backbone_module, "images_that_fit", fit)
    backbone = left_half(augment="flip", scales=(0.5, 2))
    asked.clear()
    assert backbone.images_at_a_time(5) == 5
    assert asked == [((48, 64), 1)]


def test_joined_backbones_average_the_same_views() -> None:
    parts = EmbeddingPart(left_half()), EmbeddingPart(left_half(augment="flip"))
    with pytest.raises(UsageError, match="a\\+b: joins backbones that average different views"):
        EmbeddingSpec("a+b", parts)
    pair = left_half(augment="flip"), left_half(augment="flip")
    spec = EmbeddingSpec("a+b", tuple(map(EmbeddingPart, pair)))
    assert describe(spec, Options(), b"/", 1).embedding["augment"] == "flip"


@pytest.mark.parametrize(
    ("scales", "match"),
    [
        ((0,), "scales: got 0, expected numbers from 0.1 to 4"),
        ((1, -0.5), "scales: got -0.5, expected"),
        ((1, 1e9), "scales: got 1000000000.0, expected"),
        ((1, float("nan")), "scales: got nan, expected"),
        ((1, float("inf")), "scales: got inf, expected"),
        ((1, 1), "scales: got 1 more than once"),
        ((), "scales: got .*, expected 1 to 8 numbers"),
        ([0.1 * n for n in range(1, 10)], "scales: got .*, expected 1 to 8 numbers"),
        ("1", "scales: got '1', expected 1 to 8 numbers"),
        (0.5, "scales: got 0.5, expected 1 to 8 numbers"),
        ((True,), "scales: got True, expected numbers"),
        (("1",), "scales: got '1', expected numbers"),
    ],
)
def test_scales_are_different_numbers_in_bounds(scales: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Options(scales=scales)


def test_the_order_of_scales_has_no_meaning() -> None:
    assert (
        Options(scales=[0.5, 1]).scales == Options(scales=(1, np.float32(0.5))).scales == (1, 0.5)
    )
    assert Options(scales=(1,)) == Options()


def test_a_store_read_again_has_the_views(halves: Path, tmp_path: Path) -> None:
    extract(halves, left_half(), tmp_path / "s", augment="flip")
    assert FeatureStore.open(tmp_path / "s").info.augment == "flip"
