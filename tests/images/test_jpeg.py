"""JPEGs much larger than the model's input are decoded at a reduced size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from extractor import extract
from extractor.errors import StoreError, UsageError
from extractor.images.decode import decode_into
from extractor.images.types import EncodedImage, ImageInfo
from extractor.preprocess import Preprocess


def scene(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return blurred noise at several scales, as a photo has detail at several scales."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for cell in (4, 16, 64, 256):
        small = random.integers(0, 256, (height // cell + 2, width // cell + 2, 3), np.uint8)
        large = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        picture += np.asarray(large) / 4
    image = Image.fromarray(picture.astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    return image.convert(mode)


def jpeg(image: Image.Image, **options: Any) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return EncodedImage(file.getvalue())


def both(
    source: EncodedImage, preprocess: Preprocess
) -> tuple[np.ndarray, np.ndarray, ImageInfo, ImageInfo]:
    outs = [np.empty((*preprocess.input_size, 3), np.uint8) for _ in range(2)]
    infos = [
        decode_into(source, [preprocess], [out], decode_mode=decode_mode)
        for out, decode_mode in zip(outs, ("scaled", "exact"), strict=True)
    ]
    return outs[0].astype(int), outs[1].astype(int), infos[0], infos[1]


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Factors by which JPEGs were reduced."""
    from PIL.JpegImagePlugin import JpegImageFile

    seen: list[int] = []
    draft = JpegImageFile.draft

    def noted(self: JpegImageFile, mode: str, size: tuple[int, int]) -> Any:
        width = self.size[0]
        drafted = draft(self, mode, size)
        if drafted is not None:
            seen.append(round(width / drafted[1][2]))
        return drafted

    monkeypatch.setattr(JpegImageFile, "draft", noted)
    return seen


STANDARD = Preprocess.standard(64, crop_pct=0.875, interpolation="bicubic")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1201, 803), (803, 1201), (640, 640)])
def test_reduced_picture_equals_exact_picture(
    size: tuple[int, int], orientation: int, drafts: list[int]
) -> None:
    image = scene(*size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    scaled, exact, info, whole = both(jpeg(image, exif=exif), STANDARD)
    assert drafts == [4]  # 640 pixels for 73, of which at least twice as many are wanted
    assert abs(scaled - exact).mean() < 1
    # Shifted by a pixel or turned otherwise it would not be.
    assert abs(np.roll(scaled, 1, 1) - exact).mean() > 2
    assert info == whole
    assert (info.width, info.height) == (size if orientation < 5 else size[::-1])


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_every_kind_of_jpeg_gives_the_same_picture(
    mode: str, options: dict[str, Any], drafts: list[int]
) -> None:
    scaled, exact, _, _ = both(jpeg(scene(900, 700, mode), **options), STANDARD)
    assert drafts == [4]
    assert abs(scaled - exact).mean() < 1


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_every_fit_and_filter_gives_the_same_picture(fit: str, interpolation: str) -> None:
    preprocess = Preprocess.standard(64, fit=fit, interpolation=interpolation)
    scaled, exact, _, _ = both(jpeg(scene(1500, 700)), preprocess)
    assert abs(scaled - exact).mean() < 1


@pytest.mark.parametrize(
    ("edge", "shrunk"), [(145, []), (146, []), (292, [2]), (583, [2]), (584, [4]), (1168, [8])]
)
def test_at_least_twice_the_pixels_are_decoded(
    edge: int, shrunk: list[int], drafts: list[int]
) -> None:
    # 73 pixels of the resized edge: 292 is four times as many, half of that twice.
    both(jpeg(scene(edge, edge)), STANDARD)
    assert drafts == shrunk


def test_largest_of_several_pictures_decides(drafts: list[int]) -> None:
    large = Preprocess.standard(256, crop_pct=1.0)
    outs = [np.empty((*preprocess.input_size, 3), np.uint8) for preprocess in (STANDARD, large)]
    decode_into(jpeg(scene(1200, 1100)), [STANDARD, large], outs)
    assert drafts == [2]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_other_formats_are_decoded_exactly(form: str) -> None:
    file = io.BytesIO()
    scene(700, 600).save(file, form)
    scaled, exact, _, _ = both(EncodedImage(file.getvalue()), STANDARD)
    assert np.array_equal(scaled, exact)


def test_nearest_filter_decodes_exactly(drafts: list[int]) -> None:
    nearest = Preprocess.standard(64, interpolation="nearest")
    scaled, exact, _, _ = both(jpeg(scene(1200, 1100)), nearest)
    assert np.array_equal(scaled, exact)
    assert drafts == []


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_cut_jpeg_fails(cut: float) -> None:
    from extractor.errors import DecodeError

    data = jpeg(scene(1200, 900)).data
    with pytest.raises(DecodeError, match="truncated"):
        both(EncodedImage(data[: int(cut * len(data))]), STANDARD)


def test_store_refuses_another_decode_mode(tmp_path: Path) -> None:
    from support.networks import mean_pixel

    (tmp_path / "in").mkdir()
    for index in range(2):
        content = jpeg(scene(900, 700, seed=index)).data
        (tmp_path / "in" / f"{index}.jpg").write_bytes(content)
    scaled = extract(tmp_path / "in", mean_pixel(), tmp_path / "scaled").store
    exact = extract(tmp_path / "in", mean_pixel(), tmp_path / "exact", decode="exact").store
    assert [store.manifest.description.computation["decode"] for store in (scaled, exact)] == [
        "scaled",
        "exact",
    ]
    np.testing.assert_allclose(scaled.features[:], exact.features[:], atol=0.01)
    with pytest.raises(StoreError, match=r'computation.decode: "scaled" there, "exact" now'):
        extract(tmp_path / "in", mean_pixel(), tmp_path / "scaled", decode="exact")
    with pytest.raises(UsageError, match="decode: got 'fast', expected one of scaled, exact"):
        extract(tmp_path / "in", mean_pixel(), tmp_path / "fast", decode="fast")  # type: ignore[arg-type]


def test_callers_image_keeps_its_size() -> None:
    buffer = io.BytesIO()
    scene(800, 600).save(buffer, "JPEG")
    image = Image.open(buffer)
    decode_into(image, [Preprocess.standard(32)], [np.empty((32, 32, 3), np.uint8)])
    assert image.size == (800, 600)
