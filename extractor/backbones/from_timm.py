"""Networks and weights of timm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from extractor import heads, weights
from extractor.backbones import shared
from extractor.backbones.backbone import Backbone
from extractor.errors import WeightsError
from extractor.preprocess import Preprocess

__all__ = ["build", "has", "names"]


def has(name: str) -> bool:
    """Whether timm has the architecture of a name, its weights tag aside."""
    return bool(_timm().is_model(name.partition(".")[0]))


def names() -> list[str]:
    """Every architecture of timm."""
    return list(_timm().list_models())


def _timm() -> Any:
    return shared.import_library("timm")


def build(name: str, wanted: str, seed: int) -> Backbone:
    """The backbone ``name[.tag]`` with the weights ``wanted``, on the CPU in float32.

    Raises:
        WeightsError, ModelError: as :func:`extractor.load_backbone`.
    """
    timm = _timm()
    full_name = _full_name(name, wanted)
    architecture = full_name.partition(".")[0]
    found = _find_weights(full_name, wanted)
    if found is not None and found.url:
        # Given the tensors, timm applies what it knows of the layout of its own checkpoints.
        state = weights.read_checkpoint(found.path)
        overlay = {"state_dict": state}
        module = timm.create_model(full_name, pretrained=True, pretrained_cfg_overlay=overlay)
        module.pretrained_cfg.pop("state_dict", None)
        replaced = heads.reset_timm_classifier(module)
    else:
        with weights.seeded(seed):
            module = timm.create_model(full_name)
        before = tuple(module.state_dict())
        replaced = heads.reset_timm_classifier(module)
        if found is not None:
            weights.load_into(
                module,
                weights.read_checkpoint(found.path),
                discarded=shared.gone(before, module),
                how=f"{found.path} into timm:{full_name}",
            )
    dim = getattr(module, "head_hidden_size", None) or module.num_features
    return Backbone(
        module,
        int(dim),
        replaced,
        _preprocess(timm.data.resolve_model_data_config(module)),
        shared.provenance(f"timm:{architecture}", timm, module, found, seed),
    )


def _full_name(name: str, wanted: str) -> str:
    """``architecture[.tag]``, the tag from the name or, before it, from the weights asked for."""
    architecture, _, tag = name.partition(".")
    if wanted not in ("default", "random") and shared.local_file(wanted) is None:
        tag = wanted
    tags = [full.partition(".")[2] for full in _timm().list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise WeightsError(shared.unknown_weights(f"timm:{architecture}", tag, tags))
    return f"{architecture}.{tag}" if tag else architecture


def _find_weights(full_name: str, wanted: str) -> weights.WeightsFile | None:
    if wanted == "random":
        return None
    local = shared.local_file(wanted)
    if local is not None:
        return weights.WeightsFile(local)
    config = _timm().get_pretrained_cfg(full_name)
    label = f"timm:{full_name}"
    if config.hf_hub_id:
        # As timm itself does: the safe format where the repository has it.
        usual = config.hf_hub_filename or "pytorch_model.bin"
        safe = usual.replace("pytorch_model.bin", "model.safetensors")
        return weights.find_hub_file(
            config.hf_hub_id, dict.fromkeys([safe, usual]), tag=config.tag or "", how=label
        )
    if config.url:
        return weights.find_url_file(config.url, tag=config.tag or "", how=label)
    raise WeightsError(
        f"{label}: timm has no pretrained weights for this model; use --weights FILE, or --weights "
        "random to try things out"
    )


def _preprocess(config: Mapping[str, Any]) -> Preprocess:
    """timm's evaluation transform (``timm.data.create_transform``) as numbers."""
    _, height, width = config["input_size"]
    share = config["crop_pct"]
    resize_size = (math.floor(height / share), math.floor(width / share))
    fill = (0, 0, 0)
    if config["crop_mode"] == "squash":
        resize = "squash"
    elif config["crop_mode"] == "border":
        resize = "contain"
        red, green, blue = (round(255 * level) for level in config["mean"])
        fill = (red, green, blue)
    else:
        resize = "shortest" if resize_size[0] == resize_size[1] else "cover"
    return Preprocess(
        (height, width),
        resize,
        resize_size,
        config["interpolation"],
        tuple(config["mean"]),
        tuple(config["std"]),
        fill,
    )
