"""The entry points of the library."""

from __future__ import annotations

import inspect
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.callbacks import computed
from support.networks import MeanPixel, mean_pixel, normalized
from support.pictures import color, noise

from extractor import Backbone, Extractor, FeatureStore, Preprocess, extract
from extractor.api import Progress
from extractor.errors import (
    DecodeError,
    ExtractorError,
    SourceError,
    StoreError,
    UsageError,
    WeightsError,
)
from extractor.models import embedding
from extractor.options import Options
from extractor.run import preflight


@pytest.fixture
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is the one that averages pixels."""

    def load(model: str, options: Options, *_: object) -> object:
        return mean_pixel("cpu" if options.device == "auto" else options.device)

    monkeypatch.setattr(embedding, "load", load)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------------------------------------
# The store that comes out


@pytest.mark.usefixtures("mean_model")
@pytest.mark.parametrize("shard_images", [1, 3, 4, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_row_i_belongs_to_image_i(
    photos: Path, tmp_path: Path, shard_images: int, batch_size: int
) -> None:
    report = extract(photos, out=tmp_path / "out", shard_images=shard_images, batch_size=batch_size)
    store = FeatureStore.open(tmp_path / "out")
    assert report.rows == report.images == len(store) == 11
    assert report.failed == 0
    names = [int(Path(path).stem) for path in store.paths]
    assert sorted(names) == list(range(11))
    assert [p.encode() for p in store.paths] == sorted(p.encode() for p in store.paths)
    expected = [normalized(color(i)) for i in names]
    np.testing.assert_allclose(store.features[:], expected, atol=1e-5)
    assert len(store.manifest.shards) == -(-11 // shard_images)


@pytest.mark.usefixtures("mean_model")
def test_bytes_of_store_ignore_worker_count(photos: Path, tmp_path: Path) -> None:
    for workers in (1, 4):
        extract(photos, out=tmp_path / f"{workers}", workers=workers, batch_size=3, shard_images=5)
    one, four = files_of(tmp_path / "1"), files_of(tmp_path / "4")
    assert one.keys() == four.keys()
    for name in ("store.json", "history.jsonl", "run.json"):  # hold the time of the run
        del one[name], four[name]
    assert one == four


@pytest.mark.usefixtures("mean_model")
@pytest.mark.parametrize("bad", [[0], [10], [2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_bad_images_shift_no_row(photos: Path, tmp_path: Path, bad: list[int]) -> None:
    paths = sorted(photos.rglob("*.*"), key=lambda path: path.name)
    for i in bad:
        paths[i].write_text("not an image")
    report = extract(photos, out=tmp_path / "out", batch_size=2, shard_images=3)
    store = report.store
    assert (report.images, report.rows, report.failed) == (11, 11 - len(bad), len(bad))
    names = [int(Path(path).stem) for path in store.paths]
    assert sorted(names) == sorted(set(range(11)) - set(bad))
    np.testing.assert_allclose(store.features[:], [normalized(color(i)) for i in names], atol=1e-5)
    assert sorted(int(Path(f["path"]).stem) for f in report.failures) == bad
    assert {f["error"] for f in report.failures} == {"not-an-image"}
    planned = [3, 3, 3, 2]
    assert all(shard.images == planned[shard.shard] for shard in store.manifest.shards)
    assert len(report.first_failures) == min(len(bad), 5)


@pytest.mark.usefixtures("mean_model")
def test_folder_of_bad_images_leaves_no_store(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.jpg").write_text("text")
    with pytest.raises(SourceError, match="no embedding from 5 images"):
        extract(tmp_path / "in", out=tmp_path / "new" / "out", batch_size=2)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("mean_model")
def test_one_image_makes_a_store(photos: Path, tmp_path: Path) -> None:
    store = extract(photos / "00.png", out=tmp_path / "out").store
    assert store.paths == ["00.png"]
    assert store.root == str(photos)
    np.testing.assert_allclose(store[0], normalized(color(0)), atol=1e-5)


@pytest.mark.usefixtures("mean_model")
def test_index_describes_files(photos: Path, tmp_path: Path) -> None:
    store = extract(photos, out=tmp_path / "out").store
    for column, value in (("size", "st_size"), ("mtime_ns", "st_mtime_ns")):
        expected = [getattr((photos / path).stat(), value) for path in store.paths]
        assert store.column(column) == expected
    sizes = list(zip(store.column("width"), store.column("height"), strict=True))
    assert sizes == [Image.open(photos / path).size for path in store.paths]


@pytest.mark.usefixtures("mean_model")
def test_float16_and_unit_length_are_stored(photos: Path, tmp_path: Path) -> None:
    store = extract(photos, out=tmp_path / "out", dtype="float16", normalize=True).store
    assert store.features.dtype == np.float16
    assert np.load(tmp_path / "out/features/00000.npy").dtype == np.dtype("<f2")
    np.testing.assert_allclose(np.linalg.norm(np.asarray(store.features, float), axis=1), 1, 2e-3)
    assert store.manifest.description.embedding["normalized"] is True


@pytest.mark.usefixtures("mean_model")
def test_embedding_with_nan_is_a_failure(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MeanPixel.forward

    def blow_up(self: MeanPixel, pixels: torch.Tensor) -> torch.Tensor:
        rows = forward(self, pixels).clone()
        rows[rows[:, 0] < normalized(color(2))[0]] = torch.nan  # images 0 and 1
        return rows

    monkeypatch.setattr(MeanPixel, "forward", blow_up)
    report = extract(photos, out=tmp_path / "out", batch_size=4)
    assert report.rows == 9
    assert {f["path"]: f["error"] for f in report.failures} == {
        "00.png": "not-finite",
        "deep/er/01.bmp": "not-finite",
    }
    assert np.isfinite(report.store.features[:]).all()


@pytest.mark.usefixtures("mean_model")
def test_batch_is_at_most_a_shard(photos: Path, tmp_path: Path) -> None:
    report = extract(photos, out=tmp_path / "out", shard_images=3, batch_size=32)
    assert report.store.manifest.description.computation["batch_size"] == 3


@pytest.mark.usefixtures("mean_model")
def test_progress_is_reported_after_every_batch(photos: Path, tmp_path: Path) -> None:
    (photos / "05.png").write_text("bad")
    reports: list[Progress] = []
    extract(photos, out=tmp_path / "out", batch_size=5, progress=reports.append)
    assert computed(reports) == [0, 5, 10, 12]  # 0: the models are ready
    assert {p.total for p in reports if p.phase != "listing"} == {12}
    assert reports[-1].failed == 1


@pytest.mark.usefixtures("mean_model")
def test_manifest_describes_the_computation(photos: Path, tmp_path: Path) -> None:
    description = extract(photos, out=tmp_path / "out", batch_size=7).store.manifest.description
    assert description.backbone["model"] == "test:mean"
    assert description.backbone["heads"] == ["fc"]
    assert description.embedding["definition"] == "pre-logits"
    assert description.computation == {
        "precision": "float32",
        "least_cosine": None,
        "compiled": False,
        "device": "cpu",
        "batch_size": 7,
        "decode": "scaled",
    }
    assert description.preprocess["resize"] == "squash"
    assert description.root == str(photos)
    assert description.software["torch"].startswith(torch.__version__.partition("+")[0])


# ---------------------------------------------------------------------------------------------
# Folders and options


@pytest.mark.usefixtures("mean_model")
def test_finished_store_is_replaced_only_by_overwrite(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(photos, out=out, shard_images=4)
    before = files_of(out)
    with pytest.raises(StoreError, match=r"shard_images: 4 there, 65536 now.*--overwrite"):
        extract(photos, out=out, shard_images=65_536)
    assert files_of(out) == before
    shutil.rmtree(photos / "deep")
    report = extract(photos, out=out, overwrite=True)
    assert report.rows == len(report.store) == 4
    assert sorted(path.name for path in (out / "features").iterdir()) == ["00000.npy"]


@pytest.mark.usefixtures("mean_model")
def test_failed_run_leaves_old_store(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(photos, out=out)
    before = files_of(out)

    def stop(progress: Progress) -> None:
        if progress.done > 4:
            raise KeyboardInterrupt("enough")

    with pytest.raises(KeyboardInterrupt, match="enough"):
        extract(photos, out=out, overwrite=True, batch_size=3, progress=stop)
    now = files_of(out)
    assert {name: now[name] for name in before} == before
    assert {name.split("/")[0] for name in now.keys() - before.keys()} == {".extractor-partial"}


@pytest.mark.usefixtures("mean_model")
def test_foreign_folder_is_refused_before_listing(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="not empty and holds no store"):
        extract(tmp_path / "nowhere", out=tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == {"thesis.tex": b"years of work"}


def test_default_folder_is_named_after_model(
    photos: Path, tmp_path: Path, mean_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(extract(photos).out) == "features/resnet50"
    assert str(extract(photos, "torchvision:vgg11").out) == "features/torchvision-vgg11"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch size: got 0, expected an integer from 1 to"),
        ({"workers": -1}, "workers: got -1"),
        ({"shard_images": 0}, "shard images: got 0"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of float32, float16"),
        ({"precision": "half"}, "precision: got 'half'"),
        ({"workers": 10**6}, "workers: got 1000000, expected an integer from 1 to 1024"),
        ({"seed": -1}, "seed: got -1, expected an integer from 0"),
        ({"batch_size": "4"}, "batch size: got '4', expected an integer"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"model": ""}, "or an empty name"),
        ({"out": ""}, "got an empty name"),
        ({"weights": ""}, "weights: got an empty name"),
        ({"out": 5}, "out: got 5, expected a path"),
        ({"out": b"out"}, "out: got b'out', expected a path"),
        ({"model": 5}, "model: got int, expected a name or a Backbone"),
        ({"model": [5]}, "model: got int, expected a name or a Backbone"),
        ({"model": torch.nn.Sequential()}, "model: got Sequential, .*from_module"),
        ({"layers": 5}, "layers: got 5, expected a list of module names"),
        ({"layers": {"layer1"}}, "layers: got {'layer1'}, expected a list of module names"),
        ({"bypass": 5}, "bypass: got 5, expected a list of module names"),
        ({"profile": 5}, "profile: got 5, expected a string"),
        ({"progress": 5}, "progress: got 5, expected a function or None"),
        ({"stop": True}, "stop: got True, expected a function or None"),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        extract("nowhere", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("images", [5, [5], [None], np.zeros((3, 3))], ids=str)
def test_inputs_that_are_no_paths_are_refused(images: object) -> None:
    with pytest.raises(SourceError, match=r"got (int|NoneType|ndarray), expected a folder"):
        extract(images)  # type: ignore[arg-type]


@pytest.mark.usefixtures("mean_model")
def test_too_many_shards_are_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "MAX_SHARDS", 10)
    with pytest.raises(UsageError, match="use a larger --shard-images"):
        extract(photos, out=tmp_path / "out", shard_images=1)


def test_signature_shows_every_option_with_its_default() -> None:
    arguments = inspect.signature(extract).parameters
    for name, field in Options.__dataclass_fields__.items():
        assert arguments[name].default == field.default, name
        assert arguments[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_unknown_options_are_type_errors() -> None:
    with pytest.raises(TypeError, match=r"'batchsize'; did you mean 'batch_size'"):
        extract("nowhere", batchsize=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"option 'dtype' does not apply here, but to extract"):
        Extractor("resnet18", dtype="float16")  # type: ignore[call-arg]


def test_unfit_weights_leave_nothing_behind(photos: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="do not fit"):
        extract(photos, "resnet18", tmp_path / "out", weights=tmp_path / "w.pth", device="cpu")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# In memory


@pytest.fixture
def squeezenet(device: str) -> Extractor:
    return Extractor("torchvision:squeezenet1_1", weights="random", device=device, batch_size=4)


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_row_ignores_kind_of_input(squeezenet: Extractor, tmp_path: Path) -> None:
    image = noise(3, 140, 190)
    image.save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    rows = squeezenet([path, str(path), image, np.asarray(image), encoded(image)])
    assert rows.shape == (5, squeezenet.dim) == (5, 512)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, rows[[0] * 5], rtol=1e-4, atol=1e-6)


def test_rows_in_memory_equal_rows_of_store(squeezenet: Extractor, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(6):
        noise(i, 100 + 9 * i, 120).save(tmp_path / "in" / f"{i}.png")
    store = extract(
        tmp_path / "in",
        "torchvision:squeezenet1_1",
        tmp_path / "out",
        weights="random",
        device=str(squeezenet.backbones[0].device),
    ).store
    rows = squeezenet([tmp_path / "in" / path for path in store.paths])
    np.testing.assert_allclose(rows, store.features[:], rtol=1e-3, atol=1e-5)


def test_no_images_give_no_rows(squeezenet: Extractor) -> None:
    assert squeezenet([]).shape == (0, 512)


def test_undecodable_image_in_memory_is_named_by_index(squeezenet: Extractor) -> None:
    good = np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(DecodeError, match="image 5: no image format") as raised:
        squeezenet([good] * 5 + [b"no image"])
    assert raised.value.reason == "not-an-image"


SINGLE = [
    *(5, None, "a.jpg", b"bytes", bytearray(b"bytes"), memoryview(b"bytes"), Path("a.jpg")),
    Image.new("RGB", (2, 2)),
    np.zeros((9, 9, 3), np.uint8),
    np.zeros((9, 9, 4), np.uint8),
    np.zeros((9, 9), np.uint8),
    np.zeros(9, np.uint8),
]
NOT_A_LIST = {
    "a file": (io.BytesIO(b"bytes"), r"got BytesIO.*\[file\]"),
    "a mapping": ({"a": b"bytes"}, r"got dict.*list\(images\.values\(\)\)"),
    "a set": ({"a.jpg"}, r"got set.*sorted\(images\), since a set has no order"),
    "a batch of pixels": (torch.zeros(2, 3, 4, 4), r"got Tensor.*permute\(0, 2, 3, 1\)"),
    "pixels": (torch.zeros(3, 4, 4), r"got Tensor.*\[images\.permute\(1, 2, 0\)"),
}


@pytest.mark.parametrize("image", SINGLE, ids=lambda image: type(image).__name__)
def test_single_image_is_refused(squeezenet: Extractor, image: object) -> None:
    with pytest.raises(UsageError, match=r"expected a list of images; try \[image\]"):
        squeezenet(image)  # type: ignore[arg-type]


@pytest.mark.parametrize(("images", "match"), NOT_A_LIST.values(), ids=NOT_A_LIST)
def test_collection_that_is_no_list_is_refused_with_advice(
    squeezenet: Extractor, images: object, match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        squeezenet(images)  # type: ignore[arg-type]


def test_any_iterable_of_images_is_embedded(squeezenet: Extractor, tmp_path: Path) -> None:
    image = noise(3, 40, 50)
    image.save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    expected = squeezenet([image])
    contents = (kind(encoded(image)) for kind in (bytes, bytearray, memoryview))
    for images in (contents, np.array([path] * 2), np.array([path], object), {path: 1}.keys()):
        rows = squeezenet(images)
        np.testing.assert_allclose(rows, expected[[0] * len(rows)], rtol=1e-4, atol=1e-6)


def test_tensor_in_a_list_is_refused_with_advice(squeezenet: Extractor) -> None:
    with pytest.raises(UsageError, match=r"image 0: got Tensor.*try image\.permute\(1, 2, 0\)"):
        squeezenet([torch.zeros(3, 4, 4)])  # type: ignore[list-item]


def test_batch_of_images_in_one_array_is_embedded(squeezenet: Extractor) -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 9, 9, 3), np.uint8)
    assert np.array_equal(squeezenet(images), squeezenet(list(images)))


def test_undecodable_file_is_named_by_index_and_path(squeezenet: Extractor) -> None:
    with pytest.raises(DecodeError, match=r"image 0 \(nope.jpg\): "):
        squeezenet(["nope.jpg"])


def test_network_that_is_no_backbone_is_refused(photos: Path) -> None:
    with pytest.raises(UsageError, match=r"model: got Flatten, expected .*from_module"):
        extract(photos, torch.nn.Flatten())  # type: ignore[arg-type]


def test_object_that_is_no_image_is_named_by_index(squeezenet: Extractor) -> None:
    with pytest.raises(UsageError, match="image 1: got NoneType, expected a path, bytes"):
        squeezenet([b"", None])  # type: ignore[list-item]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_extractor_is_an_error(squeezenet: Extractor) -> None:
    images = [np.zeros((9, 9, 3), np.uint8)]
    squeezenet(images)
    child = os.fork()
    if child == 0:
        try:
            squeezenet(images)
        except UsageError as error:
            os._exit(7 if "make one after the fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_errors_share_a_base_class() -> None:
    for error in (DecodeError, SourceError, StoreError, UsageError, WeightsError):
        assert issubclass(error, ExtractorError)


def test_store_in_place_of_a_model_is_answered_with_for_store(
    photos: Path, tmp_path: Path, mean_model: None
) -> None:
    store: Any = extract(photos, out=tmp_path / "out").store
    with pytest.raises(UsageError, match=r"model: got FeatureStore.* try Extractor\.for_store"):
        Extractor(store)


def trained(seed: int) -> Backbone:
    """Return a backbone with a dropout, whose weights follow a seed."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4), torch.nn.Dropout()
    )
    preprocess = Preprocess.standard(8)
    return Backbone.from_module(network, head=None, preprocess=preprocess, device="cpu")


def test_store_is_not_up_to_date_once_its_backbone_was_trained(
    photos: Path, tmp_path: Path
) -> None:
    backbone = trained(0)
    extract(photos, backbone, tmp_path / "out")
    with torch.no_grad():
        backbone.module[2].weight.mul_(3)
    with pytest.raises(StoreError, match=r"finished store of something else \(backbone\.sha256"):
        extract(photos, backbone, tmp_path / "out")
    store = extract(photos, backbone, tmp_path / "again").store
    assert store.info.weights == "given"
    with Extractor.for_store(store, backbone=backbone) as embed:
        assert embed([photos / store.paths[0]]).shape == (1, 4)
    with pytest.raises(WeightsError, match="the weights of module:Sequential changed"):
        Extractor.for_store(tmp_path / "out", backbone=backbone)


@pytest.mark.parametrize("fuse", ["auto", "off"])
def test_network_in_training_mode_is_extracted_in_eval_mode(
    fuse: Any, photos: Path, tmp_path: Path
) -> None:
    expected = extract(photos, trained(0), tmp_path / "eval", fuse=fuse).store
    backbone = trained(0)
    backbone.module.train()
    store = extract(photos, backbone, tmp_path / "train", fuse=fuse).store
    assert np.array_equal(store.features[:], expected.features[:])
    assert backbone.module.training


def test_settings_of_the_program_change_no_row(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": "random", "device": "cpu"}
    expected = extract(photos, "test_resnet", tmp_path / "plain", **options).store
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            store = extract(photos, "test_resnet", tmp_path / "out", **options).store
            with Extractor("test_resnet", **options) as embed:
                rows = embed([photos / store.paths[0]])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert np.array_equal(store.features[:], expected.features[:])
    np.testing.assert_allclose(rows[0], expected.features[0], rtol=1e-4, atol=1e-5)


def test_callbacks_run_in_calling_thread(photos: Path, tmp_path: Path, mean_model: None) -> None:
    import threading

    seen: list[object] = []
    callback: Callable[[Progress], None] = lambda _: seen.append(threading.current_thread())  # noqa: E731
    extract(photos, out=tmp_path / "out", progress=callback)
    assert set(seen) == {threading.main_thread()}


def test_numbers_beyond_float16_are_failures(tmp_path: Path) -> None:
    class Sum(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.sum((2, 3)) * 100  # of 8 x 8 pixels: 6,400 times the level

    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9), (0, 0, 255)).save(tmp_path / "in/a.png")
    Image.new("RGB", (9, 9), (0, 0, 0)).save(tmp_path / "in/b.png")
    preprocess = Preprocess.standard(8, mean=(0.0,) * 3, std=(0.01, 0.01, 0.01))
    backbone = Backbone.from_module(Sum(), head=None, preprocess=preprocess, device="cpu")
    report = extract(tmp_path / "in", backbone, tmp_path / "out", dtype="float16")
    assert report.store.features[:].tolist() == [[0, 0, 0]]
    assert report.store.paths == ["b.png"]
    (failure,) = report.failures
    assert failure["error"] == "not-finite"
    assert "6.4e+05, more than float16 can hold" in failure["message"]
