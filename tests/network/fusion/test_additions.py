"""Convolutions do the additions behind them, and what is added comes to no harm."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from support.networks import assert_same_gradients
from torch import nn

from extractor import Backbone, Preprocess
from extractor.network.fusion import onednn as packing
from extractor.network.fusion.fuse import fuse
from extractor.network.precision import convert

NOISE = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.skipif(
    not packing.can_pack(torch.device("cpu")), reason="no processor that gains by it"
)


class Block(nn.Module):
    """Adds what came before to a convolution; a stem in front, and an activation behind."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Identity()
        self.activation = activation or nn.ReLU()
        self.eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.block(self.stem(pixels)).mean((2, 3))

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        map_ = self.drop(self.last(self.middle(shortcut)))
        map_ += shortcut
        return self.activation(map_)


def summed(network: nn.Module) -> dict[str, bool]:
    """Fold a network; the convolutions with an addition, and whether they may overwrite.

    The embeddings are the same, also of other shapes than the first, and so is what was given.
    """
    whole = copy.deepcopy(network)
    with torch.inference_mode(), packing.overwriting(True):
        fuse(network, lambda pixels: [network(pixels)], NOISE)
        for pixels in (NOISE, NOISE[:1], NOISE[:, :, :9, :12], NOISE.repeat(3, 1, 2, 2)):
            for layout in (torch.contiguous_format, torch.channels_last):
                given = pixels.clone(memory_format=layout)
                for _ in range(2):
                    torch.testing.assert_close(network(given), whole(pixels), rtol=1e-5, atol=1e-5)
                assert torch.equal(given, pixels)
    assert [str(one) for one in network.state_dict()] == [str(one) for one in whole.state_dict()]
    return {
        name: one.may_overwrite
        for name, one in network.named_modules()
        if isinstance(one, packing.PackedConv2d) and one.is_summed
    }


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True)], ids=str)
def test_a_convolution_does_the_addition_and_the_activation(activation: nn.Module) -> None:
    network = Block(activation)
    assert summed(network) == {"last": True}
    assert isinstance(network.activation, nn.Identity)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU6(inplace=True), nn.Sigmoid()], ids=str)
def test_other_activations_stay_behind_the_addition(activation: nn.Module) -> None:
    network = Block(activation)
    assert summed(network) == {"last": True}
    assert network.activation is activation


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("precision", ["bfloat16", "float64", "mixed"])
def test_the_sum_is_that_of_the_network_in_other_numbers(precision: str, groups: int) -> None:
    network, whole = Block(), Block()
    for one in (network, whole):
        one.last = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        nn.init.constant_(one.last.weight, 0.1)
        nn.init.zeros_(one.last.bias)
    assert summed(network) == {"last": True}
    dtype = getattr(torch, precision, torch.float32)
    if precision == "mixed":
        convert(network, precision)
    else:
        network.to(dtype)
    with torch.inference_mode():
        given = network(NOISE.to(dtype)).float()
    torch.testing.assert_close(given, whole(NOISE), atol=2e-2, rtol=2e-2)


class Transposed(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        return self.activation(self.last(shortcut) + (shortcut * 2).transpose(2, 3))


@pytest.mark.parametrize("kind", [Block, Transposed])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_added_may_lie_in_any_way_in_bfloat16(
    kind: type[Block], layout: torch.memory_format
) -> None:
    network, whole = kind(), kind().bfloat16()
    with torch.inference_mode(), packing.overwriting(True):
        fuse(network, lambda pixels: [network(pixels)], NOISE)
        assert network.bfloat16().last.is_summed
        given = NOISE.bfloat16().contiguous(memory_format=layout)
        torch.testing.assert_close(network(given), whole(given), atol=3e-2, rtol=3e-2)


class Behind(Block):
    """What is added comes second, and is made after the convolution has run."""

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        map_ = self.last(shortcut)
        return self.activation(self.middle(shortcut) + self.drop(map_))


class NotInPlace(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        return self.activation(self.last(self.middle(shortcut)) + shortcut)


class TwoAdditions(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        map_ = shortcut + self.middle(shortcut)
        return self.activation(self.last(torch.relu(shortcut)) + map_)


class Chained(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        map_ = self.last(self.middle(shortcut)) + shortcut
        return self.activation(map_ + 1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Behind, {"middle": True}),
        (NotInPlace, {"last": True}),
        (TwoAdditions, {"middle": False, "last": True}),
        (Chained, {"last": True}),
    ],
)
def test_additions_of_any_form_are_done(kind: type[Block], expected: dict[str, bool]) -> None:
    assert summed(kind()) == expected


class UsedLater(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        return super().block(shortcut) * shortcut


class OfTheInput(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        map_ = self.last(shortcut)
        map_ += shortcut
        return self.activation(map_)


class OfThePixels(Block):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.repeat_interleave(1, 0) if self.training else pixels
        return (self.stem(self.middle(pixels)) + pixels).mean((2, 3))

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.stem = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)


class OfAParameter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 8, 16, 16), requires_grad=False)

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        height, width = shortcut.shape[2:]
        place = self.position.repeat(1, 1, 2, 2)[:, :, :height, :width]
        place = self.position if place.shape == self.position.shape else place
        return self.activation(self.last(shortcut) + place.expand(len(shortcut), -1, -1, -1))


class OfOneForAll(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        mean = shortcut.mean((2, 3), keepdim=True)
        return self.activation(self.last(shortcut) + mean.expand_as(shortcut))


class OfAHalf(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        both = torch.cat([shortcut, shortcut.sin()])
        return self.activation(self.last(self.middle(shortcut)) + both.chunk(2)[1])


class WaitedFor(Block):
    """What is added is the input of another convolution, whose addition comes later."""

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        late = self.last(shortcut)
        map_ = self.middle(shortcut.tanh()) + shortcut
        return self.activation(late + map_)


class Given(Block):
    """Gives what was added as well."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        shortcut = self.stem(pixels)
        self.block(shortcut)
        return shortcut

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(shortcut)) + shortcut


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (UsedLater, {"last": False}),
        (OfTheInput, {"last": False}),
        (OfThePixels, {"stem": False}),
        (OfAParameter, {"last": False}),
        (OfOneForAll, {"last": False}),
        (OfAHalf, {"last": False}),
        (WaitedFor, {"middle": False, "last": True}),
        (Given, {"last": False}),
    ],
)
def test_what_is_needed_otherwise_is_not_overwritten(
    kind: Callable[[], Block], expected: dict[str, bool]
) -> None:
    assert summed(kind()) == expected


class Kept(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        self.kept = shortcut
        return super().block(shortcut)


class OfNumpy(Block):
    """Memory that no operation made; it may lie where something was that one did make."""

    def __init__(self) -> None:
        super().__init__()
        self.array = torch.randn(1, 8, 16, 16).numpy()

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            shortcut = shortcut * 1
        return self.activation(self.last(self.middle(shortcut)) + torch.from_numpy(self.array))


def test_what_is_kept_or_comes_from_elsewhere_is_not_overwritten() -> None:
    assert summed(Kept()) == {"last": False}
    network = OfNumpy()
    before = network.array.copy()
    with torch.inference_mode(), packing.overwriting(True):
        fuse(network, lambda pixels: [network(pixels)], NOISE[:1])
        for _ in range(3):
            network(NOISE[:1].contiguous(memory_format=torch.channels_last))
    assert network.last.is_summed
    assert (network.array == before).all()


class Resized(Block):
    """What is added is a copy at the first size, and a parameter at another."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 8, 9, 9), requires_grad=False)
        layout = self.position.data.contiguous(memory_format=torch.channels_last)
        self.position.data = layout

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        place = self.position
        if place.shape[2:] != shortcut.shape[2:]:
            place = nn.functional.interpolate(place, shortcut.shape[2:])
        return self.activation(self.last(shortcut) + place)


class Expanded(Block):
    """Of one image for all: with one image it is a tensor like others."""

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        first = (shortcut[:1] * 2).expand_as(shortcut)
        return self.activation(self.last(shortcut) + first)


def test_what_may_be_overwritten_at_one_size_is_not_at_others() -> None:
    whole = Resized()
    backbone = Backbone.from_module(Resized(), head=None, preprocess=Preprocess.standard(16)).fold()
    assert backbone.module.last.may_overwrite
    for size in (16, 9, 16):
        given = NOISE[:1, :, :size, :size].contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            torch.testing.assert_close(backbone(given), whole(given), atol=1e-5, rtol=1e-5)
    assert torch.equal(backbone.module.position, whole.position)
    assert summed(Expanded()) == {"last": True}


class Contiguous(Block):
    """What is added is a copy of pixels in another layout, and else these themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.layout = torch.contiguous_format

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.contiguous(memory_format=self.layout)
        return (self.last(self.middle(pixels)) + pixels).mean((2, 3))


def test_a_pass_overwrites_what_is_added_in_usual_passes_alone() -> None:
    backbone = Backbone.from_module(Block(), head=None, preprocess=Preprocess.standard(16)).fold()
    seen: list[torch.Tensor] = []
    middle = backbone.module.middle
    middle.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    usual = NOISE.contiguous(memory_format=torch.channels_last)
    others = (NOISE, usual[:, :, :9, :9], usual[:, :, :9].contiguous())
    shortcuts = [Block().stem(pixels).detach() for pixels in (usual, *others)]
    for pixels in (usual, *others):
        backbone(pixels)
    backbone.module(usual)  # which nobody says is one
    is_kept = [
        torch.allclose(one, shortcut, atol=1e-5)
        for one, shortcut in zip(seen, (*shortcuts, shortcuts[0]), strict=True)
    ]
    assert is_kept == [False, True, True, True, True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_of_any_layout_stay(layout: torch.memory_format) -> None:
    network = Contiguous()
    network.layout = layout
    backbone = Backbone.from_module(network, head=None, preprocess=Preprocess.standard(16)).fold()
    for given_in in (torch.contiguous_format, torch.channels_last):
        given = NOISE.clone(memory_format=given_in)
        first = backbone(given)
        assert torch.equal(backbone(given), first)
        assert torch.equal(given, NOISE)


def test_what_a_hook_may_have_kept_is_not_overwritten() -> None:
    kept = []
    network = Block()
    network.drop.register_forward_hook(lambda *_: None)
    network.stem.register_forward_hook(lambda _, __, output: kept.append(output))
    assert summed(network) == {"last": False}
    with torch.inference_mode(), packing.overwriting(True):
        kept.clear()
        network(NOISE)
        torch.testing.assert_close(kept[0], Block().stem(NOISE), atol=1e-5, rtol=1e-5)


class InputChanged(Block):
    """The input of a convolution changes before its output is added to."""

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        given = self.middle(shortcut)
        map_ = self.last(given)
        given.clamp_(max=9.0)  # which leaves it as it is here, but not everywhere
        return self.activation(map_ + shortcut)


class AlsoElsewhere(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        map_ = self.last(shortcut)
        return self.activation(map_ + shortcut) + map_


class Subtracted(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        return self.activation(self.last(shortcut) - shortcut)


class Scaled(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        return self.activation(torch.add(self.last(shortcut), shortcut, alpha=2))


class OfAnotherShape(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        return self.activation(self.last(shortcut) + shortcut.mean((2, 3), keepdim=True))


class IntoTheOther(Block):
    """The sum is where the other was, which somebody sees; here nothing is added yet."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        other = shortcut.view(shortcut.shape)
        shortcut += self.last(shortcut.sin())
        return self.activation(other)


class ByName(Block):
    """An addition of which only a tensor knows."""

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        return self.activation(torch.add(self.last(shortcut), shortcut))


class Asking(Block):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        map_ = self.last(shortcut)
        return self.activation(map_ + shortcut if map_.shape == shortcut.shape else map_)


@pytest.mark.parametrize(
    "kind",
    [
        *(InputChanged, AlsoElsewhere, Subtracted, Scaled),
        *(OfAnotherShape, IntoTheOther, ByName, Asking),
    ],
)
def test_a_network_that_adds_otherwise_is_packed_without(kind: type[Block]) -> None:
    network = kind()
    assert summed(network) == {}
    assert isinstance(network.last, packing.PackedConv2d)
    assert isinstance(network.activation, nn.ReLU)


class Shared(Block):
    """One activation for all."""

    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        map_ = self.last(self.activation(self.middle(self.activation(shortcut))))
        map_ += shortcut
        return self.activation(map_)


class SharedWithMore(Shared):
    def block(self, shortcut: torch.Tensor) -> torch.Tensor:
        return self.activation(super().block(shortcut) - 1)


class SharedWithReflection(Shared):
    """Of one of the convolutions, that cannot be packed, too."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(inplace=True))
        self.middle = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")


def test_an_activation_in_several_places_goes_out_of_all_or_none() -> None:
    network = Shared()
    assert summed(network) == {"last": True}
    assert isinstance(network.activation, nn.ReLU)  # of the stem's output, which is added, too
    network = Shared(nn.ReLU(inplace=True))
    assert summed(network) == {"last": True}
    assert isinstance(network.activation, nn.Identity)
    for network in (SharedWithMore(nn.ReLU(inplace=True)), SharedWithReflection()):
        assert summed(network) == {"last": True}
        assert isinstance(network.activation, nn.ReLU)


def test_gradients_are_those_of_the_whole_network() -> None:
    network, whole = Block(), Block()
    summed(network)
    assert_same_gradients(network, whole, NOISE)
    shortcut = torch.randn(3, 8, 16, 16, requires_grad=True)
    map_ = network.last(torch.zeros(3, 8, 16, 16)) + shortcut
    (gradient,) = torch.autograd.grad(map_.sum(), shortcut)
    assert torch.equal(gradient, (map_ > 0).float())


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 1, 16, 16), (16,), ()])
def test_what_is_added_may_be_of_another_shape_later(shape: tuple[int, ...]) -> None:
    network = Block()
    assert summed(network) == {"last": True}
    given, added = torch.randn(3, 8, 16, 16), torch.randn(shape)
    with torch.inference_mode(), packing.overwriting(True):
        expected = torch.relu(Block().last(given) + added)
        torch.testing.assert_close(network.last(given) + added, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_gets_all_of_it() -> None:
    network = Block()
    summed(network)
    torch.testing.assert_close(torch.jit.trace(network, NOISE)(NOISE), Block()(NOISE))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_an_unpacked_copy_compiles_as_a_whole(copied: Callable[[nn.Module], nn.Module]) -> None:
    network = Block()
    summed(network)
    copy_ = packing.without_packing(copied(network))
    assert packing.without_packing(copy_) is copy_
    assert type(copy_.last) is nn.Conv2d
    assert type(copy_.activation) is nn.ReLU
    assert vars(copy_.last).keys() == vars(Block().last).keys()
    assert isinstance(network.last, packing.PackedConv2d)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    with torch.inference_mode():
        expected = Block()(NOISE)
        compiled = torch.compile(copy_, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(NOISE), expected, atol=1e-5, rtol=1e-5)
        assert len(graphs) == 1
        in_pieces = torch.compile(network, backend=backend)
        torch.testing.assert_close(in_pieces(NOISE), expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) > 1
