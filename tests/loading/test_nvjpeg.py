"""The GPU renders the same pictures as the CPU, and what it cannot decode is not lost.

Except in the tests marked cuda, Pillow stands in for nvJPEG.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import mean_pixel
from support.pictures import noise

from extractor import extract
from extractor.api import Report
from extractor.errors import DeviceError, UsageError
from extractor.images.decode import decode_into
from extractor.images.jpeg import plain_jpeg
from extractor.images.types import EncodedJpeg, ReadFile
from extractor.loading import image_decoder, nvjpeg
from extractor.loading.batch import Batch
from extractor.loading.crash_log import CrashLog
from extractor.loading.device_render import block_of, render_block, turned_upright
from extractor.loading.nvjpeg import NvjpegDecoder
from extractor.models import embedding
from extractor.preprocess import Preprocess
from extractor.run import session
from extractor.store.format import IN_FLIGHT

STANDARD = Preprocess.standard(32)
PADDED = Preprocess((40, 24), "contain", (40, 24), "bilinear", (0,) * 3, (1,) * 3, (9, 8, 7))
FRAME = b"\xff\xc0\0\x11\x08"  # the start of a frame of three components with eight bits
SECOND_SCAN = b"\xff\xda\0\x08\x01\x02\x11\0\x3f\0"
SQUASHED = Preprocess((24, 40), "squash", (24, 40), "bicubic", (0,) * 3, (1,) * 3)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture without noise, on which two decoders agree."""
    return noise(seed, 5, 4).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif, **options)
    return buffer.getvalue()


def read(content: bytes) -> ReadFile:
    return ReadFile(b"a.jpg", content, len(content), 1)


def plain(content: bytes, preprocess: Preprocess = STANDARD) -> EncodedJpeg | None:
    found = plain_jpeg(read(content), [preprocess], 10**6)
    return found and found[1]


def opened(content: torch.Tensor) -> Image.Image:
    return Image.open(io.BytesIO(content.numpy().tobytes()))


def planes(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.array(image.convert("RGB"))).permute(2, 0, 1)


def pillow(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
    return [planes(opened(content)) for content in encoded]


def nearest_color(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
    """Decode as nvJPEG does: each value of a color channel covers two by two pixels."""
    images = []
    for image in map(opened, encoded):
        if image.mode == "L":
            images.append(planes(image))
            continue
        image.draft("YCbCr", image.size)
        brightness, *colors = image.split()
        halves = ((image.width + 1) // 2, (image.height + 1) // 2)
        colors = [color.resize(halves, Image.Resampling.BOX) for color in colors]
        colors = [color.resize(image.size, Image.Resampling.NEAREST) for color in colors]
        images.append(planes(Image.merge("YCbCr", [brightness, *colors])))
    return images


# ---------------------------------------------------------------------------------------------
# Which images


@pytest.mark.parametrize(
    "content",
    [
        jpeg(smooth(60, 40)),
        jpeg(smooth(60, 40).convert("L")),
        *(jpeg(smooth(60, 40), subsampling=sampling) for sampling in (0, 1, 2)),
        jpeg(smooth(60, 40), orientation=6),
        jpeg(smooth(60, 40), restart_marker_rows=1),
        jpeg(smooth(60, 40)) + bytes(3),
    ],
)
def test_plain_jpegs_are_left_to_the_gpu(content: bytes) -> None:
    found = plain_jpeg(read(content), [STANDARD], 2400)
    expected = decode_into(read(content), [STANDARD], [np.empty((32, 32, 3), np.uint8)])
    assert found is not None
    assert found[0] == expected


def with_adobe_transform(content: bytes, transform: int) -> bytes:
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    return content[:2] + marker + content[2:]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xd8\xff\xd9",
        jpeg(smooth(60, 40))[:-200],
        jpeg(smooth(60, 40))[:-200] + b"\xff\xff\xd8",
        jpeg(smooth(60, 40), progressive=True),
        jpeg(smooth(60, 40)).replace(b"\xff\xc0", b"\xff\xc9"),  # arithmetic codes
        jpeg(smooth(60, 40))[:-200] + jpeg(smooth(60, 40)),  # cut, and another one
        jpeg(smooth(60, 40)).replace(b"\xff\xdb", b"\xff\xfe"),  # no tables
        jpeg(smooth(60, 40).convert("CMYK")),
        jpeg(smooth(60, 40), keep_rgb=True),
        with_adobe_transform(jpeg(smooth(60, 40)), 0),
        jpeg(smooth(60, 40))[:-2] + SECOND_SCAN + b"\xff\xd9",
        jpeg(smooth(60, 40)).replace(FRAME, FRAME[:4] + b"\x0c"),  # twelve bits
        jpeg(smooth(60, 40)).replace(FRAME + b"\0\x28", FRAME + bytes(2)),  # no height
        jpeg(smooth(61, 40)),  # one pixel too many
        jpeg(smooth(1000, 2)),  # resized whole it would be very long
    ],
)
def test_other_files_are_not_left_to_the_gpu(content: bytes) -> None:
    assert plain_jpeg(read(content), [STANDARD], 2400) is None


def test_gpu_decode_skips_lanczos() -> None:
    lanczos = Preprocess((8, 8), "squash", (8, 8), "lanczos", (0,) * 3, (1,) * 3)
    assert plain(jpeg(smooth(60, 40)), lanczos) is None


# ---------------------------------------------------------------------------------------------
# Rendering


@pytest.mark.parametrize("preprocess", [STANDARD, PADDED, SQUASHED])
def test_gpu_pictures_equal_cpu_pictures(preprocess: Preprocess) -> None:
    """All sizes and orientations in one block."""
    contents = [
        jpeg(smooth(*size, seed), orientation)
        for seed, size in enumerate([(60, 40), (40, 61), (20, 30), (90, 91), (33, 33)])
        for orientation in range(1, 9)
    ]
    expected = np.empty((len(contents), *preprocess.input_size, 3), np.uint8)
    layouts = []
    for content, out in zip(contents, expected, strict=True):
        decode_into(read(content), [preprocess], [out], decode_mode="exact")
        image = plain(content, preprocess)
        assert image is not None
        layouts.append(image.layout)
    decoded = pillow([torch.frombuffer(bytearray(c), dtype=torch.uint8) for c in contents])
    block = block_of(
        [
            turned_upright(image, layout.orientation)
            for image, layout in zip(decoded, layouts, strict=True)
        ]
    )
    rendered = render_block(block, [layout.upright for layout in layouts], preprocess).numpy()
    assert rendered.shape == expected.shape
    difference = np.abs(rendered.astype(int) - expected)
    assert difference.max() <= 2  # rows come first here and columns there if an image lies sideways
    assert difference.mean(axis=(1, 2, 3)).max() < 0.15


# ---------------------------------------------------------------------------------------------
# In a run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "in"
    images.mkdir()
    for number in range(8):
        content = jpeg(smooth(60 + number % 2, 40, number), orientation=number + 1)
        (images / f"{number}.jpg").write_bytes(content)
    (images / "cut.jpg").write_bytes(jpeg(smooth(60, 40))[:-300])
    (images / "progressive.jpg").write_bytes(jpeg(smooth(60, 40, 9), progressive=True))
    smooth(50, 70, 11).save(images / "x.png")
    return images


class Run:
    """Runs with a decoder in place of nvJPEG."""

    def __init__(self, folder: Path, out: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.out = out
        self.calls: list[int] = []  # images per call of the decoder
        self.decode: Callable[[list[torch.Tensor]], list[torch.Tensor]] = pillow
        patch.setattr(nvjpeg, "TRIAL_IMAGES", 4)
        patch.setattr(embedding, "load", lambda *_, **__: mean_pixel())
        patch.setattr(session, "check_decode_device", lambda *_: None)
        patch.setattr(NvjpegDecoder, "_nvjpeg", lambda _, encoded: self._counted(encoded))

    def _counted(self, encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        self.calls.append(len(encoded))
        return self.decode(encoded)

    def __call__(self, decode: Any = "gpu", **options: Any) -> Report:
        options = {"batch_size": 4, "workers": 2, **options}
        return extract(self.folder, "mean", self.out / decode, decode=decode, **options)

    def is_as_exact(self, report: Report) -> bool:
        store, expected = report.stores[0].store, self("exact").stores[0].store
        assert list(store.paths) == list(expected.paths)
        assert store.failures == expected.failures
        return bool(np.abs(store.features[:] - expected.features[:]).max() < 0.01)


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(folder, tmp_path / "out", monkeypatch)


def test_run_leaves_plain_jpegs_to_the_gpu(run: Run) -> None:
    report = run()
    assert run.is_as_exact(report)
    assert sum(run.calls) == 8
    assert report.stores[0].store.manifest.description.computation["decode"] == "gpu"


@pytest.mark.parametrize(("limit", "value"), [("PIXELS", 2 * 61 * 40), ("IMAGES", 2)])
def test_group_size_is_bounded(
    run: Run, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(nvjpeg, f"MAX_GROUP_{limit}", value)
    assert run.is_as_exact(run())
    assert max(run.calls) == 2
    assert sum(run.calls) == 8


def test_bytes_waiting_for_the_gpu_are_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoder, "MAX_ENCODED_BYTES", 0)
    assert run.is_as_exact(run())
    assert not run.calls


def test_waiting_bytes_are_freed_after_decoding(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max(path.stat().st_size for path in run.folder.iterdir())
    monkeypatch.setattr(image_decoder, "MAX_ENCODED_BYTES", largest)
    assert run.is_as_exact(run(batch_size=1, workers=1))
    assert len(run.calls) >= 3  # and not the first one alone


def test_an_image_that_the_gpu_refuses_is_decoded_by_the_cpu(run: Run) -> None:
    refused = (run.folder / "2.jpg").read_bytes()

    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        if any(content.numpy().tobytes() == refused for content in encoded):
            raise RuntimeError("Error while decoding JPEG images")
        return pillow(encoded)

    run.decode = decode
    assert run.is_as_exact(run())
    assert sorted(run.calls) == [1, 1, 2, 2, 4, 4]


def test_a_cut_image_fails_and_flat_ones_do_not(run: Run) -> None:
    whole = jpeg(smooth(60, 40))
    cut = whole[:-300].rstrip(b"\xff") + b"\xff\xd9"
    (run.folder / "cut.jpg").write_bytes(cut)
    for color in ("gray", "white", "red"):
        (run.folder / f"{color}.jpg").write_bytes(jpeg(Image.new("RGB", (60, 40), color)))
    report = run()
    assert sum(run.calls) == 8 + 4
    assert run.is_as_exact(report)
    (failure,) = report.stores[0].store.failures
    assert (failure["path"], failure["error"]) == ("cut.jpg", "truncated")


def test_an_image_of_unexpected_size_is_decoded_by_the_cpu(run: Run) -> None:
    run.decode = lambda encoded: [image[:, :, :-1] for image in pillow(encoded)]
    assert run.is_as_exact(run())


@pytest.mark.parametrize("kind", ["other pixels", "error"])
def test_a_wrong_decoder_is_abandoned(
    run: Run, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        if kind == "error":
            raise RuntimeError("torchvision not compiled with nvJPEG support")
        return [255 - image for image in pillow(encoded)]

    run.decode = decode
    with caplog.at_level(logging.WARNING):
        report = run(batch_size=2, workers=1)
    assert run.is_as_exact(report)
    assert run.calls == ([2, 2] if kind == "other pixels" else [2, 1, 1, 2, 1, 1])
    warned = [r.message for r in caplog.records if "decoding all images on the CPU" in r.message]
    assert len(warned) == 1


def test_pictures_of_a_wrong_decoder_are_discarded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvjpeg, "MAX_GROUP_IMAGES", 2)
    seen = 0

    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        nonlocal seen
        seen += len(encoded)
        return [255 - image if seen > 2 else image for image in pillow(encoded)]

    run.decode = decode
    assert run.is_as_exact(run(batch_size=16, workers=1))
    assert run.calls == [2, 2, 2, 2]


def test_images_that_the_gpu_cannot_render_are_rendered_by_the_cpu(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(block: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(block) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        if block.shape[1] == 61:
            raise RuntimeError("too large for a kernel")
        return render_block(block, *rest)

    monkeypatch.setattr(nvjpeg, "render_block", render)
    assert run.is_as_exact(run())
    assert sorted(run.calls) == [1] * 8 + [2] * 4 + [4] * 2


@pytest.mark.parametrize(("most", "is_trusted"), [(1, False), (2, True)])
def test_a_decoder_that_fails_later_is_abandoned(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    most: int,
    is_trusted: bool,
) -> None:
    """The first two batches of two are the trial; images that were left encoded stay so."""
    seen = 0

    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        nonlocal seen
        seen += len(encoded)
        if seen > 4:
            raise RuntimeError("CUDA out of memory.")
        return pillow(encoded)

    monkeypatch.setattr(nvjpeg, "MAX_REFUSED", most)
    run.decode = decode
    assert run.is_as_exact(run(batch_size=2, workers=1))
    assert run.calls == [2, 2, 2, 1, 1] if not is_trusted else [2, 2, 2, 1, 1, 2, 1, 1]
    warned = [message for message in caplog.messages if "decoding all images on the" in message]
    assert warned == (
        []
        if is_trusted
        else ["cpu refuses 2 of 2 JPEGs now (CUDA out of memory.); decoding all images on the CPU"]
    )


def test_an_error_that_stays_ends_the_run(run: Run) -> None:
    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    run.decode = decode
    with pytest.raises(DeviceError, match="does not work: CUDA error: an illegal memory access"):
        run()
    assert len(run.calls) == 1


def test_an_image_that_neither_decodes_is_a_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = (run.folder / "3.jpg").read_bytes()

    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        if any(content.numpy().tobytes() == bad for content in encoded):
            raise RuntimeError("cannot be decoded")
        return pillow(encoded)

    def on_cpu(file: ReadFile, *rest: Any) -> Any:
        if file.content == bad:
            raise nvjpeg.DecodeError("corrupt", "broken data stream")
        return decode_into(file, *rest)

    run.decode = decode
    monkeypatch.setattr(nvjpeg, "decode_into", on_cpu)
    (store,) = run().stores
    assert (store.rows, store.failed) == (9, 2)
    names = [Path(path).name for path in store.store.paths]
    assert names == sorted(
        p.name for p in run.folder.iterdir() if p.name not in ("3.jpg", "cut.jpg")
    )


def test_images_on_the_gpu_are_in_the_crash_log(run: Run) -> None:
    noted: list[list[str]] = []

    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        (file,) = run.out.rglob(IN_FLIGHT)
        noted.append([Path(path.decode()).name for path in CrashLog.read(file)])
        return pillow(encoded)

    run.decode = decode
    run(workers=1)
    assert {"0.jpg", "1.jpg", "2.jpg", "3.jpg"} <= set(noted[0])
    assert not {"0.jpg", "1.jpg", "2.jpg", "3.jpg"} & set(noted[1])


def test_gpu_decode_without_a_gpu_is_a_usage_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_, **__: mean_pixel())
    with pytest.raises(
        UsageError, match="got gpu, which needs a CUDA device; this run computes on"
    ):
        extract(folder, "mean", tmp_path / "out", decode="gpu", device="cpu")


# ---------------------------------------------------------------------------------------------
# Whether the decoder is trusted


class Owner:
    """Stands in for the loader of a batch."""

    is_on_host = False

    def release(self, batch: Batch) -> None:
        pass

    def decode_on_host(self) -> None:
        self.is_on_host = True


@functools.cache
def colorful(count: int = 40) -> list[bytes]:
    """JPEGs with 4:2:0 sampling and edges between colors, the more of them the higher the index."""
    grids = [noise(seed, 12 + seed % 40, 10 + seed % 30) for seed in range(count)]
    images = [grid.resize((200, 150), Image.Resampling.NEAREST) for grid in grids]
    gray = noise(1, 150, 200).convert("L").convert("RGB")  # so that no corner is flat
    calm = [Image.blend(gray, image, 0.3) for image in images]
    return [jpeg(image, subsampling=2) for image in calm]


def trial(
    decode: Callable[[list[torch.Tensor]], list[torch.Tensor]], *, embed: Any = None
) -> tuple[NvjpegDecoder, Batch, torch.Tensor]:
    """Decode a batch of JPEGs, and return its pictures as well."""
    contents = colorful()
    batch = Batch((torch.zeros(len(contents), 32, 32, 3, dtype=torch.uint8),), contents, Owner())
    for index, content in enumerate(contents):
        found = plain_jpeg(read(content), [STANDARD], 10**6)
        assert found is not None
        batch.settle(index, *found)
    decoder = NvjpegDecoder(torch.device("cpu"), [STANDARD], max_pixels=10**6, decode=decode)
    decoder.decode_batch(batch, batch.pictures, embed)
    return decoder, batch, batch.pictures[0]


@pytest.fixture
def short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvjpeg, "TRIAL_IMAGES", 32)


@pytest.mark.usefixtures("short_trial")
def test_repeated_color_is_trusted(caplog: pytest.LogCaptureFixture) -> None:
    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        first, *images = nearest_color(encoded)
        return [(first.int() + 3).clamp(max=255).to(torch.uint8), *images]

    decoder, _, pictures = trial(decode)
    assert decoder.is_trusted, caplog.messages
    *_, exact = trial(pillow)
    differences = (pictures.float() - exact).abs().mean((1, 2, 3))
    assert 0.3 < differences.mean() < 1
    assert differences.max() > 2  # one picture alone may differ by more


@pytest.mark.usefixtures("short_trial")
@pytest.mark.parametrize(
    ("decode", "reason"),
    [
        (lambda encoded: [image.flip(0) for image in pillow(encoded)], "to other pixels"),  # BGR
        (lambda encoded: [planes(opened(c).convert("L")) for c in encoded], "to other pixels"),
        (lambda encoded: [image.roll(4, 2) for image in pillow(encoded)], "to other pixels"),
        (lambda encoded: [image // 8 * 8 for image in pillow(encoded)], "to other pixels"),
        (lambda encoded: [image[:1] for image in pillow(encoded)], "decodes only 0 of 32 JPEGs"),
    ],
)
def test_wrong_pixels_are_not_trusted(
    decode: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    decoder, batch, pictures = trial(decode)
    assert decoder.is_trusted is False
    assert reason in caplog.text
    assert vars(batch)["_owner"].is_on_host
    *_, exact = trial(pillow)
    assert (pictures.int() - exact.int()).abs().max() <= 2


@pytest.mark.usefixtures("short_trial")
def test_one_wrong_picture_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        first, *images = pillow(encoded)
        return [first // 8 * 7, *images]

    assert trial(decode)[0].is_trusted is False
    assert "to other pixels" in caplog.text


@pytest.mark.usefixtures("short_trial")
@pytest.mark.parametrize(("gain", "is_trusted"), [(0.01, True), (1.0, False)])
def test_embeddings_decide_as_well(
    gain: float, is_trusted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The embedding has two values: 100, and the mean of a picture's last bits."""

    def embed(pictures: list[torch.Tensor]) -> list[torch.Tensor]:
        bits = (pictures[0] % 2).float().mean((1, 2, 3))
        return [torch.stack([torch.full_like(bits, 1.0), gain * bits], 1)]

    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        return [image | 1 for image in pillow(encoded)]

    flat = [
        jpeg(Image.new("RGB", (200, 150), (level,) * 3), subsampling=2)
        for level in range(32, 96, 2)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "colorful", lambda: [*flat])
        patch.setattr(nvjpeg, "_with_flat_end", lambda _: set())
        decoder, *_ = trial(decode, embed=embed)
    assert decoder.is_trusted is is_trusted
    assert ("to other embeddings (least cosine 0.7071)" in caplog.text) is not is_trusted


def test_the_cpu_decodes_until_the_trial_is_over(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nvjpeg, "TRIAL_IMAGES", 64)
    run.decode = lambda encoded: [255 - image for image in pillow(encoded)]
    assert run.is_as_exact(run())
    assert sum(run.calls) == 8
    assert "decoding all images on the CPU" not in caplog.text


def assert_gpu_decodes(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, device: str, **settings: Any
) -> None:
    """Assert that a run leaves photos to the GPU, trusts it, and stores the same embeddings."""
    decoders: list[NvjpegDecoder] = []
    images = 0

    def seen(decoder: NvjpegDecoder, batch: Batch, *rest: Any) -> None:
        nonlocal images
        images += len(batch.encoded)
        decoders.append(decoder)
        decode_batch(decoder, batch, *rest)

    decode_batch = NvjpegDecoder.decode_batch
    monkeypatch.setattr(NvjpegDecoder, "decode_batch", seen)
    settings = {"weights": "random", "precision": "float32", "batch_size": 32, **settings}
    on_gpu = extract(folder, "resnet10t", out / "gpu", decode="gpu", device=device, **settings)
    expected = extract(folder, "resnet10t", out / "cpu", decode="exact", device="cpu", **settings)
    assert decoders[-1].is_trusted, "the GPU is not trusted"
    assert images > nvjpeg.TRIAL_IMAGES
    a, b = on_gpu.stores[0].store, expected.stores[0].store
    assert list(a.paths) == list(b.paths)
    assert a.failures == b.failures
    one, other = a.torch(), b.torch()
    assert float(torch.cosine_similarity(one, other).min()) > 0.999


@pytest.fixture
def photo_folder(folder: Path) -> Path:
    """The folder with 70 JPEGs more, all with 4:2:0 sampling, and other kinds after them."""
    for number, content in enumerate(colorful(70)):
        (folder / f"more-{number:02}.jpg").write_bytes(content)
    image = smooth(90, 70, 3)
    kinds = {
        "gray": jpeg(image.convert("L")),
        "restarts": jpeg(image, restart_marker_rows=1),
        **{f"sampling-{sampling}": jpeg(image, subsampling=sampling) for sampling in (0, 1)},
        "turned": jpeg(image, orientation=5),
        "cmyk": jpeg(image.convert("CMYK")),
        "tiny": jpeg(image.resize((1, 1))),
        "long": jpeg(image.resize((3000, 16))),
    }
    for name, content in kinds.items():
        (folder / f"other-{name}.jpg").write_bytes(content)
    return folder


@pytest.mark.cuda
def test_nvjpeg_embeddings_equal_cpu_embeddings(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_gpu_decodes(photo_folder, tmp_path, monkeypatch, "cuda")


def test_the_cuda_test_passes_on_a_stand_in(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "check_decode_device", lambda *_: None)
    monkeypatch.setattr(NvjpegDecoder, "_nvjpeg", lambda _, encoded: nearest_color(encoded))
    assert_gpu_decodes(photo_folder, tmp_path, monkeypatch, "cpu", image_size=64)


def test_the_cuda_test_fails_without_a_decoder(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_: NvjpegDecoder, encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(session, "check_decode_device", lambda *_: None)
    monkeypatch.setattr(NvjpegDecoder, "_nvjpeg", decode)
    with pytest.raises(AssertionError, match="the GPU is not trusted"):
        assert_gpu_decodes(photo_folder, tmp_path, monkeypatch, "cpu", image_size=64)
