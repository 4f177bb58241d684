"""Real photos and real weights against references made with the libraries alone.

Runs where ``EXTRACTOR_TEST_DATA`` names a folder with them, see ``data/README.md``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image, ImageOps
from safetensors.torch import load_file

from extractor import (
    FeatureStore,
    evaluate_store,
    extract,
    find_duplicates,
    load_backbone,
    transform_store,
)
from extractor.cli import main as cli
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.models.backbone import Backbone

DATA = Path(os.environ.get("EXTRACTOR_TEST_DATA") or "absent")
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="EXTRACTOR_TEST_DATA names no folder")

Embed = Callable[[Image.Image], torch.Tensor]


def weights(pattern: str) -> Path:
    (path,) = (DATA / "weights").glob(pattern)
    return path


def squeezenet() -> tuple[str, Path, Embed, Callable[[Image.Image], torch.Tensor]]:
    """Name, weights, and the reference: a hook on the input of the classifier, and its mean."""
    path = weights("squeezenet1_0*.pth")
    model = torchvision.models.squeezenet1_0(weights=None).eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    transform = torchvision.models.SqueezeNet1_0_Weights.DEFAULT.transforms()
    seen: list[torch.Tensor] = []
    model.classifier[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def embed(image: Image.Image) -> torch.Tensor:
        model(transform(image)[None])
        return seen.pop().mean((2, 3))[0]

    return "torchvision:squeezenet1_0", path, embed, transform


def mobilenet() -> tuple[str, Path, Embed, Callable[[Image.Image], torch.Tensor]]:
    path = weights("mobilenetv2_035*.safetensors")
    model = timm.create_model("mobilenetv2_035").eval()
    model.load_state_dict(load_file(path), strict=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

    def embed(image: Image.Image) -> torch.Tensor:
        features = model.forward_features(transform(image)[None])
        return model.forward_head(features, pre_logits=True)[0]

    return "timm:mobilenetv2_035", path, embed, transform


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def levels(backbone: Backbone, normalized: torch.Tensor) -> torch.Tensor:
    """Normalized pixels back to levels 0..255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (
        backbone.preprocess.mean, backbone.preprocess.std))  # fmt: skip
    return (normalized * std + mean) * 255


@pytest.mark.parametrize("model", [squeezenet, mobilenet])
def test_embeddings_and_pixels_equal_the_reference(
    model: Callable[[], tuple[str, Path, Embed, Embed]], tmp_path: Path
) -> None:
    name, path, embed, transform = model()
    store = extract(DATA / "photos", name, tmp_path / "out", weights=path, device="cpu").store
    files = [DATA / "photos" / p for p in store.paths]
    assert len(files) == len(list((DATA / "photos").iterdir()))
    with torch.inference_mode():
        images = [Image.open(file).convert("RGB") for file in files]
        expected = torch.stack([embed(image) for image in images]).numpy()
    assert cosines(store.features[:], expected).min() >= 0.999

    backbone = load_backbone(name, weights=path, device="cpu")
    with BatchLoader(
        ([file] for file in files), [backbone.preprocess], LoaderOptions(batch_size=1, workers=2)
    ) as loader:
        for image, batch in zip(images, loader, strict=True):
            ours = batch.pictures[0][0].permute(2, 0, 1).float()
            assert (ours - levels(backbone, transform(image))).abs().mean() < 1
            batch.release()


# What turns an upright picture into the stored one for an EXIF orientation.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def test_every_orientation_of_a_scene_has_one_embedding(tmp_path: Path) -> None:
    """The nine files of a scene differ by a number printed in the middle, so that is covered."""
    name, path, embed, _ = squeezenet()
    upright = {
        file.name: ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        for file in sorted((DATA / "orientation").glob("*.jpg"))
    }
    raw = extract(DATA / "orientation", name, tmp_path / "raw", weights=path, device="cpu").store
    with torch.inference_mode():
        expected = torch.stack([embed(upright[p]) for p in raw.paths]).numpy()
    assert cosines(raw.features[:], expected).min() >= 0.999

    (tmp_path / "covered").mkdir()
    for file, image in upright.items():
        x, y = image.width // 2, image.height // 2
        image.paste((128, 128, 128), (x - 120, y - 120, x + 120, y + 120))
        orientation = int(Path(file).stem.rpartition("_")[2])
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = image.transpose(STORED[orientation]) if orientation in STORED else image
        stored.save(tmp_path / "covered" / file, quality=95, exif=exif)
    store = extract(tmp_path / "covered", name, tmp_path / "out", weights=path, device="cpu").store
    scenes = {p.partition("_")[0] for p in store.paths}
    assert scenes
    for scene in scenes:
        rows = store[[i for i, p in enumerate(store.paths) if p.startswith(scene)]]
        assert len(rows) == 9
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert (unit @ unit.T).min() >= 0.99


def test_odd_files_become_rows_or_failures(tmp_path: Path) -> None:
    words = ["-m", "torchvision:squeezenet1_0", "--weights", str(weights("squeezenet1_0*.pth"))]
    out = tmp_path / "out"
    assert cli.main([*words, "--device", "cpu", str(DATA / "odd"), "-o", str(out), "--quiet"]) == 3
    store = FeatureStore.open(out)
    named = set(store.paths) | {failure["path"] for failure in store.failures}
    assert len(named) == len(store) + len(store.failures) == store.manifest.images
    assert named <= set(os.listdir(DATA / "odd"))


def test_worker_count_changes_no_byte_and_batch_size_no_order(tmp_path: Path) -> None:
    name, path, _, _ = squeezenet()

    def run(workers: int, batch_size: int) -> FeatureStore:
        out = tmp_path / f"{workers}-{batch_size}"
        return extract(
            DATA / "photos", name, out, weights=path, device="cpu",
            workers=workers, batch_size=batch_size,
        ).store  # fmt: skip

    one, four, small = run(1, 32), run(4, 32), run(4, 7)
    for file in ("features/00000.npy", "images/00000.parquet", "failures.jsonl"):
        assert (one.path / file).read_bytes() == (four.path / file).read_bytes()
    assert one.paths == four.paths == small.paths
    assert cosines(one.features[:], small.features[:]).min() > 0.99999


def test_nearest_photos_have_the_class_that_scikit_learn_finds(tmp_path: Path) -> None:
    if not (DATA / "labelled").is_dir():
        pytest.skip("there are no labelled photos")
    sklearn = pytest.importorskip("sklearn.neighbors")
    name, path, _, _ = squeezenet()
    store = extract(DATA / "labelled", name, tmp_path / "out", weights=path, device="cpu").store
    labels = np.array([image.partition("/")[0] for image in store.paths])
    evaluation = evaluate_store(store)
    search = sklearn.KNeighborsClassifier(5, metric="cosine", algorithm="brute")
    neighbors = search.fit(store.features[:], labels).kneighbors(return_distance=False)
    right = (labels[neighbors[:, 0]] == labels).mean()
    assert evaluation.scores["accuracy@1"].value == pytest.approx(right, abs=1e-9)
    recalled = (labels[neighbors] == labels[:, None]).any(axis=1).mean()
    assert evaluation.scores["recall@5"].value == pytest.approx(recalled, abs=1e-9)
    assert right > 0.9
    small = transform_store(store, tmp_path / "small", normalize=True, pca=64, whiten=True)
    assert small.shape == (64,)
    assert evaluate_store(small.out).scores["accuracy@1"].value > 0.9


def test_resized_and_recompressed_photos_are_found_and_no_others(tmp_path: Path) -> None:
    name, path, _, _ = squeezenet()
    images = tmp_path / "images"
    images.mkdir()
    for number, photo in enumerate(sorted((DATA / "photos").iterdir())[::9][:36]):
        image = Image.open(photo).convert("RGB")
        image.save(images / f"{photo.stem}.png")
        if number % 4 == 0:
            image.save(images / f"copy_{photo.stem}.jpg", quality=75)
        elif number % 4 == 2:
            smaller = image.resize((image.width * 3 // 4, image.height * 3 // 4))
            smaller.save(images / f"copy_{photo.stem}.jpg", quality=95)
    store = extract(images, name, tmp_path / "out", weights=path, device="cpu").store
    groups = [
        [image.path for image in group.images] for group in find_duplicates(store, threshold=0.95)
    ]
    assert len(groups) == 18
    assert all(f"{Path(keep).stem}.jpg" == copy[5:] for keep, copy in groups)
