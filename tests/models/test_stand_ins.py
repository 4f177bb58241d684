"""What trainers keep beside the tensors is passed over, and nothing that a pickle names runs."""

from __future__ import annotations

import argparse
import builtins
import collections
import datetime
import decimal
import os
import random
import threading
import types
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch

from extractor.errors import WeightsError
from extractor.models import stand_ins
from extractor.models.checkpoint import read_checkpoint

STATE = {"a": torch.randn(2, 3, generator=torch.Generator().manual_seed(1))}

BESIDE: dict[str, Any] = {
    "float64": np.float64(71.2),
    "float32": np.float32(0.5),
    "int64": np.int64(3),
    "numpy bool": np.bool_(True),
    "numpy text": np.str_("best"),
    "array": np.arange(6.0).reshape(2, 3),
    "array of objects": np.array([1, "a", Path("x")], dtype=object),
    "records": np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
    "dtype": np.dtype("f8"),
    "random state": np.random.get_state(),
    "generator": np.random.default_rng(0),
    "python's random state": random.getstate(),
    "path": Path("runs/1"),
    "windows path": PureWindowsPath("c:\\runs"),
    "pure path": PurePosixPath("runs"),
    "datetime": datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
    "date": datetime.date(2024, 2, 29),
    "timedelta": datetime.timedelta(seconds=3),
    "Namespace": argparse.Namespace(lr=0.1, out=Path("x"), inner=argparse.Namespace(a=np.int8(1))),
    "SimpleNamespace": types.SimpleNamespace(lr=0.1),
    "defaultdict": collections.defaultdict(list, {"loss": [0.5]}),
    "deque": collections.deque([1.0, 2.0], maxlen=3),
    "Counter": collections.Counter("aab"),
    "uuid": uuid.UUID(int=7),
    "Decimal": decimal.Decimal("1.5"),
    "bytes": b"a\xff",
    "sets": ({1, 2}, frozenset([3])),
    "torch's version": torch.__version__,
    "nested": {"x": [{"y": (np.float64(1), Path("q"))}]},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_values_beside_the_tensors_do_no_harm(beside: str, zipped: bool, tmp_path: Path) -> None:
    content = {"metric": BESIDE[beside], "state_dict": STATE, "args": [BESIDE[beside]]}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "w.pth")
    assert list(read) == ["a"]
    assert torch.equal(read["a"], STATE["a"])


def class_of(name: str, *bases: type) -> type:
    """A class of a library that is not installed, as a pickle names it."""
    module, _, own = name.rpartition(".")
    made = type(own, bases, {})
    made.__module__ = module
    return made


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type]:
    """Make classes that ``torch.save`` can find."""

    def make(name: str, *bases: type) -> type:
        made, module = class_of(name, *bases), name.rpartition(".")[0]
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            package = ".".join(parts[:length])
            monkeypatch.setitem(__import__("sys").modules, package, types.ModuleType(package))
        setattr(__import__("sys").modules[module], made.__name__, made)
        return made

    return make


@pytest.mark.parametrize(
    "name", ["pytorch_lightning.utilities.parsing.AttributeDict", "easydict.EasyDict"]
)
def test_mapping_of_a_library_keeps_its_state_dict(
    name: str, tmp_path: Path, libraries: Callable[..., type]
) -> None:
    outer = libraries(name, dict)(state_dict=STATE, lr=0.1)
    torch.save(outer, tmp_path / "w.pth")
    assert torch.equal(read_checkpoint(tmp_path / "w.pth")["a"], STATE["a"])


def test_objects_of_absent_libraries_are_passed_over(
    tmp_path: Path, libraries: Callable[..., type]
) -> None:
    made = libraries("omegaconf.dictconfig.DictConfig")()
    made.__dict__["_content"] = {"lr": 0.1}
    torch.save({"state_dict": STATE, "cfg": made}, tmp_path / "w.pth")
    assert list(read_checkpoint(tmp_path / "w.pth")) == ["a"]


# ---------------------------------------------------------------------------------------------
# Pickles that run code


class Call:
    """Is read by calling a function, if the reader lets it."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.function, self.arguments


class BuildCall(Call):
    """Is read by setting the attributes of an object to the result of a call."""

    def __reduce__(self) -> tuple[object, ...]:
        return argparse.Namespace, (), {"a": Call(self.function, *self.arguments)}


def attacks(mark: Path) -> dict[str, object]:
    touch = Call(os.system, f"touch {mark}")
    opened = Call(eval, f"open({str(mark)!r}, 'w')")
    return {
        "os.system": touch,
        "eval": opened,
        "exec": Call(exec, f"open({str(mark)!r}, 'w')"),
        "open": Call(open, str(mark), "w"),
        "import": Call(__import__, "antigravity"),
        "in a Namespace": argparse.Namespace(out=touch),
        "in a path": Call(PurePosixPath, touch),
        "in an array": np.array([touch], dtype=object),
        "by attributes": BuildCall(os.system, f"touch {mark}"),
        "factory of a defaultdict": collections.defaultdict(os.getcwd, {"a": 1}),
        "getattr of a module": Call(getattr, Call(__import__, "os"), "system"),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", [*attacks(Path("x")), "print"])
def test_no_pickle_runs_code(
    attack: str, zipped: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "w.pth"
    evil = Call(print, "ran") if attack == "print" else attacks(mark)[attack]
    torch.save({"state_dict": STATE, "x": evil}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"w\.pth is (refused: it holds|not a checkpoint that)"):
        read_checkpoint(path)
    assert not mark.exists()
    assert capfd.readouterr() == ("", "")


def test_result_of_a_stand_in_cannot_be_called(tmp_path: Path) -> None:
    method = b"cbuiltins\ngetattr\ncpathlib\nPosixPath\nX\x05\0\0\0touch\x86R"  # PosixPath.touch
    (tmp_path / "w.pth").write_bytes(b"\x80\x02" + method + b"X\x04\0\0\0mark\x85R.")
    with pytest.raises(WeightsError, match="call reduce for unrecognized function"):
        read_checkpoint(tmp_path / "w.pth")


def test_listed_names_call_nothing_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of a pickle never reach pathlib, datetime, numpy or getattr."""
    content = {"state_dict": STATE, "x": Call(getattr, Path("a"), "name"), "y": np.float64(1)}
    torch.save(content, tmp_path / "w.pth")

    def refuse(*_: object) -> object:
        raise AssertionError("called")

    with monkeypatch.context() as patched:
        patched.setattr("numpy._core.multiarray.scalar", refuse)
        patched.setattr(Path, "__new__", refuse)
        with stand_ins.stand_ins(), (tmp_path / "w.pth").open("rb") as file:
            read = torch.load(file, weights_only=True)
    assert type(read["x"]).__name__ == "getattr"
    assert type(read["x"]) is not builtins.getattr
    assert type(read["y"]).__mro__[1] is stand_ins._Nothing


def test_every_name_has_one_stand_in() -> None:
    names = [*stand_ins.NOTHING, *stand_ins.ITEMS, *stand_ins.ENTRIES]
    assert len(names) == len(set(names))
    spelled = [f"{made.__module__}.{made.__qualname__}" for made in stand_ins._STAND_INS]
    assert spelled == names


def test_allowed_names_of_the_caller_stay(tmp_path: Path) -> None:
    """Reading leaves the process-wide list of torch as it was."""
    torch.save({"state_dict": STATE, "x": argparse.Namespace(a=1)}, tmp_path / "w.pth")
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        before = set(torch.serialization.get_safe_globals())
        read_checkpoint(tmp_path / "w.pth")
        assert set(torch.serialization.get_safe_globals()) == before
        own = torch.load(tmp_path / "w.pth", weights_only=True)
        assert own["x"] == argparse.Namespace(a=1)
    finally:
        torch.serialization.clear_safe_globals()


def test_checkpoints_can_be_read_in_parallel(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "x": [Path("a"), np.float64(1)]}, tmp_path / "w.pth")
    failed: list[Exception] = []

    def read() -> None:
        try:
            for _ in range(20):
                read_checkpoint(tmp_path / "w.pth")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert torch.serialization.get_safe_globals() == []
