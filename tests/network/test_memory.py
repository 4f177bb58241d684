"""The memory of a forward pass is estimated without computing it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from extractor import Backbone, Extractor, Preprocess, load_backbone
from extractor.errors import DeviceError
from extractor.models.load import adapt
from extractor.network import memory
from extractor.options import Options

SIZE = 40
PLANE = SIZE * SIZE * 4  # bytes of one channel of one image in float32


class Widen(nn.Module):
    """From 3 channels to 5 and to 7, then the mean of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 7, 1)
        self.seen: list[torch.Tensor] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(pixels)
        return self.second(self.first(pixels)).mean((2, 3))


class Picky(Widen):
    """Looks at a value, which an estimate does not have."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(pixels) * (1 if float(pixels.sum()) > 0 else 2)


def backbone(network: nn.Module) -> Backbone:
    return Backbone.from_module(
        network, head=None, preprocess=Preprocess.standard(SIZE), device="cpu"
    )


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "USABLE", 1.0)
    monkeypatch.setattr(memory, "free_memory", lambda: math.inf)
    memory._known.clear()


def fit(made: Backbone, wanted: int, reserved: int = 0) -> memory.Fit:
    return memory.images_that_fit(made, (SIZE, SIZE), wanted, reserved_bytes=reserved)


def test_estimate_is_the_sum_of_what_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = backbone(Widen())
    monkeypatch.setattr(memory, "free_memory", lambda: 160 * PLANE)
    # The pixels stay until the end, and the second convolution reads 5 channels and writes 7. The
    # input comes in two layouts of memory.
    low, high = (3 + 5 + 7) * PLANE, (3 + 3 + 5 + 7) * PLANE
    needed = fit(made, 1000).image_bytes
    assert low <= needed <= high + 1000
    assert fit(made, 1000).images == 160 * PLANE // needed
    assert fit(made, 2).images == 2
    assert fit(made, 1000, reserved=100 * PLANE).images == 60 * PLANE // needed
    assert fit(made, 1000, reserved=159 * PLANE).images == 0


def test_nothing_is_estimated_where_memory_is_plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 3 * memory.UNESTIMATED * 10 * PLANE)
    made = backbone(Widen())
    assert fit(made, 10) == (10, 0, 3 * memory.UNESTIMATED * 10 * PLANE)
    assert not memory._known
    assert fit(made, 11).image_bytes > 0


def test_estimate_computes_nothing_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Widen()
    made = backbone(network)
    network.seen.clear()
    monkeypatch.setattr(memory, "free_memory", lambda: 160 * PLANE)
    assert fit(made, 1000).image_bytes > 0
    assert network.seen == []
    assert made(torch.ones(2, 3, SIZE, SIZE)).shape == (2, 7)
    assert type(network.seen[0]) is torch.Tensor


def test_network_that_cannot_be_estimated_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 160 * PLANE)
    assert fit(backbone(Picky()), 1000) == (1000, 0, 160 * PLANE)


def test_image_that_does_not_fit_is_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2**30)
    match = (
        r"test_resnet: one image of 9000 x 9000 pixels needs about \d+\.\d GiB, and 1\.0 GiB of "
        r"memory are free, of which 70% may be used; try a smaller --image-size"
    )
    for load in (load_backbone, Extractor):
        with pytest.raises(DeviceError, match=match):
            load("test_resnet", weights="random", device="cpu", image_size=9000)


def test_batches_that_do_not_fit_are_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    made = backbone(Widen())
    monkeypatch.setattr(memory, "free_memory", lambda: 160 * PLANE)
    with pytest.raises(DeviceError, match=r"the decoded batches 0\.0 GiB.* or --batch-size"):
        made.images_at_a_time(8, reserved_bytes=159 * PLANE)


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (
            "DefaultCPUAllocator: can't allocate memory: you tried",
            r"not enough memory: .*can't allocate memory",
        ),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", r"is out of memory; .*ALLOC_FAILED"),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", r"does not work: cuDNN error"),
    ],
)
def test_failing_device_is_not_called_a_wrong_image_size(
    monkeypatch: pytest.MonkeyPatch, message: str, match: str
) -> None:
    made = backbone(Widen())

    def full(*_: object) -> torch.Tensor:
        raise RuntimeError(message)

    monkeypatch.setattr(Widen, "forward", full)
    with pytest.raises(DeviceError, match=match):
        adapt(made, Options(image_size=SIZE))
