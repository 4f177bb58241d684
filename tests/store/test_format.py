"""The manifest survives a round trip, and anything else is rejected."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import extractor.store.format as format_module
from extractor.errors import StoreError
from extractor.store.format import (
    Description,
    Difference,
    FileEntry,
    Manifest,
    ShardEntry,
    features_name,
    images_name,
)

SHA = "ab" * 32


def shard(number: int, rows: int = 2, images: int = 4) -> ShardEntry:
    return ShardEntry(
        number,
        images,
        rows,
        FileEntry(features_name(number), 152, SHA),
        FileEntry(images_name(number), 99, SHA),
    )


@pytest.fixture
def manifest(describe_store: Callable[..., Description]) -> Manifest:
    shards = (shard(0), shard(3, rows=1))
    failures = FileEntry("failures.jsonl", 7, SHA)
    return Manifest(
        describe_store(),
        5,
        LISTING,
        3,
        shards,
        failures,
        "2024-01-02T03:04:05+00:00",
        history=FileEntry("history.jsonl", 9, SHA),
        next_id=16,
    )


LISTING = "0" * 64


@pytest.fixture
def content(manifest: Manifest) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(manifest.to_json())
    return loaded


def read(content: object) -> Manifest:
    return Manifest.from_json(json.dumps(content), "OUT/store.json")


def test_manifest_survives_a_round_trip(manifest: Manifest) -> None:
    for text in (manifest.to_json(), manifest.to_json().encode()):
        again = Manifest.from_json(text, "OUT/store.json")
        assert again == manifest
        assert again.created == manifest.created
        assert again.to_json() == manifest.to_json()


def test_manifest_keys_have_a_fixed_order(content: dict[str, Any]) -> None:
    assert list(content) == [
        "format",
        "version",
        "created",
        "backbone",
        "embedding",
        "preprocess",
        "computation",
        "root",
        "shard_images",
        "software",
        "counts",
        "listing",
        "shards",
        "failures",
        "history",
        "next_id",
        "checksum",
    ]
    assert content["format"] == "extractor-store"
    assert content["version"] == 2
    assert content["counts"] == {"images": 5, "rows": 3, "failures": 2, "retired": 0}
    assert list(content["shards"][0]) == [
        "shard",
        "images",
        "rows",
        "features",
        "index",
        "retired",
        "first_id",
    ]
    assert content["shards"][1]["features"] == {
        "name": "features/00003.npy",
        "bytes": 152,
        "sha256": SHA,
    }


@pytest.mark.parametrize("root", ["/Bilder/Käse", "/bad-\udcff-name", '/quo"te\n', "/\U0001f600"])
def test_root_survives_a_round_trip_through_ascii(
    describe_store: Callable[..., Description], root: str
) -> None:
    failures = FileEntry("failures.jsonl", 0, SHA)
    text = Manifest(describe_store(root=root), 0, LISTING, 0, (), failures, "now").to_json()
    assert text.isascii()
    assert text.endswith("}\n")
    assert Manifest.from_json(text.encode(), "OUT/store.json").description.root == root


def test_manifest_equality_ignores_creation_time(manifest: Manifest) -> None:
    later = replace(manifest, created="2030-01-01T00:00:00+00:00")
    assert later == manifest
    assert later != replace(later, images=6)


def test_file_names_sort_in_row_order() -> None:
    assert features_name(0) == "features/00000.npy"
    assert images_name(12345) == "images/12345.parquet"
    numbers = [0, 1, 9, 10, 99, 100, 12345, 99999]
    for name in (features_name, images_name):
        assert sorted(map(name, numbers)) == [name(number) for number in numbers]


@pytest.mark.parametrize(
    "text", ["", "{", b"\xff\xfe\xff", b'{"format": "\xff"}', "no", b"\x00" * 40], ids=repr
)
def test_manifest_that_is_not_json_is_rejected(text: str | bytes) -> None:
    with pytest.raises(StoreError, match=r"OUT/store\.json is not JSON .*damaged"):
        Manifest.from_json(text, "OUT/store.json")


@pytest.mark.parametrize("content", [[], 3, None, "extractor-store", {}, {"format": "other"}])
def test_json_of_something_else_is_rejected(content: object) -> None:
    with pytest.raises(StoreError, match=r"OUT/store\.json is not the manifest .*extractor-store"):
        read(content)


@pytest.mark.parametrize("version", [0, 3, 17, "1", None, [1]])
def test_unknown_version_is_rejected(content: dict[str, Any], version: object) -> None:
    shown = repr(version).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(StoreError, match=f"has format version {shown}; .* reads versions 1 to 2"):
        read({**content, "version": version})


KEYS = [
    ("created",),
    ("backbone",),
    ("embedding",),
    ("embedding", "dim"),
    ("embedding", "dtype"),
    ("preprocess",),
    ("computation",),
    ("root",),
    ("shard_images",),
    ("software",),
    ("counts",),
    ("counts", "images"),
    ("counts", "rows"),
    ("shards",),
    ("shards", 0, "shard"),
    ("shards", 0, "images"),
    ("shards", 1, "rows"),
    ("shards", 0, "features"),
    ("shards", 0, "features", "sha256"),
    ("shards", 1, "index", "name"),
    ("failures",),
    ("failures", "bytes"),
    ("next_id",),
]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: ".".join(map(str, key)))
def test_manifest_without_a_key_is_damaged(content: dict[str, Any], key: Any) -> None:
    inner: Any = content
    for step in key[:-1]:
        inner = inner[step]
    del inner[key[-1]]
    with pytest.raises(StoreError, match=r"OUT/store\.json is damaged: .*" + key[-1]):
        read(content)


@pytest.mark.parametrize("key", ["backbone", "embedding", "counts", "shards", "failures"])
@pytest.mark.parametrize("value", [None, 3, "text", [[]]], ids=repr)
def test_manifest_with_a_value_of_wrong_type_is_damaged(
    content: dict[str, Any], key: str, value: object
) -> None:
    with pytest.raises(StoreError, match=r"OUT/store\.json is damaged"):
        read({**content, key: value})


def test_manifest_with_contradicting_counts_is_damaged(content: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"damaged: .*4 rows of 5 images, shards hold 3"):
        read({**content, "counts": {"images": 5, "rows": 4}})
    with pytest.raises(StoreError, match=r"damaged: .*3 rows of 2 images"):
        read({**content, "counts": {"images": 2, "rows": 3}})


@pytest.mark.parametrize(
    "name",
    ["../other/00000.npy", "/etc/passwd", "features/00001.npy", "notes.txt", "features/../x.npy"],
)
@pytest.mark.parametrize("file", ["features", "index"])
def test_shard_entry_with_foreign_file_names_is_damaged(
    content: dict[str, Any], file: str, name: str
) -> None:
    # An overwrite removes the files of the old manifest: it must not be led elsewhere.
    content["shards"][0][file]["name"] = name
    with pytest.raises(StoreError, match=r"OUT/store\.json is damaged"):
        read(content)


def test_failures_entry_with_another_name_is_damaged(content: dict[str, Any]) -> None:
    content["failures"]["name"] = "../failures.jsonl"
    with pytest.raises(StoreError, match=r"OUT/store\.json is damaged"):
        read(content)


def test_manifest_of_version_1_counts_its_ids(manifest: Manifest) -> None:
    old = replace(manifest, version=1, history=None)
    content = json.loads(old.to_json())
    assert content["version"] == 1
    assert not {"next_id", "history"} & set(content)
    assert not any("first_id" in entry for entry in content["shards"])
    content["shards"][0]["retired"] = "1"  # ids count the rows in the files
    content["counts"] = {**content["counts"], "rows": 2, "retired": 1}
    again = read(content)
    assert [entry.first_id for entry in again.shards] == [0, 2]
    assert (again.next_id, again.history, again.version) == (3, None, 1)
    assert Manifest.from_json(again.to_json(), "OUT/store.json") == again


@pytest.mark.parametrize(
    ("first_ids", "next_id", "problem"),
    [
        ((0, 1), 16, "shard 3: first id 1 below 2"),
        ((4, 0), 16, "shard 3: first id 0 below 6"),
        ((-1, 4), 16, "shard 0: first id -1 below 0"),
        ((0, 4), 4, "next id 4, but shards hold ids below 5"),
        ((7, None), 8, "next id 8, but shards hold ids below 9"),
    ],
)
def test_ids_that_overlap_are_damage(
    content: dict[str, Any], first_ids: tuple[int | None, ...], next_id: int, problem: str
) -> None:
    for entry, first_id in zip(content["shards"], first_ids, strict=True):
        entry["first_id"] = first_id
    with pytest.raises(StoreError, match=f"damaged: .*{problem}"):
        read({**content, "next_id": next_id})


@pytest.mark.parametrize(("rows", "images"), [(0, 4), (5, 4), (-1, 4)])
def test_shard_entry_needs_a_row_and_no_more_rows_than_images(rows: int, images: int) -> None:
    with pytest.raises(ValueError, match=f"shard 7: {rows} rows of {images} images"):
        shard(7, rows=rows, images=images)


@pytest.mark.parametrize("numbers", [(1, 0), (2, 2), (0, 2, 1)])
def test_shard_entries_must_be_unique_and_sorted(
    manifest: Manifest, numbers: tuple[int, ...]
) -> None:
    shards = tuple(shard(number, rows=1) for number in numbers)
    with pytest.raises(ValueError, match="shards out of order"):
        Manifest(manifest.description, 9, LISTING, len(numbers), shards, manifest.failures, "now")


def test_description_checks_dim_and_dtype(describe_store: Callable[..., Description]) -> None:
    for dtype in ("float64", ">f4", "int8"):
        with pytest.raises(ValueError, match=f"dtype: got '{dtype}'"):
            describe_store(dtype=dtype)
    with pytest.raises(ValueError, match="dim: got 0"):
        describe_store(dim=0)


def test_description_names_model_and_weights(describe_store: Callable[..., Description]) -> None:
    description = describe_store(dim=5, dtype="float16")
    assert (description.dim, description.dtype) == (5, "float16")
    assert description.model == "timm:tiny"
    assert description.made_with == "timm:tiny (a1, sha256 0123456789ab)"


def test_failed_counts_images_without_a_row(manifest: Manifest) -> None:
    assert manifest.failed == 2


def keys(differences: list[Difference]) -> list[str]:
    return [difference.key for difference in differences]


def joined(*digests: str, **changes: object) -> dict[str, Any]:
    parts = [{"model": f"m{i}", "sha256": digest, **changes} for i, digest in enumerate(digests)]
    return {"backbone": {"model": "m0+m1", "sha256": "".join(digests), "parts": parts}}


@pytest.mark.parametrize("name", ["weights", "tag", "source", "revision"])
def test_digest_decides_whether_weights_are_the_same(
    describe_store: Callable[..., Description], name: str
) -> None:
    backbone = {"model": "timm:tiny", "sha256": SHA, name: "before"}
    before = describe_store(backbone=backbone)
    assert before.differences(describe_store(backbone={**backbone, name: "now"})) == []
    other = describe_store(backbone={**backbone, name: "now", "sha256": "cd" * 32})
    assert set(keys(before.differences(other))) == {f"backbone.{name}", "backbone.sha256"}
    unknown = {**backbone, "sha256": ""}
    differences = describe_store(backbone=unknown).differences(
        describe_store(backbone={**unknown, name: "now"})
    )
    assert keys(differences) == [f"backbone.{name}"]


def test_digest_of_each_joined_backbone_decides(
    describe_store: Callable[..., Description],
) -> None:
    before = describe_store(**joined("aa", "bb", source="one.pth"))
    assert before.differences(describe_store(**joined("aa", "bb", source="two.pth"))) == []
    other = describe_store(**joined("aa", "cc", source="two.pth"))
    assert keys(before.differences(other)) == [
        "backbone.parts.1.sha256",
        "backbone.parts.1.source",
        "backbone.sha256",
    ]


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("local-dir:/mnt/a/net", "local-dir:/mnt/b/net", True),
        ("hf-hub:org/net", "local-dir:/mnt/net", True),
        ("local-dir:/mnt/a/net", "timm:net", False),
        ("timm:net", "timm:other", False),
    ],
)
def test_model_in_another_folder_is_the_same_if_its_weights_are(
    describe_store: Callable[..., Description], before: str, now: str, same: bool
) -> None:
    def described(model: str, digest: str = SHA) -> Description:
        return describe_store(backbone={"model": model, "sha256": digest})

    def as_part(model: str) -> Description:
        parts = [{"model": "timm:first", "sha256": "aa"}, {"model": model, "sha256": SHA}]
        joined = {"model": f"timm:first+{model}", "sha256": "bb", "parts": parts}
        embedding = {"dim": 2, "shape": [2], "dtype": "float32"}
        models = [{"model": part["model"], "dim": 1} for part in parts]
        return describe_store(backbone=joined, embedding={**embedding, "parts": models})

    expected = [] if same else ["backbone.model"]
    assert keys(described(before).differences(described(now))) == expected
    expected = [] if same else ["backbone.parts.1.model"]
    assert keys(as_part(before).differences(as_part(now))) == expected
    other = described(now, "cd" * 32)
    assert keys(described(before).differences(other)) == ["backbone.model", "backbone.sha256"]


def test_versions_of_software_are_changes_but_no_differences(
    describe_store: Callable[..., Description],
) -> None:
    before, now = (
        describe_store(
            software={"timm": timm, "torch": "2.0"},
            backbone={"model": "timm:tiny", "sha256": SHA, "library_version": timm},
        )
        for timm in ("1.0", "1.1")
    )
    assert before.differences(now) == []
    assert before.software_changes(now) == [Difference("software.timm", "1.0", "1.1")]


@pytest.mark.parametrize(
    ("before", "now", "changes"),
    [
        ("NVIDIA A100", "NVIDIA H100", 1),
        ("NVIDIA A100", "NVIDIA A100", 0),
        (None, "NVIDIA H100", 0),  # an older program did not name it
        ("NVIDIA H100", None, 0),
    ],
)
def test_another_gpu_is_a_change_but_no_difference(
    describe_store: Callable[..., Description], before: str | None, now: str | None, changes: int
) -> None:
    old, new = (
        describe_store(computation={"device": "cuda"} | ({"device_name": name} if name else {}))
        for name in (before, now)
    )
    assert old.differences(new) == []
    expected = [Difference("computation.device_name", before, now)]
    assert old.software_changes(new) == expected[:changes]


def test_missing_key_means_its_default(
    describe_store: Callable[..., Description], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        format_module, "DEFAULTS", {"preprocess.levels": 16, "backbone.is_whole": False}
    )
    old = describe_store()
    for preprocess in ({"size": [8, 8], "levels": 16}, {"size": [8, 8], "other": None}):
        assert old.differences(describe_store(preprocess=preprocess)) == []
        assert describe_store(preprocess=preprocess).differences(old) == []
    now = describe_store(preprocess={"size": [8, 8], "levels": 12})
    assert list(map(str, old.differences(now))) == ["preprocess.levels: 16 there, 12 now"]
    assert list(map(str, now.differences(old))) == ["preprocess.levels: 12 there, 16 now"]
    parts = describe_store(**joined("aa", "bb"))
    assert parts.differences(describe_store(**joined("aa", "bb", is_whole=False))) == []
    assert keys(parts.differences(describe_store(**joined("aa", "bb", is_whole=True)))) == [
        "backbone.parts.0.is_whole",
        "backbone.parts.1.is_whole",
    ]
