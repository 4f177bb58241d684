"""Several stores of one run: models, layers and what is joined of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch
from support.networks import MeanPixel
from support.pictures import noise
from torch import nn

from extractor import Backbone, Extractor, FeatureStore, extract, load_backbone
from extractor.cli import main as cli
from extractor.compute.inputs import pictures_of
from extractor.errors import ModelError, SourceError, StoreError, UsageError, WeightsError
from extractor.images import decode
from extractor.images.types import ImageInfo
from extractor.loading import image_decoder
from extractor.models import embedding
from extractor.models.embedding import EmbeddingPart, EmbeddingSpec
from extractor.models.naming import planned_stores, store_folders
from extractor.options import Options
from extractor.preprocess import Preprocess
from extractor.reading.array import ShardedArray

NAMES = ["resnet18", "torchvision:squeezenet1_1"]
RANDOM: dict[str, Any] = {"weights": "random", "device": "cpu", "image_size": 64, "batch_size": 4}
WORDS = ["--weights", "random", "--device", "cpu", "--image-size", "64", "-b", "4", "--quiet"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six pictures with structure, of different sizes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        noise(i, 70 + 9 * i, 110 - 6 * i).save(folder / f"{i}.png")
    return folder


class Stripes(nn.Module):
    """The mean of each row and channel."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(3).flatten(1)


class DarkIsNone(nn.Module):
    """The mean of each channel; not a number for a picture that is darker than gray."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        rows = pixels.mean((2, 3))
        return torch.where(rows.mean(1, keepdim=True) < 0, torch.nan, rows)


HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def small(network: nn.Module, size: int | tuple[int, int] = 8, name: str = "") -> Backbone:
    preprocess = Preprocess.standard(size, crop_pct=1.0, fit="squash", **HALF)  # type: ignore[arg-type]
    return Backbone.from_module(network, head=None, preprocess=preprocess, name=name, device="cpu")


@pytest.fixture
def named_models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Backbone]:
    """Models that a name loads."""
    made = {"mean": small(MeanPixel()), "stripes": small(Stripes(), (6, 10))}
    monkeypatch.setattr(embedding, "load", lambda name, *_: made[name])
    return made


def rows_of(store: FeatureStore) -> npt.NDArray[np.float32]:
    return np.asarray(store.features)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "features").iterdir()}


# ---------------------------------------------------------------------------------------------
# Several models


def test_each_model_fills_its_store_as_if_alone(images: Path, tmp_path: Path) -> None:
    report = extract(images, NAMES, tmp_path / "both", shard_images=4, **RANDOM)
    folders = ["resnet18", "torchvision-squeezenet1_1"]
    assert [store.out for store in report.stores] == [tmp_path / "both" / name for name in folders]
    assert [store.shape for store in report.stores] == [(512,), (512,)]
    assert report.images == 6
    for store, name in zip(report.stores, NAMES, strict=True):
        alone = extract(images, name, tmp_path / "alone" / name, shard_images=4, **RANDOM)
        assert files_of(store.out) == files_of(alone.out)
        assert list(files_of(store.out)) != []
        assert store.store.paths == alone.store.paths == [f"{i}.png" for i in range(6)]
        assert store.rows == alone.rows == 6
        ours, theirs = store.store.manifest.description, alone.store.manifest.description
        assert ours == theirs
        assert ours.model == (name if ":" in name else f"timm:{name}")


def test_command_takes_several_models(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for name in NAMES for word in ("-m", name)]
    assert cli.main([*words, *WORDS, str(images), "-o", str(tmp_path / "command")]) == 0
    capsys.readouterr()
    report = extract(images, NAMES, tmp_path / "library", **RANDOM)
    for store in report.stores:
        assert files_of(tmp_path / "command" / store.out.name) == files_of(store.out)


def test_summary_names_every_store(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "resnet18", "--layer", "layer1", "--layer", "layer2", *WORDS[:-1]]
    (images / "bad.jpg").write_text("text")
    assert cli.main([*words, str(images), "-o", str(tmp_path / "out")]) == 3
    printed = capsys.readouterr().out
    for folder, dim in (("resnet18@layer1", 64), ("resnet18@layer2", 128)):
        assert f"6 of 7 images, {dim} numbers each" in printed
        assert f"{tmp_path}/out/{folder}\n" in printed
        assert f"listed in {tmp_path}/out/{folder}/failures.jsonl" in printed


def test_every_image_is_opened_and_decoded_once(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, decoded, lock = [], [], threading.Lock()
    open_image, decode_into = PIL.Image.open, image_decoder.decode_into

    def count_open(*arguments: Any, **keywords: Any) -> PIL.Image.Image:
        with lock:
            opened.append(arguments)
        return open_image(*arguments, **keywords)

    def count_decode(source: Any, preprocesses: Any, *rest: Any) -> ImageInfo:
        with lock:
            decoded.append((Path(str(source.path, "utf8")).name, len(preprocesses)))
        return decode_into(source, preprocesses, *rest)

    monkeypatch.setattr(PIL.Image, "open", count_open)
    monkeypatch.setattr(image_decoder, "decode_into", count_decode)
    models = [small(MeanPixel()), small(Stripes()), small(MeanPixel(), 5, name="other")]
    extract(images, models, tmp_path / "out", batch_size=4)
    assert len(opened) == 6
    assert sorted(decoded) == [(f"{i}.png", 2) for i in range(6)]


def test_each_model_sees_its_own_picture(images: Path, tmp_path: Path) -> None:
    models = [small(Stripes(), (4, 9), "low"), small(Stripes(), (7, 5), "high")]
    report = extract(images, models, tmp_path / "out", batch_size=4)
    for store, size in zip(report.stores, [(4, 9), (7, 5)], strict=True):
        for row, name in zip(rows_of(store.store), store.store.paths, strict=True):
            with PIL.Image.open(images / name) as image:
                squashed = image.resize(size[::-1], PIL.Image.Resampling.BICUBIC)
            levels = np.asarray(squashed, np.float32) / 255
            expected = ((levels - 0.5) / 0.5).mean(1).T.ravel()
            np.testing.assert_allclose(row, expected, atol=0.004)  # a level or less


def test_equal_pictures_are_resized_once() -> None:
    one, same = small(MeanPixel()), small(Stripes())
    other_levels = Backbone.from_module(
        MeanPixel(),
        head=None,
        preprocess=Preprocess.standard(8, crop_pct=1.0, fit="squash"),
        device="cpu",
    )
    larger = small(MeanPixel(), 9)
    made = pictures_of(
        [EmbeddingSpec("x", (EmbeddingPart(b),)) for b in (one, same, larger, other_levels)]
    )
    assert [preprocess.input_size for preprocess in made] == [(8, 8), (9, 9)]
    joined = EmbeddingSpec("y", (EmbeddingPart(larger), EmbeddingPart(one)))
    assert pictures_of([joined]) == [larger.preprocess, one.preprocess]


def test_decoding_for_several_models_equals_decoding_for_each(images: Path) -> None:
    preprocesses = [
        Preprocess.standard(24),
        Preprocess.standard((20, 30), fit="pad", mean=(0.2, 0.4, 0.6)),
        Preprocess.standard(17, fit="squash", interpolation="bilinear"),
    ]
    rotated = PIL.Image.open(images / "3.png")
    rotated.getexif()[0x0112] = 6
    for source in (str(images / "0.png"), np.asarray(rotated), rotated):
        together = [np.full((*p.input_size, 3), 7, np.uint8) for p in preprocesses]
        info = decode.decode_into(source, preprocesses, together)
        for preprocess, picture in zip(preprocesses, together, strict=True):
            alone = np.full_like(picture, 9)
            assert decode.decode_into(source, [preprocess], [alone]) == info
            assert np.array_equal(alone, picture)
            assert alone.std() > 0


# ---------------------------------------------------------------------------------------------
# Failures


def test_bad_image_fails_in_every_store(images: Path, tmp_path: Path) -> None:
    (images / "2.png").write_text("no image")
    report = extract(images, [small(MeanPixel()), small(Stripes(), 5)], tmp_path / "out")
    assert report.failure_rate == pytest.approx(1 / 6)
    for store in report.stores:
        assert (store.rows, store.failed) == (5, 1)
        assert store.store.paths == [f"{i}.png" for i in (0, 1, 3, 4, 5)]
        assert [entry["path"] for entry in store.store.failures] == ["2.png"]
        assert store.first_failures[0][0] == "2.png"


@pytest.fixture
def shades(tmp_path: Path) -> Path:
    folder = tmp_path / "shades"
    folder.mkdir()
    for i, level in enumerate((250, 30, 200, 10, 240)):
        PIL.Image.new("RGB", (9, 9), (level, level, level)).save(folder / f"{i}.png")
    return folder


def test_non_finite_embedding_fails_in_its_store_only(shades: Path, tmp_path: Path) -> None:
    report = extract(shades, [small(MeanPixel()), small(DarkIsNone())], tmp_path / "out")
    whole, gaps = report.stores
    assert (whole.rows, whole.failed, gaps.rows, gaps.failed) == (5, 0, 3, 2)
    assert report.failure_rate == pytest.approx(2 / 5)
    assert whole.store.failures == []
    assert {entry["path"]: entry["error"] for entry in gaps.store.failures} == {
        "1.png": "not-finite",
        "3.png": "not-finite",
    }
    expected = [[(level / 255 - 0.5) / 0.5] * 3 for level in (250, 30, 200, 10, 240)]
    np.testing.assert_allclose(rows_of(whole.store), expected, atol=1e-5)
    assert gaps.store.paths == ["0.png", "2.png", "4.png"]
    np.testing.assert_allclose(rows_of(gaps.store), np.array(expected)[[0, 2, 4]], atol=1e-5)


def test_store_without_any_row_stops_all_stores(shades: Path, tmp_path: Path) -> None:
    for name in ("0.png", "2.png", "4.png"):
        (shades / name).unlink()
    models = [small(MeanPixel()), small(DarkIsNone())]
    with pytest.raises(SourceError, match=r"no embedding of module-DarkIsNone from 2 images"):
        extract(shades, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_existing_store_stops_all(images: Path, tmp_path: Path) -> None:
    extract(images, small(Stripes()), tmp_path / "out" / "module-Stripes", dtype="float16")
    models = [small(MeanPixel()), small(Stripes())]
    with pytest.raises(
        StoreError,
        match=r"finished store made with other options \(embedding.dtype.*--dtype float16",
    ):
        extract(images, models, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["module-Stripes"]
    report = extract(images, models, tmp_path / "out", overwrite=True)
    assert [store.rows for store in report.stores] == [6, 6]


def test_two_stores_of_one_name_are_a_usage_error(images: Path, tmp_path: Path) -> None:
    models = [small(MeanPixel()), small(MeanPixel(), 9)]
    with pytest.raises(UsageError, match=r"module[-:]MeanPixel"):
        extract(images, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# Joined


@pytest.mark.usefixtures("named_models")
@pytest.mark.parametrize("normalize", [False, True])
def test_joined_models_have_unit_length_each(images: Path, tmp_path: Path, normalize: bool) -> None:
    apart = extract(images, ["mean", "stripes"], tmp_path / "apart")
    report = extract(images, "mean+stripes", tmp_path / "joined", normalize=normalize)
    mean, stripes = (rows_of(store.store).astype(np.float64) for store in apart.stores)
    parts = [rows / np.sqrt((rows**2).sum(1, keepdims=True)) for rows in (mean, stripes)]
    expected = np.hstack(parts) / (np.sqrt(2) if normalize else 1)
    assert report.dim == 3 + 18
    np.testing.assert_allclose(rows_of(report.store), expected, atol=1e-6)
    embedding = report.store.manifest.description.embedding
    assert (embedding["definition"], embedding["unit_parts"]) == ("concatenation", True)
    assert [part["dim"] for part in embedding["parts"]] == [3, 18]
    backbone = report.store.manifest.description.backbone
    assert backbone["model"] == "module:MeanPixel+module:Stripes"
    sizes = [p["input_size"] for p in report.store.manifest.description.preprocess["parts"]]
    assert sizes == [[8, 8], [6, 10]]


@pytest.mark.usefixtures("named_models")
def test_model_both_joined_and_alone_computes_once(images: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    backbone = embedding.load("mean", Options())
    backbone.module.register_forward_pre_hook(lambda *_: calls.append(1))
    report = extract(images, ["mean", "mean+stripes"], tmp_path / "out", batch_size=3)
    assert len(calls) == 2  # batches
    assert [store.out.name for store in report.stores] == ["mean", "mean+stripes"]
    alone, joined = (rows_of(store.store) for store in report.stores)
    unit = alone / np.linalg.norm(alone, axis=1, keepdims=True)
    np.testing.assert_allclose(joined[:, :3], unit, atol=1e-6)


def test_joined_layers_are_not_scaled(images: Path, tmp_path: Path) -> None:
    layers = ["layer3", "layer1", "fc"]
    apart = extract(images, "resnet18", tmp_path / "apart", layers=layers, **RANDOM)
    assert [store.out.name for store in apart.stores] == [f"resnet18@{layer}" for layer in layers]
    words = [word for layer in layers for word in ("--layer", layer)]
    out = tmp_path / "joined"
    assert (
        cli.main(["-m", "resnet18", *words, "--concat", *WORDS, str(images), "-o", str(out)]) == 0
    )
    store = FeatureStore.open(out)
    expected = np.hstack([rows_of(one.store) for one in apart.stores])
    assert expected.shape == (6, 256 + 64 + 512)
    assert np.array_equal(rows_of(store), expected)
    assert store.manifest.description.embedding["unit_parts"] is False


def test_joined_layers_are_one_embedding_to_normalize(images: Path, tmp_path: Path) -> None:
    options = {**RANDOM, "layers": ["layer1", "layer2"]}
    apart = extract(images, "resnet18", tmp_path / "apart", **options)
    store = extract(
        images, "resnet18", tmp_path / "joined", concat=True, normalize=True, **options
    ).store
    rows = np.hstack([rows_of(one.store) for one in apart.stores])
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(rows_of(store), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# Weights of their own


@pytest.fixture
def own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Files of weights for two small models, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("test_resnet", 1), ("test_byobnet", 2)):
        backbone = load_backbone(name, weights="random", seed=seed, device="cpu")
        torch.save(backbone.module.state_dict(), f"{name}.pth")
    return "test_resnet=test_resnet.pth", "test_byobnet=test_byobnet.pth"


OWN = ["--device", "cpu", "--image-size", "64", "--quiet"]


def test_models_have_weights_of_their_own(
    images: Path, own_weights: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(images), "-m", own_weights[0], "-m", own_weights[1], *OWN]
    assert cli.main(words) == 0
    for name in ("test_resnet", "test_byobnet"):
        store = FeatureStore.open(f"features/{name}")
        options: dict[str, Any] = {"device": "cpu", "image_size": 64}
        single = extract(images, name, f"single/{name}", weights=f"{name}.pth", **options).store
        np.testing.assert_array_equal(rows_of(store), rows_of(single))
        assert store.info.weights_source == f"{name}.pth"
        with Extractor.for_store(store, exact=True) as embed:
            np.testing.assert_array_equal(embed([store.full_path(0)])[0], rows_of(store)[0])
    assert cli.main(words) == 0  # up to date, by names and files alone
    Path("test_byobnet.pth").write_bytes(Path("test_resnet.pth").read_bytes())
    assert cli.main(words) == 1
    assert "test_byobnet.pth into timm:test_byobnet" in capsys.readouterr().err


def test_joined_models_have_weights_of_their_own(
    images: Path, own_weights: tuple[str, str]
) -> None:
    joined = "+".join(own_weights)
    options: dict[str, Any] = {"device": "cpu", "image_size": 64}
    store = extract(images, joined, **options).store
    assert store.path.name == "test_resnet+test_byobnet"
    with Extractor.for_store(store, exact=True) as embed:
        np.testing.assert_array_equal(embed([store.full_path(2)])[0], rows_of(store)[2])
    for name in ("test_resnet", "test_byobnet"):
        Path(f"{name}.pth").rename(f"{name}-moved.pth")
    with pytest.raises(WeightsError, match=r"no longer .*test_resnet\.pth; name that file"):
        Extractor.for_store(store)
    words = ["verify", str(store.path), "--recompute", "1", "--device", "cpu", "--weights"]
    named = "test_resnet=test_resnet-moved.pth+test_byobnet=test_byobnet-moved.pth"
    assert cli.main([*words, named]) == 0
    moved = {"test_resnet": "test_resnet-moved.pth", "test_byobnet.pth": "test_byobnet-moved.pth"}
    with Extractor.for_store(store, exact=True, weights=moved) as embed:
        np.testing.assert_array_equal(embed([store.full_path(2)])[0], rows_of(store)[2])


def test_weights_of_one_model_are_named_once(images: Path, own_weights: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match=r"got other\.pth beside test_resnet=test_resnet\.pth"):
        extract(images, own_weights[0], weights="other.pth", device="cpu")
    for model in ("test_resnet=", "=test_resnet.pth", "test_resnet=+resnet18"):
        with pytest.raises(UsageError, match=r"model: got '.*', expected NAME or NAME=WEIGHTS"):
            extract(images, model, device="cpu")
    with pytest.raises(UsageError, match=r"named test_resnet; use a run and an output folder for"):
        extract(images, [own_weights[0], "test_resnet"], **RANDOM)


# ---------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"model": NAMES, "weights": "w.pth"},
            "weights: one file or tag cannot fit several models",
        ),
        ({"model": "resnet18+resnet34", "weights": "a1_in1k"}, "weights: one file or tag cannot"),
        ({"model": "resnet18+resnet34", "layers": ["layer1"]}, r"layers: A\+B joins embeddings"),
        ({"model": ["a", "b+c"], "layers": ["layer1"]}, r"layers: A\+B joins embeddings"),
        ({"model": ["resnet18", "resnet18"]}, "expected each only once"),
        ({"model": []}, "got no model"),
        ({"model": ["resnet18", ""]}, "got no model, or an empty name"),
        ({"model": NAMES, "bypass": ["layer1.0"]}, "bypass: works with one model only"),
        ({"layers": ["a", "b"], "pool": "none", "concat": True}, "pool: none keeps maps or tokens"),
        ({"layers": ["a"], "pool": "none", "normalize": True}, "pool: none keeps maps or tokens"),
        ({"pool": "max"}, "pool: max pools a layer; name one"),
        ({"concat": True}, "concat: joins several layers"),
        ({"layers": ["layer1"], "concat": True}, "concat: joins several layers"),
        ({"layers": "layer1"}, "layers: got 'layer1', expected a list of module names"),
        ({"layers": [""]}, r"layers: got \[''\], expected a list of module names"),
        ({"bypass": "layer1"}, "bypass: got 'layer1', expected a list"),
    ],
)
def test_conflicting_options_are_errors(
    options: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=match):
        extract(tmp_path / "nowhere", **{"model": "resnet18", **options})


@pytest.mark.parametrize("glob", ["layer[12]", "layer?", "layer*", "**.downsample"])
def test_any_glob_may_be_joined(images: Path, tmp_path: Path, glob: str) -> None:
    store = extract(
        images, "resnet18", tmp_path / "out", layers=[glob], concat=True, **RANDOM
    ).store
    dims = {"layer[12]": 64 + 128, "**.downsample": 128 + 256 + 512}
    assert store.dim == dims.get(glob, 64 + 128 + 256 + 512)


def test_weights_for_a_loaded_backbone_are_an_error(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the backbone already has weights"):
        extract(images, small(MeanPixel()), tmp_path / "out", weights="random")


# ---------------------------------------------------------------------------------------------
# Backbones, and in memory


def test_backbone_replaces_its_name(images: Path, tmp_path: Path) -> None:
    from extractor import load_backbone

    backbone = load_backbone(
        "resnet18", weights="random", device="cpu", image_size=64, layers=["layer2"], pool="max"
    )
    ours = extract(images, backbone, tmp_path / "a", batch_size=4)
    theirs = extract(images, "resnet18", tmp_path / "b", layers=["layer2"], pool="max", **RANDOM)
    assert files_of(ours.out) == files_of(theirs.out)
    embedding = ours.store.manifest.description.embedding
    assert embedding == theirs.store.manifest.description.embedding
    assert (embedding["layer"], embedding["pool"]) == ("layer2", "max")


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bfloat16"},
        {"bypass": ["1"]},
        {"layers": ["0"], "pool": "max"},
        {"image_size": 12, "mean": (0, 0, 0), "resize": "crop"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_run_leaves_the_callers_backbone_unchanged(
    images: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone, pixels = small(network), torch.rand(2, 3, 8, 8)
    before = backbone(pixels)
    extract(images, backbone, tmp_path / "out", **options)
    assert torch.equal(backbone(pixels), before)
    assert backbone.preprocess.input_size == (8, 8)


@pytest.mark.usefixtures("named_models")
@pytest.mark.parametrize("model", ["stripes", "mean+stripes"])
def test_extractor_in_memory_returns_the_same_embedding(
    images: Path, tmp_path: Path, model: str
) -> None:
    store = extract(images, model, tmp_path / "out", batch_size=4).store
    embed = Extractor(model, batch_size=4)
    rows = embed([images / path for path in store.paths])
    assert embed.dim == store.dim
    assert embed.shape == (store.dim,)
    assert len(embed.backbones) == model.count("+") + 1
    np.testing.assert_allclose(rows, rows_of(store), atol=1e-6)


def test_in_memory_layers_keep_their_shape(images: Path, tmp_path: Path) -> None:
    paths = [images / f"{i}.png" for i in range(6)]
    options = {**RANDOM, "layers": ["layer4"], "pool": "none"}
    embed = Extractor("resnet18", **options)
    assert (embed.shape, embed.dim) == ((512, 2, 2), 2048)
    rows = embed(paths)
    store = extract(images, "resnet18", tmp_path / "out", **options).store
    np.testing.assert_allclose(rows, rows_of(store), rtol=1e-3, atol=1e-5)
    assert embed([]).shape == (0, 512, 2, 2)
    pooled = Extractor("resnet18", **{**options, "pool": "avg"})(paths)
    np.testing.assert_allclose(rows.mean((2, 3)), pooled, rtol=1e-4, atol=1e-5)


def test_several_layers_in_memory_must_be_joined() -> None:
    options = {**RANDOM, "layers": ["layer1", "layer2"]}
    with pytest.raises(
        UsageError, match=r"2 embeddings per image \(resnet18@layer1, resnet18@layer2\)"
    ):
        Extractor("resnet18", **options)
    assert Extractor("resnet18", concat=True, **options).dim == 64 + 128


# ---------------------------------------------------------------------------------------------
# Rows with axes


@pytest.mark.parametrize(
    ("layer", "shape"), [("layer2", (128, 8, 8)), ("layer3.0.conv1", (256, 4, 4))]
)
def test_maps_are_plain_npy_files(
    images: Path, tmp_path: Path, layer: str, shape: tuple[int, ...]
) -> None:
    options = {**RANDOM, "layers": [layer]}
    store = extract(
        images, "resnet18", tmp_path / "maps", pool="none", shard_images=4, **options
    ).store
    parts = [np.load(store.path / f"features/0000{i}.npy") for i in (0, 1)]
    assert [part.shape for part in parts] == [(4, *shape), (2, *shape)]
    assert all(part.flags.c_contiguous and part.dtype == np.float32 for part in parts)
    pooled = rows_of(extract(images, "resnet18", tmp_path / "avg", **options).store)
    np.testing.assert_allclose(np.concatenate(parts).mean((2, 3)), pooled, rtol=1e-3, atol=1e-5)
    assert store.features.shape == (6, *shape)
    assert store[4].shape == shape
    assert np.array_equal(store[[5, 0], 3], np.concatenate(parts)[[5, 0], 3])
    assert store.manifest.description.embedding["shape"] == list(shape)
    assert store.dim == np.prod(shape)


ROWS = np.arange(9 * 4 * 3 * 5, dtype=np.float32).reshape(9, 4, 3, 5)
MASK = np.array([True, False, True, True, False, False, True, False, True])
INDICES: list[Any] = [
    0, -1, np.int64(3), np.array(4), slice(None), slice(2, 7), slice(None, None, -1),
    slice(8, 1, -3), slice(5, 5), ..., (), [0, 8, 4, 4], [-1, -9], [], range(1, 9, 3),
    MASK, list(MASK), np.zeros(9, bool), np.array([[0, 8], [3, 3]]), np.array([2, 7], np.uint8),
    (3, 1), (3, 1, 2, 4), (-1, -1, -1, -1), (slice(1, 8, 2), 3), (slice(None), slice(None), 1),
    (..., 2), (..., 2, 1), (..., slice(1, 3)), (0, ..., 1), (slice(2, 6), ..., [0, 4]),
    ([0, 8, 5], 1), ([0, 8, 5], [1, 2, 3]), ([0, 8, 5], [1, 2, 3], [0, 0, 2], [4, 3, 2]),
    ([0, 8, 5], slice(None), [1, 2, 0]), ([0, 8], slice(None), slice(None), [1, 2]),
    (MASK, 2), (MASK, slice(None), 1), (MASK, [0, 1, 2, 3, 0]), (5, [0, 1], slice(None), [2, 3]),
    (5, slice(None), [0, 1]), (slice(3, 8), [0, 1], slice(None), [2, 3]),
    (np.array([[0], [8]]), [1, 2, 3]), (np.array([[0, 1], [2, 3]]), ..., 0),
    (slice(None), np.array([True, False, True, False])), (4, ..., np.array([True, False, True]), 0),
    ((0, 3), (1, 2)), (range(4), 1), (slice(None, None, -2), 0, ..., slice(None, None, -1)),
    (..., None), (slice(None), None), (2, None), (0, ..., None), (slice(1, 7), ..., None, 0),
    (slice(None), 0, None, 1, 2), ([1, 6], None, 0, 1, 2), (slice(None), None, None, 0, 0, 0),
    (slice(2, 5), np.ones((4, 3), bool)), (..., np.eye(3, 5, dtype=bool)),
    (6, ..., np.eye(3, 5, dtype=bool)), ([1, 5], ..., slice(0, 2), None),
]  # fmt: skip


@pytest.mark.parametrize("cuts", [(), (4,), (1, 2, 7)], ids=str)
@pytest.mark.parametrize("index", INDICES, ids=lambda index: " ".join(repr(index).split()))
def test_sharded_rows_are_indexed_as_numpy_indexes_them(index: Any, cuts: tuple[int, ...]) -> None:
    array = ShardedArray(np.split(ROWS, cuts), row_shape=ROWS.shape[1:], dtype=ROWS.dtype)
    expected = ROWS[list(index) if isinstance(index, range) else index]
    got = array[index]
    assert got.shape == expected.shape
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    "index",
    [9, -10, [0, 9], (0, 4), (..., 5), (0, 0, 0, 0, 0), (..., ...), 1.0, "a", MASK[:8], [0.5]],
    ids=repr,
)
def test_index_refused_by_numpy_is_refused(index: Any) -> None:
    array = ShardedArray(np.split(ROWS, (4,)), row_shape=ROWS.shape[1:], dtype=ROWS.dtype)
    with pytest.raises(IndexError, match=r"."):
        ROWS[index]
    with pytest.raises((IndexError, TypeError), match=r"."):
        array[index]


def test_sharded_rows_convert_to_an_array_and_iterate() -> None:
    array = ShardedArray(np.split(ROWS, (4,)), row_shape=ROWS.shape[1:], dtype=ROWS.dtype)
    assert (array.shape, array.ndim, len(array), array.size) == (ROWS.shape, 4, 9, ROWS.size)
    assert array.nbytes == ROWS.nbytes
    assert np.array_equal(np.asarray(array), ROWS)
    assert np.asarray(array, np.float64).dtype == np.float64
    assert all(np.array_equal(a, b) for a, b in zip(array, ROWS, strict=True))


# ---------------------------------------------------------------------------------------------
# Reports and places


def test_report_of_several_stores_has_no_single_row_count(images: Path, tmp_path: Path) -> None:
    report = extract(images, [small(MeanPixel()), small(Stripes())], tmp_path / "out")
    for name in ("rows", "failed", "out", "dim", "store", "failures", "first_failures"):
        with pytest.raises(UsageError, match=r"got 2 stores, expected one; see report.stores"):
            getattr(report, name)
    assert report.images_per_second > 0
    assert [store.rows for store in report.stores] == [6, 6]


@pytest.mark.parametrize(
    ("out", "names", "folders"),
    [
        (None, ["resnet18"], ["features/resnet18"]),
        (None, ["a", "b@layer1"], ["features/a", "features/b@layer1"]),
        ("x/y", ["a"], ["x/y"]),
        ("x/y", ["a", "b"], ["x/y/a", "x/y/b"]),
        ("x/", ["a", "b"], ["x/a", "x/b"]),
        ("x", [], []),
    ],
)
def test_several_stores_are_subfolders_of_out(
    out: str | None, names: list[str], folders: list[str]
) -> None:
    assert store_folders(out, names) == folders


@pytest.mark.parametrize(
    ("models", "options", "names"),
    [
        (["resnet18"], {}, ["resnet18"]),
        (["torchvision:vgg11", "a+b"], {}, ["torchvision-vgg11", "a+b"]),
        (["a"], {"layers": ["l.1"]}, ["a@l.1"]),
        (["a", "b"], {"layers": ["x", "y"]}, ["a@x", "a@y", "b@x", "b@y"]),
        (["a"], {"layers": ["x", "y"], "concat": True}, ["a@x+y"]),
        (["a"], {"layers": ["x*"]}, None),
        (["a"], {"layers": ["x", "-1"]}, None),
        (["a"], {"layers": ["x[12]"]}, None),
        (["a"], {"layers": ["x?"]}, None),
    ],
)
def test_stores_are_named_before_loading_except_for_globs(
    models: list[str], options: dict[str, Any], names: list[str] | None
) -> None:
    assert planned_stores(models, Options(**options)) == names


@pytest.mark.parametrize("layers", [["layer1", "layer2"], ["layer[12]"], ["-4", "-3"]])
def test_globs_name_stores_after_matching_layers(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    report = extract(images, "resnet18", layers=layers, **RANDOM)
    folders = ["features/resnet18@layer1", "features/resnet18@layer2"]
    assert [str(store.out) for store in report.stores] == folders


def test_existing_store_is_found_before_loading(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "b@x").mkdir(parents=True)
    (tmp_path / "out" / "b@x" / "thesis.tex").write_text("years of work")

    def load(*_: object) -> Backbone:
        raise ModelError("loaded too early")

    monkeypatch.setattr(embedding, "load", load)
    with pytest.raises(StoreError, match="b@x is not empty and holds no store"):
        extract(images, ["a", "b"], tmp_path / "out", layers=["x"])
