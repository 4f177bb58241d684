"""Checks that refuse a run before hours are spent on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import mean_pixel

from extractor import extract
from extractor.errors import StoreError, UsageError
from extractor.options import Options
from extractor.run import output, preflight
from extractor.run.preflight import (
    check_decode_device,
    check_output_folders,
    check_output_name,
    check_shard_count,
)
from extractor.store.claim import ClaimedFolder


def test_full_disk_is_refused_before_computing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    monkeypatch.setattr(output, "INDEX_BYTES", 2**20)
    with pytest.raises(StoreError, match=r"about 11.0 MiB are needed and 0.0 MiB are free"):
        extract(photos, mean_pixel(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert extract(photos, mean_pixel(), tmp_path / "out").rows == 11


def test_output_name_must_not_be_empty(tmp_path: Path) -> None:
    assert check_output_name(None) is None
    assert check_output_name(tmp_path) == str(tmp_path)
    with pytest.raises(UsageError, match="out: got an empty name, expected a folder"):
        check_output_name("")


def test_shard_count_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MAX_SHARDS", 10)
    check_shard_count(30, 3)
    with pytest.raises(UsageError, match=r"got 31 images in shards of 3, expected at most 10"):
        check_shard_count(31, 3)


def test_gpu_decoding_needs_a_cuda_device() -> None:
    check_decode_device("gpu", torch.device("cuda:1"))
    check_decode_device("exact", torch.device("cpu"))
    with pytest.raises(UsageError, match=r"got gpu, which needs a CUDA device; .* computes on cpu"):
        check_decode_device("gpu", torch.device("cpu"))


def test_each_output_folder_is_checked(tmp_path: Path) -> None:
    models = ["resnet18", "resnet50"]
    check_output_folders(models, str(tmp_path), Options())
    (tmp_path / "resnet50").mkdir()
    (tmp_path / "resnet50" / "thesis.tex").write_text("years of work")
    check_output_folders(models[:1], str(tmp_path / "resnet18"), Options())
    with pytest.raises(StoreError, match=r"resnet50.* not empty"):
        check_output_folders(models, str(tmp_path), Options())
    # Only the loaded model knows which layers a pattern means.
    check_output_folders(models, str(tmp_path), Options(layers=["layer*"]))


def test_no_store_is_made_inside_another(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    store = write_store(tmp_path / "store", [np.zeros((2, 3), np.float32)])
    (tmp_path / "link").symlink_to(store)
    before = sorted(store.rglob("*"))
    for out in (store / "sub", store / "features", store / "a" / "b", tmp_path / "link" / "sub"):
        with pytest.raises(StoreError, match=f"is in the store {store}; choose an --out beside it"):
            check_output_folders(["resnet18"], str(out), Options())
    with pytest.raises(StoreError, match="store/resnet18 is in the store"):
        check_output_folders(["resnet18", "resnet50"], str(store), Options())
    with (
        pytest.raises(StoreError, match="is in the store"),
        ClaimedFolder(store / "sub"),  # a model of the caller
    ):
        pass
    assert sorted(store.rglob("*")) == before


def test_a_store_that_is_inside_another_can_be_extended(
    tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    inner = write_store(tmp_path / "outer" / "inner", [np.zeros((2, 3), np.float32)])
    shutil.copytree(inner, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():  # the outer one was made later
        shutil.move(path, tmp_path / "outer")
    check_output_folders(["resnet18"], str(inner), Options())
