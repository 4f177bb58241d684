"""Half precision and compilation are taken where they are faster and leave the embeddings right."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from support.callbacks import stop_after
from support.networks import mean_pixel
from support.pictures import noise
from torch import nn

from extractor import Preprocess, extract
from extractor.api import Report
from extractor.compute import tune as tuning
from extractor.errors import DeviceError, InterruptedRunError, StoreError
from extractor.models import embedding
from extractor.models.backbone import Backbone
from extractor.network import precision
from extractor.network.fusion.onednn import PackedConv2d, can_pack
from extractor.options import Options
from extractor.store.format import with_checksum


class Clock:
    """Seconds that pass only in :meth:`sleep`, so that no load of the machine changes a choice."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-3  # no batch takes no time
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


class Colors(nn.Module):
    """The mean of each channel; in half precision quicker and ``error`` away from it."""

    def __init__(self, error: float, seconds: float = 0.004) -> None:
        super().__init__()
        self.error = error
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        exact = pixels.float().mean((2, 3)) + 1
        if self.weight.dtype == torch.float32:
            CLOCK.sleep(self.seconds * len(pixels))
            return exact
        return exact + self.error * torch.tensor([1.0, -1.0, 0.0])


@pytest.fixture
def run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Runs a model that is ``error`` off in half precision, of which a few images are enough."""
    monkeypatch.setattr(tuning, "MIN_IMAGES", 4)
    monkeypatch.setattr(tuning, "faster_precisions", lambda _: ("bfloat16",))
    monkeypatch.setattr(tuning, "time", CLOCK)

    def go(error: float = 0.0, seconds: float = 0.004, **options: object) -> Report:
        def load(_: str, given: Options, *__: object) -> Backbone:
            backbone = replace(mean_pixel(), module=Colors(error, seconds))
            name = precision.resolve_precision(given.precision)
            return backbone.to(torch.device("cpu"), name)

        monkeypatch.setattr(embedding, "load", load)
        options = {"batch_size": 4, **options}
        return extract(photos, "colors", tmp_path / "out", **options)  # type: ignore[arg-type]

    return go


def computation(report: Report) -> dict[str, object]:
    return dict(report.store.manifest.description.computation)


def test_close_and_fast_half_precision_is_used(run: Callable[..., Report]) -> None:
    report = run(error=1e-3)
    assert computation(report)["precision"] == report.precision == "bfloat16"
    assert report.least_cosine == computation(report)["least_cosine"]
    assert 0.9995 < float(str(report.least_cosine)) < 1


def test_inexact_half_precision_is_not_used(run: Callable[..., Report]) -> None:
    report = run(error=0.3)
    assert computation(report)["precision"] == "float32"
    assert report.least_cosine is None


def test_half_precision_with_nan_is_not_used(run: Callable[..., Report]) -> None:
    assert run(error=float("nan")).precision == "float32"


def test_slow_half_precision_is_not_used(run: Callable[..., Report]) -> None:
    class Slow(Colors):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            CLOCK.sleep(0.004 * len(pixels))
            return super().forward(pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.Colors", Slow)
        assert run(seconds=0).precision == "float32"


def test_slow_measurement_is_repeated(run: Callable[..., Report]) -> None:
    class Disturbed(Colors):
        """Its first batches in half precision take long."""

        left = 3  # that is all batches of a look

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.weight.dtype != torch.float32 and type(self).left:
                type(self).left -= 1
                CLOCK.sleep(0.01 * len(pixels))
            return super().forward(pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.Colors", Disturbed)
        assert run().precision == "bfloat16"
    assert not Disturbed.left


def test_network_that_fails_in_half_precision_stays_in_float32(
    run: Callable[..., Report],
) -> None:
    class Refusing(Colors):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.weight.dtype != torch.float32:
                raise RuntimeError("no kernel for this")
            return super().forward(pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.Colors", Refusing)
        assert run().precision == "float32"


def test_few_images_are_not_worth_a_trial(
    run: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "MIN_IMAGES", 12)
    assert run().precision == "float32"


def test_requested_precision_is_not_tried(
    run: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "faster_precisions", None)  # calling it would be an error
    assert run(precision="bfloat16", error=0.3).precision == "bfloat16"


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_growing_store_keeps_its_precision(
    run: Callable[..., Report], photos: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    report = run(error=0.3 if first == "float32" else 1e-3)
    assert report.precision == first
    shutil.copy(photos / "00.png", photos / "new.png")
    # Now the other one would be chosen.
    monkeypatch.setattr(
        tuning, "faster_precisions", lambda _: ("bfloat16",) if first == "float32" else ()
    )
    again = run(error=1e-3)
    assert (again.precision, again.stores[0].added) == (first, 1)
    assert again.least_cosine == report.least_cosine
    assert run(overwrite=True).precision == ("bfloat16" if first == "float32" else "float32")


def test_store_refuses_another_precision(run: Callable[..., Report], photos: Path) -> None:
    assert run().precision == "bfloat16"
    shutil.copy(photos / "00.png", photos / "new.png")
    with pytest.raises(StoreError, match=r'precision: "bfloat16" there, "float32" now'):
        run(precision="float32")


@pytest.mark.parametrize("overwrite", [False, True])
def test_resumed_run_keeps_its_precision(
    run: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    with pytest.raises(InterruptedRunError, match=r"stopped after 8 of 11"):
        run(error=1e-3, stop=stop_after(2), overwrite=overwrite)
    monkeypatch.setattr(tuning, "faster_precisions", lambda _: ())
    report = run(error=1e-3, overwrite=overwrite)
    assert (report.precision, report.resumed) == ("bfloat16", 8)
    rows = report.store.features[:]
    again = run(error=1e-3, overwrite=True, precision="bfloat16")
    assert np.array_equal(again.store.features[:], rows)


def test_each_model_has_its_own_precision(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "MIN_IMAGES", 4)
    monkeypatch.setattr(tuning, "faster_precisions", lambda _: ("bfloat16",))
    monkeypatch.setattr(tuning, "time", CLOCK)

    def load(name: str, given: Options, *_: object) -> Backbone:
        backbone = replace(mean_pixel(), module=Colors({"good": 1e-3, "bad": 0.3}[name]))
        backbone = replace(backbone, provenance=replace(backbone.provenance, model=name))
        return backbone.to(torch.device("cpu"), precision.resolve_precision(given.precision))

    monkeypatch.setattr(embedding, "load", load)
    report = extract(photos, ["good", "bad", "good+bad"], tmp_path / "out", batch_size=4)
    chosen = [store.store.manifest.description.computation["precision"] for store in report.stores]
    assert chosen == ["bfloat16", "float32", "bfloat16+float32"]
    again = extract(photos, ["good", "bad", "good+bad"], tmp_path / "out", batch_size=4)
    assert again.resumed == again.images


# ---------------------------------------------------------------------------------------------
# Compilation


def pretend(monkeypatch: pytest.MonkeyPatch, network: Callable[[nn.Module], object]) -> None:
    """Let ``torch.compile`` give something else."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: network(module))


class Quick(nn.Module):
    """What a compiler makes of :class:`Colors`."""

    def __init__(self, module: nn.Module, error: float = 0.0) -> None:
        super().__init__()
        self.module = module
        self.error = error

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((2, 3)) + 1 + self.error * torch.tensor([1.0, -1.0, 0.0])


def test_long_run_is_compiled_and_resumes_compiled(
    run: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, photos: Path
) -> None:
    pretend(monkeypatch, Quick)
    monkeypatch.setattr(tuning, "faster_precisions", lambda _: ())
    assert not run().is_compiled  # it would not repay it
    monkeypatch.setattr(tuning, "COMPILE_SECONDS", {"cpu": 0.0})
    with pytest.raises(InterruptedRunError, match=r"stopped after 8 of 11"):
        run(overwrite=True, stop=stop_after(2))
    monkeypatch.setattr(tuning, "COMPILE_SECONDS", {"cpu": 1e9})
    report = run(overwrite=True)
    assert report.is_compiled
    assert computation(report)["compiled"] is True
    # One more image does not repay it, and its row need not be of the same bytes.
    shutil.copy(photos / "00.png", photos / "new.png")
    assert not run().is_compiled


@pytest.mark.parametrize("gain", [True, False])
def test_compilation_without_gain_is_not_used(
    run: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, gain: bool
) -> None:
    pretend(monkeypatch, Quick if gain else lambda module: module)
    monkeypatch.setattr(tuning, "faster_precisions", lambda _: ())
    monkeypatch.setattr(tuning, "COMPILE_SECONDS", {"cpu": 0.0})
    assert run().is_compiled is gain


def refuse(_: nn.Module) -> nn.Module:
    raise RuntimeError("no compiler here\nand much more")


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (refuse, "test:mean is not compiled: no compiler here"),
        (
            lambda module: Quick(module, 0.5),
            r"test:mean is not compiled: its embeddings would change \(cosine 0\.\d+\)",
        ),
    ],
)
def test_network_that_does_not_compile_runs_with_a_warning(
    run: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    made: Callable[[nn.Module], nn.Module],
    why: str,
) -> None:
    pretend(monkeypatch, made)
    report = run(compile="on", precision="float32")
    assert not report.is_compiled
    (line,) = [record.message for record in caplog.records]
    assert re.fullmatch(why, line)


@pytest.mark.parametrize("computes", [True, False])
def test_kernel_that_a_gpu_refuses_is_left_out_if_the_gpu_still_computes(
    run: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    computes: bool,
) -> None:
    def fails(_: nn.Module) -> nn.Module:
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

    pretend(monkeypatch, fails)
    monkeypatch.setattr(tuning, "computes", lambda _: computes)
    if not computes:
        with pytest.raises(DeviceError, match="does not work: Triton Error"):
            run(compile="on", precision="float32")
        return
    assert not run(compile="on", precision="float32").is_compiled
    assert "is not compiled: Triton Error [CUDA]: device kernel image" in caplog.text


@pytest.mark.parametrize("computes", [True, False])
def test_precision_that_a_gpu_lacks_is_left_out_if_the_gpu_still_computes(
    run: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, computes: bool
) -> None:
    class Picky(Colors):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.weight.dtype != torch.float32:
                raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")
            return super().forward(pixels)

    monkeypatch.setattr(f"{__name__}.Colors", Picky)
    monkeypatch.setattr(tuning, "computes", lambda _: computes)
    if not computes:
        with pytest.raises(DeviceError, match="lacks this precision or layer; try --precision fl"):
            run()
        return
    assert run().precision == "float32"


def test_compile_off_never_compiles(
    run: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, refuse)
    monkeypatch.setattr(tuning, "COMPILE_SECONDS", {"cpu": 0.0})
    assert not run(compile="off").is_compiled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_network_gives_the_same_rows(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    settings: dict[str, Any] = {
        "weights": "random",
        "device": "cpu",
        "precision": "float32",
        "batch_size": 4,
    }
    eager = extract(photos, "resnet10t", tmp_path / "a", compile="off", **settings)  # type: ignore[arg-type]
    fast = extract(photos, "resnet10t", tmp_path / "b", compile="on", **settings)  # type: ignore[arg-type]
    assert fast.is_compiled
    np.testing.assert_allclose(
        fast.store.features[:], eager.store.features[:], rtol=1e-3, atol=1e-4
    )


@pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="packs nothing here")
def test_compiled_network_has_plain_convolutions() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    size = Preprocess.standard(16)
    backbone = Backbone.from_module(network, head=None, preprocess=size).fold()
    fast = tuning.compiled(backbone)
    assert fast.is_compiled
    types = [type(module) for module in fast.module.modules()]
    assert (types.count(nn.Conv2d), types.count(nn.ReLU)) == (1, 1)
    assert isinstance(backbone.module[0], PackedConv2d)


@pytest.mark.parametrize(("variable", "expected"), [(None, 3), ("7", 32)])
def test_compilers_are_no_more_than_the_cores_that_are_granted(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: int
) -> None:
    from torch._inductor import config

    monkeypatch.delenv(tuning.COMPILERS, raising=False)
    if variable is not None:
        monkeypatch.setenv(tuning.COMPILERS, variable)
    monkeypatch.setattr(tuning, "available_cores", lambda: 3)
    pretend(monkeypatch, Quick)
    with config.patch(compile_threads=32):  # on a machine of many cores
        tuning.compiled(mean_pixel())
        assert config.compile_threads == expected


def test_layers_are_not_compiled(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = extract(
        photos,
        "resnet10t",
        tmp_path / "out",
        weights="random",
        device="cpu",
        layers=["layer1"],
        image_size=64,
        compile="on",
    )
    assert not report.is_compiled
    assert "its layers are read with hooks, which do not compile" in caplog.text


# ---------------------------------------------------------------------------------------------
# A GPU, with stand-ins


class Event:
    """An event whose time is that of :data:`CLOCK`."""

    def __init__(self) -> None:
        self.seconds = -1.0

    def record(self) -> None:
        self.seconds = CLOCK.now

    def synchronize(self) -> None:
        assert self.seconds >= 0

    def elapsed_time(self, later: Event) -> float:
        return (later.seconds - self.seconds) * 1000


@pytest.fixture
def pretended_gpu(run: object, monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Let the CPU pass for a GPU; return the shapes of what is copied to it."""
    copied: list[torch.Size] = []
    to = torch.Tensor.to

    def watched(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        if tensor.dtype == torch.uint8:
            copied.append(tensor.shape)
        return to(tensor, *arguments, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", watched)
    monkeypatch.setattr(tuning, "_is_gpu", lambda _: True)
    monkeypatch.setattr(tuning, "_event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return copied


class LaunchBound(Colors):
    """As fast in both precisions until a batch has so many images that the GPU is busy."""

    batches: ClassVar[list[tuple[torch.dtype, int]]] = []
    busy_from = 64

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        dtype = self.weight.dtype
        self.batches.append((dtype, len(pixels)))
        is_new = self.batches.count(self.batches[-1]) <= tuning.WARM_UPS
        CLOCK.sleep(100.0 if is_new else 0.0)  # kernels are chosen in the first batches
        per_image = 1e-3 if dtype == torch.float32 else 0.5e-3
        CLOCK.sleep(max(self.busy_from * 1e-3, per_image * len(pixels)))
        exact = pixels.float().mean((2, 3)) + 1
        return exact + self.error * torch.tensor([1.0, -1.0, 0.0])


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(16, "float32"), (64, "float32"), (128, "bfloat16")]
)
def test_gpu_is_timed_with_batches_of_the_run(
    run: Callable[..., Report],
    pretended_gpu: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    expected: str,
) -> None:
    monkeypatch.setattr(f"{__name__}.Colors", LaunchBound)
    monkeypatch.setattr(LaunchBound, "batches", [])
    monkeypatch.setattr(tuning, "RETRIES", 0)
    before = len(pretended_gpu)
    assert run(batch_size=batch_size).precision == expected
    tuned = 2 * (1 + tuning.WARM_UPS + tuning.TIMED_BATCHES)
    assert {size for _, size in LaunchBound.batches[:tuned]} == {batch_size}
    # Once per precision before the clock runs, and where a tensor already is on the device.
    assert {shape[0] for shape in pretended_gpu[before:]} == {batch_size}


def test_gpu_embeds_each_image_of_the_sample_once(pretended_gpu: list[torch.Size]) -> None:
    backbone = replace(mean_pixel(), module=Colors(0.0, 0.0))
    pictures = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 24, 32, 3)
    for size in (2, 5, 8):
        trial = tuning._Trial(backbone, lambda: pictures, size)
        (rows,), _ = trial._embed(backbone)
        expected = tuning._timed(backbone, pictures)[0][0]
        torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize(
    "message", ["CUDA out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"]
)
@pytest.mark.parametrize("fits", [1, 3, 8])
def test_gpu_without_memory_for_a_batch_is_timed_with_parts(
    run: Callable[..., Report],
    pretended_gpu: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
    fits: int,
    message: str,
) -> None:
    class Crowded(Colors):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if len(pixels) > fits:
                raise RuntimeError(message)
            return super().forward(pixels)

    monkeypatch.setattr(f"{__name__}.Colors", Crowded)
    report = run(batch_size=8)
    assert (report.precision, report.rows) == ("bfloat16", 11)


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ("CUDA out of memory", "is out of memory; try a smaller --batch-size"),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "does not work: cuDNN error"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_failing_gpu_ends_the_choice_with_advice(
    run: Callable[..., Report],
    pretended_gpu: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    message: str,
    match: str,
) -> None:
    class Failing(Colors):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.weight.dtype == dtype:
                raise RuntimeError(message)
            return super().forward(pixels)

    monkeypatch.setattr(f"{__name__}.Colors", Failing)
    if "memory" in message and dtype != torch.float32:
        assert run().precision == "float32"  # which does fit
        return
    with pytest.raises(DeviceError, match=match):
        run()


def test_gpu_seconds_per_image_are_those_of_whole_batches(
    pretended_gpu: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LaunchBound, "batches", [])
    backbone = replace(mean_pixel(), module=LaunchBound(0.0))
    trial = tuning._Trial(backbone, lambda: torch.zeros(0), 256)
    assert trial.seconds_per_image() == pytest.approx(1e-3)
    assert {size for _, size in LaunchBound.batches} == {256}


@pytest.mark.parametrize(
    ("model", "gain", "tolerance"),
    [
        ("resnet50", 1.9, 0.01),
        ("convnext_base", 1.31, 0.02),
        ("vit_base_patch16_224", 1.13, 0.02),
        ("vit_large_patch16_224", 1.10, 0.02),
    ],
)
def test_expected_gain_on_a_gpu_is_that_of_the_published_table(
    monkeypatch: pytest.MonkeyPatch, model: str, gain: float, tolerance: float
) -> None:
    monkeypatch.setattr(tuning, "_is_gpu", lambda _: True)
    with torch.device("meta"):
        network = timm.create_model(model, num_classes=0)
    backbone = replace(mean_pixel(), module=network)
    assert tuning._compile_gain(backbone) == pytest.approx(1 - 1 / gain, abs=tolerance)


def test_long_run_on_a_gpu_compiles_by_the_kind_of_network(
    pretended_gpu: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1 ms per image, 40 s are saved after 85,107 or after 400,000 images."""

    class Slow(LaunchBound):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__(0.0)
            self.layer = layer

    pretend(monkeypatch, Quick)
    monkeypatch.setattr(LaunchBound, "batches", [])
    monkeypatch.setitem(tuning.COMPILE_SECONDS, "cpu", 40.0)
    pictures = torch.zeros(1, 24, 32, 3, dtype=torch.uint8)
    for layer, enough in ((nn.Conv2d(3, 3, 1), 85_107), (nn.Linear(3, 3), 400_001)):
        for images in (enough - 1_000, enough + 1_000):
            trial = tuning._Trial(replace(mean_pixel(), module=Slow(layer)), lambda: pictures, 128)
            settings = tuning.TuneSettings(False, "auto", images, 128)
            tuning._choose_compilation(trial, settings, [])
            assert trial.best.is_compiled is (images > enough), (layer, images)


@pytest.mark.cuda
@pytest.mark.parametrize("compile", ["off", "on"])
def test_precision_chosen_on_gpu_keeps_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile: Any
) -> None:
    monkeypatch.setattr(tuning, "MIN_IMAGES", 4)
    for seed in range(24):
        path = tmp_path / "images" / f"{seed:02d}.png"
        path.parent.mkdir(exist_ok=True)
        noise(seed, 240, 320).save(path)
    settings: dict[str, Any] = {"weights": "random"}
    exact = extract(
        tmp_path / "images",
        "resnet18",
        tmp_path / "a",
        device="cpu",
        precision="float32",
        batch_size=8,
        **settings,
    )
    # In batches that keep any GPU busy, half precision is faster.
    fast = extract(
        tmp_path / "images",
        "resnet18",
        tmp_path / "b",
        device="cuda",
        compile=compile,
        batch_size=256,
        **settings,
    )
    assert fast.precision in ("float16", "bfloat16")
    assert fast.least_cosine is not None
    assert fast.is_compiled is (compile == "on")
    expected, given = (
        torch.from_numpy(report.store.features[:].astype(np.float64)) for report in (exact, fast)
    )
    assert torch.nn.functional.cosine_similarity(expected, given).min() > tuning.LEAST_COSINE


@pytest.mark.parametrize("precision", ["float8", "bfloat16+float32+float16", "auto", "mixed+"])
def test_store_of_another_model_does_not_choose_the_precision(
    run: Callable[..., Report], tmp_path: Path, photos: Path, precision: str
) -> None:
    run()
    manifest = tmp_path / "out" / "store.json"
    text = manifest.read_text().replace('"precision": "bfloat16"', f'"precision": "{precision}"')
    manifest.write_text(with_checksum(re.sub('"checksum": ".*"', '"checksum": ""', text)))
    shutil.copy(photos / "00.png", photos / "new.png")
    with pytest.raises(StoreError, match=r"precision: .* there, .* now"):
        run()


@pytest.mark.parametrize(
    ("flags", "name", "gain"),
    [
        ({"amx_bf16"}, "bfloat16", tuning.COMPILE_GAIN_AMX),
        ({"amx_bf16"}, "float32", tuning.COMPILE_GAIN["cpu"]),
        ({"avx512_bf16"}, "bfloat16", tuning.COMPILE_GAIN["cpu"]),
    ],
)
def test_compiling_gains_most_with_matrix_units(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], name: str, gain: float
) -> None:
    monkeypatch.setattr(precision, "_cpu_flags", lambda: flags)
    assert tuning._compile_gain(mean_pixel().to(torch.device("cpu"), name)) == gain
