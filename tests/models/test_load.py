"""Models and weights by location: the hub's cache, a folder, tags; and digests kept beside them."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from support.networks import assert_close, pixels, pre_logits
from support.weights import publish
from timm.models._hub import save_for_hf
from torch import nn

from extractor import load_backbone
from extractor.errors import ExtractorError, ModelError, WeightsError
from extractor.models import digests, from_timm, from_torchvision
from extractor.models.weight_files import WeightsFile
from extractor.system.hashing import hash_file

A, B = "a" * 40, "b" * 40  # commits

CROP, MEAN = 0.5, (0.1, 0.2, 0.3)


def network(name: str = "test_resnet", seed: int = 5, **arguments: Any) -> nn.Module:
    """A model of timm that was fine-tuned to seven classes and pixels of its own."""
    torch.manual_seed(seed)
    own = {"crop_pct": CROP, "mean": MEAN}
    return timm.create_model(name, num_classes=7, pretrained_cfg_overlay=own, **arguments).eval()


def snapshot(home: Path, repository: str, commit: str = A, *refs: str) -> Path:
    """An empty snapshot of a repository in the hub's cache, and the branches that point at it."""
    folder = home / "huggingface" / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    for ref in refs or ("main",):
        (folder / "refs" / ref).write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------
# The hub


@pytest.mark.parametrize("safe", [True, False, "both"])
def test_repository_uses_its_weights_and_transform(safe: Any, empty_caches: Path) -> None:
    published = network()
    folder = snapshot(empty_caches, "me/net")
    save_for_hf(published, str(folder), safe_serialization=safe)
    backbone = load_backbone("hf-hub:me/net", device="cpu")
    assert_close(backbone(pixels()), pre_logits(published))
    assert backbone.preprocess.mean == MEAN
    assert backbone.preprocess.resize_size == (math.floor(160 / CROP),) * 2
    file = folder / ("model.safetensors" if safe else "pytorch_model.bin")
    made = backbone.provenance
    assert (made.model, made.weights, made.revision) == ("hf-hub:me/net", "hub", A)
    assert (made.source, made.sha256) == (f"hf-hub:me/net/{file.name}", sha256(file))


@pytest.fixture
def revisions(empty_caches: Path) -> dict[str, nn.Module]:
    """``me/net``, of which ``main`` is commit A and the tag ``v2`` is commit B."""
    networks = {A: network(seed=5), B: network(seed=6)}
    for (commit, published), ref in zip(networks.items(), ("main", "v2"), strict=True):
        save_for_hf(
            published, str(snapshot(empty_caches, "me/net", commit, ref)), safe_serialization=True
        )
    return networks


@pytest.mark.parametrize("as_weights", [False, True], ids=["model", "weights"])
@pytest.mark.parametrize(("at", "commit"), [("", A), ("@main", A), ("@v2", B), (f"@{B}", B)])
def test_repository_revision_is_used(
    at: str, commit: str, as_weights: bool, revisions: dict[str, nn.Module]
) -> None:
    location = f"hf-hub:me/net{at}"
    model, weights = ("test_resnet", location) if as_weights else (location, "default")
    backbone = load_backbone(model, weights=weights, device="cpu")
    assert_close(backbone(pixels()), pre_logits(revisions[commit]))
    assert backbone.provenance.revision == commit


def test_repository_weights_fit_torchvision_models(empty_caches: Path) -> None:
    torch.manual_seed(5)
    published = torchvision.models.squeezenet1_1().eval()
    save_file(published.state_dict(), snapshot(empty_caches, "me/net") / "model.safetensors")
    backbone = load_backbone("torchvision:squeezenet1_1", weights="hf-hub:me/net", device="cpu")
    with torch.inference_mode():
        assert_close(backbone(pixels()), published.features(pixels()).mean((2, 3)))


def test_config_supplies_model_arguments(empty_caches: Path) -> None:
    published = network("test_vit3", img_size=96, depth=2)
    save_for_hf(published, str(snapshot(empty_caches, "me/net")), safe_serialization=True)
    backbone = load_backbone("hf-hub:me/net", device="cpu")
    assert backbone.preprocess.input_size == (96, 96)
    assert_close(backbone(pixels(96)), pre_logits(published, 96))


@pytest.mark.parametrize("revision", ["v3", "c" * 40])
@pytest.mark.usefixtures("revisions")
def test_uncached_revision_is_an_error(revision: str) -> None:
    with pytest.raises(
        WeightsError, match=r"weights are not on this machine\. Looked in .*me--net"
    ):
        load_backbone(f"hf-hub:me/net@{revision}", device="cpu")


@pytest.mark.parametrize("name", ["a/b/c", "a//b", "../x", "a b"])
@pytest.mark.parametrize("as_weights", [False, True], ids=["model", "weights"])
def test_malformed_repository_is_refused(name: str, as_weights: bool) -> None:
    location = f"hf-hub:{name}"
    model, weights = ("test_resnet", location) if as_weights else (location, "default")
    with pytest.raises(WeightsError, match="is not a repository of the hub, expected ORG/NAME"):
        load_backbone(model, weights=weights, device="cpu")


# ---------------------------------------------------------------------------------------------
# A folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_for_hf(network(), str(tmp_path / "net"), safe_serialization=True)
    return tmp_path / "net"


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_pretrained(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    edit(folder, pretrained_cfg={**config, **changes})


def load_folder(folder: Path, **options: Any) -> Any:
    return load_backbone(f"local-dir:{folder}", device="cpu", **options)


def test_local_dir_uses_its_weights_and_transform(folder: Path) -> None:
    backbone = load_folder(folder)
    assert_close(backbone(pixels()), pre_logits(network()))
    assert backbone.preprocess.mean == MEAN
    made = backbone.provenance
    assert (made.weights, made.source, made.revision) == ("file", "model.safetensors", "")
    assert made.sha256 == sha256(folder / "model.safetensors")


def test_local_dir_accepts_other_weights(folder: Path, tmp_path: Path) -> None:
    other = network(seed=6)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "w.pth")
    backbone = load_folder(folder, weights=tmp_path / "w.pth")
    assert_close(backbone(pixels()), pre_logits(other))
    assert backbone.preprocess.mean == MEAN


def test_config_from_before_2023_is_read(folder: Path) -> None:
    old = {
        **{"architecture": "test_resnet", "num_classes": 7, "num_features": 96},
        **{"input_size": [3, 96, 96], "interpolation": "bicubic", "crop_pct": 0.75},
        **{"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "first_conv": "conv1.0"},
        **{"classifier": "fc", "labels": ["a"], "pool_size": [3, 3]},
    }
    (folder / "config.json").write_text(json.dumps(old))
    backbone = load_folder(folder)
    assert_close(backbone(pixels()), pre_logits(network()))
    transform = backbone.preprocess
    assert (transform.input_size, transform.resize_size) == ((96, 96), (128, 128))
    assert (transform.mean, transform.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert transform.interpolation == "bicubic"


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", "3", "{}", '{"architecture": "a", "pretrained_cfg": null}']
)
def test_malformed_config_is_refused(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json is not a config\.json of timm"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("changes", "pretrained"),
    [
        ({"model_args": {"nonsense": 1}}, {}),
        ({"num_classes": "seven"}, {}),
        ({}, {"input_size": "big"}),
        ({}, {"mean": [0.5]}),
        ({}, {"interpolation": "wild"}),
    ],
    ids=["argument", "classes", "size", "mean", "interpolation"],
)
def test_invalid_config_names_the_folder(
    changes: dict[str, Any], pretrained: dict[str, Any], folder: Path
) -> None:
    edit_pretrained(folder, **pretrained)
    edit(folder, **changes)
    with pytest.raises(ExtractorError, match=r"local-dir:"):
        load_folder(folder)


@pytest.mark.filterwarnings("ignore")
def test_grayscale_model_names_the_folder(tmp_path: Path) -> None:
    save_for_hf(
        timm.create_model("test_resnet", in_chans=1), str(tmp_path), safe_serialization=True
    )
    with pytest.raises(ExtractorError, match=r"local-dir:"):
        load_folder(tmp_path)


@pytest.mark.parametrize("architecture", ["resnet5", "", None, 3, ["resnet18"]])
def test_config_with_unknown_architecture_is_refused(architecture: object, folder: Path) -> None:
    edit(folder, architecture=architecture)
    with pytest.raises(ModelError, match="timm has no architecture"):
        load_folder(folder)


def test_error_names_the_missing_file(folder: Path, empty_caches: Path) -> None:
    shutil.copy(folder / "config.json", snapshot(empty_caches, "me/net"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"has none of .*model\.safetensors.*; use --weights"):
        load_folder(folder)
    with pytest.raises(WeightsError, match=r"weights are not on this machine.*models--me--net"):
        load_backbone("hf-hub:me/net", device="cpu")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"there is no .*config\.json, which names the arch"):
        load_folder(folder)


@pytest.mark.parametrize("location", ["hf-hub:", "local-dir:"])
def test_empty_location_is_an_error(location: str) -> None:
    with pytest.raises(ModelError, match="expected hf-hub:ORG/NAME or local-dir:PATH"):
        load_backbone(location, device="cpu")


def test_local_dir_has_no_tags(folder: Path) -> None:
    with pytest.raises(WeightsError, match="unknown weights 'a1_in1k'; expected default, random"):
        load_folder(folder, weights="a1_in1k")


def test_local_dir_weights_must_fit_the_config(folder: Path) -> None:
    save_file(timm.create_model("test_vit").state_dict(), folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"do not fit.*They are those of timm:test_vit: use"):
        load_folder(folder)


# ---------------------------------------------------------------------------------------------
# Tags

TAGS = ("e2400_r224_in1k", "e1200_r224_in1k")  # of timm's mobilenetv4_conv_small, first the default


@pytest.mark.parametrize(
    ("name", "weights", "tag"),
    [
        ("{}", "default", TAGS[0]),
        ("{}.e1200_r224_in1k", "default", TAGS[1]),
        ("timm:{}.e1200_r224_in1k", "default", TAGS[1]),
        ("{}", "e1200_r224_in1k", TAGS[1]),
        ("{}.e2400_r224_in1k", "e1200_r224_in1k", TAGS[1]),
    ],
)
def test_timm_tag_in_weights_wins_over_one_in_the_name(
    name: str, weights: str, tag: str, empty_caches: Path
) -> None:
    architecture = "mobilenetv4_conv_small"
    assert timm.get_pretrained_cfg(architecture).tag == TAGS[0]
    networks = {}
    for seed, one in enumerate(TAGS):
        torch.manual_seed(seed)
        networks[one] = timm.create_model(architecture).eval()
        repository: Any = timm.get_pretrained_cfg(f"{architecture}.{one}").hf_hub_id
        where = snapshot(empty_caches, repository)
        save_file(networks[one].state_dict(), where / "model.safetensors")
    backbone = load_backbone(name.format(architecture), weights=weights, device="cpu")
    assert_close(backbone(pixels()), pre_logits(networks[tag]))
    assert (backbone.provenance.model, backbone.provenance.tag) == (f"timm:{architecture}", tag)


@pytest.mark.parametrize(
    ("weights", "tag", "resize"),
    [
        ("default", "IMAGENET1K_V2", 232),
        ("IMAGENET1K_V2", "IMAGENET1K_V2", 232),
        ("IMAGENET1K_V1", "IMAGENET1K_V1", 256),
    ],
)
def test_torchvision_tag_selects_file_and_transform(
    weights: str, tag: str, resize: int, empty_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = torchvision.models.MobileNet_V2_Weights
    networks = {}
    for seed, entry in enumerate(entries):
        torch.manual_seed(seed)
        networks[entry.name] = torchvision.models.mobilenet_v2().eval()
        publish(monkeypatch, empty_caches, entry, networks[entry.name].state_dict())
    backbone = load_backbone("torchvision:mobilenet_v2", weights=weights, device="cpu")
    with torch.inference_mode():
        assert_close(backbone(pixels()), networks[tag].features(pixels()).mean((2, 3)))
    assert backbone.preprocess.resize_size == (resize, resize)
    assert (backbone.provenance.tag, backbone.provenance.source) == (tag, entries[tag].url)


# ---------------------------------------------------------------------------------------------
# Digests beside cached files


@pytest.fixture(params=["hub", "torch"])
def cached(request: pytest.FixtureRequest, empty_caches: Path) -> Iterator[Path]:
    """A cached weights file of either kind; neither is real."""
    if request.param == "hub":
        yield snapshot(empty_caches, "timm/test_resnet.r160_in1k") / "model.safetensors"
    else:
        folder = empty_caches / "torch" / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        yield folder / "squeezenet1_1-b8a52dc0.pth"


def digest(cached: Path) -> str:
    """By way of the library's own finding."""
    room, name = (
        (from_timm, "test_resnet")
        if cached.suffix != ".pth"
        else (from_torchvision, "squeezenet1_1")
    )
    found = room.fetch(name)
    assert found.path == cached
    return found.sha256()


def kept(cached: Path) -> Path:
    return cached.with_name(cached.name + ".sha256")


def test_digest_file_has_the_format_of_sha256sum(cached: Path) -> None:
    cached.write_bytes(b"weights")
    expected = hashlib.sha256(b"weights").hexdigest()
    assert digest(cached) == expected
    line, comment = kept(cached).read_text().splitlines()
    assert line == f"{expected}  {cached.name}"
    assert comment.startswith("#")
    assert sorted(cached.parent.iterdir()) == [cached, kept(cached)]
    if tool := shutil.which("sha256sum"):
        done = subprocess.run(
            [tool, "--check", "--strict", kept(cached).name],
            cwd=cached.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, f"{cached.name}: OK\n"), done.stderr


def test_kept_digest_is_not_computed_again(cached: Path) -> None:
    cached.write_bytes(b"weights")
    first = digest(cached)
    planted = "0123456789abcdef" * 4
    kept(cached).write_text(kept(cached).read_text().replace(first, planted))
    assert digest(cached) == planted


def test_digest_follows_changes_of_the_file(cached: Path) -> None:
    cached.write_bytes(b"weights")
    digest(cached)
    time = cached.stat().st_mtime_ns
    cached.write_bytes(b"WEIGHTS")  # of the same size, a nanosecond later
    os.utime(cached, ns=(time + 1, time + 1))
    assert digest(cached) == hashlib.sha256(b"WEIGHTS").hexdigest()
    cached.write_bytes(b"longer weights")  # at the same time
    os.utime(cached, ns=(time + 1, time + 1))
    assert digest(cached) == hashlib.sha256(b"longer weights").hexdigest()
    assert digest(cached) == hashlib.sha256(b"longer weights").hexdigest()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n\n", b"0" * 64, b"a\nb\nc\n"])
def test_unreadable_digest_file_is_replaced(content: bytes, cached: Path) -> None:
    cached.write_bytes(b"weights")
    kept(cached).write_bytes(content)
    expected = hashlib.sha256(b"weights").hexdigest()
    assert digest(cached) == expected
    assert kept(cached).read_text().startswith(f"{expected}  {cached.name}\n#")


def test_read_only_cache_keeps_no_digest(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    cached.write_bytes(b"weights")
    monkeypatch.setattr(Path, "write_text", refused)  # a superuser may write in any folder
    monkeypatch.setattr(Path, "write_bytes", refused)
    monkeypatch.setattr(os, "replace", refused)
    assert digest(cached) == hashlib.sha256(b"weights").hexdigest()
    assert list(cached.parent.iterdir()) == [cached]


def test_digests_are_not_kept_beside_user_files(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(network().state_dict(), file)
    before = sorted(tmp_path.rglob("*"))
    assert load_backbone("test_resnet", weights=file, device="cpu").provenance.sha256 == sha256(
        file
    )
    load_folder(folder)
    assert WeightsFile(file).sha256() == sha256(file)
    assert sorted(tmp_path.rglob("*")) == before


def test_loading_keeps_the_digest_of_provenance(empty_caches: Path) -> None:
    where = snapshot(empty_caches, "timm/test_resnet.r160_in1k")
    torch.manual_seed(5)
    save_file(timm.create_model("test_resnet").state_dict(), where / "model.safetensors")
    made = load_backbone("test_resnet", device="cpu").provenance
    assert made.sha256 == sha256(where / "model.safetensors")
    assert kept(where / "model.safetensors").read_text().startswith(made.sha256)


# ---------------------------------------------------------------------------------------------
# Cached files and the digests in their names


@pytest.mark.parametrize("damage", ["another", "cut", "zeros"])
def test_cached_file_must_have_the_digest_in_its_name(
    damage: str, empty_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    network = torchvision.models.squeezenet1_1()
    path = publish(monkeypatch, empty_caches, entry, network.state_dict())
    content = path.read_bytes()
    expected = hashlib.sha256(content).hexdigest()[:8]
    assert load_backbone("torchvision:squeezenet1_1", device="cpu").provenance.weights == "hub"
    if damage == "another":
        torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    else:
        kept = content[: len(content) // 2]
        path.write_bytes(kept if damage == "cut" else kept + bytes(len(content) - len(kept)))
    match = rf"{path.name} is not what its name says: got SHA-256 \w{{8}}, expected {expected}\. .*"
    with pytest.raises(WeightsError, match=match + "Delete it and download it again"):
        load_backbone("torchvision:squeezenet1_1", device="cpu")
    # Named as a file of one's own, it is whatever it is.
    if damage == "another":
        made = load_backbone("torchvision:squeezenet1_1", weights=path, device="cpu").provenance
        assert (made.weights, made.source) == ("file", path.name)


@pytest.mark.parametrize("as_weights", [False, True], ids=["model", "weights"])
def test_hub_blob_must_have_the_digest_in_its_name(as_weights: bool, empty_caches: Path) -> None:
    folder = snapshot(empty_caches, "me/net")
    published = network()
    save_for_hf(published, str(folder), safe_serialization=True)
    link = folder / "model.safetensors"
    blob = folder.parent.parent / "blobs" / sha256(link)
    blob.parent.mkdir()
    link.rename(blob)
    link.symlink_to(os.path.relpath(blob, folder))
    model, weights = (
        ("test_resnet", "hf-hub:me/net") if as_weights else ("hf-hub:me/net", "default")
    )
    backbone = load_backbone(model, weights=weights, device="cpu")
    assert_close(backbone(pixels()), pre_logits(published))
    save_file(network(seed=6).state_dict(), blob)
    with pytest.raises(WeightsError, match=rf"safetensors is not what its name.* {blob.name}\. It"):
        load_backbone(model, weights=weights, device="cpu")


def test_small_hub_blobs_have_no_digest_in_their_name(empty_caches: Path) -> None:
    """The hub names files outside of its large file storage by another digest."""
    folder = snapshot(empty_caches, "me/net")
    save_for_hf(network(), str(folder), safe_serialization=True)
    link, blob = folder / "model.safetensors", folder.parent.parent / "blobs" / ("d" * 40)
    blob.parent.mkdir()
    link.rename(blob)
    link.symlink_to(blob)
    assert load_backbone("hf-hub:me/net", device="cpu").provenance.weights == "hub"


def test_named_digest_costs_no_second_reading(
    empty_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    entry = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    path = publish(
        monkeypatch, empty_caches, entry, torchvision.models.squeezenet1_1().state_dict()
    )
    hashed: list[Path] = []

    def counted(file: IO[bytes]) -> tuple[bytes, int]:
        hashed.append(Path(file.name))
        return hash_file(file)

    monkeypatch.setattr(Path, "write_text", refused)
    monkeypatch.setattr(digests, "hash_file", counted)
    load_backbone("torchvision:squeezenet1_1", device="cpu")
    assert hashed == [path]
