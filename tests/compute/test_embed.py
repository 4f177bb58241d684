"""Forward passes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import mean_pixel, normalized
from torch import nn

from extractor import load_backbone
from extractor.compute import embed as embed_module
from extractor.compute.embed import Normalize, embed
from extractor.images.types import ImageSource
from extractor.loading.batch import Batch
from extractor.loading.loader import BatchLoader
from extractor.loading.options import LoaderOptions
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingPart, EmbeddingSpec
from extractor.system.timing import Timer


def colors(count: int) -> list[tuple[int, int, int]]:
    return [((37 * i) % 256, (91 * i) % 256, (5 * i) % 256) for i in range(count)]


def run(
    backbone: Backbone, images: list[np.ndarray], size: int, *, normalize: bool = False
) -> np.ndarray:
    plan: Iterator[list[ImageSource]] = (
        list(images[i : i + size]) for i in range(0, len(images), size)
    )
    pin = backbone.device.type == "cuda"
    with BatchLoader(
        plan, [backbone.preprocess], LoaderOptions(batch_size=size, workers=2, pin=pin)
    ) as loader:
        spec = EmbeddingSpec("test", (EmbeddingPart(backbone),))
        computed = embed([spec], loader, normalize=normalize)
        rows = [embedded.rows[0].copy() for embedded in computed]
    return np.concatenate(rows)


def mean_spec() -> EmbeddingSpec:
    return EmbeddingSpec("mean", (EmbeddingPart(mean_pixel()),))


def flat(color: tuple[int, int, int]) -> np.ndarray:
    return np.full((10, 10, 3), color, np.uint8)


@pytest.mark.parametrize("size", [1, 3, 16, 40])
def test_rows_are_normalized_colors_in_order(size: int, device: str) -> None:
    rows = run(mean_pixel(device), [flat(c) for c in colors(16)], size)
    np.testing.assert_allclose(rows, [normalized(c) for c in colors(16)], atol=1e-5)


@pytest.mark.parametrize("width", [1, 4, 256])
def test_bfloat16_pixels_are_rounded_once(width: int) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    pictures = torch.stack([levels, levels.flip(0), levels.roll(5)], 1).view(-1, 1, width, 3)
    backbone = mean_pixel("cpu")
    size = (1, width)
    backbone = replace(backbone, preprocess=replace(backbone.preprocess, input_size=size))
    exact = Normalize(backbone)(pictures)
    rounded = Normalize(backbone.to(backbone.device, "bfloat16"))(pictures)
    assert exact.dtype == torch.float32
    assert rounded.dtype == torch.bfloat16
    assert rounded.shape == (256 // width, 3, *size)
    assert rounded.stride() == exact.stride()
    # Up to a number that lies in the middle of two.
    assert int((rounded != exact.bfloat16()).sum()) <= 2


def test_batches_stay_in_order(device: str) -> None:
    rows = run(mean_pixel(device), [flat(c) for c in colors(200)], 2)
    np.testing.assert_allclose(rows, [normalized(c) for c in colors(200)], atol=1e-5)


def test_normalized_rows_have_unit_length(device: str) -> None:
    rows = run(mean_pixel(device), [flat(c) for c in colors(9)], 4, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    plain = np.array([normalized(c) for c in colors(9)])
    np.testing.assert_allclose(
        rows, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5
    )


def test_row_ignores_rest_of_batch(device: str) -> None:
    backbone = load_backbone("resnet18", weights="random", device=device)
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (60, 50, 3), np.uint8) for _ in range(7)]
    alone = run(backbone, images[4:], 4)  # the last three, in a padded batch
    together = run(backbone, images, 4)
    assert np.array_equal(alone, together[4:])
    among_others = run(backbone, [images[4], images[0], images[6], images[2]], 4)
    assert np.array_equal(among_others[[0, 2]], alone[[0, 2]])


def test_gpu_rows_equal_cpu_rows(device: str) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (90, 80, 3), np.uint8) for _ in range(10)]
    here = run(load_backbone("resnet18", weights="random", device=device), images, 4)
    cpu = run(load_backbone("resnet18", weights="random", device="cpu"), images, 5)
    worst = np.abs(here - cpu).max() / np.abs(cpu).max()
    assert worst < 1e-4


def test_rows_are_those_of_float64_whatever_a_program_allows(device: str) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (60, 50, 3), np.uint8) for _ in range(4)]
    backbone = load_backbone("resnet18", weights="random", device="cpu", image_size=64)
    with BatchLoader(
        iter([list(images)]), [backbone.preprocess], LoaderOptions(batch_size=4, workers=1)
    ) as loader:
        pixels = Normalize(backbone)(next(iter(loader)).pictures[0].clone())
    expected = copy.deepcopy(backbone.module).double()(pixels.double()).numpy()
    torch.set_float32_matmul_precision("medium")
    try:
        rows = run(backbone.to(torch.device(device)), images, 4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    # TF32 keeps 11 bits: it would be off by about 1e-3.
    assert np.linalg.norm(rows - expected) < 5e-5 * np.linalg.norm(expected)


@pytest.mark.cuda
def test_full_gpu_computes_the_same_rows_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (60, 50, 3), np.uint8) for _ in range(256)]
    backbone = load_backbone("resnet18", weights="random", device="cuda")
    expected = run(backbone, images, 16)
    torch.cuda.empty_cache()
    # The pixels of 256 images take 147 MiB in float32, and the first feature maps four times that.
    total = torch.cuda.get_device_properties(backbone.device).total_memory
    limit = torch.cuda.memory_reserved(backbone.device) + 400 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / total, backbone.device)
    try:
        rows = run(backbone, images, 256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, backbone.device)
    assert "is out of memory with 256 images at a time; continuing with 128" in caplog.text
    np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-4 * abs(expected).max())


@pytest.mark.cuda
def test_closed_embed_gives_back_memory_of_a_gpu() -> None:
    backbone = load_backbone("resnet18", weights="random", device="cuda")
    spec = EmbeddingSpec("test", (EmbeddingPart(backbone),))

    def start(batches: int) -> int:
        plan: Iterator[list[ImageSource]] = ([flat(c)] * 8 for c in colors(6))
        options = LoaderOptions(batch_size=8, workers=2, pin=True)
        with (
            BatchLoader(plan, [backbone.preprocess], options) as loader,
            closing(embed([spec], loader, normalize=False)) as computed,
        ):
            for _ in range(batches):
                next(computed)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    whole = start(6)
    assert start(2) == whole
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("seconds", "taken"), [(0.0, [1, 5, 5, 5, 5, 9, 9, 9, 9]), (1.0, list(range(1, 10)))]
)
def test_only_quick_batches_are_grouped(
    monkeypatch: pytest.MonkeyPatch, seconds: float, taken: list[int]
) -> None:
    class Clock(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += seconds
            return pixels.mean((2, 3))

    def counted(batches: Iterable[Batch]) -> Iterator[Batch]:
        nonlocal count
        for batch in batches:
            count += 1
            yield batch

    now, count = 0.0, 0
    backbone = replace(mean_pixel(), module=Clock())
    plan: list[list[ImageSource]] = [[flat(color)] for color in colors(9)]
    with BatchLoader(plan, [backbone.preprocess], LoaderOptions(batch_size=1, workers=2)) as loader:
        monkeypatch.setattr("extractor.compute.embed.time.perf_counter", lambda: now + 1e-6 * count)
        computed = embed(
            [EmbeddingSpec("t", (EmbeddingPart(backbone),))], counted(loader), normalize=False
        )
        assert [count for _ in computed] == taken


def test_embed_leaves_grad_mode_alone() -> None:
    assert torch.is_grad_enabled()
    with BatchLoader(
        iter([[flat((1, 2, 3))]]), [mean_pixel().preprocess], LoaderOptions(batch_size=1, workers=1)
    ) as loader:
        for _ in embed(
            [EmbeddingSpec("test", (EmbeddingPart(mean_pixel()),))], loader, normalize=False
        ):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()


def test_embed_restores_tf32_setting() -> None:
    before = torch.backends.cudnn.allow_tf32
    run(mean_pixel(), [flat((1, 2, 3))], 1)
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("fits", [1, 3, 4, 5])
def test_full_device_gets_smaller_parts_from_then_on(
    fits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = embed_module._Step([mean_spec()], normalize=False)
    sizes = []
    original = Backbone.embed

    def crowded(backbone: Backbone, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(len(pixels))
        if len(pixels) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(backbone, pixels)

    pictures = torch.randint(0, 256, (8, 24, 32, 3), dtype=torch.uint8)
    (expected,) = step([pictures], lambda: None)
    monkeypatch.setattr(Backbone, "embed", crowded)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    (rows,) = step.in_parts([pictures])
    assert torch.equal(rows, expected)
    warned = len(caplog.records)
    assert warned == len([size for size in sizes if size > fits]) > 0
    sizes.clear()
    (rows,) = step.in_parts([pictures])
    assert torch.equal(rows, expected)
    assert max(sizes) <= fits
    assert len(caplog.records) == warned


@pytest.mark.parametrize("fits", [1, 3, 4, 5])
@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory: ..."), MemoryError()])
def test_full_cpu_gets_smaller_parts_from_then_on(
    fits: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = embed_module._Step([mean_spec()], normalize=False)
    sizes = []
    original = Backbone.embed

    def crowded(backbone: Backbone, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(len(pixels))
        if len(pixels) > fits:
            raise error
        return original(backbone, pixels)

    pictures = torch.randint(0, 256, (8, 24, 32, 3), dtype=torch.uint8)
    (expected,) = step([pictures], lambda: None)
    monkeypatch.setattr(Backbone, "embed", crowded)
    for turn in range(2):
        reused = pictures.clone()
        releases: list[int] = []

        def release(reused: torch.Tensor = reused, releases: list[int] = releases) -> None:
            releases.append(reused.zero_().numel())  # decoders write into it at once

        sizes.clear()
        (rows,) = step.in_fitting_parts([reused], release)
        assert torch.equal(rows, expected)
        assert len(releases) == 1
        assert (max(sizes) <= fits) is (turn == 1)


def test_cpu_without_memory_for_normalized_pixels_gets_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = embed_module._Step([mean_spec()], normalize=False)
    pictures = torch.randint(0, 256, (8, 24, 32, 3), dtype=torch.uint8)
    (expected,) = step([pictures], lambda: None)
    original = embed_module.Normalize.__call__

    def crowded(normalize: embed_module.Normalize, uint8: torch.Tensor) -> torch.Tensor:
        if len(uint8) > 2:
            raise RuntimeError("can't allocate memory: ...")
        return original(normalize, uint8)

    monkeypatch.setattr(embed_module.Normalize, "__call__", crowded)
    (rows,) = step.in_fitting_parts([pictures], lambda: None)
    assert torch.equal(rows, expected)


def test_other_errors_of_a_network_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(backbone: Backbone, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Backbone, "embed", broken)
    step = embed_module._Step([mean_spec()], normalize=False)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        step.in_fitting_parts([torch.zeros(4, 24, 32, 3, dtype=torch.uint8)], lambda: None)


@pytest.mark.parametrize("fitting", [1, 3, 7])
def test_parts_are_chosen_before_the_memory_is_full(
    fitting: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def images_at_a_time(backbone: Backbone, wanted: int, *, reserved_bytes: int) -> int:
        # Four batches of decoded pictures wait or are being filled.
        assert reserved_bytes == 4 * 8 * 24 * 32 * 3
        return min(wanted, fitting)

    monkeypatch.setattr(Backbone, "images_at_a_time", images_at_a_time)
    step = embed_module._Step([mean_spec()], normalize=False)
    pictures = torch.randint(0, 256, (8, 24, 32, 3), dtype=torch.uint8)
    (expected,) = step([pictures], lambda: None)
    sizes = []
    original = Backbone.embed

    def watched(backbone: Backbone, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(len(pixels))
        return original(backbone, pixels)

    monkeypatch.setattr(Backbone, "embed", watched)
    (rows,) = step.in_fitting_parts([pictures], lambda: None)
    assert torch.equal(rows, expected)
    assert max(sizes) == fitting
    assert f"a batch of 8 images; computing {fitting} at a time" in caplog.text


def test_device_too_small_for_one_image_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(backbone: Backbone, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Backbone, "embed", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    step = embed_module._Step([mean_spec()], normalize=False)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        step.in_parts([torch.zeros(4, 24, 32, 3, dtype=torch.uint8)])


@pytest.mark.parametrize(
    "message", ["CUDA out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"]
)
def test_compiled_network_runs_eagerly_in_parts(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Compiled(nn.Module):
        """What torch.compile returns: it keeps the network, and compiles for each size."""

        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self._orig_mod = network
            self.sizes: list[int] = []

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            self.sizes.append(len(pixels))
            if len(pixels) > fits:
                raise RuntimeError(message)
            rows: torch.Tensor = self._orig_mod(pixels)
            return rows

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    eager = mean_pixel()
    fast = replace(eager, module=Compiled(eager.module), is_compiled=True)
    step = embed_module._Step([EmbeddingSpec("mean", (EmbeddingPart(fast),))], normalize=False)
    pictures = torch.randint(0, 256, (8, 24, 32, 3), dtype=torch.uint8)
    fits = 8
    (expected,) = step.in_parts([pictures])
    fits = 3
    for _ in range(2):
        (rows,) = step.in_parts([pictures])
        torch.testing.assert_close(rows, expected)
    assert fast.module.sizes == [8, 8]  # never in parts


# ---------------------------------------------------------------------------------------------
# The path of a GPU, with stand-ins for streams and events


class Stream:
    """A stream on which everything is done at once."""

    broken = False
    waited_for: object = None

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: unspecified launch failure")

    def wait_stream(self, stream: object) -> None:
        self.waited_for = stream

    def wait_event(self, event: object) -> None:
        pass


class Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: object) -> float:
        return 2.0


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Let the path of a GPU compute on the CPU; return its stream of copies."""
    copies, compute, empty = Stream(), Stream(), torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: compute)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(
        torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options)
    )
    monkeypatch.setattr(embed_module, "_event", Event)
    monkeypatch.setattr(embed_module, "_embed_in_turn", embed_module._embed_cuda)
    return copies


@pytest.mark.usefixtures("pretended_gpu")
def test_gpu_path_keeps_the_order_and_counts_device_time() -> None:
    timer = Timer()
    plan: list[list[ImageSource]] = [[flat(color)] for color in colors(9)]
    with BatchLoader(
        plan, [mean_pixel().preprocess], LoaderOptions(batch_size=1, workers=2)
    ) as loader:
        rows = [e.rows[0][0] for e in embed([mean_spec()], loader, normalize=False, timer=timer)]
    np.testing.assert_allclose(rows, [normalized(c) for c in colors(9)], atol=1e-5)
    assert timer.seconds["model"] == pytest.approx(9 * 0.002)


def test_copies_begin_once_the_network_is_on_the_gpu(pretended_gpu: Stream) -> None:
    list(embed([mean_spec()], [], normalize=False))
    assert pretended_gpu.waited_for is torch.cuda.current_stream()


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("is_pinned", [False, True])
def test_rows_are_page_locked_if_pictures_are(
    monkeypatch: pytest.MonkeyPatch, is_pinned: bool
) -> None:
    pinned, empty = [], torch.empty

    def watched(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options)

    plan: list[list[ImageSource]] = [[flat((1, 2, 3))]]
    with BatchLoader(
        plan, [mean_pixel().preprocess], LoaderOptions(batch_size=1, workers=1)
    ) as loader:
        monkeypatch.setattr(torch, "empty", watched)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: is_pinned)
        list(embed([mean_spec()], loader, normalize=False))
    assert pinned == [is_pinned]


@pytest.mark.parametrize("is_broken", [False, True])
def test_first_error_of_a_gpu_is_not_hidden(pretended_gpu: Stream, is_broken: bool) -> None:
    def batches(loader: Iterable[Batch]) -> Iterator[Batch]:
        yield next(iter(loader))
        raise ValueError("the disk is gone")

    pretended_gpu.broken = is_broken
    plan: list[list[ImageSource]] = [[flat((1, 2, 3))]]
    with (
        BatchLoader(
            plan, [mean_pixel().preprocess], LoaderOptions(batch_size=1, workers=1)
        ) as loader,
        pytest.raises(ValueError, match="the disk is gone"),
    ):
        list(embed([mean_spec()], batches(loader), normalize=False))
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("is_gpu", [False, True])
def test_closed_embed_gives_back_memory_and_tf32(is_gpu: bool, request: Any) -> None:
    if is_gpu:
        request.getfixturevalue("pretended_gpu").broken = True
    plan: list[list[ImageSource]] = [[flat(color)] for color in colors(9)]
    with BatchLoader(
        plan, [mean_pixel().preprocess], LoaderOptions(batch_size=1, workers=2)
    ) as loader:
        with closing(embed([mean_spec()], loader, normalize=False)) as computed:
            next(computed)
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        assert computed.gi_frame is None  # which held the batches in flight
