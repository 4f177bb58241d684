"""Transformer files in another layout give the rows that timm makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from support.networks import assert_close, pixels, pre_logits
from timm.layers import resample_abs_pos_embed
from torch import nn

from extractor import extract, load_backbone
from extractor.errors import ModelError, WeightsError
from extractor.models.checkpoint import MisfitError
from extractor.run.recompute import recompute

VIT = "test_vit"  # 160 pixels in patches of 16, 64 channels
OWN = 160


@functools.cache
def network(name: str = VIT, **arguments: Any) -> nn.Module:
    """A network of timm whose positions and tokens matter; not to be changed."""
    torch.manual_seed(3)
    made = timm.create_model(name, **{"num_classes": 7, **arguments}).eval()
    with torch.no_grad():
        for key, value in made.named_parameters():
            if any(word in key for word in ("pos_embed", "token", "relative", "gamma")):
                value.normal_()
    return made


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(state: dict[str, torch.Tensor]) -> Path:
        torch.save({"state_dict": state}, tmp_path / "w.pth")
        return tmp_path / "w.pth"

    return write


# ---------------------------------------------------------------------------------------------
# Image size

TABLES = ("beit_base_patch16_224", "swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_file_of_another_size_fits_at_its_size(prefix: str, save: Callable[..., Path]) -> None:
    trained = network(img_size=96)
    path = save({prefix + key: value for key, value in trained.state_dict().items()})
    backbone = load_backbone(VIT, weights=path, image_size=96, device="cpu")
    assert backbone.preprocess.input_size == (96, 96)
    assert_close(backbone(pixels(96)), pre_logits(trained, 96))


@pytest.mark.parametrize("trained_at", [96, OWN, 224])
def test_positions_are_resampled_as_timm_does(trained_at: int, save: Callable[..., Path]) -> None:
    trained = network(img_size=trained_at)
    reference = timm.create_model(VIT, num_classes=7, img_size=128).eval()
    state = dict(trained.state_dict())
    path = save(state)
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=[8, 8])
    reference.load_state_dict(state)
    backbone = load_backbone(VIT, weights=path, image_size=128, device="cpu")
    assert_close(backbone(pixels(128)), pre_logits(reference, 128))


def test_rectangular_file_fits_at_its_size(save: Callable[..., Path]) -> None:
    trained = network(img_size=(96, 128))
    path = save(dict(trained.state_dict()))
    backbone = load_backbone(VIT, weights=path, image_size=(96, 128), device="cpu")
    images = pixels(128)[:, :, :96]
    with torch.inference_mode():
        expected = trained.forward_head(trained.forward_features(images), pre_logits=True)
    assert_close(backbone(images), expected)
    with pytest.raises(MisfitError, match=r"trained at: --image-size HEIGHTxWIDTH$"):
        load_backbone(VIT, weights=path, device="cpu")


@pytest.mark.parametrize("trained_at", [96, 224])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_file_of_another_size_names_the_option(
    trained_at: int, pool: str, save: Callable[..., Path]
) -> None:
    path = save(dict(network(img_size=trained_at, global_pool=pool).state_dict()))
    match = (
        rf"of another image size \({trained_at} pixels instead of {OWN}\)\. Use the size that they "
        rf"were trained at: --image-size {trained_at}$"
    )
    with pytest.raises(MisfitError, match=match):
        load_backbone(VIT, weights=path, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_relative_positions_fit_at_their_size(
    name: str, save: Callable[..., Path]
) -> None:
    trained = network(name, img_size=96)
    path = save(dict(trained.state_dict()))
    backbone = load_backbone(name, weights=path, image_size=96, device="cpu")
    assert_close(backbone(pixels(96)), pre_logits(trained, 96))
    with pytest.raises(MisfitError, match=r"trained at: --image-size (96|N)$"):
        load_backbone(name, weights=path, device="cpu")


def test_kept_head_comes_with_a_file_of_another_size(save: Callable[..., Path]) -> None:
    trained = network(img_size=96)
    path = save(dict(trained.state_dict()))
    backbone = load_backbone(VIT, weights=path, image_size=96, keep_head=True, device="cpu")
    with torch.inference_mode():
        assert_close(backbone(pixels(96)), trained(pixels(96)))


def test_kept_head_passes_by_the_conversion(save: Callable[..., Path]) -> None:
    trained = network(img_size=96)
    state = dict(trained.state_dict())
    path = save({**state, "mask_token": torch.zeros(1, 64)})
    backbone = load_backbone(VIT, weights=path, image_size=128, keep_head=True, device="cpu")
    reference = timm.create_model(VIT, num_classes=7, img_size=128).eval()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=[8, 8])
    reference.load_state_dict(state)
    with torch.inference_mode():
        assert_close(backbone(pixels(128)), reference(pixels(128)))


# ---------------------------------------------------------------------------------------------
# Tokens and pooling


@pytest.mark.parametrize(
    "arguments",
    [
        {"global_pool": "avg"},
        {"global_pool": "avg", "img_size": 96},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"reg_tokens": 3},
        {"reg_tokens": 4, "global_pool": "avg"},
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", [0, 7])
def test_variant_of_the_file_is_built(
    arguments: dict[str, Any],
    classes: int,
    save: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained = network(num_classes=classes, **arguments)
    edge = arguments.get("img_size", OWN)
    path = save(dict(trained.state_dict()))
    backbone = load_backbone(VIT, weights=path, image_size=edge, device="cpu")
    assert_close(backbone(pixels(edge)), pre_logits(trained, edge))
    (message,) = caplog.messages
    assert message.endswith("as the tensors suggest")


def dinov2(of: nn.Module, *, registers: bool) -> dict[str, torch.Tensor]:
    """The tensors of a network as Meta publishes them, with a mask token.

    Their table of positions has a row for the class token, before the registers are put in.
    """
    state = {**of.state_dict(), "mask_token": torch.zeros(1, 64)}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        positions = torch.ones(1, 1, 64)
        state["cls_token"] = state["cls_token"] - positions
        state["pos_embed"] = torch.cat([positions, state["pos_embed"]], 1)
    return state


@pytest.mark.parametrize("edge", [OWN, 96])
@pytest.mark.parametrize("registers", [True, False])
def test_own_files_of_dinov2_load(registers: bool, edge: int, save: Callable[..., Path]) -> None:
    more = {"reg_tokens": 4, "no_embed_class": True} if registers else {}
    trained = network(num_classes=0, img_size=edge, **more)
    path = save(dinov2(trained, registers=registers))
    backbone = load_backbone(VIT, weights=path, image_size=edge, device="cpu")
    assert_close(backbone(pixels(edge)), pre_logits(trained, edge))


def test_decoder_of_a_masked_autoencoder_is_passed_over(save: Callable[..., Path]) -> None:
    trained = network(num_classes=0)
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 101, 8)}
    path = save({**trained.state_dict(), **decoder, "decoder_pred.bias": torch.zeros(3)})
    backbone = load_backbone(VIT, weights=path, device="cpu")
    assert_close(backbone(pixels(OWN)), pre_logits(trained, OWN))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda value: value.to(torch.int8), "1 without fractions"),
        (lambda value: value * torch.nan, "1 with NaN or infinity"),
        (lambda value: value.to("meta"), "1 without values"),
        (lambda value: value[:-1], "do not fit"),
    ],
)
def test_conversion_lets_no_wrong_values_pass(
    spoil: Callable[[torch.Tensor], torch.Tensor], match: str, save: Callable[..., Path]
) -> None:
    state = dinov2(network(num_classes=0), registers=False)
    state["blocks.0.mlp.fc1.weight"] = spoil(state["blocks.0.mlp.fc1.weight"])
    with pytest.raises(WeightsError, match=match):
        load_backbone(VIT, weights=save(state), device="cpu")


def test_file_that_fits_is_taken_as_it_is(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    trained = network()
    backbone = load_backbone(VIT, weights=save(dict(trained.state_dict())), device="cpu")
    assert_close(backbone(pixels(OWN)), pre_logits(trained, OWN))
    assert caplog.records == []


def test_recompute_repeats_a_file_of_another_size(
    photos: Path, tmp_path: Path, save: Callable[..., Path]
) -> None:
    path = save(dict(network(img_size=96, global_pool="avg").state_dict()))
    out = tmp_path / "s"
    store = extract(photos, VIT, out, weights=path, image_size=128, device="cpu").store
    assert list(recompute(store, 3, weights=str(path), device="cpu")) == []


# ---------------------------------------------------------------------------------------------
# Vision transformers of torchvision


@pytest.mark.slow
@pytest.mark.parametrize("keep_head", [False, True])
def test_torchvision_resamples_positions(keep_head: bool, save: Callable[..., Path]) -> None:
    vision_transformer = torchvision.models.vision_transformer
    torch.manual_seed(3)
    trained = torchvision.models.vit_b_32(image_size=96).eval()
    nn.init.normal_(trained.heads[0].weight)
    path = save({f"module.{key}": value for key, value in trained.state_dict().items()})
    reference = torchvision.models.vit_b_32(image_size=160).eval()
    state = vision_transformer.interpolate_embeddings(160, 32, dict(trained.state_dict()))
    reference.load_state_dict(state)
    for network, edge in ((trained, 96), (reference, 160)):
        network.heads[0] = network.heads[0] if keep_head else nn.Identity()
        backbone = load_backbone(
            "torchvision:vit_b_32",
            weights=path,
            image_size=edge,
            keep_head=keep_head,
            device="cpu",
        )
        with torch.inference_mode():
            assert_close(backbone(pixels(edge)), network(pixels(edge)))
    with pytest.raises(MisfitError, match=r"\(96 pixels instead of 224\)\. .*--image-size 96$"):
        load_backbone("torchvision:vit_b_32", weights=path, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, (64, 96)])
def test_torchvision_refuses_a_size_without_whole_square_patches(size: Any) -> None:
    with pytest.raises(ModelError, match="cannot take images of"):
        load_backbone("torchvision:vit_b_32", weights="random", image_size=size, device="cpu")
