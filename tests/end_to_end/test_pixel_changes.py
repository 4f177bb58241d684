"""Changed evaluation transforms against what timm makes of the same arguments."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from PIL import Image
from support.pictures import noise
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import ResizeKeepRatio, str_to_interp_mode
from torch import nn

from extractor import Backbone, Extractor, extract, load_backbone
from extractor.cli import main as cli
from extractor.errors import ModelError, StoreError, UsageError
from extractor.images import decode
from extractor.options import Options
from extractor.preprocess import PixelChanges, Preprocess
from extractor.run.recompute import recompute
from extractor.terminal.parser import parse

VIT = "vit_tiny_patch16_224"
NETWORKS = ["resnet18", "torchvision:squeezenet1_1", "own"]
# Read off the libraries' own tables: what the changes begin with.
OWN: dict[str, dict[str, Any]] = {
    "resnet18": {"crop_pct": 0.95, "interpolation": "bicubic"},
    "torchvision:squeezenet1_1": {"crop_pct": 224 / 256, "interpolation": "bilinear"},
    "own": {"crop_pct": 0.8, "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.25,) * 3},
}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
MODES = {"crop": "center", "pad": "border", "squash": "squash"}

CHANGES: dict[str, dict[str, Any]] = {
    "size": {"image_size": 160},
    "sizes": {"image_size": (96, 160)},
    "crop": {"crop_pct": 0.7},
    "whole": {"crop_pct": 1.0},
    "filter": {"interpolation": "nearest"},
    "levels": {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1)},
    "zero": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "crop-fit": {"resize": "crop"},
    "pad": {"resize": "pad"},
    "squash": {"resize": "squash"},
    "pad-levels": {"resize": "pad", "mean": (0.9, 0.5, 0.1)},
    "all": {
        "image_size": (128, 96),
        "crop_pct": 0.8,
        "interpolation": "bicubic",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "resize": "squash",
    },
    "all-pad": {"image_size": (100, 140), "crop_pct": 0.75, "resize": "pad"},
}


class Pixels(nn.Module):
    """Remembers its input; takes images of any size, or of one."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size, self.seen = size, torch.empty(0)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.size is not None and pixels.shape[2:] != (self.size, self.size):
            raise ValueError(f"only {self.size} x {self.size} pixels")
        self.seen = pixels.clone()
        return pixels.mean((2, 3))


def own(size: int | None = None) -> Backbone:
    preprocess = Preprocess.standard(size or 120, **OWN["own"])
    return Backbone.from_module(Pixels(size), head=None, preprocess=preprocess, device="cpu")


def changed(name: str, **changes: Any) -> Preprocess:
    if name == "own":
        return Extractor(own(), **changes).backbones[0].preprocess
    return load_backbone(name, weights="random", device="cpu", **changes).preprocess


def theirs(name: str, changes: dict[str, Any]) -> Any:
    """timm's transform for the model's own configuration and the changes."""
    words = dict(changes)
    size = words.pop("image_size", 120 if name == "own" else 224)
    height, width = (size, size) if isinstance(size, int) else size
    if "resize" in words:
        words["crop_mode"] = MODES[words.pop("resize")]
    config = {
        "crop_mode": "center",
        **IMAGENET,
        **OWN[name],
        "input_size": (3, height, width),
        **words,
    }
    if name == "resnet18":
        own_config = timm.get_pretrained_cfg(name).to_dict()
        arguments = {"input_size": (3, height, width), **words}
        assert resolve_data_config(arguments, pretrained_cfg=own_config) == config
    transform = create_transform(**config)
    for step in transform.transforms:
        if isinstance(step, ResizeKeepRatio):  # older timm forgets the filter here
            step.interpolation = str_to_interp_mode(config["interpolation"])
    return transform


@functools.cache
def photos() -> list[Image.Image]:
    return [noise(1, 180, 260), noise(2, 300, 190), noise(3, 90, 97)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("case", CHANGES)
def test_changed_transform_equals_timms(name: str, case: str) -> None:
    preprocess, transform = changed(name, **CHANGES[case]), theirs(name, CHANGES[case])
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    for photo in photos():
        picture = np.zeros((*preprocess.input_size, 3), np.uint8)
        decode.decode_into(photo, [preprocess], [picture])
        ours = (picture / 255 - mean) / std
        expected = transform(photo).permute(1, 2, 0).numpy()
        assert ours.shape == expected.shape
        assert (np.abs(ours - expected) * std * 255).mean() < 1
        assert (expected * std).std() > 0.02


@pytest.mark.parametrize("case", ["sizes", "levels", "all", "all-pad"])
def test_network_receives_the_changed_pixels(case: str) -> None:
    backbone = own()
    Extractor(backbone, **CHANGES[case])(photos())
    network = backbone.module
    assert isinstance(network, Pixels)
    std = np.array(CHANGES[case].get("std", OWN["own"]["std"]))
    for got, photo in zip(network.seen.numpy(), photos(), strict=True):
        expected: npt.NDArray[np.float32] = theirs("own", CHANGES[case])(photo).numpy()
        assert got.shape == expected.shape
        assert (np.abs(got - expected) * std[:, None, None] * 255).mean() < 1


@pytest.mark.parametrize(
    ("name", "changes", "input_size", "resize", "resize_size"),
    [
        ("resnet18", {}, (224, 224), "shortest", (235, 235)),
        ("resnet18", {"image_size": 160}, (160, 160), "shortest", (168, 168)),
        ("resnet18", {"image_size": (160, 192)}, (160, 192), "cover", (168, 202)),
        ("resnet18", {"crop_pct": 0.5}, (224, 224), "shortest", (448, 448)),
        ("resnet18", {"crop_pct": 1.15}, (224, 224), "shortest", (194, 194)),
        ("resnet18", {"resize": "squash", "crop_pct": 1}, (224, 224), "squash", (224, 224)),
        ("torchvision:squeezenet1_1", {"image_size": 112}, (112, 112), "shortest", (128, 128)),
        ("torchvision:squeezenet1_1", {"resize": "pad"}, (224, 224), "contain", (256, 256)),
        ("own", {"image_size": (90, 45)}, (90, 45), "cover", (112, 56)),
    ],
)
def test_sizes_follow_timms_arithmetic(
    name: str,
    changes: dict[str, Any],
    input_size: tuple[int, int],
    resize: str,
    resize_size: tuple[int, int],
) -> None:
    got = changed(name, **changes)
    assert (got.input_size, got.resize, got.resize_size) == (input_size, resize, resize_size)


@pytest.mark.parametrize("name", NETWORKS)
def test_unchanged_options_keep_the_models_values(name: str) -> None:
    before = changed(name)
    after = changed(name, mean=(0.1, 0.2, 0.3))
    assert after.mean == (0.1, 0.2, 0.3)
    for field in ("input_size", "resize", "resize_size", "interpolation", "std", "fill"):
        assert getattr(after, field) == getattr(before, field)
    assert changed(name, crop_pct=OWN[name]["crop_pct"]) == before
    assert not PixelChanges()
    assert PixelChanges(crop_pct=1.0)


def test_padding_has_the_models_mean_color() -> None:
    padded = changed("resnet18", resize="pad")
    assert padded.fill == (124, 116, 104)  # 255 times ImageNet's mean
    levels = Preprocess.standard(64, fit="pad").changed(PixelChanges(mean=(0.0, 0.5, 1.0)))
    assert levels.fill == (0, 128, 255)
    out = np.zeros((224, 224, 3), np.uint8)
    decode.decode_into(Image.new("RGB", (80, 20), (9, 9, 9)), [padded], [out])
    assert out[0, 0].tolist() == [124, 116, 104]
    assert out[112, 112].tolist() == [9, 9, 9]


# ---------------------------------------------------------------------------------------------
# Networks of a fixed size


def test_timm_vit_is_built_for_the_image_size() -> None:
    backbone = load_backbone(VIT, weights="random", device="cpu", image_size=160)
    original = load_backbone(VIT, weights="random", device="cpu")
    assert backbone.module.pos_embed.shape == (1, 101, 192)  # 10 x 10 and the class
    reference = timm.create_model(VIT, num_classes=0).eval()
    reference.load_state_dict(original.module.state_dict())
    reference.set_input_size(img_size=(160, 160))
    pixels = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(pixels)
    assert (backbone(pixels) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert backbone.provenance.sha256 == original.provenance.sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i, photo in enumerate(photos()):
        photo.save(tmp_path / "in" / f"{i}.png")
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("model", "size", "match"),
    [
        ("gmlp_ti16_224", 160, r"timm:gmlp_ti16_224 cannot take .* 160 x 160 .*--image-size out"),
        (VIT, (160, 10), r"cannot take images of 160 x 10 pixels"),
        ("torchvision:squeezenet1_1", 8, "cannot take images of 8 x 8 pixels .*--image-size"),
        ("own", 64, r"module:Pixels cannot take images of 64 x 64 pixels \(only 80 x 80 pixels\)"),
    ],
)
def test_unsupported_image_size_fails_before_reading_images(
    model: str,
    size: int | tuple[int, int],
    match: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[object] = []
    monkeypatch.setattr(
        "extractor.loading.image_decoder.decode_into", lambda *given: read.append(given)
    )
    options: dict[str, Any] = {} if model == "own" else {"weights": "random"}
    with pytest.raises(ModelError, match=match):
        extract(
            folder,
            own(80) if model == "own" else model,
            tmp_path / "out",
            image_size=size,
            device="cpu",
            **options,
        )
    assert read == []
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": 0}, "image size: got 0, expected an integer from 1"),
        ({"image_size": -5}, "image size: got -5"),
        ({"image_size": (0, 5)}, "image size: got 0"),
        ({"image_size": 16385}, "image size: got 16385, expected an integer from 1 to 16384"),
        ({"image_size": (5,)}, r"image size: got \(5,\), expected a number or \(height, width\)"),
        ({"image_size": "224"}, "image size: got '224'"),
        ({"image_size": 224.0}, "image size: got 224.0"),
        ({"image_size": (224.5, 3)}, "image size: got 224.5, expected an integer"),
        ({"crop_pct": 0}, "crop pct: got 0, expected a number of more than 0 and at most 2"),
        ({"crop_pct": -0.1}, "crop pct: got -0.1"),
        ({"crop_pct": 87.5}, "crop pct: got 87.5"),
        ({"crop_pct": math.nan}, "crop pct: got nan"),
        ({"crop_pct": "0.9"}, "crop pct: got '0.9'"),
        ({"interpolation": "cubic"}, "interpolation: got 'cubic', expected one of nearest"),
        ({"interpolation": "random"}, "interpolation: got 'random'"),
        ({"resize": "center"}, "resize: got 'center', expected one of crop, pad, squash"),
        ({"mean": (0.5, 0.5)}, r"mean: got \(0.5, 0.5\), expected three numbers"),
        ({"mean": 0.5}, "mean: got 0.5, expected three numbers"),
        ({"mean": "abc"}, "mean: got 'abc', expected three numbers"),
        ({"mean": (0.5, 0.5, math.nan)}, "mean: got .*, expected three numbers for pixels of 0 to"),
        ({"mean": (123.675, 116.28, 103.53)}, "mean: got .123.675, .* for pixels of 0 to 1"),
        ({"mean": (-0.5, 0.5, 0.5)}, "mean: got .-0.5, .* for pixels of 0 to 1"),
        ({"std": (0.5, 0.5, 0.0)}, "std: got .*, expected three positive numbers"),
        ({"std": (0.5, 0.5, -1.0)}, "std: got .*, expected three positive numbers"),
        ({"std": (0.5, math.inf, 0.5)}, "std: got .*, expected three positive numbers"),
        ({"gray_bits": 7}, "gray bits: got 7, expected 8 to 16, or minmax"),
        ({"gray_bits": 17}, "gray bits: got 17, expected"),
        ({"gray_bits": True}, "gray bits: got True, expected"),
        ({"gray_bits": "12"}, "gray bits: got '12', expected"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_value_out_of_range_is_a_usage_error(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        extract("nowhere", "resnet18", **options)


def test_numpy_integers_are_accepted() -> None:
    assert Options(image_size=np.int64(96)).pixel_changes.image_size == (96, 96)  # type: ignore[arg-type]
    given = Options(image_size=(np.int32(96), 64))  # type: ignore[arg-type]
    assert given.pixel_changes.image_size == (96, 64)


def test_manifest_holds_the_changed_transform(folder: Path, tmp_path: Path) -> None:
    store = extract(
        folder,
        "torchvision:squeezenet1_1",
        tmp_path / "out",
        weights="random",
        device="cpu",
        image_size=(64, 96),
        crop_pct=0.8,
        interpolation="lanczos",
        mean=(0.25, 0.5, 0.75),
        std=(0.1, 0.2, 0.3),
        resize="pad",
    ).store
    assert store.manifest.description.preprocess == {
        "input_size": [64, 96],
        "resize": "contain",
        "resize_size": [80, 120],
        "interpolation": "lanczos",
        "mean": [0.25, 0.5, 0.75],
        "std": [0.1, 0.2, 0.3],
        "fill": [64, 128, 191],
    }


class TestGrayBits:
    """Values of 10 or 12 bits in files of 16 bits, from the file to the store and back."""

    OPTIONS: dict[str, Any] = {  # noqa: RUF012 (never changed)
        "model": "torchvision:squeezenet1_1",
        "weights": "random",
        "device": "cpu",
        "precision": "float32",
        "image_size": 48,
    }

    @pytest.fixture
    def scans(self, tmp_path: Path) -> Path:
        levels = np.random.default_rng(5).integers(0, 256, (60, 80)).astype(np.uint16)
        folder = tmp_path / "scans"
        folder.mkdir()
        Image.fromarray(levels * 16 + levels // 16).save(folder / "low.png")
        Image.fromarray(levels * 257).save(folder / "full.png")
        return folder

    def test_low_values_get_the_row_of_the_full_range(self, scans: Path, tmp_path: Path) -> None:
        full = extract(scans / "full.png", out=tmp_path / "full", **self.OPTIONS).store
        low = extract(scans / "low.png", out=tmp_path / "low", **self.OPTIONS, gray_bits=12).store
        assert np.array_equal(low.features[:], full.features[:])
        assert low.manifest.description.preprocess["gray_bits"] == 12
        assert "gray_bits" not in full.manifest.description.preprocess

    @pytest.mark.parametrize("bits", [12, "minmax"])
    def test_computing_rows_again_repeats_the_option(
        self, scans: Path, tmp_path: Path, bits: Any
    ) -> None:
        store = extract(scans, out=tmp_path / "out", **self.OPTIONS, gray_bits=bits).store
        assert list(recompute(store, 2, device="cpu")) == []

    def test_store_keeps_its_gray_bits(self, scans: Path, tmp_path: Path) -> None:
        extract(scans, out=tmp_path / "out", **self.OPTIONS)
        same = extract(scans, out=tmp_path / "out", **self.OPTIONS, gray_bits=16)
        assert same.resumed == 2
        with pytest.raises(StoreError, match="gray_bits"):
            extract(scans, out=tmp_path / "out", **self.OPTIONS, gray_bits=12)

    def test_extractor_takes_images_of_16_bits(self, scans: Path) -> None:
        options = {key: value for key, value in self.OPTIONS.items() if key != "model"}
        low = Extractor(self.OPTIONS["model"], **options, gray_bits=12)
        full = Extractor(self.OPTIONS["model"], **options)
        with Image.open(scans / "low.png") as image:
            ours = low([image])
        assert np.array_equal(ours, full([scans / "full.png"]))

    def test_changes_of_size_keep_the_gray_bits(self) -> None:
        changed = Preprocess.standard(32).changed(PixelChanges(gray_bits=12))
        assert changed == replace(Preprocess.standard(32), gray_bits=12)
        assert changed.changed(PixelChanges(image_size=(8, 8))).gray_bits == 12
        assert changed.picture_key != Preprocess.standard(32).picture_key


# ---------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--image-size", "160"], "image_size", 160),
        (["--image-size", "160x192"], "image_size", (160, 192)),
        (["--image-size=7x9"], "image_size", (7, 9)),
        (["--crop-pct", "0.9"], "crop_pct", 0.9),
        (["--interpolation", "lanczos"], "interpolation", "lanczos"),
        (["--resize", "pad"], "resize", "pad"),
        (["--mean", "0.5,0.25,0"], "mean", (0.5, 0.25, 0.0)),
        (["--std", "1,0.5,2"], "std", (1.0, 0.5, 2.0)),
        (["--gray-bits", "12"], "gray_bits", 12),
        (["--gray-bits", "minmax"], "gray_bits", "minmax"),
        (["--layer", "-1", "--layer", "blocks.*"], "layers", ["-1", "blocks.*"]),
        (["--layer", "-1", "--pool", "gem:4"], "pool", "gem:4"),
        (["--bypass", "layer1.0", "--bypass", "-2"], "bypass", ["layer1.0", "-2"]),
    ],
)
def test_arguments_become_options(words: list[str], field: str, value: object) -> None:
    options = parse(["images", *words]).options
    assert getattr(options, field) == value
    others = set(Options.__dataclass_fields__) - {field, "layers"}
    assert all(getattr(options, other) == getattr(Options(), other) for other in others)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--image-size", "160X192"], "got '160X192', expected N or HEIGHTxWIDTH"),
        (["--image-size", "-5"], "--image-size"),
        (["--image-size", "0"], "image size: got 0"),
        (["--image-size", "99999"], "image size: got 99999"),
        (["--image-size", "1x2x3"], "got '1x2x3'"),
        (["--image-size", ""], "got ''"),
        (["--mean", "0.5,0.5"], "got '0.5,0.5', expected three numbers"),
        (["--mean", "a,b,c"], "got 'a,b,c'"),
        (["--mean", "nan,0,0"], "mean: got (nan, 0.0, 0.0)"),
        (["--std", "0,1,1"], "std: got (0.0, 1.0, 1.0)"),
        (["--gray-bits", "4095"], "got '4095', expected 8 to 16, or minmax"),
        (["--gray-bits", "auto"], "got 'auto', expected 8 to 16, or minmax"),
        (["--crop-pct", "x"], "--crop-pct"),
        (["--crop-pct", "0"], "crop pct: got 0.0"),
        (["--interpolation", "cubic"], "--interpolation"),
        (["--resize", "center"], "--resize"),
        (["--pool", "max"], "pool: max pools a layer"),
        (["--layer", "layer1", "--pool", "mean"], "pool: got 'mean'"),
    ],
)
def test_bad_arguments_exit_with_2(
    words: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main([str(tmp_path), *words])
    except SystemExit as stop:  # argparse
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    assert match in capsys.readouterr().err


def test_command_changes_the_pixels(folder: Path, tmp_path: Path) -> None:
    words = ["--image-size", "64x96", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    more = ["-m", "resnet18", "--weights", "random", "--device", "cpu", "--quiet"]
    assert cli.main([*more, *words, "--resize", "squash", str(folder), "-o", f"{tmp_path}/a"]) == 0
    report = extract(
        folder,
        "resnet18",
        tmp_path / "b",
        weights="random",
        device="cpu",
        image_size=(64, 96),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        resize="squash",
    )
    ours = (tmp_path / "a/features/00000.npy").read_bytes()
    assert ours == (report.out / "features/00000.npy").read_bytes()
    assert report.store.manifest.description.preprocess["input_size"] == [64, 96]
