"""Packed convolutions with fused activations compute the same as the original network."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.networks import assert_same_gradients
from torch import nn

from extractor import Backbone, Preprocess
from extractor.network.fusion import onednn
from extractor.network.fusion.fuse import fuse

NOISE = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.skipif(
    not onednn.can_pack(torch.device("cpu")), reason="no processor that gains by it"
)


class Net(nn.Module):
    """A convolution, an activation, and the mean of each channel."""

    def __init__(
        self, activation: nn.Module | None = None, convolution: nn.Module | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution: Any = convolution or nn.Conv2d(3, 8, 3)
        self.activation = activation or nn.ReLU()
        self.eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.activation(self.convolution(pixels)).mean((2, 3))


def is_packed(convolution: nn.Module) -> bool:
    return isinstance(convolution, onednn.PackedConv2d)


def packed(network: nn.Module) -> tuple[str, ...]:
    """Fuse a network, compare its embeddings for several shapes, and return the fused names."""
    original = copy.deepcopy(network)
    with torch.inference_mode():
        names = fuse(network, lambda pixels: [network(pixels)], NOISE)
        for pixels in (NOISE, NOISE[:1], NOISE[:, :, :9, :12], NOISE.repeat(3, 1, 2, 2)):
            torch.testing.assert_close(network(pixels), original(pixels), rtol=1e-5, atol=1e-5)
            last = pixels.to(memory_format=torch.channels_last)
            torch.testing.assert_close(network(last), original(pixels), rtol=1e-5, atol=1e-5)
    return names


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(inplace=True),
        nn.LeakyReLU(0.3),
        nn.SiLU(),
        nn.Hardswish(inplace=True),
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.Sigmoid(),
    ],
    ids=str,
)
def test_convolution_computes_the_activation_behind_it(
    activation: nn.Module, precision: str
) -> None:
    network = Net(activation)
    original = copy.deepcopy(network)
    assert packed(network) == ("activation",)
    assert is_packed(network.convolution)
    assert isinstance(network.activation, nn.Identity)
    assert not list(network.convolution.children())
    assert list(network.state_dict()) == list(original.state_dict())
    dtype = getattr(torch, precision)
    with torch.inference_mode():
        output = network.to(dtype)(NOISE.to(dtype)).float()
    torch.testing.assert_close(output, original(NOISE), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 6, 3, groups=3, bias=False),
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(3, 8, (1, 3), padding=(0, 2), dilation=2),
        nn.Conv2d(3, 8, 1),
    ],
    ids=str,
)
def test_convolutions_of_all_shapes_are_packed(convolution: nn.Module) -> None:
    network = Net(convolution=convolution)
    assert packed(network) == ("activation",)
    assert is_packed(network.convolution)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
    ],
    ids=["same", "reflect", "parametrized"],
)
def test_convolutions_without_zero_padding_stay_plain(convolution: nn.Module) -> None:
    network = Net(convolution=nn.Sequential(nn.Conv2d(3, 3, 1), convolution))
    assert packed(network) == ()
    assert is_packed(network.convolution[0])
    assert not is_packed(convolution)
    assert isinstance(network.activation, nn.ReLU)


class AlsoElsewhere(Net):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        map_ = self.convolution(pixels)
        return self.activation(map_).mean((2, 3)) + map_.mean((2, 3))


class AfterASum(Net):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        map_ = self.convolution(pixels)
        map_ += pixels.mean()
        return self.activation(map_).mean((2, 3))


class OfAPart(Net):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.activation(self.convolution(pixels)[:, :4]).mean((2, 3))


class Twice(Net):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        map_ = self.activation(self.convolution(pixels))
        return self.activation(map_ - 1).mean((2, 3))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [AfterASum, OfAPart, Twice])
def test_activation_of_something_else_stays(kind: type[Net], inplace: bool) -> None:
    network = kind(nn.ReLU(inplace=inplace))
    assert packed(network) == ()
    assert isinstance(network.activation, nn.ReLU)
    assert is_packed(network.convolution)


def test_activation_stays_if_its_input_has_another_use() -> None:
    assert packed(AlsoElsewhere()) == ()


def test_in_place_activation_is_fused_if_its_output_has_another_use() -> None:
    assert packed(AlsoElsewhere(nn.ReLU(inplace=True))) == ("activation",)


@pytest.mark.parametrize("assign", [False, True])
def test_new_weights_are_packed_again(assign: bool) -> None:
    network = Net()
    packed(network)
    for value in (0.1, 0.2, 0.3):
        other = Net(convolution=nn.Conv2d(3, 8, 3))
        nn.init.constant_(other.convolution.weight, value)
        network.load_state_dict(other.state_dict(), assign=assign)
        network.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        torch.testing.assert_close(network(NOISE), other(NOISE), atol=1e-5, rtol=1e-5)


def test_new_weights_at_a_reused_address_are_packed_again() -> None:
    network, other = Net(), Net()
    packed(network)
    with torch.inference_mode():
        for _ in range(20):
            weights = {name: torch.randn(one.shape) for name, one in network.state_dict().items()}
            output = torch.func.functional_call(network, weights, (NOISE,))
            expected = torch.func.functional_call(other, weights, (NOISE,))
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
            del weights


def test_view_of_the_weights_is_packed_again() -> None:
    network = Net(convolution=nn.Conv2d(3, 3, 3))
    other = copy.deepcopy(network)
    packed(network)
    for one in (network, other):
        weight = one.convolution.weight.detach().transpose(0, 1)
        one.convolution.weight = nn.Parameter(weight, requires_grad=False)
    torch.testing.assert_close(network(NOISE), other(NOISE), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradients_of_packed_network_equal_those_of_original() -> None:
    network, original = Net(nn.SiLU()), Net(nn.SiLU())
    packed(network)
    assert_same_gradients(network, original, NOISE)
    pixels = NOISE.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(pixels).sum(), pixels)
    assert gradient.any()
    _, ahead = torch.func.jvp(network, (NOISE,), (torch.ones_like(NOISE),))
    _, expected = torch.func.jvp(Net(nn.SiLU()), (NOISE,), (torch.ones_like(NOISE),))
    torch.testing.assert_close(ahead, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_traces_packed_network_and_rejects_scripting() -> None:
    network = Net(nn.SiLU())
    before = network(NOISE)
    packed(network)
    torch.testing.assert_close(torch.jit.trace(network, NOISE)(NOISE), before)
    with pytest.raises(Exception, match=r"annotation|activation|_cache"):
        torch.jit.script(network)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copy_has_its_own_weights(copied: Callable[[nn.Module], nn.Module]) -> None:
    network = Net()
    packed(network)
    before = network(NOISE)
    other: Any = copied(network)
    assert torch.equal(other(NOISE), before)
    nn.init.zeros_(other.convolution.weight)
    nn.init.zeros_(other.convolution.bias)
    assert not other(NOISE).any()
    assert torch.equal(network(NOISE), before)


def test_unsupported_dtype_is_computed_by_torch() -> None:
    network, original = Net(nn.SiLU()), Net(nn.SiLU())
    packed(network)
    expected = original.double()(NOISE.double())
    assert torch.equal(network.double()(NOISE.double()), expected)


def test_weights_above_the_size_limit_are_not_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "MAX_PACKED_BYTES", 100)
    network = Net()
    assert packed(network) == ()
    assert not is_packed(network.convolution)


def test_network_whose_embeddings_change_is_unpacked() -> None:
    class Careful(Net):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            changed = isinstance(self.activation, nn.Identity)
            return super().forward(pixels) + changed

    network = Careful()
    assert packed(network) == ()
    assert isinstance(network.activation, nn.ReLU)
    assert not is_packed(network.convolution)


def wrong(output: torch.Tensor, *_: object) -> torch.Tensor:
    return output + 1


def refusing(*_: object) -> torch.Tensor:
    raise RuntimeError("no such operation")


@pytest.mark.parametrize("failing", [wrong, refusing])
def test_normalizations_stay_folded_if_packing_fails(
    failing: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten()).eval()
    nn.init.uniform_(network[1].weight, 1, 2)  # type: ignore[arg-type]
    monkeypatch.setattr(onednn.PackedConv2d, "forward", lambda _, output: failing(output))
    before = network(NOISE)
    assert fuse(network, lambda pixels: [network(pixels)], NOISE) == ("1",)
    assert not is_packed(network[0])
    torch.testing.assert_close(network(NOISE), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrap", [lambda network: network, copy.deepcopy])
def test_packed_network_compiles_to_one_graph(wrap: Callable[[nn.Module], nn.Module]) -> None:
    network = Net(nn.Hardswish())
    packed(network)
    before = network(NOISE)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(wrap(network), backend=backend, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(NOISE), before, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


def test_convolution_output_can_still_be_a_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    network.append(nn.Flatten())
    backbone = Backbone.from_module(network, head=None, preprocess=Preprocess.standard(16))
    for pool in ("avg", "none"):
        layer = backbone.at_layers(["0", "2"], pool)
        expected = [one.clone() for one in layer.embed(NOISE)]
        twin = copy.deepcopy(backbone).at_layers(["0", "2"], pool).fold()
        for one, other in zip(expected, twin.embed(NOISE), strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


class Residual(Net):
    """Adds the input of the last convolution to its output, in place or not."""

    def __init__(self, activation: nn.Module | None = None, in_place: bool = False) -> None:
        super().__init__(activation)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.in_place = in_place
        self.eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        shortcut = self.convolution(pixels)
        features = self.last(shortcut)
        if self.in_place:
            features += shortcut
        else:
            features = features + shortcut
        return self.activation(features).mean((2, 3))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True)], ids=str)
def test_activation_after_residual_sum_stays(activation: nn.Module, in_place: bool) -> None:
    network = Residual(activation, in_place)
    assert packed(network) == ()
    assert is_packed(network.last)
    assert network.activation is activation


def test_gradients_of_packed_residual_network_equal_those_of_original() -> None:
    network, original = Residual(), Residual()
    packed(network)
    assert_same_gradients(network, original, NOISE)


class SharedActivation(Net):
    """One activation behind two convolutions, and optionally behind something else."""

    def __init__(self, activation: nn.Module | None = None, with_more: bool = False) -> None:
        super().__init__(activation)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.with_more = with_more
        self.eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.activation(self.last(self.activation(self.convolution(pixels))))
        return (self.activation(features - 1) if self.with_more else features).mean((2, 3))


def test_shared_activation_is_fused_everywhere_or_nowhere() -> None:
    network = SharedActivation()
    assert packed(network) == ("activation",)
    assert isinstance(network.activation, nn.Identity)
    network = SharedActivation(with_more=True)
    assert packed(network) == ()
    assert isinstance(network.activation, nn.ReLU)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copy_without_packing_has_the_original_modules(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    network, original = Net(), Net()
    packed(network)
    plain = onednn.without_packing(copied(network))
    assert onednn.without_packing(plain) is plain
    assert type(plain.convolution) is nn.Conv2d
    assert type(plain.activation) is nn.ReLU
    assert vars(plain.convolution).keys() == vars(original.convolution).keys()
    assert is_packed(network.convolution)
    torch.testing.assert_close(plain(NOISE), original(NOISE))
