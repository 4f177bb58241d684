"""Ids of rows and the changes between the states of a store, as readers see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extractor import Changes, FeatureStore
from extractor.errors import StoreDamagedError, StoreReplacedError, UnknownTokenError, UsageError
from extractor.store.format import Manifest
from extractor.store.ids import id_after_damage
from extractor.upkeep.compact import compact
from extractor.upkeep.verify import verify

WriteStore = Callable[..., Path]
FOUR = [np.arange(12, dtype=np.float32).reshape(4, 3)]
TWO = [np.ones((2, 3), np.float32)]


@pytest.fixture
def store(tmp_path: Path, write_store: WriteStore) -> FeatureStore:
    return FeatureStore.open(write_store(tmp_path / "out", FOUR))


def test_ids_are_an_int64_array(store: FeatureStore) -> None:
    assert store.ids.dtype == np.int64
    assert store.ids.tolist() == store.column("id") == [0, 1, 2, 3]
    assert store.select([2, 0]).ids.tolist() == [2, 0]


def test_present_state_has_no_changes(store: FeatureStore) -> None:
    changes = store.changes_since(store.token)
    assert isinstance(changes, Changes)
    assert not changes
    assert changes.changed.shape == (0, 2)
    assert changes.token == store.token


def test_empty_token_adds_all_rows(store: FeatureStore) -> None:
    changes = store.changes_since("")
    assert changes.added.tolist() == [0, 1, 2, 3]
    assert (len(changes.removed), len(changes.moved)) == (0, 0)


def test_unknown_token_asks_for_a_full_sync(store: FeatureStore) -> None:
    with pytest.raises(UnknownTokenError, match=r"does not know the state 'abc'.* full sync"):
        store.changes_since("abc")
    with pytest.raises(UsageError, match="token: got NoneType, expected the token of a store"):
        store.changes_since(None)  # type: ignore[arg-type]


def test_overwriting_goes_on_with_the_ids(store: FeatureStore, write_store: WriteStore) -> None:
    write_store(store.path, TWO, overwrite=True)
    new = store.reopen()
    assert new.ids.tolist() == [4, 5]
    changes = new.changes_since(store.token)
    assert changes.added.tolist() == [4, 5]
    assert changes.removed.tolist() == [0, 1, 2, 3]
    assert list(verify(store.path)) == []


def test_overwriting_a_damaged_manifest_uses_no_id_again(
    store: FeatureStore, write_store: WriteStore
) -> None:
    manifest = store.path / "store.json"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    lowest = id_after_damage()
    write_store(store.path, TWO, overwrite=True)
    first, second = store.reopen().ids.tolist()
    assert first >= lowest > 10**15  # microseconds since 1970, roughly
    assert second == first + 1
    with pytest.raises(UnknownTokenError, match="full sync"):
        store.reopen().changes_since(store.token)
    assert list(verify(store.path)) == []


def test_overwriting_a_damaged_history_begins_a_new_one(
    store: FeatureStore, write_store: WriteStore
) -> None:
    (store.path / "history.jsonl").write_bytes(b"{")
    assert any("history.jsonl: has 1 bytes" in problem for problem in verify(store.path))
    write_store(store.path, TWO, overwrite=True)
    assert store.reopen().ids.tolist() == [4, 5]
    with pytest.raises(UnknownTokenError, match="full sync"):
        store.reopen().changes_since(store.token)


def test_history_of_other_ids_is_damaged(store: FeatureStore, write_store: WriteStore) -> None:
    write_store(store.path, TWO, overwrite=True)
    history = store.path / "history.jsonl"
    content = history.read_bytes()
    history.write_bytes(content.replace(b'"4-5"', b'"3-5"'))
    assert history.read_bytes() != content
    with pytest.raises(StoreDamagedError, match=r"history.jsonl is damaged: its SHA-256 differs"):
        store.reopen().changes_since(store.token)


def test_store_made_anew_knows_no_earlier_state(
    store: FeatureStore, tmp_path: Path, write_store: WriteStore
) -> None:
    write_store(tmp_path / "new", TWO)
    new = FeatureStore.open(tmp_path / "new")
    assert new.ids.tolist() == [0, 1]
    with pytest.raises(UnknownTokenError, match="full sync"):
        new.changes_since(store.token)


def test_handle_to_an_older_state_says_what_it_cannot_do(
    store: FeatureStore, write_store: WriteStore
) -> None:
    write_store(store.path, TWO, overwrite=True)
    assert store.ids.tolist() == [0, 1, 2, 3]
    assert not store.changes_since(store.token)
    with pytest.raises(StoreReplacedError, match=r"was replaced .* call reopen\(\)"):
        store.changes_since("abc")


def test_compact_keeps_the_id_of_each_vector_and_path(
    tmp_path: Path, write_store: WriteStore
) -> None:
    names = [[b"b", b"d"], [b"a", b"c"]]
    parts = [np.arange(6, dtype=np.float32).reshape(2, 3) + 10 * i for i in range(2)]
    out = write_store(tmp_path / "out", parts, names=names)
    before = FeatureStore.open(out)
    assert before.ids.tolist() == [0, 1, 4, 5]  # four images fit into a shard
    compact(out)
    after = FeatureStore.open(out)
    assert after.paths == ["a", "b", "c", "d"]
    assert after.ids.tolist() == [4, 0, 5, 1]
    rows = after.rows_of(before.ids)
    np.testing.assert_array_equal(after.features[rows], before.features)
    assert Manifest.read(out / "store.json").next_id == before.manifest.next_id
    assert not after.changes_since(before.token)
    assert list(verify(out)) == []
