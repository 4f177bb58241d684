"""Inner layers, compared with plain forward hooks on untouched networks."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from support import networks
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionVit

from extractor import Backbone, load_backbone
from extractor.errors import ModelError, UsageError
from extractor.network.taps import Output
from extractor.preprocess import Preprocess

POOLS = ["avg", "max", "gem", "gem:4.5", "avg+max"]


def picture(*size: int, images: int = 2) -> torch.Tensor:
    return torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(1))


assert_close = functools.partial(networks.assert_close, limit=1e-4)


def pooled(positions: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool ``(B, positions, channels)`` by definition."""
    if pool == "avg":
        return positions.sum(1) / positions.shape[1]
    if pool == "max":
        return positions.max(1).values
    if pool == "avg+max":
        return torch.hstack([pooled(positions, "avg"), pooled(positions, "max")])
    power = {"gem": 3.0, "gem:4.5": 4.5}[pool]
    return (positions.clamp(min=1e-6) ** power).mean(1) ** (1 / power)


def hooked(network: nn.Module, layer: str, pixels: torch.Tensor) -> torch.Tensor:
    """Return a copy of a layer's last output, before anything writes into it."""
    seen: list[torch.Tensor] = []
    module = network.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    with torch.inference_mode():
        network.eval()(pixels)
    handle.remove()
    return seen[-1]


# Small images, so that the tests are quick: 4 x 4 or 2 x 2 positions behind the last stage.
SIDE = 64
VIT = "vit_tiny_patch16_224"


@functools.cache
def loaded(name: str) -> Backbone:
    return load_backbone(name, weights="random", device="cpu", image_size=SIDE)


@functools.cache
def untouched(name: str) -> nn.Module:
    library, _, short = name.rpartition(":")
    if library == "torchvision":
        network = torchvision.models.get_model(short, weights=None)
    else:
        options: dict[str, Any] = {"img_size": SIDE} if name == VIT else {}
        network = timm.create_model(short, **options)
    network.load_state_dict(loaded(name).module.state_dict(), strict=False)
    return network.eval()


def wrapped(
    network: nn.Module, size: int | tuple[int, int], head: str | None = "head"
) -> tuple[Backbone, nn.Module]:
    """Return a backbone and an untouched copy of its network."""
    backbone = Backbone.from_module(
        copy.deepcopy(network), head=head, preprocess=Preprocess.standard(size), device="cpu"
    )
    return backbone, network.eval()


def small_vit(size: tuple[int, int], patch: int = 16, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    settings = {"embed_dim": 20, "depth": 3, "num_heads": 2, "num_classes": 5, **options}
    network = VisionTransformer(img_size=size, patch_size=patch, **settings)
    for name, parameter in network.named_parameters():
        if name in ("cls_token", "reg_token"):  # tokens that no mean could miss
            nn.init.constant_(parameter, 9.0)
    return network


# ---------------------------------------------------------------------------------------------
# Maps


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18"])
def test_pooled_map_equals_hooked_map_pooled_by_hand(name: str, pool: str) -> None:
    backbone, pixels = loaded(name).at_layers(["layer3"], pool), picture(SIDE, SIDE)
    expected = pooled(hooked(untouched(name), "layer3", pixels).flatten(2).mT, pool)
    assert_close(backbone(pixels), expected)
    assert backbone.dim == expected.shape[1] == (512 if pool == "avg+max" else 256)
    (output,) = backbone.outputs
    assert (output.layer, output.layout, output.definition) == ("layer3", "map", "layer")
    assert output.pool == ("gem:3" if pool == "gem" else pool)


def test_load_backbone_accepts_layers_and_pool() -> None:
    backbone = load_backbone(
        "resnet18", weights="random", device="cpu", layers=["layer2", "layer1"], pool="max"
    )
    pixels = picture(SIDE, SIDE)
    for got, layer in zip(backbone.embed(pixels), ["layer2", "layer1"], strict=True):
        assert_close(got, hooked(untouched("resnet18"), layer, pixels).amax((2, 3)))


def test_unpooled_map_is_channels_first_and_contiguous() -> None:
    backbone, pixels = loaded("resnet18").at_layers(["layer4"], "none"), picture(SIDE, SIDE)
    got = backbone(pixels)
    assert_close(got, hooked(untouched("resnet18"), "layer4", pixels))
    assert got.shape == (2, 512, 2, 2)
    assert got.is_contiguous()
    assert backbone.outputs[0].shape == (512, 2, 2)
    assert backbone.dim == 512 * 2 * 2


@pytest.mark.parametrize("pool", ["avg", "none"])
def test_layers_work_with_rectangular_images(pool: str) -> None:
    backbone = load_backbone(
        "resnet18",
        weights="random",
        device="cpu",
        layers=["layer4"],
        pool=pool,
        image_size=(160, 192),
    )
    pixels = picture(160, 192)
    expected = hooked(untouched("resnet18"), "layer4", pixels)
    assert expected.shape == (2, 512, 5, 6)
    assert_close(backbone(pixels), expected if pool == "none" else expected.mean((2, 3)))


def test_last_layer_equals_the_embedding() -> None:
    backbone, pixels = loaded("resnet18"), picture(SIDE, SIDE)
    head = backbone.at_layers(["fc"])
    assert torch.equal(head(pixels), backbone(pixels))
    assert (head.outputs[0].layout, head.outputs[0].pool) == ("vector", "")


def small_swin(embed_dim: int) -> nn.Module:
    torch.manual_seed(4)
    return SwinTransformer(
        img_size=64, patch_size=4, window_size=4, embed_dim=embed_dim, depths=(1, 1),
        num_heads=(1, 2), num_classes=5,
    )  # fmt: skip


def small_torchvision_swin(embed_dim: int) -> nn.Module:
    torch.manual_seed(4)
    return TorchvisionSwin([4, 4], embed_dim, [1, 1], [1, 2], [4, 4], num_classes=5)


# Of 64 pixels these make 16 x 16 positions: with 16 channels no length tells the axes apart.
@pytest.mark.parametrize("embed_dim", [24, 16])
@pytest.mark.parametrize(
    ("make", "head", "layer"),
    [(small_swin, "head.fc", "layers.0"), (small_torchvision_swin, "head", "features.1")],
)
def test_channels_last_maps_are_pooled_over_positions(
    make: Callable[[int], nn.Module], head: str, layer: str, embed_dim: int
) -> None:
    backbone, network = wrapped(make(embed_dim), 64, head)
    pixels = picture(SIDE, SIDE)
    expected = hooked(network, layer, pixels)
    assert expected.shape == (2, 16, 16, embed_dim)
    assert_close(backbone.at_layers([layer])(pixels), expected.mean((1, 2)))
    assert_close(backbone.at_layers([layer], "max")(pixels), expected.amax((1, 2)))
    kept = backbone.at_layers([layer], "none")(pixels)
    assert_close(kept, expected.permute(0, 3, 1, 2))
    assert kept.is_contiguous()


def test_channels_first_layer_of_channels_last_network_is_recognized() -> None:
    backbone, network = wrapped(small_swin(16), 64, "head.fc")
    pixels = picture(SIDE, SIDE)
    expected = hooked(network, "patch_embed.proj", pixels)  # a convolution, (B, 16, 16, 16)
    assert_close(backbone.at_layers(["patch_embed.proj"])(pixels), expected.mean((2, 3)))


def test_torchvision_swin_stage_is_channels_last() -> None:
    name, pixels = "torchvision:swin_t", picture(SIDE, SIDE)
    expected = hooked(untouched(name), "features.3", pixels)
    assert expected.shape == (2, 8, 8, 192)
    backbone = loaded(name).at_layers(["features.3"], "gem")
    assert_close(backbone(pixels), pooled(expected.flatten(1, 2), "gem"))


# ---------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("pool", [*POOLS, "cls", "none"])
def test_pooling_ignores_the_class_token(pool: str) -> None:
    name, layer = VIT, "blocks.5"
    backbone, pixels = loaded(name).at_layers([layer], pool), picture(SIDE, SIDE)
    tokens = hooked(untouched(name), layer, pixels)
    assert tokens.shape == (2, 17, 192)
    by_hand = {"cls": tokens[:, 0], "none": tokens}
    expected = by_hand[pool] if pool in by_hand else pooled(tokens[:, 1:], pool)
    assert_close(backbone(pixels), expected)
    assert backbone.outputs == (
        Output(
            tuple(expected.shape[1:]),
            "layer",
            layer,
            "gem:3" if pool == "gem" else pool,
            "tokens",
            1,
        ),
    )


# At 80 x 96, 5 prefix tokens and 5 x 6 positions are 35, which is 5 x 7, too.
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (80, 96), (96, 80), (112, 112)])
@pytest.mark.parametrize("pool", ["avg", "max", "cls"])
def test_pooling_ignores_register_tokens(size: tuple[int, int], pool: str) -> None:
    backbone, network = wrapped(small_vit(size, reg_tokens=4), size)
    pixels, count = picture(*size), size[0] * size[1] // 256
    tokens = hooked(network, "blocks.1", pixels)
    assert tokens.shape == (2, 5 + count, 20)
    expected = tokens[:, 0] if pool == "cls" else pooled(tokens[:, 5:], pool)
    assert_close(backbone.at_layers(["blocks.1"], pool)(pixels), expected)


def test_pooling_ignores_registers_without_a_class_token() -> None:
    network = small_vit((64, 64), class_token=False, reg_tokens=4, global_pool="avg")
    backbone, network = wrapped(network, 64)
    pixels = picture(SIDE, SIDE)
    tokens = hooked(network, "blocks.2", pixels)
    assert tokens.shape == (2, 20, 20)
    assert_close(backbone.at_layers(["blocks.2"])(pixels), tokens[:, 4:].mean(1))
    with pytest.raises(UsageError, match=r"pool cls: 'blocks.2' of module:\w+ returns .*; try avg"):
        backbone.at_layers(["blocks.2"], "cls")


@pytest.mark.parametrize("size", [(64, 64), (80, 96), (96, 64)])
@pytest.mark.parametrize("registers", [0, 4])
def test_patch_embedding_has_no_prefix_tokens(size: tuple[int, int], registers: int) -> None:
    backbone, network = wrapped(small_vit(size, reg_tokens=registers), size)
    pixels = picture(*size)
    tokens = hooked(network, "patch_embed", pixels)
    assert tokens.shape == (2, size[0] * size[1] // 256, 20)
    assert_close(backbone.at_layers(["patch_embed"])(pixels), tokens.mean(1))
    with pytest.raises(
        UsageError, match=r"pool cls: 'patch_embed' .* returns tokens without a class"
    ):
        backbone.at_layers(["patch_embed"], "cls")


def test_tokens_of_rectangular_images_are_recognized() -> None:
    backbone = load_backbone(
        VIT,
        weights="random",
        device="cpu",
        layers=["blocks.2"],
        image_size=(160, 192),
    )
    network = timm.create_model(VIT, img_size=(160, 192))
    network.load_state_dict(backbone.module.state_dict(), strict=False)
    pixels = picture(160, 192)
    tokens = hooked(network, "blocks.2", pixels)
    assert tokens.shape == (2, 121, 192)  # 11 x 11, but one is the class and the rest 10 x 12
    assert_close(backbone(pixels), tokens[:, 1:].mean(1))


@pytest.fixture
def torchvision_vit() -> tuple[Backbone, nn.Module]:
    torch.manual_seed(5)
    network = TorchvisionVit(32, 8, 3, 2, 16, 32, num_classes=5)
    nn.init.constant_(network.class_token, 9.0)
    return wrapped(network, 32, "heads.head")


def test_torchvision_vit_has_class_token_and_blocks(
    torchvision_vit: tuple[Backbone, nn.Module],
) -> None:
    backbone, network = torchvision_vit
    pixels = picture(32, 32)
    for wanted, block in ((-1, 2), (-3, 0)):
        tokens = hooked(network, f"encoder.layers.encoder_layer_{block}", pixels)
        assert tokens.shape == (2, 17, 16)
        assert_close(backbone.at_layers([str(wanted)])(pixels), tokens[:, 1:].mean(1))
        assert_close(backbone.at_layers([str(wanted)], "cls")(pixels), tokens[:, 0])


def test_only_tensor_of_a_tuple_is_the_output(
    torchvision_vit: tuple[Backbone, nn.Module],
) -> None:
    backbone, network = torchvision_vit
    layer, pixels, seen = "encoder.layers.encoder_layer_1.self_attention", picture(32, 32), []
    network.get_submodule(layer).register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.inference_mode():
        network(pixels)
    values, nothing = seen[0]
    assert nothing is None
    assert_close(backbone.at_layers([layer])(pixels), values[:, 1:].mean(1))


@pytest.mark.parametrize("layer", ["layer4", "fc"])
def test_cls_rejects_a_convolutional_network(layer: str) -> None:
    with pytest.raises(UsageError, match=f"pool cls: '{layer}' of .*resnet18 returns a (map|vec)"):
        loaded("resnet18").at_layers([layer], "cls")


# ---------------------------------------------------------------------------------------------
# What happens around the layer


class InPlace(nn.Module):
    """Writes into the outputs of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.narrow, self.relu = nn.Linear(6, 4), nn.ReLU(inplace=True)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = self.conv(pixels)
        values += 5
        values = self.relu(self.norm(values) - 1)
        values = self.narrow(values.mean((2, 3)))
        values *= -7
        return self.relu(values)


@pytest.mark.parametrize("pool", ["none", "avg"])
@pytest.mark.parametrize("layer", ["conv", "norm", "narrow"])
def test_later_in_place_writes_do_not_change_the_output(layer: str, pool: str) -> None:
    backbone, network = wrapped(InPlace(), 8, None)
    pixels = picture(8, 8)
    expected = hooked(network, layer, pixels)
    if pool == "avg" and layer != "narrow":
        expected = expected.mean((2, 3))
    # A second layer behind it, so that the network goes on.
    got, _ = backbone.at_layers([layer, "relu"], pool).embed(pixels)
    assert_close(got, expected)


def test_in_place_activation_does_not_change_the_norm_before_it() -> None:
    pixels = picture(SIDE, SIDE)
    expected = hooked(untouched("resnet18"), "bn1", pixels)
    assert expected.min() < 0
    got, _ = loaded("resnet18").at_layers(["bn1", "layer1"], "none").embed(pixels)
    assert_close(got, expected)


def test_last_call_of_a_module_counts() -> None:
    name, pixels = "torchvision:resnet18", picture(SIDE, SIDE)
    backbone = loaded(name).at_layers(["layer1.0.relu"], "none")
    # Its second call is the last step of the block.
    assert_close(backbone(pixels), hooked(untouched(name), "layer1.0", pixels))


def calls_of(network: nn.Module, name: str) -> list[str]:
    calls: list[str] = []
    for inner, module in network.get_submodule(name).named_modules():
        module.register_forward_pre_hook(lambda _, __, inner=inner: calls.append(inner))
    return calls


def test_one_pass_returns_all_layers_and_ends_after_the_last() -> None:
    backbone = load_backbone("resnet18", weights="random", device="cpu", image_size=SIDE)
    tapped = backbone.at_layers(["layer3", "layer2"])
    network = backbone.module
    stem, third, fourth = (calls_of(network, name) for name in ("conv1", "layer3.1", "layer4"))
    pixels = picture(SIDE, SIDE)
    rows = tapped.embed(pixels)
    assert len(stem) == 1
    assert third.count("") == 1
    assert fourth == []
    for got, layer in zip(rows, ["layer3", "layer2"], strict=True):
        assert_close(got, hooked(untouched("resnet18"), layer, pixels).mean((2, 3)))
    backbone(pixels)
    assert fourth.count("") == 1  # the counter counts


def test_layers_do_not_change_the_original_backbone() -> None:
    backbone = load_backbone("resnet18", weights="random", device="cpu", image_size=SIDE)
    pixels = picture(SIDE, SIDE)
    before = backbone(pixels)
    first, second = backbone.at_layers(["layer1"]), backbone.at_layers(["layer2"], "max")
    assert (first.dim, second.dim, backbone.dim) == (64, 128, 512)
    assert_close(first(pixels), hooked(untouched("resnet18"), "layer1", pixels).mean((2, 3)))
    assert_close(second(pixels), hooked(untouched("resnet18"), "layer2", pixels).amax((2, 3)))
    assert torch.equal(backbone(pixels), before)


class Meeting(nn.Module):
    """Two layers; two threads wait for each other after each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ReLU(), nn.ReLU()
        self.barrier: threading.Barrier | None = None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = self.first(pixels)
        if self.barrier is not None:
            self.barrier.wait(20)
        values = self.second(values * 2)
        if self.barrier is not None:
            self.barrier.wait(20)
        return values.mean((2, 3))


def test_threads_do_not_mix_their_outputs() -> None:
    network = Meeting()
    tapped = Backbone.from_module(
        network, head=None, preprocess=Preprocess.standard(4), device="cpu"
    ).at_layers(["first", "second"])
    network.barrier = threading.Barrier(2)
    rows: dict[int, tuple[torch.Tensor, ...]] = {}

    def work(level: int) -> None:
        rows[level] = tapped.embed(torch.full((1, 3, 4, 4), float(level)))

    # The second layer is the last: the barrier behind it is not reached.
    threads = [threading.Thread(target=work, args=(level,)) for level in (3, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for level in (3, 8):
        assert [values.tolist() for values in rows[level]] == [[[level] * 3], [[2 * level] * 3]]


def test_several_outputs_reject_dim_and_call() -> None:
    backbone = loaded("resnet18").at_layers(["layer1", "layer2"])
    for ask in (lambda: backbone.dim, lambda: backbone(picture(SIDE, SIDE))):
        with pytest.raises(UsageError, match=r"2 outputs \(layer1, layer2\); use embed"):
            ask()


def test_empty_list_of_layers_is_rejected() -> None:
    with pytest.raises(UsageError, match="layer"):
        loaded("resnet18").at_layers([])


def test_unknown_pooling_is_rejected() -> None:
    for pool in ("mean", "gem:0", "gem:-1", "gem:nan", "gem:x", "avg:3", "", "gem:inf"):
        with pytest.raises(UsageError, match=r"pool: got .*, expected one of avg, max, gem"):
            loaded("resnet18").at_layers(["layer1"], pool)


class Halves(nn.Module):
    """Returns two tensors."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pixels[:, :, :4], pixels[:, :, 4:]


class Odd(nn.Module):
    """Modules that cannot be layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.ReLU()])
        self.unused = nn.Linear(2, 2)
        self.halves = Halves()
        self.rows = nn.Flatten(0, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            pixels = block(pixels)
        self.rows(pixels)
        upper, _ = self.halves(pixels)
        return upper.mean((2, 3))


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        ("blocks", r"layer 'blocks' does not run as a whole .*it holds 0, 1"),
        ("unused", "layer 'unused' does not run as a whole"),
        (
            "halves",
            r"'halves' returned \[\(3, 3, 4, 8\), \(3, 3, 4, 8\)\] for 3 images, exp",
        ),
        ("rows", r"'rows' returned \(9, 8, 8\) for 3 images"),
    ],
)
def test_layer_without_one_tensor_per_image_is_rejected(layer: str, match: str) -> None:
    backbone, _ = wrapped(Odd(), 8, None)
    with pytest.raises(ModelError, match=match):
        backbone.at_layers([layer])


def test_module_used_only_for_its_weights_is_rejected(
    torchvision_vit: tuple[Backbone, nn.Module],
) -> None:
    with pytest.raises(ModelError, match="out_proj' does not run as a whole"):
        torchvision_vit[0].at_layers(["encoder.layers.encoder_layer_0.self_attention.out_proj"])


def test_attention_heads_are_not_taken_for_a_map() -> None:
    # (B, heads, tokens, channels of a head) is neither a map nor tokens.
    with pytest.raises(ModelError, match=r"q_norm' returned \(3, 3, 17, 64\)"):
        loaded(VIT).at_layers(["blocks.0.attn.q_norm"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copied_backbone_embeds_with_its_own_layers(copied: Callable[[Any], Any]) -> None:
    backbone = load_backbone("test_resnet", weights="random", device="cpu", layers=["layer2"])
    pixels = picture(64, 64)
    expected = backbone(pixels)
    other = copied(backbone)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.zero_()
    assert not other(pixels).any()
    assert torch.equal(backbone(pixels), expected)
