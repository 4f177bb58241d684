"""Networks of the user's own: a module in hand, or a function in a file."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import run_python
from support.networks import MEAN, STD, normalized
from support.pictures import color
from torch import nn

from extractor import Backbone, FeatureStore, extract, load_backbone
from extractor.cli import main as cli
from extractor.errors import ExtractorError, ModelError, StoreError, UsageError, WeightsError
from extractor.models import from_file
from extractor.models.checkpoint import MisfitError
from extractor.preprocess import Preprocess
from extractor.run.recompute import recompute

PREPROCESS = Preprocess((8, 8), "squash", (8, 8), "bilinear", MEAN, STD)

W, BIAS = [[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]], [0.5, -0.5]


def by_hand(i: int) -> list[float]:
    """The embedding of image ``i`` of the photos: its normalized color times W."""
    values = normalized(color(i))
    return [
        sum(w * v for w, v in zip(row, values, strict=True)) + b
        for row, b in zip(W, BIAS, strict=True)
    ]


def linear() -> nn.Linear:
    layer = nn.Linear(3, 2)
    layer.weight.data, layer.bias.data = torch.tensor(W), torch.tensor(BIAS)
    return layer


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(), nn.Linear(2, 5))


def backbone(module: nn.Module, head: Any, preprocess: Preprocess = PREPROCESS) -> Backbone:
    return Backbone.from_module(module, head=head, preprocess=preprocess, device="cpu")


@pytest.fixture(autouse=True)
def own_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a user's file adds to the interpreter goes with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and tmp_path in Path(file).parents:
            del sys.modules[name]


# ---------------------------------------------------------------------------------------------
# A module


def assert_rows_by_hand(store: FeatureStore) -> None:
    expected = {path: by_hand(int(Path(path).stem)) for path in store.paths}
    assert len(expected) == 11
    np.testing.assert_allclose(store.features[:], list(expected.values()), atol=1e-5)


def test_module_embeddings_match_arithmetic(photos: Path, tmp_path: Path) -> None:
    module = classifier()
    state = dict(module.state_dict())
    made = Backbone.from_module(module, head="3", preprocess=PREPROCESS, name="mine", device="cpu")
    report = extract(photos, made, tmp_path / "out", batch_size=4)
    assert (report.rows, report.dim) == (11, 2)
    assert_rows_by_hand(report.store)
    description = report.store.manifest.description
    described = description.backbone
    assert (described["model"], described["library"], described["weights"]) == (
        "module:mine",
        "module",
        "given",
    )
    assert described["heads"] == ["3"]
    assert description.preprocess["input_size"] == [8, 8]
    assert description.preprocess["mean"] == list(MEAN)
    other = Backbone.from_module(classifier(), head="3", preprocess=PREPROCESS, device="cpu")
    assert other.provenance.model == "module:Sequential"
    assert len(described["sha256"]) == 64
    assert described["sha256"] != other.provenance.sha256  # its random head was another
    again = classifier()
    again.load_state_dict(state)
    assert backbone(again, "3").provenance.sha256 == described["sha256"]


def test_module_without_classifier_has_no_heads() -> None:
    made = backbone(classifier()[:3], None)
    assert (made.heads, made.dim) == ((), 2)
    pixels = torch.tensor([[1.0, 2.0, 3.0]])[..., None, None].expand(1, 3, 8, 8)
    assert made(pixels).tolist() == [[1 + 4 + 9 + 0.5, -2 + 3 - 0.5]]


class Distilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = classifier()[:3]
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 5), "b": nn.Linear(2, 5)})

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.body(pixels)
        return (self.heads["a"](features) + self.heads["b"](features)) / 2


def test_several_heads_are_all_replaced() -> None:
    made = backbone(Distilled(), ["heads.a", "heads.b"])
    assert made.heads == ("heads.a", "heads.b")
    pixels = torch.tensor([[1.0, 2.0, 3.0]])[..., None, None].expand(1, 3, 8, 8)
    assert made(pixels).tolist() == [[14.5, 0.5]]


@pytest.mark.parametrize(
    ("head", "match"),
    [
        ("fc", "no module 'fc' in Sequential"),
        (["3", "4"], "no module '4' in Sequential"),
        ("3.weight", r"no module '3\.weight' in Sequential"),
        ("", "the whole model cannot be its own head"),
    ],
)
def test_unknown_head_is_an_error(head: object, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        backbone(classifier(), head)


@pytest.mark.parametrize("head", [5, ["3", 4], b"3", {"3"}, object()])
def test_head_must_be_a_name(head: object) -> None:
    with pytest.raises(UsageError, match=r"head: got .*, expected the dotted name of a module"):
        backbone(classifier(), head)


@pytest.mark.parametrize("preprocess", [None, 224, nn.Identity()])
def test_preprocess_must_be_a_preprocess(preprocess: Any) -> None:
    match = r"preprocess: got .*, expected a Preprocess; try Preprocess\.standard\(224\)"
    module = classifier()
    with pytest.raises(UsageError, match=match):
        backbone(module, "3", preprocess)
    assert isinstance(module[3], nn.Linear)  # it is as it was


@pytest.mark.parametrize("module", [5, None, nn.Linear, "resnet50", torch.zeros(3)])
def test_module_must_be_a_module(module: Any) -> None:
    with pytest.raises(UsageError, match=r"module: got .*, expected a torch\.nn\.Module"):
        backbone(module, None)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_head_cannot_be_replaced() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.Linear(4, 2)).eval()
    pixels = torch.rand(2, 3, 8, 8)
    for script in (torch.jit.script(network), torch.jit.trace(network, pixels)):
        with pytest.raises(UsageError, match="pass the module it was made from"):
            Backbone.from_module(script, head="2", preprocess=PREPROCESS)
        backbone = Backbone.from_module(script, head=None, preprocess=PREPROCESS)
        torch.testing.assert_close(backbone(pixels), network(pixels))


def test_module_that_returns_a_map_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"module:Conv2d returns shape \(4, 6, 6\) for an image, expected"
    ):
        backbone(nn.Conv2d(3, 4, 3), None)


def test_map_with_one_position_is_an_embedding() -> None:
    made = backbone(nn.AdaptiveAvgPool2d(1), None)
    assert made.dim == 3
    assert made(torch.ones(2, 3, 8, 8)).tolist() == [[1, 1, 1]] * 2


def test_module_must_return_a_row_per_image() -> None:
    with pytest.raises(ModelError, match=r"returned .* for 3 images, expected one row per image"):
        backbone(nn.Flatten(0), None)


def test_module_is_tried_at_the_size_of_its_transform() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    assert backbone(module, None).dim == 4
    with pytest.raises(ModelError, match="module:Sequential"):
        backbone(module, None, Preprocess.standard(16))


def test_module_is_frozen_and_in_eval_mode() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), *classifier()).train()
    made = backbone(module, "4")
    assert not any(part.training for part in made.module.modules())
    assert not any(parameter.requires_grad for parameter in made.module.parameters())
    assert module[0].num_batches_tracked == 0


@pytest.mark.parametrize("options", [{"weights": "random"}, {"weights_key": "model_ema"}])
def test_loaded_backbone_rejects_other_weights(
    options: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the backbone already has weights"):
        extract(photos, backbone(classifier(), "3"), tmp_path / "out", **options)


# ---------------------------------------------------------------------------------------------
# A function in a file

CODE = f"""
import sys
import torch
from torch import nn
from extractor import Backbone
from extractor.preprocess import Preprocess

class Net(nn.Sequential):
    pass

def bare():
    layer = nn.Linear(3, 2)
    layer.weight.data, layer.bias.data = torch.tensor({W}), torch.tensor({BIAS})
    return Net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer)

def whole():
    preprocess = Preprocess((8, 8), "squash", (8, 8), "bilinear", {MEAN}, {STD})
    module = nn.Sequential(*bare(), nn.Linear(2, 5))
    return Backbone.from_module(module, head="3", preprocess=preprocess, device="cpu")

def drawn():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))

def a_map():
    return nn.Conv2d(3, 4, 3)

def a_number():
    return 3

def raises():
    return {{}}["nothing"]

def ends():
    sys.exit(0)

not_a_function = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "net.py"
    path.parent.mkdir()
    path.write_text(CODE)
    return path


def load(file: Path, name: str, **options: Any) -> Backbone:
    return load_backbone(f"{file}:{name}", device="cpu", **options)


def test_function_may_return_a_module(file: Path) -> None:
    made = load(file, "bare")
    assert made.preprocess == Preprocess.standard(224)
    pixels = torch.tensor([[1.0, 2.0, 3.0]])[..., None, None].expand(1, 3, 224, 224)
    np.testing.assert_allclose(made(pixels), [[14.5, 0.5]], atol=1e-5)
    provenance = made.provenance
    assert (provenance.model, provenance.library) == ("net.py:bare", "file")
    assert provenance.weights == "given"


def test_running_code_causes_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(file, "bare")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == f"{file}: running the code in this file"


def test_command_accepts_a_function(
    file: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", f"{file}:whole", str(photos), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(words) == 0
    printed = capfd.readouterr()
    assert printed.err == f"extract: warning: {file}: running the code in this file\n"
    assert "net.py:whole" in printed.out
    store = FeatureStore.open(tmp_path / "out")
    assert_rows_by_hand(store)
    described = store.manifest.description.backbone
    assert (described["model"], described["library"], described["heads"]) == (
        "net.py:whole",
        "file",
        ["3"],
    )


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("a_number", "returned 3, expected a Backbone or a torch.nn.Module"),
        ("raises", r"net\.py:raises failed: KeyError: 'nothing' \(.*net\.py, line \d+\)"),
        ("a_map", r"returns shape \(4, 222, 222\) for an image, expected a vector"),
        ("nowhere", "has no function 'nowhere'; it has Net, a_map, a_number, bare, drawn, ends"),
        ("not_a_function", "has no function 'not_a_function'; it has Net, "),
    ],
)
def test_function_must_return_a_network(
    name: str, match: str, file: Path, capsys: pytest.CaptureFixture[str], photos: Path
) -> None:
    with pytest.raises(ModelError, match=match):
        load(file, name)
    assert cli.main(["-m", f"{file}:{name}", str(photos), "-o", str(file.parent / "out")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_function_that_exits_is_an_error(file: Path, photos: Path) -> None:
    with pytest.raises(ModelError, match="SystemExit"):
        load(file, "ends")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("def f(:\n", r"broken\.py failed: SyntaxError: .*\(broken\.py, line 1\)"),
        ("\n1 / 0\n", r"broken\.py failed: ZeroDivisionError: .*broken\.py, line 2\)"),
        ("import no_such_module\n", r"failed: ModuleNotFoundError: No module named 'no_such_mod"),
        ("", r"broken\.py has no function 'f'; it has no functions"),
    ],
)
def test_failing_file_is_reported(content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(ModelError, match=match):
        load(tmp_path / "broken.py", "f")


def test_missing_file_runs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ModelError, match=r"there is no file .*nowhere\.py"):
        load(tmp_path / "nowhere.py", "f")
    assert caplog.records == []


def beside(folder: Path, width: int) -> Path:
    """A file that takes the width of its embeddings from the file ``width_beside`` beside it."""
    folder.mkdir()
    (folder / "width_beside.py").write_text(f"WIDTH = {width}\n")
    (folder / "net.py").write_text(
        "from torch import nn\nfrom width_beside import WIDTH\n"
        "def f(): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, WIDTH))"
    )
    return folder / "net.py"


def test_file_imports_from_its_own_folder(tmp_path: Path, monkeypatch: Any) -> None:
    assert load(beside(tmp_path / "a", 5), "f").dim == 5
    monkeypatch.chdir(tmp_path / "a")
    assert load(Path("net.py"), "f").dim == 5


def test_two_files_import_from_their_own_folders(tmp_path: Path) -> None:
    first, second = beside(tmp_path / "a", 5), beside(tmp_path / "b", 6)
    assert (load(first, "f").dim, load(second, "f").dim) == (5, 6)


def test_two_stores_must_not_share_a_name(tmp_path: Path, photos: Path) -> None:
    models = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(CODE)
        models.append(f"{tmp_path / folder}/net.py:whole")
    with pytest.raises(UsageError, match=r"net\.py-whole"):
        extract(photos, models, tmp_path / "out", device="cpu")


def test_plus_sign_in_a_folder_joins_no_models(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "c++").mkdir()
    (tmp_path / "c++" / "net.py").write_text(CODE)
    model = f"{tmp_path}/c++/net.py:whole"
    assert extract(photos, model, tmp_path / "out", device="cpu").rows == 11


@pytest.mark.parametrize("name", ["bare", "whole"])
def test_function_accepts_a_weights_file(name: str, file: Path, tmp_path: Path) -> None:
    state = {
        "module.2.weight": torch.tensor([[1.0, 0, 0], [0, 0, 2]]),
        "module.2.bias": torch.ones(2),
    }
    if name == "whole":
        state |= {"module.3.weight": torch.zeros(9, 2), "module.3.bias": torch.zeros(9)}
    torch.save({"ema": state}, tmp_path / "w.pth")
    made = load(file, name, weights=tmp_path / "w.pth", weights_key="ema")
    pixels = torch.tensor([[1.0, 2.0, 3.0]])[..., None, None].expand(1, 3, 8, 8)
    np.testing.assert_allclose(made(pixels), [[2, 7]], atol=1e-5)
    described = made.provenance
    assert (described.weights, described.source, described.key) == ("file", "w.pth", "ema")
    assert described.sha256 == hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()


def test_weights_must_fit_the_function(file: Path, tmp_path: Path) -> None:
    torch.save({"2.weight": torch.zeros(4, 3), "2.bias": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(
        MisfitError, match=r"into .*net\.py:bare: .*1 of another shape: 2\.weight \(4, 3\) instead"
    ):
        load(file, "bare", weights=tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no such file"):
        load(file, "bare", weights=tmp_path / "nowhere.pth")


@pytest.mark.parametrize("name", ["w.pth", "pipe"])
def test_pipe_as_weights_is_refused_without_waiting(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(name)
    for model in (f"{file}:bare", "resnet18", "torchvision:resnet18"):
        for path in (name, str(tmp_path / name), os.devnull):
            with pytest.raises(WeightsError, match=f"weights {path}: not a regular file"):
                load_backbone(model, weights=path, device="cpu")


def test_folder_named_like_a_tag_does_not_hide_the_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nosuch").mkdir()
    with pytest.raises(WeightsError, match="unknown weights 'nosuch'"):
        load_backbone("resnet18", weights="nosuch", device="cpu")


@pytest.mark.parametrize("weights", ["random", "a1_in1k"])
def test_function_rejects_random_weights_and_tags(weights: str, file: Path) -> None:
    with pytest.raises(UsageError, match="makes its own weights"):
        load(file, "bare", weights=weights)


def test_weights_key_needs_a_file(file: Path) -> None:
    with pytest.raises(ExtractorError, match=r"weights.key"):
        load(file, "bare", weights_key="model_ema")


def test_function_follows_the_seed(file: Path) -> None:
    def digest(seed: int) -> str:
        return load(file, "drawn", seed=seed).provenance.sha256

    assert digest(0) == digest(0) != digest(1)


def test_provenance_records_the_seed_of_a_function(
    file: Path, photos: Path, tmp_path: Path
) -> None:
    assert load(file, "drawn").provenance.seed == 0
    assert load(file, "drawn", seed=7).provenance.seed == 7
    store = extract(
        photos, f"{file}:drawn", tmp_path / "out", seed=7, image_size=8, device="cpu"
    ).store
    assert store.manifest.description.backbone["seed"] == 7
    assert backbone(classifier(), "3").provenance.seed is None  # nothing was seeded here


def test_function_accepts_pixel_options(file: Path) -> None:
    made = load(file, "bare", image_size=(32, 64), mean=(0.0, 0.0, 0.0))
    assert made.preprocess.input_size == (32, 64)
    assert made.preprocess.mean == (0, 0, 0)


def test_worker_counts_what_the_program_imported_as_code(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program beside the file of the model imports more than the model does."""
    (file.parent / "of_the_program.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(file.parent)
    importlib.import_module("of_the_program")
    digest = load(file, "bare").provenance.code
    files = from_file.files_of_code([digest, "another"])
    assert files == (str(file), str(file.parent / "of_the_program.py"))
    code = (
        "import sys; from extractor import load_backbone; from extractor.models import from_file\n"
        "from_file.count_as_imported(sys.argv[2:])\n"
        "print(load_backbone(sys.argv[1], device='cpu').provenance.code)\n"
    )
    worker = run_python("-c", code, f"{file}:bare", *files)
    assert worker.stdout == f"{digest}\n", worker.stderr
    alone = run_python("-c", code, f"{file}:bare")
    assert alone.stdout not in (f"{digest}\n", "")


def test_changed_code_counts_as_another_network(file: Path, photos: Path, tmp_path: Path) -> None:
    (file.parent / "beside_it.py").write_text("FACTOR = 1\n")
    text = file.read_text()
    file.write_text(f"from beside_it import FACTOR\n{text}")
    settings: dict[str, Any] = {"image_size": 8, "device": "cpu", "batch_size": 4}
    out = tmp_path / "out"
    made = extract(photos, f"{file}:bare", out, **settings)
    assert extract(photos, f"{file}:bare", out, **settings).resumed == made.rows
    name = f"{file}:bare"
    assert list(recompute(made.store, 3, weights=name, device="cpu")) == []
    with pytest.raises(StoreError, match=r"code of your own; name it with --weights PATH"):
        list(recompute(made.store, 3, device="cpu"))
    (file.parent / "beside_it.py").write_text("FACTOR = 2\n")
    with pytest.raises(StoreError, match=r"backbone.code: .* there, .* now"):
        extract(photos, name, out, **settings)
    with pytest.raises(StoreError, match=r"code of .* changed since the store was made"):
        list(recompute(made.store, 3, weights=name, device="cpu"))
