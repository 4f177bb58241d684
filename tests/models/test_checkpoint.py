"""Checkpoints as trainers leave them: each gives the embeddings of the model it was saved from."""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from support.networks import assert_close
from torch import nn
from torchvision.models import VisionTransformer

from extractor import load_backbone
from extractor.errors import ExtractorError, WeightsError
from extractor.models import checkpoint
from extractor.models.checkpoint import MisfitError, load_into, read_checkpoint

Tensors: TypeAlias = "dict[str, torch.Tensor]"

TIMM = "timm:test_resnet"
TORCHVISION = "torchvision:squeezenet1_1"
HEADS = ("fc.", "classifier.")  # of these two

PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@functools.cache
def network(model: str, seed: int = 3) -> nn.Module:
    """The library's own, with weights that half precision holds exactly; not to be changed."""
    library, _, name = model.partition(":")
    torch.manual_seed(seed)
    made = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    return made.half().float().eval()


@functools.cache
def embeddings(of: nn.Module) -> torch.Tensor:
    """What goes into the classifier, its mean where that is a convolution."""
    seen: list[torch.Tensor] = []
    head = of.classifier[1] if hasattr(of, "classifier") else of.fc
    handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        of(PIXELS)
    handle.remove()
    return seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]


def loaded(model: str, path: Path, key: str | None = None) -> torch.Tensor:
    return load_backbone(model, weights=path, weights_key=key, device="cpu")(PIXELS)


def under(prefix: str, state: Tensors) -> Tensors:
    return {prefix + key: value for key, value in state.items()}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def headless(state: Tensors) -> Tensors:
    return {key: value for key, value in state.items() if not key.startswith(HEADS)}


def other_classes(state: Tensors) -> Tensors:
    resized = {k: noise(7, *v.shape[1:]) for k, v in state.items() if k.startswith(HEADS)}
    assert len(resized) == 2
    return {**state, **resized}


def trainer(state: Tensors) -> dict[str, Any]:
    """As timm's ``CheckpointSaver`` writes it."""
    weight = nn.Parameter(noise(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "arch": "net",
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(lr=0.1, aa="rand-m9", img_size=None, mean=[0.5, 0.5, 0.5]),
        "metric": 71.5,
        "state_dict_ema": {key: value + 1 for key, value in state.items()},
    }


def lightning(state: Tensors) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 17,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": under("model.", state),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"EarlyStopping{'monitor': 'loss'}": {"best_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "hyper_parameters": {"lr": 0.1},
    }


CONTENTS: dict[str, Callable[[Tensors], object]] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best": 0.7},
    "model": lambda state: {"model": state, "scaler": {"scale": 65536.0}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": torch.tensor(0.5)},
    "DDP": lambda state: under("module.", state),
    "DDP in state_dict": lambda state: {"state_dict": under("module.", state)},
    "encoder": lambda state: under("encoder.", headless(state)),
    "module.backbone": lambda state: {"state_dict": under("module.backbone.", headless(state))},
    "torch.compile": lambda state: under("_orig_mod.", state),
    "compiled in DDP": lambda state: under("module._orig_mod.", state),
    "Lightning of a compiled backbone": lambda state: under("model.backbone._orig_mod.", state),
    "Lightning": lightning,
    "timm's trainer": trainer,
    "another number of classes": other_classes,
    "no classifier": headless,
    "half precision": lambda state: {k: v.half() if v.is_floating_point() else v
                                     for k, v in state.items()},
    "parameters": lambda state: {k: nn.Parameter(v) if v.is_floating_point() else v
                                 for k, v in state.items()},
    "no counters": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}  # fmt: skip


# Of torchvision only what takes another way there: its heads, and every kind of unwrapping.
IN_BOTH = ("Lightning", "module.backbone", "another number of classes", "no classifier")


@pytest.mark.parametrize(
    ("model", "layout"),
    [(TIMM, layout) for layout in CONTENTS] + [(TORCHVISION, layout) for layout in IN_BOTH],
)
def test_every_trainer_layout_yields_its_embeddings(
    model: str, layout: str, tmp_path: Path
) -> None:
    trained = network(model)
    torch.save(CONTENTS[layout](trained.state_dict()), tmp_path / "w.pth")
    assert_close(loaded(model, tmp_path / "w.pth"), embeddings(trained))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar", ".ckpt"])
def test_every_state_dict_key_is_unwrapped(suffix: str, zipped: bool, tmp_path: Path) -> None:
    trained = network(TIMM)
    path = tmp_path / f"w{suffix}"
    torch.save(trained.state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) is zipped
    assert_close(loaded(TIMM, path), embeddings(trained))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth", ".weights"])
def test_safetensors_are_recognized_by_content(suffix: str, tmp_path: Path) -> None:
    trained = network(TIMM)
    path = tmp_path / f"w{suffix}"
    save_file(under("module.", trained.state_dict()), path)
    assert_close(loaded(TIMM, path), embeddings(trained))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_format_is_recognized_by_content(zipped: bool, tmp_path: Path) -> None:
    trained, path = network(TIMM), tmp_path / "w.safetensors"
    torch.save(trained.state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert_close(loaded(TIMM, path), embeddings(trained))


def test_code_in_a_file_named_safetensors_does_not_run(tmp_path: Path) -> None:
    torch.save({"a": noise(2), "hook": Bomb(tmp_path / "ran")}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="refused: it holds more than tensors"):
        loaded(TIMM, tmp_path / "w.safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tag", ["mps", "cuda:0"])
def test_tensors_are_read_on_the_cpu(
    tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, path = network(TIMM), tmp_path / "w.pth"
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda _: tag)
        torch.save(trained.state_dict(), path)
    assert tag.encode() in path.read_bytes()
    assert {value.device.type for value in read_checkpoint(path).values()} == {"cpu"}
    assert_close(loaded(TIMM, path), embeddings(trained))


def test_projector_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = network(TIMM)
    state = under("backbone.", headless(trained.state_dict()))
    state |= {"projector.0.weight": noise(8, 96), "predictor.bias": noise(8)}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    assert_close(loaded(TIMM, tmp_path / "w.pth"), embeddings(trained))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "without projector.0.weight, predictor.bias" in message


def test_complete_weights_cause_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(under("module.", network(TIMM).state_dict()), tmp_path / "w.pth")
    loaded(TIMM, tmp_path / "w.pth")
    assert caplog.records == []


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.encoder."])
def test_encoder_module_of_the_network_is_not_a_prefix(prefix: str) -> None:
    def vit(seed: int) -> VisionTransformer:
        torch.manual_seed(seed)
        made = VisionTransformer(32, 16, 2, 2, 16, 32)
        made.heads = nn.Identity()
        return made.eval()

    trained, fresh = vit(1), vit(2)
    pixels = PIXELS[..., :32, :32]
    with torch.inference_mode():
        expected = trained(pixels)
        assert not torch.allclose(fresh(pixels), expected)
        load_into(fresh, under(prefix, trained.state_dict()), discarded=["heads"], label="a into b")
        assert torch.equal(fresh(pixels), expected)


# ---------------------------------------------------------------------------------------------
# Any prefix, copies, and counters

TEACHER, STUDENT = 3, 4  # seeds of networks


def copies(teacher: str, student: str) -> Tensors:
    """Two networks side by side in one state dict, and a tensor of neither."""
    return {
        **under(student, network(TIMM, STUDENT).state_dict()),
        **under(teacher, network(TIMM, TEACHER).state_dict()),
        "queue": noise(4, 8),
    }


@pytest.mark.parametrize(
    "prefix",
    ["net.", "student.", "visual.trunk.", "module._orig_mod.net.", "a.b.c.d.e.", "0.", "models."],
)
@pytest.mark.parametrize("with_head", [True, False])
def test_single_prefix_is_found_whatever_it_is(
    prefix: str, with_head: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = network(TIMM)
    state = trained.state_dict() if with_head else headless(trained.state_dict())
    torch.save({"state_dict": under(prefix, state)}, tmp_path / "w.pth")
    assert_close(loaded(TIMM, tmp_path / "w.pth"), embeddings(trained))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == f"took the weights under {prefix!r}"


# How self-supervised trainers name the two copies, and the one that is usually evaluated.
PAIRS = [
    ("teacher.", "student."),
    ("module.encoder_k.", "module.encoder_q."),  # MoCo
    ("online_encoder.net.", "target_encoder.net."),  # BYOL
    ("model.teacher.backbone.", "model.student.backbone."),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_none_of_two_copies_is_chosen(pair: tuple[str, str], tmp_path: Path) -> None:
    torch.save({"state_dict": copies(*pair)}, tmp_path / "w.pth")
    match = f"holds 2 copies of this network, under {', '.join(sorted(pair))}; choose one"
    with pytest.raises(WeightsError, match=match):
        loaded(TIMM, tmp_path / "w.pth")


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dot", [".", ""])
def test_weights_prefix_chooses_a_copy(pair: tuple[str, str], dot: str, tmp_path: Path) -> None:
    torch.save({"state_dict": copies(*pair)}, tmp_path / "w.pth")
    for prefix, seed in zip(pair, (TEACHER, STUDENT), strict=True):
        typed = prefix.rstrip(".") + dot
        backbone = load_backbone(
            TIMM, weights=tmp_path / "w.pth", weights_prefix=typed, device="cpu"
        )
        assert_close(backbone(PIXELS), embeddings(network(TIMM, seed)))
        assert backbone.provenance.as_dict()["prefix"] == prefix


def test_prefix_is_recorded_only_if_asked_for(tmp_path: Path) -> None:
    torch.save(under("net.", network(TIMM).state_dict()), tmp_path / "w.pth")
    made = load_backbone(TIMM, weights=tmp_path / "w.pth", device="cpu").provenance
    assert "prefix" not in made.as_dict()


def test_copy_under_a_usual_prefix_is_taken_and_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"state_dict": copies("model.", "ema_model.")}, tmp_path / "w.pth")
    assert_close(loaded(TIMM, tmp_path / "w.pth"), embeddings(network(TIMM, TEACHER)))
    assert (
        "the file also holds this network under ema_model.; choose with --weights-prefix"
        in caplog.messages
    )


def test_copy_of_the_right_shapes_is_taken(tmp_path: Path) -> None:
    """A student and a larger teacher of the same names are not two copies of one network."""
    trained = network(TIMM)
    larger = {
        key: torch.cat([value, value]) if value.ndim else value
        for key, value in trained.state_dict().items()
    }
    state = under("teacher.", larger) | under("student.", trained.state_dict())
    torch.save(state, tmp_path / "w.pth")
    assert_close(loaded(TIMM, tmp_path / "w.pth"), embeddings(trained))


def test_unknown_prefix_lists_what_names_begin_with(tmp_path: Path) -> None:
    torch.save(copies("teacher.", "student."), tmp_path / "w.pth")
    match = r"no tensors under 'nope\.'; its names begin with student\., teacher\.$"
    with pytest.raises(WeightsError, match=match):
        load_backbone(TIMM, weights=tmp_path / "w.pth", weights_prefix="nope", device="cpu")


@pytest.mark.parametrize("prefix", ["", ".", ".."])
def test_empty_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ExtractorError, match=r"weights prefix: got an empty one"):
        load_backbone(TIMM, weights_prefix=prefix, device="cpu")


def test_random_weights_reject_a_weights_prefix() -> None:
    with pytest.raises(ExtractorError, match=r"weights prefix: random weights have none"):
        load_backbone(TIMM, weights="random", weights_prefix="net.", device="cpu")


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_counters_of_profilers_are_passed_over(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = network(TIMM)
    state = dict(trained.state_dict())
    modules = ["", *(f"{name}." for name, _ in trained.named_modules() if name)]
    for module in modules:
        for counter in ("total_ops", "total_params"):
            state[module + counter] = torch.zeros(1, dtype=torch.float64)
    torch.save(under(prefix, state), tmp_path / "w.pth")
    assert_close(loaded(TIMM, tmp_path / "w.pth"), embeddings(trained))
    assert f"w.pth: passed over {2 * len(modules)} counters of a profiler" in caplog.messages


def test_network_inside_a_removed_head_is_no_copy() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    state = module.state_dict()
    inside = {"head.0.weight": noise(2, 2), "head.0.bias": noise(2)}
    load_into(module, {**state, **inside}, discarded=["head"], label="a into b")
    assert torch.equal(module[0].weight, state["0.weight"])


# ---------------------------------------------------------------------------------------------
# Several state dicts in one file


@pytest.fixture
def averaged(tmp_path: Path) -> tuple[Path, nn.Module, nn.Module]:
    """A checkpoint, the network of its ``model`` and that of its ``model_ema``."""
    plain, ema = network(TIMM), network(TIMM, seed=4)
    content = {
        "model": plain.state_dict(),
        "model_ema": under("module.", ema.state_dict()),
        "nested": {"teacher": {"state_dict": ema.state_dict()}, "epoch": 3},
        "a.b": ema.state_dict(),
    }
    torch.save(content, tmp_path / "w.pth")
    return tmp_path / "w.pth", plain, ema


def test_unused_averaged_weights_are_announced(
    averaged: tuple[Path, nn.Module, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    path, plain, _ = averaged
    assert_close(loaded(TIMM, path), embeddings(plain))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "took model; it also holds averaged weights, use --weights-key model_ema" in message


@pytest.mark.parametrize("key", ["model_ema", "nested.teacher", "nested.teacher.state_dict", "a.b"])
def test_weights_key_selects_a_state_dict(
    key: str, averaged: tuple[Path, nn.Module, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    path, _, ema = averaged
    assert_close(loaded(TIMM, path, key), embeddings(ema))
    assert caplog.records == []
    made = load_backbone(TIMM, weights=path, weights_key=key, device="cpu").provenance
    assert (made.key, made.source) == (key, "w.pth")


@pytest.mark.parametrize("key", ["nope", "nested.nope", "nested.epoch", "model.fc.weight"])
def test_unknown_weights_key_lists_the_known_ones(
    key: str, averaged: tuple[Path, nn.Module, nn.Module]
) -> None:
    match = (
        rf"no state dict under '{key}'; choose one of model, model_ema, a\.b, "
        r"nested\.teacher\.state_dict with --weights-key"
    )
    with pytest.raises(WeightsError, match=match):
        loaded(TIMM, averaged[0], key)


# Where trainers put the averaged weights when they do not lie right under a key of their own, and
# what is beside them there.
DEEP: dict[str, Callable[[Tensors, Tensors], tuple[str, object]]] = {
    "module": lambda plain, ema: ("ema.module", {"model": plain, "ema": {"module": ema}}),
    "counts": lambda plain, ema: (
        "ema.shadow",
        {"model": plain, "ema": {"decay": torch.tensor(0.99), "updates": 3, "shadow": ema}},
    ),
    "below a key": lambda plain, ema: (
        "net.ema.module",
        {"net": {"model": plain, "ema": {"module": ema}}, "optimizer": {"state": {0: ema}}},
    ),
    "dots": lambda plain, ema: ("ema.a.b", {"state_dict": plain, "ema": {"a.b": ema}}),
    "state_dict": lambda plain, ema: (
        "ema.state_dict",
        {"model": plain, "ema": {"state_dict": ema}},
    ),
}


@pytest.mark.parametrize("layout", DEEP)
def test_announced_key_selects_averaged_weights(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, ema = network(TIMM), network(TIMM, seed=4)
    key, content = DEEP[layout](plain.state_dict(), ema.state_dict())
    torch.save(content, tmp_path / "w.pth")
    outer = "net" if layout == "below a key" else None
    assert_close(loaded(TIMM, tmp_path / "w.pth", outer), embeddings(plain))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith(f"it also holds averaged weights, use --weights-key {key} for them")
    assert_close(loaded(TIMM, tmp_path / "w.pth", key), embeddings(ema))


def test_averaged_metrics_are_not_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"model": network(TIMM).state_dict(), "ema": {"decay": torch.tensor(0.99)}}
    torch.save(content, tmp_path / "w.pth")
    loaded(TIMM, tmp_path / "w.pth")
    assert caplog.records == []


@pytest.mark.parametrize("key", ["ema", "run.ema", None])
def test_error_lists_full_names_of_state_dicts(key: str | None, tmp_path: Path) -> None:
    state = network(TIMM).state_dict()
    inner = {"ema": {"module": state, "other": {"b": state}, "epoch": 3}}
    torch.save({"run": inner} if key == "run.ema" else inner, tmp_path / "w.pth")
    top = "run.ema" if key == "run.ema" else "ema"
    names = [f"{top}.module", f"{top}.other.b"]
    match = rf"holds no tensors by name.*; choose one of {', '.join(names)} with --weights-key"
    with pytest.raises(WeightsError, match=match):
        loaded(TIMM, tmp_path / "w.pth", key)
    for name in names:
        assert loaded(TIMM, tmp_path / "w.pth", name).shape == (2, 96)


def test_weights_key_with_many_dots_is_fast(tmp_path: Path) -> None:
    torch.save({"a": {"b": {"c": noise(2)}}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"under 'a\.a.*; choose one of a\.b with"):
        read_checkpoint(tmp_path / "w.pth", ".".join("a" * 200))


def test_error_lists_networks_of_checkpoint(tmp_path: Path) -> None:
    state = network(TIMM).state_dict()
    torch.save({"student": state, "teacher": state, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="choose one of student, teacher with --weights-key"):
        loaded(TIMM, tmp_path / "w.pth")
    assert loaded(TIMM, tmp_path / "w.pth", "teacher").shape == (2, 96)


def test_random_weights_reject_a_weights_key() -> None:
    with pytest.raises(ExtractorError, match=r"weights.key"):
        load_backbone(TIMM, weights="random", weights_key="model_ema", device="cpu")


# ---------------------------------------------------------------------------------------------
# What is refused


class Bomb:
    """Unpickling this makes a file: code that came with a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["beside", "whole", "args", "in the state dict"])
def test_code_in_a_checkpoint_is_named_and_does_not_run(
    where: str, zipped: bool, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    state = network(TIMM).state_dict()
    content: object = {
        "beside": {"state_dict": state, "hook": Bomb(ran)},
        "whole": Bomb(ran),
        "args": {"state_dict": state, "args": argparse.Namespace(hook=Bomb(ran))},
        "in the state dict": {**state, "fc.weight": Bomb(ran)},
    }[where]
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        WeightsError, match=r"w\.pth is refused: it holds more than tensors \(posix\.system\).*code"
    ):
        loaded(TIMM, tmp_path / "w.pth")
    assert not ran.exists()
    pickle.loads(pickle.dumps(Bomb(ran)))  # it would have
    assert ran.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_plain_pickle_does_not_run(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol))
    with pytest.raises(WeightsError, match=r"w\.pth is (refused|not a checkpoint).* code"):
        loaded(TIMM, tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_pickled_module_is_refused_with_its_class(tmp_path: Path) -> None:
    torch.save(network(TIMM), tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=r"refused.*timm\.models\.resnet\.ResNet.*torch\.save\(model\.state_dict"
    ):
        loaded(TIMM, tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(WeightsError, match=r"refused: it is a TorchScript archive.*holds code"):
        loaded(TIMM, tmp_path / "w.pt")


def zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes/readme.txt", "no weights")


def half_a_checkpoint(path: Path) -> None:
    torch.save(network(TIMM).state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_of_safetensors(path: Path) -> None:
    save_file(network(TIMM).state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("write", [zip_of_text, half_a_checkpoint, half_of_safetensors, Path.touch])
def test_incomplete_checkpoint_is_refused(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"is not a checkpoint that can be read.*expected a"):
        loaded(TIMM, tmp_path / "w.pth")


# ---------------------------------------------------------------------------------------------
# Weights of another model


def shapes(name: str) -> dict[str, torch.Size]:
    state = timm.create_model(name).state_dict()
    return {
        key: value.shape
        for key, value in state.items()
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_misfit_error_names_the_right_model(prefix: str, tmp_path: Path) -> None:
    torch.save(under(prefix, timm.create_model("resnet10t").state_dict()), tmp_path / "w.pth")
    with pytest.raises(MisfitError, match="the weights do not fit") as raised:
        loaded("resnet18", tmp_path / "w.pth")
    message = str(raised.value)
    given, wanted = shapes("resnet10t"), shapes("resnet18")
    missing = sorted(wanted.keys() - given.keys())
    assert (
        f"{len(missing)} missing: {', '.join(missing[:5])}, and {len(missing) - 5} more" in message
    )
    assert "unexpected: conv1.0.weight, " in message
    misshapen = [key for key in wanted if key in given and given[key] != wanted[key]]
    assert f"{len(misshapen)} of another shape: " in message
    for key in misshapen[:5]:
        assert f"{key} {tuple(given[key])} instead of {tuple(wanted[key])}" in message
    assert message.endswith("They are those of timm:resnet10t: use --model with that name")


@pytest.mark.parametrize(("model", "right"), [(TIMM, TORCHVISION), (TORCHVISION, TIMM)])
def test_misfit_error_recognizes_the_other_library(model: str, right: str, tmp_path: Path) -> None:
    torch.save({"state_dict": network(right).state_dict()}, tmp_path / "w.pth")
    with pytest.raises(MisfitError, match=rf"They are those of {right}: use --model"):
        loaded(model, tmp_path / "w.pth")


def test_misfit_error_recognizes_fine_tuned_model(tmp_path: Path) -> None:
    torch.save(other_classes(network(TIMM).state_dict()), tmp_path / "w.pth")
    with pytest.raises(MisfitError, match=rf"They are those of {TIMM}: use --model"):
        loaded(TORCHVISION, tmp_path / "w.pth")


def test_unknown_weights_cause_advice_to_check(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "w.pth")
    with pytest.raises(MisfitError, match=r"2 unexpected: bias, weight\. Check that they were"):
        loaded(TIMM, tmp_path / "w.pth")


def test_broken_values_do_not_suggest_the_same_model(tmp_path: Path) -> None:
    state = network(TIMM).state_dict()
    state["conv1.0.weight"] = state["conv1.0.weight"] * torch.nan
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(MisfitError, match=r"1 with NaN or infinity: conv1\.0\.weight") as raised:
        loaded(TIMM, tmp_path / "w.pth")
    assert "They are those of" not in str(raised.value)


def infinite(value: torch.Tensor) -> torch.Tensor:
    return value * torch.inf


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.int8)


def complex_(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.complex64)


def empty(value: torch.Tensor) -> torch.Tensor:
    return value.to("meta")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (infinite, r"1 with NaN or infinity: conv1\.weight"),
        (whole, r"1 without fractions: conv1\.weight torch\.int8"),
        (complex_, r"1 without fractions: conv1\.weight torch\.complex64"),
        (empty, r"1 without values: conv1\.weight"),
        (torch.Tensor.to_sparse, r"1 sparse: conv1\.weight torch\.sparse_coo"),
    ],
)
def test_wrong_values_suggest_no_other_model(
    spoil: Callable[[torch.Tensor], torch.Tensor], match: str, tmp_path: Path
) -> None:
    state = torchvision.models.resnet18().state_dict()  # timm's has the same names and shapes
    state["conv1.weight"] = spoil(state["conv1.weight"])
    torch.save(state, tmp_path / "w.pth")
    match += r"\. Names and shapes are right: check how these values were made$"
    for model in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(MisfitError, match=match):
            load_backbone(model, weights=tmp_path / "w.pth", device="cpu")


# ---------------------------------------------------------------------------------------------
# Reading and fitting, without a model


def test_checkpoint_with_code_is_refused_without_running_it(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hook": Bomb(ran)}, tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=r"refused: it holds more than tensors \(posix\.system\), .* run code"
    ):
        read_checkpoint(tmp_path / "w.pth")
    assert not ran.exists()


def test_plain_pickle_is_refused_without_running_it(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Bomb(ran)))
    with pytest.raises(WeightsError, match=r"w\.pth"):
        read_checkpoint(tmp_path / "w.pth")
    assert not ran.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_other_files_are_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"is not a checkpoint(: it is text| that can be read)"):
        read_checkpoint(path)


def test_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(nn.Linear(30, 40).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(WeightsError, match="not a checkpoint that"):
        read_checkpoint(path)


def torn(whole: bytes, damage: str) -> bytes:
    half = len(whole) // 2 // 4096 * 4096
    return {
        "cut": whole[:half],
        "ten bytes short": whole[:-10],
        "rest not written": whole[:half] + bytes(len(whole) - half),
        "longer": whole + b"more",
    }[damage]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "it is truncated, its header describes {size:,} bytes and the file has {half:,};"),
        ("ten bytes short", "its header describes {size:,} bytes and the file has {short:,};"),
        ("rest not written", "its last {rest:,} bytes are zero, they were never written;"),
        ("longer", "4 bytes follow the {size:,} that its header describes;"),
    ],
)
def test_torn_safetensors_are_refused_with_the_bytes(
    damage: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": noise(70, 70), "b": noise(70, 70)}, path)
    whole = path.read_bytes()
    path.write_bytes(torn(whole, damage))
    size, half = len(whole), len(whole) // 2 // 4096 * 4096
    expected = message.format(size=size, half=half, short=size - 10, rest=size - half)
    with pytest.raises(WeightsError, match=re.escape(expected) + " expected a whole file, copy or"):
        read_checkpoint(path)


def test_header_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"layer{i}": noise(2) for i in range(9)}, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(WeightsError, match=r"truncated, its header alone takes [\d,]+ bytes and"):
        read_checkpoint(path)


def test_tensors_of_zeros_are_whole(tmp_path: Path) -> None:
    """Zeros at the end are nothing odd: a new head, or an output channel that was pruned."""
    path = tmp_path / "w.safetensors"
    save_file({"a": noise(70, 70), "b": torch.zeros(70, 70)}, path)
    assert not read_checkpoint(path)["b"].any()
    pruned = noise(70, 70)
    pruned[20:] = 0
    save_file({"a": noise(70, 70), "b": pruned}, path)
    assert torch.equal(read_checkpoint(path)["b"], pruned)


@pytest.mark.parametrize(
    ("zipped", "damage", "message"),
    [
        (True, "cut", "the end of its zip archive is missing, it is truncated or damaged;"),
        (True, "ten bytes short", "the end of its zip archive is missing, it is truncated or"),
        (True, "rest not written", "the end of its zip archive is missing, it is truncated or"),
        (False, "cut", r"it is truncated, [\d,]+ bytes are missing;"),
        (False, "ten bytes short", "it is truncated, 10 bytes are missing;"),
        (False, "rest not written", "a part of it is damaged or missing;"),
    ],
)
def test_torn_checkpoint_is_refused_in_a_sentence(
    zipped: bool, damage: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    state = {"a": noise(70, 70), "b": noise(70, 70)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(torn(path.read_bytes(), damage))
    with pytest.raises(
        WeightsError, match=f"w.pth is not a checkpoint that can be read: {message}"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, torch.zeros(2)])
def test_checkpoint_without_named_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds no tensors by name"):
        read_checkpoint(tmp_path / "w.pth")


def test_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot read weights"):
        read_checkpoint(tmp_path)


def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    for path in (tmp_path / "w.pth", Path(os.devnull)):
        with pytest.raises(WeightsError, match=f"cannot read weights {path}: not a regular file"):
            read_checkpoint(path)


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
def test_text_instead_of_weights_is_described(
    content: bytes, match: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=match) as raised:
        read_checkpoint(path)
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
def test_errors_never_advise_running_code(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.pth is (refused|not a checkpoint)") as raised:
        read_checkpoint(tmp_path / "w.pth")
    for advice in ("weights_only", "safe_globals", "trust", "it is text"):
        assert advice not in str(raised.value)


def test_error_keeps_the_reason_that_torch_gives(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"\x1f\x8b\x08 gzip")
    with pytest.raises(
        WeightsError, match=r"code \(UnpicklingError: Unsupported operand 31\); exp"
    ):
        read_checkpoint(tmp_path / "w.pth")
    assert (
        checkpoint._reason(RuntimeError("Cannot use ``weights_only=True`` with")) == "RuntimeError"
    )


def test_misfit_error_lists_names_and_shapes() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = module.state_dict()
    state["0.weight"] = torch.zeros(5, 2)
    state["other.weight"] = torch.zeros(1)
    del state["1.bias"]
    with pytest.raises(WeightsError, match="do not fit") as raised:
        load_into(module, state, discarded=["head"], label="a into b")
    assert str(raised.value) == (
        "a into b: the weights do not fit. 1 missing: 1.bias; 1 unexpected: other.weight; "
        "1 of another shape: 0.weight (5, 2) instead of (3, 2)"
    )


def test_misfit_error_counts_all_and_shows_the_first() -> None:
    state = {f"key{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(WeightsError, match=r"9 unexpected: key0, key1, key2, key3, key4, and 4 m"):
        load_into(nn.Identity(), state, discarded=[], label="a into b")


def test_head_keys_and_training_counters_are_optional() -> None:
    module = nn.BatchNorm1d(2)
    wanted = {"weight": torch.tensor([1.0, 2.0]), "bias": torch.ones(2)}
    wanted |= {"running_mean": torch.zeros(2), "running_var": torch.ones(2)}
    parent = nn.Sequential(module)
    state = {f"0.{key}": value for key, value in wanted.items()}
    state["head.fc.weight"] = torch.zeros(9, 9)
    load_into(parent, state, discarded=["head.fc"], label="a into b")
    assert module.weight.tolist() == [1, 2]
    with pytest.raises(WeightsError, match=r"1 unexpected: headless\.weight"):
        load_into(
            parent, {**state, "headless.weight": torch.zeros(1)}, discarded=["head"], label="a"
        )


def test_quantized_and_broken_weights_are_refused() -> None:
    state = {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.tensor([0.0, torch.nan])}
    with pytest.raises(
        WeightsError,
        match=r"1 without fractions: weight torch\.int8; 1 with NaN or infinity: bias",
    ):
        load_into(nn.Linear(2, 2), state, discarded=[], label="a into b")


def test_misfit_error_separates_names_from_values() -> None:
    right = nn.Linear(2, 2).state_dict()
    for state, foreign in (
        ({**right, "bias": torch.full((2,), torch.nan)}, False),
        ({**right, "bias": torch.ones(2, dtype=torch.complex64)}, False),
        ({**right, "bias": torch.ones(2, device="meta")}, False),
        ({"weight": right["weight"]}, True),
        ({**right, "more": torch.ones(2)}, True),
        ({**right, "bias": torch.full((3,), torch.nan)}, True),
    ):
        with pytest.raises(MisfitError, match="do not fit") as raised:
            load_into(nn.Linear(2, 2), state, discarded=[], label="a into b")
        assert raised.value.foreign is foreign


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Validating sparse tensor")
def test_meta_and_sparse_weights_are_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = module.state_dict()
    state["0.weight"] = state["0.weight"].to_sparse()
    state["1.weight"] = state["1.weight"].to_sparse_csr()
    state["1.bias"] = torch.zeros(4, device="meta")
    state["2.num_batches_tracked"] = state["2.num_batches_tracked"].to("meta")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="do not fit") as raised:
        load_into(module, read_checkpoint(tmp_path / "w.pth"), discarded=[], label="a into b")
    assert str(raised.value) == (
        "a into b: the weights do not fit. 2 without values: 1.bias, 2.num_batches_tracked; "
        "2 sparse: 0.weight torch.sparse_coo, 1.weight torch.sparse_csr"
    )


@pytest.mark.filterwarnings("ignore:.*quantize", "ignore:TypedStorage")
def test_torch_quantized_tensors_are_refused(tmp_path: Path) -> None:
    weight = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    torch.save({"weight": weight, "bias": torch.zeros(2)}, tmp_path / "w.pth")
    state = read_checkpoint(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 without fractions: weight torch\.qint8$"):
        load_into(nn.Linear(2, 2), state, discarded=[], label="a into b")


def test_misfit_is_pickled_without_its_tensors() -> None:
    error = MisfitError("the weights do not fit", {"a": torch.zeros(10_000)})
    content = pickle.dumps(error)
    assert len(content) < 1_000
    again = pickle.loads(content)
    assert (type(again), str(again)) == (WeightsError, "the weights do not fit")
