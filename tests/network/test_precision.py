"""Precision of networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from extractor import load_backbone
from extractor.errors import UsageError
from extractor.network import precision


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse avx2 avx512f", ()),
        ("fpu avx512f avx512_bf16", ("bfloat16", "mixed")),
        ("fpu amx_tile amx_bf16", ("bfloat16", "mixed")),
        ("fpu avx512_bf16x", ()),
    ],
)
def test_bfloat16_needs_a_processor_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: tuple[str, ...]
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: some\nflags\t\t: {flags}\nbugs\t\t: none\n")
    monkeypatch.setattr(precision, "CPU_FLAGS", file)
    assert precision.faster_precisions(torch.device("cpu")) == expected


def test_missing_cpuinfo_means_no_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "CPU_FLAGS", tmp_path / "none")
    assert precision.faster_precisions(torch.device("cpu")) == ()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), ()), ((7, 5), ("float16",)), ((9, 0), ("float16", "bfloat16"))],
)
def test_gpu_precisions_follow_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert precision.faster_precisions(torch.device("cuda", 0)) == expected


def test_mixed_keeps_sensitive_modules_in_float32() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 4, 1),
    ).eval()
    pixels = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = module(pixels)
    precision.convert(module, "mixed")
    kinds = [next(part.parameters()).dtype for part in module]
    assert kinds == [torch.float32, torch.float32, torch.float32, torch.bfloat16]
    output = module(pixels)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "crossvit_9_240", "dm_nfnet_f0", "torchvision:swin_v2_t"]
)
def test_mixed_works_in_networks_of_several_kinds(name: str) -> None:
    """One with a class token, one with two stems, one that computes its weights."""
    exact = load_backbone(name, weights="random", device="cpu")
    height, width = exact.preprocess.input_size
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    mixed = load_backbone(name, weights="random", device="cpu", precision="mixed")
    assert (mixed.precision, mixed.dtype) == ("mixed", torch.float32)
    rows = mixed(pixels)
    assert rows.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rows, exact(pixels)).min() > 0.99


def test_mixed_precision_cannot_be_changed() -> None:
    backbone = load_backbone("resnet10t", weights="random", device="cpu", precision="mixed")
    assert backbone.to(torch.device("cpu"), "mixed").precision == "mixed"
    with pytest.raises(UsageError, match=r"mixed cannot be changed; load the backbone again"):
        backbone.to(torch.device("cpu"), "float32")
