from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.commands import WarmProcess, run_extract, run_python
from support.networks import mean_pixel
from support.stand_ins import stand_in

from extractor import FeatureStore, __version__, errors
from extractor.cli import extract as extract_module
from extractor.cli import main as cli
from extractor.flags import Option
from extractor.models import embedding
from extractor.terminal.parser import command_options

MODEL = ["-m", "torchvision:squeezenet1_1", "--weights", "random", "--device", "cpu"]
SMALL = [*MODEL, "--image-size", "64", "--precision", "float32"]


@pytest.fixture
def mean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_, **__: mean_pixel())


def command(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return run_extract(*words, cwd=cwd, env={**os.environ, **env})


def test_command_fills_a_store_and_prints_a_summary(photos: Path, tmp_path: Path) -> None:
    (photos / "bad.jpg").write_text("text")
    (photos / "notes.txt").write_text("text")
    words = [sys.executable, "-m", "extractor", *MODEL, str(photos)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 3, done.stderr
    assert "RANDOM weights (seed 0)" in done.stderr
    assert "Traceback" not in done.stderr
    for text in (
        "torchvision:squeezenet1_1",
        "11 of 12 images, 512 numbers each",
        "images/s",
        "features/torchvision-squeezenet1_1",
        "skipped       1 file: 1 .txt",
        "bad.jpg: no image format",
    ):
        assert text in done.stdout
    store = FeatureStore.open(tmp_path / "features/torchvision-squeezenet1_1")
    assert len(store) == 11
    plain = np.load(store.path / "features/00000.npy", mmap_mode="r")
    assert plain.shape == (11, 512)


def test_help_version_and_usage_do_not_load_torch() -> None:
    code = (
        "import sys; from extractor.cli import main as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: print(stop.code)\n"
        "heavy = {'torch', 'numpy', 'PIL', 'pyarrow', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for words in (["--help"], ["--version"], [], ["--batch-size", "0", "x"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert f"extract {__version__}" in command("--version").stdout


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        ([], 2, "no input; try: extract images/"),
        (["a", "--list", "b"], 2, "got both INPUT and --list"),
        (["a", "--batch-size", "0"], 2, "batch size: got 0, expected an integer from 1 to"),
        (["a", "--max-failure-rate", "1.5"], 2, "failure rate: got 1.5"),
        (["a", "--max-failure-rate", "nan"], 2, "failure rate: got nan"),
        (["--list", "nowhere.txt"], 1, "cannot read the list nowhere.txt"),
        (["nowhere"], 1, "cannot read .*nowhere: No such file or directory"),
        (["--model", "resnet50", "nowhere"], 1, "cannot read .*nowhere: No such file or"),
        (["info", ""], 2, "got an empty word after info, expected the name of a store"),
        (["compact", "a", "--no-lock", ""], 2, "got an empty word after --no-lock"),
        (["serach", "store", "a.jpg"], 2, "serach: no such .*; did you mean extract search\\?"),
        (["--model", "resnet18", "gone/"], 1, "cannot read .*gone: No such file"),
        (["evalute", "s", "--probe"], 2, "evalute: no such .*; did you mean extract evaluate\\?"),
        (["."], 1, "no images in"),
        (["a", "-o", ""], 2, "out: got an empty name"),
        (["a", "-m", ""], 2, "model: got an empty name"),
    ],
)
def test_error_is_one_sentence_and_an_exit_code(
    words: list[str],
    code: int,
    match: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == code
    printed = capsys.readouterr()
    assert re.search(match, printed.err)
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--precision", "int4", "a"], ["--nonsense"], ["-b", "x", "a"]])
def test_unparsable_words_exit_with_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)


@pytest.mark.usefixtures("mean_model")
@pytest.mark.parametrize(
    ("rate", "code"), [(None, 3), ("0", 3), ("0.08", 3), ("0.0834", 0), ("1", 0)]
)
def test_max_failure_rate_decides_the_exit_code(
    photos: Path, tmp_path: Path, rate: str | None, code: int
) -> None:
    (photos / "bad.jpg").write_text("text")  # one of twelve
    accept = [] if rate is None else ["--max-failure-rate", rate]
    assert cli.main([str(photos), "-o", str(tmp_path / "out"), *accept]) == code
    assert len(FeatureStore.open(tmp_path / "out")) == 11


@pytest.mark.usefixtures("mean_model")
def test_quiet_prints_nothing(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(photos), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("mean_model")
def test_bar_needs_a_terminal(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(photos), "-o", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "11 of 11 images" in printed.out


def test_bar_counts_images_and_failures(photos: Path, tmp_path: Path) -> None:
    (photos / "bad.jpg").write_text("text")
    terminal, side = pty.openpty()
    words = [*SMALL, "-b", "4", str(photos), "-o", str(tmp_path / "out")]
    with WarmProcess(["-m", "extractor", *words], stderr=side) as run:
        os.close(side)
        shown = b""
        while True:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # the other end has gone
                break
            if not piece:
                break
            shown += piece
        assert run.wait(60) == 3
    os.close(terminal)
    assert b"12/12" in shown
    assert b"img/s" in shown
    assert b"failed=1" in shown


@pytest.mark.usefixtures("mean_model")
def test_list_is_read_from_a_file_or_standard_input(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    (tmp_path / "list.txt").write_text("deep/er/01.bmp\n00.png\n\nnowhere.png\n")
    assert cli.main(["--list", str(tmp_path / "list.txt"), "-o", str(tmp_path / "a")]) == 3
    store = FeatureStore.open(tmp_path / "a")
    assert store.paths == ["00.png", "deep/er/01.bmp"]
    (failure,) = store.failures
    assert (failure["path"], failure["error"]) == ("nowhere.png", "unreadable")
    assert "No such file" in failure["message"]

    class Stdin:
        buffer = (tmp_path / "list.txt").open("rb")

    monkeypatch.setattr(sys, "stdin", Stdin())
    assert cli.main(["--list", "-", "-o", str(tmp_path / "b")]) == 3
    assert FeatureStore.open(tmp_path / "b").paths == store.paths


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_signal_saves_the_run_and_a_repeat_resumes(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(300):
        Image.new("RGB", (100, 100), (i % 256, 0, 0)).save(tmp_path / "in" / f"{i}.bmp")
    out = tmp_path / "out"
    words = [*MODEL, "--precision", "float32", str(tmp_path / "in"), "-o", str(out)]
    with WarmProcess(["-m", "extractor", *words]) as run:
        partial = out / ".extractor-partial/features/00000.npy.partial"
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size > 0):
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(number)
        assert run.wait(30) == code
    errors = run.errors()
    assert "Traceback" not in errors
    assert "images saved. Run the same command to resume." in errors
    assert not (out / "store.json").exists()

    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert "resumed       after " in done.stdout
    assert len(FeatureStore.open(out)) == 300


@pytest.mark.usefixtures("mean_model")
def test_unprintable_names_are_escaped(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (photos / os.fsdecode(b"bad\xff\n\x1b[31m.jpg")).write_text("text")
    assert cli.main([str(photos), "-o", str(tmp_path / "out")]) == 3
    printed = capfd.readouterr().out
    assert r"bad\udcff\n\x1b[31m.jpg: no image format" in printed
    (failure,) = [
        json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()
    ]
    assert os.fsencode(failure["path"]) == b"bad\xff\n\x1b[31m.jpg"


def test_bug_prints_its_traceback(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object, **__: object) -> object:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(embedding, "load", broken)
    assert cli.main([str(photos), "-o", str(tmp_path / "out")]) == 1
    assert "please report it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mismatched_torchvision_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = 'RuntimeError("operator torchvision::nms does not exist")'
    stand_in(tmp_path, "torchvision", "0.9.0", f"raise {error}")
    stand_in(tmp_path, "torch", "2.6.0+cu124", "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")
    command = ["-m", "torchvision:resnet18", str(photos), "-o", str(tmp_path / "out")]
    assert cli.main(command) == 1
    errors = capsys.readouterr().err
    assert errors == (
        "extract: torchvision 0.9.0 is installed, expected 0.19 or newer; "
        "try: pip install 'torchvision>=0.19'\n"
    )
    stand_in(tmp_path, "torchvision", "0.20.1", f"raise {error}")
    assert cli.main(command) == 1
    errors = capsys.readouterr().err
    assert errors == (
        "extract: torchvision 0.20.1 cannot be imported (operator torchvision::nms does not "
        "exist): it does not fit torch 2.6.0+cu124, which needs torchvision 0.21; "
        "try: pip install 'torchvision==0.21.*'\n"
    )


@pytest.fixture
def pipe_without_reader() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("reader", ["pipe", "no stdout", "no stderr", "neither", "full"])
def test_closed_or_full_output_is_no_error(
    reader: str, photos: Path, tmp_path: Path, pipe_without_reader: int
) -> None:
    streams: dict[str, Any] = {}
    if reader == "pipe":
        streams = {"stdout": pipe_without_reader}
    if reader in ("no stdout", "neither"):
        streams |= {"stdout": None}
    if reader in ("no stderr", "neither"):
        streams |= {"stderr": None}
    words = ["-m", "extractor", *SMALL, str(photos), "-o", str(tmp_path / "out")]
    with open("/dev/full", "wb") as full:
        if reader == "full":
            streams = {"stdout": full.fileno()}
        done = run_python(*words, **streams)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert ("cannot print the result: No space" in done.stderr) is (reader == "full")
    assert len(FeatureStore.open(tmp_path / "out")) == 11


@pytest.mark.parametrize("words", [[], ["--log-json"]])
def test_broken_standard_error_ends_no_run(words: list[str], photos: Path, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        arguments = ["-m", "extractor", *SMALL, *words, str(photos), "-o", str(tmp_path / "out")]
        done = run_python(*arguments, stderr=full.fileno())
    assert done.returncode == 0
    assert len(FeatureStore.open(tmp_path / "out")) == 11


def test_list_from_closed_standard_input_is_an_error(tmp_path: Path) -> None:
    line = f"{sys.executable} -m extractor --list - -o {tmp_path}/out <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "extract: --list -: standard input is closed\n"


@pytest.mark.parametrize("caches", ["/proc/none", "", "here"])
def test_unwritable_home_is_no_error(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caches: str
) -> None:
    """What is compiled goes where there is room for it, and nothing else depends on it."""
    home = str(tmp_path / "home") if caches == "here" else "/proc/none"
    environment: dict[str, Any] = {
        "HOME": home,
        "XDG_CACHE_HOME": "" if caches == "here" else caches,
    }
    words = [*MODEL, "--image-size", "64", str(photos), "-o", str(tmp_path / "out")]
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    done = command(*words, **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "home/.cache/extractor/compiled").is_dir() is (caches == "here")


def test_unknown_home_leaves_no_folder_called_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user has a number and no name."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    extract_module._keep_compiled()
    assert not list(tmp_path.iterdir())
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.parametrize(
    ("words", "what_now"),
    [
        (["index", "store"], "run it again"),
        (["compare", "a", "b"], "finished batches are saved. Run the same command to resume."),
        (["images"], "finished batches are saved. Run the same command to resume."),
    ],
)
def test_only_an_interrupted_run_claims_to_have_saved_something(
    words: list[str],
    what_now: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object) -> int:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal raises")

    monkeypatch.setattr("extractor.cli.extract.extract", interrupted)
    monkeypatch.setattr("extractor.cli.compare.compare", interrupted)
    monkeypatch.setitem(cli.VERBS, "compare", interrupted)
    monkeypatch.setitem(cli.VERBS, "index", lambda words: interrupted())
    assert cli.main(words) == 130
    assert capsys.readouterr().err == f"extract: interrupted: {what_now}\n"


@pytest.mark.parametrize("words", [["images"], ["verify", "nothing"]])
def test_signal_while_the_last_message_is_written_changes_no_exit_code(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as process() does
    said: list[str] = []

    def say(text: str) -> None:
        signal.raise_signal(signal.SIGTERM)
        said.append(text)

    monkeypatch.setattr(cli, "say", say)
    try:
        assert cli.main(words) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(said) == 1


# ---------------------------------------------------------------------------------------------
# A device that breaks in the middle of a run

BREAKING = """
import pathlib
import torch
from torch import nn

class Tensor:
    def __del__(self):
        pathlib.Path(__file__).with_name("freed").touch()

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.batches = 0

    def forward(self, pixels):
        self.batches += len(pixels) == 4
        broke = pathlib.Path(__file__).with_name("broke")
        if self.batches == 3 and not broke.exists():
            broke.touch()
            tensor = Tensor()
            if pixels.is_cuda:
                torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")].cpu()
            raise RuntimeError("CUDA error: device-side assert triggered")
        return self.fc(pixels.mean((2, 3)))

def network():
    return Network()
"""


@pytest.mark.slow
def test_a_process_ends_before_a_broken_device_is_asked_to_free_memory(
    photos: Path, tmp_path: Path
) -> None:
    assert_ends_by_itself(photos, tmp_path, "cpu")


@pytest.mark.cuda
def test_a_process_ends_by_itself_after_a_gpu_broke(photos: Path, tmp_path: Path) -> None:
    assert_ends_by_itself(photos, tmp_path, "cuda:0")


def assert_ends_by_itself(photos: Path, folder: Path, device: str) -> None:
    """Assert that a run ends with 1 though its device breaks, and that the next one resumes it."""
    (folder / "code").mkdir()
    (folder / "code/breaking.py").write_text(BREAKING, "utf-8")
    model = f"{folder}/code/breaking.py:network"
    words = ["-m", model, "--device", device, "--batch-size", "4", "-o", str(folder / "out")]
    words = [sys.executable, "-m", "extractor", *words, "--precision", "float32", str(photos)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    *_, line = [line for line in done.stderr.splitlines() if line.startswith("extract: ")]
    assert line.startswith(f"extract: {device} does not work: CUDA error: device-side assert")
    assert "terminate called" not in done.stderr
    assert not (folder / "code/freed").exists()
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert len(FeatureStore.open(folder / "out")) == 11
    # The second batch was computed, and not yet collected.
    assert json.loads((folder / "out/run.json").read_bytes())["counts"]["resumed"] == 4


@pytest.mark.parametrize(
    ("error", "is_at_once"), [(errors.DeviceError("broken"), True), (errors.StoreError("x"), False)]
)
def test_only_an_error_of_a_device_ends_the_process_at_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: errors.ExtractorError,
    is_at_once: bool,
) -> None:
    def fail(*_: object) -> int:
        raise error

    ended: list[int] = []
    monkeypatch.setattr("extractor.cli.extract.extract", fail)
    monkeypatch.setattr(cli, "_broken", [])
    monkeypatch.setattr("sys.argv", ["extract", "photos"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("os._exit", ended.append)
    assert cli.process() == 1
    assert ended == [1] * is_at_once
    assert capsys.readouterr().err.startswith(f"extract: {error}")


@pytest.mark.parametrize("each", command_options(), ids=lambda each: each.name)
def test_no_option_is_taken_for_a_mistyped_verb(each: Option) -> None:
    for word in [*each.words, "--help", "--version"]:
        cli._check_first([word])
