"""The command ``extract doctor``."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import run_python
from support.stand_ins import stand_in

import extractor
from extractor.cli import main as cli
from extractor.doctor import children
from extractor.doctor.finding import Finding
from extractor.doctor.packages import TOOLS, check_extras, check_tools
from extractor.images.containers.kinds import KINDS

ROOT = str(Path(extractor.__file__).parent.parent)

FOUND = [
    Finding("numpy", "ok", "2.0", details={"version": "2.0"}),
    Finding("torch", "broken", "torch is not installed", "pip install torch torchvision"),
    Finding("hub", "warning", "no answer", "use cached weights"),
]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    findings = list(FOUND)
    monkeypatch.setattr(children, "examine", lambda out: findings)
    for name in os.environ:
        if name.startswith("EXTRACTOR_"):
            monkeypatch.delenv(name)
    return findings


def test_states_are_aligned_and_advice_ends_the_page(
    found: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out == (
        "ok            numpy           2.0\n"
        "broken        torch           torch is not installed\n"
        "warning       hub             no answer\n"
        "\n"
        "try for torch: pip install torch torchvision\n"
        "try for hub: use cached weights\n"
        "extract cannot run: 1 problem (torch)\n"
    )
    del found[1]
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("\nextract can run\n")


def test_empty_output_folder_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "-o", ""]) == 2
    assert "got an empty word after -o, expected" in capsys.readouterr().err


def test_json_has_every_check(
    found: list[Finding], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXTRACTOR_MODEL", "a secret name")
    monkeypatch.setenv("EXTRACTOR_MODLE", "another secret")
    assert cli.main(["doctor", "--json"]) == 1
    text = capsys.readouterr().out
    page = json.loads(text)
    assert page["ok"] is False
    assert [check["name"] for check in page["checks"][2:]] == ["numpy", "torch", "hub"]
    assert [check["text"] for check in page["checks"][:2]] == [
        "set: EXTRACTOR_MODEL",
        "environment variable EXTRACTOR_MODLE sets no option; did you mean EXTRACTOR_MODEL?",
    ]
    assert "secret" not in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("words", [["info"], ["info", "--json"], ["verify"]])
def test_full_standard_output_ends_with_one(words: list[str]) -> None:
    store = str(Path(__file__).parents[1] / "store" / "golden" / "store")
    with open("/dev/full", "wb") as full:
        done = run_python("-m", "extractor", *words, store, stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == "extract: cannot print the result: No space left on device\n"


def broken_torch(folder: Path) -> Path:
    return stand_in(folder, "torch", "2.6.0", "import os; os.abort()")


def test_interpreter_killed_by_torch_is_told(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(broken_torch(tmp_path)), ROOT])
    done = subprocess.run(
        [sys.executable, "-m", "extractor", "doctor", "--json", "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    page = json.loads(done.stdout)
    checks = {check["name"]: check for check in page["checks"]}
    assert {name for group in children.GROUPS.values() for name in group[1]} <= set(checks)
    assert checks["torch"]["text"] == "ended the interpreter by signal SIGABRT"
    assert checks["timm"]["text"] == "not checked: torch failed"
    states = {name: checks[name]["state"] for name in ("numpy", "pyarrow", "lock", "formats")}
    assert set(states.values()) == {"ok"}
    assert not (tmp_path / "out").exists()


def test_names_of_the_checks_are_those_of_the_formats_with_an_extra() -> None:
    assert children.GROUPS["extras"][1] == tuple(kind.name for kind in KINDS if kind.extra)


@pytest.mark.parametrize(
    ("code", "state", "text"),
    [
        ("", "ok", "decoded by pillow-heif 99.0"),
        ("raise ImportError('libheif.so')", "warning", "pillow-heif 99.0 cannot be imported"),
        (None, "ok", "not decoded; pip install 'backbone-extractor[heif]'"),
    ],
)
def test_broken_decoder_is_a_warning_and_a_missing_one_is_not(
    code: str | None, state: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        stand_in(tmp_path, "pillow_heif", "99.0", code, "pillow-heif")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    found = {each.name: each for each in check_extras("") if isinstance(each, Finding)}
    assert found["HEIC"].state == state
    assert text in found["HEIC"].text


def test_tools_are_the_extras_with_the_versions_of_the_project() -> None:
    assert children.GROUPS["tools"][1] == tuple(TOOLS)
    project = (Path(ROOT) / "pyproject.toml").read_text("utf-8")
    for extra, package in TOOLS.items():
        wanted = re.search(rf'^{extra} = \["(.+?)>=(.+?)"[],]', project, re.MULTILINE)
        assert wanted
        assert wanted.groups() == (package.name, package.minimum)


@pytest.mark.parametrize(
    ("code", "version", "state", "text", "advice"),
    [
        ("", "99.0", "ok", "h5py 99.0", ""),
        (None, "", "ok", "no h5py; pip install 'backbone-extractor[export]'", ""),
        (
            "raise ImportError('libhdf5.so')",
            "99.0",
            "warning",
            "h5py 99.0 cannot be imported (libhdf5.so)",
            "pip install --force-reinstall h5py",
        ),
        (
            "",
            "2.0",
            "warning",
            "h5py 2.0 is installed, expected 3.10 or newer",
            "pip install 'h5py>=3.10'",
        ),
    ],
)
def test_broken_or_old_tool_is_a_warning_and_a_missing_one_is_not(
    code: str | None,
    version: str,
    state: str,
    text: str,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [name for name in TOOLS if name != "export"]
    for name in others:
        monkeypatch.delitem(TOOLS, name)
    if code is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        stand_in(tmp_path, "h5py", version, code, "h5py")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "h5py", raising=False)
    started, finding = check_tools("")
    assert isinstance(finding, Finding)
    assert (started, finding.name) == ("export", "export")
    assert (finding.state, finding.text, finding.advice) == (state, text, advice)
    sys.modules.pop("h5py", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "state", "text"),
    [
        ("numpy", "", "ok", ""),
        ("torchvision", "raise RuntimeError('no operator')", "broken", "it does not fit torch"),
        ("timm", "raise ImportError('none')", "broken", "timm 99.0 cannot be imported (none)"),
    ],
)
def test_one_broken_package_leaves_the_other_checks(
    tmp_path: Path, name: str, code: str, state: str, text: str
) -> None:
    paths = ROOT
    if code:
        paths = f"{stand_in(tmp_path, name, '99.0', code)}{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, "-m", "extractor", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (int(state == "broken"), "")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks[name]["state"] == state
    assert text in checks[name]["text"]
    assert checks["torch"]["state"] == checks["devices"]["state"] == "ok"
    assert checks["devices"]["text"].endswith(", 1 thread)")
    assert checks["extractor"]["state"] == state
