from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from extractor.errors import WeightsError
from extractor.models import weight_files as weights


class Bomb:
    """Unpickling this makes a folder: code that came with a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hook": Bomb(ran)}, tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=r"refused: it holds more than tensors \(posix\.mkdir\), .* run code"
    ):
        weights.read_checkpoint(tmp_path / "w.pth")
    assert not ran.exists()


def test_a_plain_pickle_is_refused_and_its_code_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Bomb(ran)))
    with pytest.raises(WeightsError, match=r"w\.pth"):
        weights.read_checkpoint(tmp_path / "w.pth")
    assert not ran.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_files_that_are_no_checkpoints_are_errors(
    suffix: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"no checkpoint that (torch )?can"):
        weights.read_checkpoint(path)


def test_a_cut_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(nn.Linear(30, 40).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(WeightsError, match="no checkpoint that"):
        weights.read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, torch.zeros(2)])
def test_a_checkpoint_without_named_tensors_is_an_error(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds no tensors by name"):
        weights.read_checkpoint(tmp_path / "w.pth")


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot read weights"):
        weights.read_checkpoint(tmp_path)


def test_a_pipe_is_no_checkpoint_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    for path in (tmp_path / "w.pth", Path(os.devnull)):
        with pytest.raises(WeightsError, match=f"cannot read weights {path}: is no regular file"):
            weights.read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"<!DOCTYPE html>\n<html><body>", r"is a web page, not weights; fetch the file"),
        (
            "\ufeff\n  <HTML lang='de'>\u00e4".encode(),
            r"is a web page, not weights; fetch the file",
        ),
        (b"<html><body>caf\xe9", r"is a web page, not weights; fetch the file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            r"is a Git LFS pointer, not weights; fetch the file with git lfs pull$",
        ),
        (
            b"<?xml version='1.0'?><Error>",
            r"it is text that begins with \"<\?xml version='1\.0'\?>",
        ),
        (b'{"a": 1}', r"it is text that begins with '\{\"a\": 1\}'; expected"),
        (b"hello", r"it is text that begins with 'hello'; expected a \.pth"),
        ((255 * "x ").encode() + "x\u00e4".encode() * 9, "it is text that begins with 'x x"),
    ],
)
def test_what_text_a_file_holds_instead_of_weights_is_said(
    content: bytes, match: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=match) as raised:
        weights.read_checkpoint(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\x1f\x8b\x08 gzip",
        b"\x93NUMPY\x01\x00",
        b"<\x00!\x00D\x00",
        b"}\xff\xfe.",
        bytes(range(256)),
        pickle.dumps({"a": list(range(9))}, 2)[:-4],
        b"ctarfile\nopen\n(tR.",
    ],
)
def test_no_error_advises_to_read_a_file_in_a_way_that_runs_its_code(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.pth is (refused|no checkpoint)") as raised:
        weights.read_checkpoint(tmp_path / "w.pth")
    for advice in ("weights_only", "safe_globals", "trust", "it is text"):
        assert advice not in str(raised.value)


def test_torchs_own_words_are_kept_but_for_that_advice(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"\x1f\x8b\x08 gzip")
    with pytest.raises(
        WeightsError, match=r"code \(UnpicklingError: Unsupported operand 31\); exp"
    ):
        weights.read_checkpoint(tmp_path / "w.pth")
    assert weights._reason(RuntimeError("Cannot use ``weights_only=True`` with")) == "RuntimeError"


def test_misfits_are_listed_by_name_and_shape() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = module.state_dict()
    state["0.weight"] = torch.zeros(5, 2)
    state["other.weight"] = torch.zeros(1)
    del state["1.bias"]
    with pytest.raises(WeightsError, match="do not fit") as raised:
        weights.load_into(module, state, discarded=["head"], how="a into b")
    assert str(raised.value) == (
        "a into b: the weights do not fit. 1 missing: 1.bias; 1 unexpected: other.weight; "
        "1 of another shape: 0.weight (5, 2) instead of (3, 2)"
    )


def test_only_the_first_misfits_are_shown_and_all_are_counted() -> None:
    state = {f"key{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(WeightsError, match=r"9 unexpected: key0, key1, key2, key3, key4, and 4 m"):
        weights.load_into(nn.Identity(), state, discarded=[], how="a into b")


def test_keys_of_the_removed_head_and_counters_of_training_do_not_matter() -> None:
    module = nn.BatchNorm1d(2)
    wanted = {"weight": torch.tensor([1.0, 2.0]), "bias": torch.ones(2)}
    wanted |= {"running_mean": torch.zeros(2), "running_var": torch.ones(2)}
    parent = nn.Sequential(module)
    state = {f"0.{key}": value for key, value in wanted.items()}
    state["head.fc.weight"] = torch.zeros(9, 9)
    weights.load_into(parent, state, discarded=["head.fc"], how="a into b")
    assert module.weight.tolist() == [1, 2]
    with pytest.raises(WeightsError, match=r"1 unexpected: headless\.weight"):
        weights.load_into(
            parent, {**state, "headless.weight": torch.zeros(1)}, discarded=["head"], how="a"
        )


def test_quantised_and_broken_weights_are_refused() -> None:
    state = {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.tensor([0.0, torch.nan])}
    with pytest.raises(
        WeightsError,
        match=r"1 without fractions: weight torch\.int8; 1 with NaN or infinity: bias",
    ):
        weights.load_into(nn.Linear(2, 2), state, discarded=[], how="a into b")


def test_misfits_of_names_and_shapes_are_told_from_those_of_values() -> None:
    right = nn.Linear(2, 2).state_dict()
    for state, foreign in (
        ({**right, "bias": torch.full((2,), torch.nan)}, False),
        ({**right, "bias": torch.ones(2, dtype=torch.complex64)}, False),
        ({**right, "bias": torch.ones(2, device="meta")}, False),
        ({"weight": right["weight"]}, True),
        ({**right, "more": torch.ones(2)}, True),
        ({**right, "bias": torch.full((3,), torch.nan)}, True),
    ):
        with pytest.raises(weights.MisfitError, match="do not fit") as raised:
            weights.load_into(nn.Linear(2, 2), state, discarded=[], how="a into b")
        assert raised.value.foreign is foreign


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Validating sparse tensor")
def test_weights_without_values_and_sparse_ones_are_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = module.state_dict()
    state["0.weight"] = state["0.weight"].to_sparse()
    state["1.weight"] = state["1.weight"].to_sparse_csr()
    state["1.bias"] = torch.zeros(4, device="meta")
    state["2.num_batches_tracked"] = state["2.num_batches_tracked"].to("meta")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="do not fit") as raised:
        weights.load_into(
            module, weights.read_checkpoint(tmp_path / "w.pth"), discarded=[], how="a into b"
        )
    assert str(raised.value) == (
        "a into b: the weights do not fit. 2 without values: 1.bias, 2.num_batches_tracked; "
        "2 sparse: 0.weight torch.sparse_coo, 1.weight torch.sparse_csr"
    )


@pytest.mark.filterwarnings("ignore:.*quantize", "ignore:TypedStorage")
def test_tensors_of_torchs_quantisation_are_refused(tmp_path: Path) -> None:
    weight = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    torch.save({"weight": weight, "bias": torch.zeros(2)}, tmp_path / "w.pth")
    state = weights.read_checkpoint(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 without fractions: weight torch\.qint8$"):
        weights.load_into(nn.Linear(2, 2), state, discarded=[], how="a into b")


def test_digest_of_a_state_depends_on_names_types_shapes_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    digest = weights.sha256_of_state(base)
    assert digest == weights.sha256_of_state(dict(reversed(base.items())))
    for changed in (
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3).half(), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
    ):
        assert weights.sha256_of_state(changed) != digest


def test_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "w").write_bytes(content)
    assert weights.sha256_of_file(tmp_path / "w") == hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------------------------
# A server on this machine in the place of the hubs


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(tmp_path / "served"), **kwargs)  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_weights_are_fetched_once_and_then_taken_from_the_cache(
    server: str, tmp_path: Path, empty_caches: Path
) -> None:
    content = os.urandom(5000)
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "served" / name).write_bytes(content)
    found = weights.find_url_file(f"{server}/{name}", tag="T", how="test")
    assert found.path == empty_caches / "torch" / "hub" / "checkpoints" / name
    assert found.path.read_bytes() == content
    assert (found.url, found.tag) == (f"{server}/{name}", "T")
    (tmp_path / "served" / name).unlink()
    assert weights.find_url_file(f"{server}/{name}", tag="T", how="test") == found


def test_a_download_with_another_digest_than_its_name_is_refused(
    server: str, tmp_path: Path, empty_caches: Path
) -> None:
    (tmp_path / "served" / "net-0123abcd.pth").write_bytes(b"something else")
    with pytest.raises(WeightsError, match="invalid hash value"):
        weights.find_url_file(f"{server}/net-0123abcd.pth", tag="", how="test")
    assert not list(empty_caches.rglob("net-*"))


def test_a_missing_file_on_the_server_is_an_error(server: str) -> None:
    with pytest.raises(WeightsError, match="answered: HTTP Error 404"):
        weights.find_url_file(f"{server}/nothing.pth", tag="", how="test")


def test_a_server_that_refuses_the_question_is_still_there(server: str) -> None:
    assert weights._reachable(f"{server}/whatever")


def test_a_closed_port_is_out_of_reach_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        started = time.monotonic()
        assert not weights._reachable(f"http://127.0.0.1:{unused.getsockname()[1]}/")
        assert time.monotonic() - started < weights.PROBE_SECONDS


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PROBE_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        assert not weights._reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert time.monotonic() - started < 3
