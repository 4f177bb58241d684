from __future__ import annotations

from pathlib import Path

import pytest
from support.networks import mean_pixel

from extractor import FeatureStore
from extractor.cli import environment
from extractor.cli import extract as run
from extractor.cli import main as cli
from extractor.errors import UsageError
from extractor.models import embedding


def parsed(words: list[str], **variables: str) -> dict[str, object]:
    return vars(environment.parse(run.build_parser(), words, variables))


def test_every_flag_can_stand_in_the_environment() -> None:
    plain = parsed(["a"])
    for action in run.build_parser()._actions:
        if action.dest in ("help", "version", "inputs"):
            continue
        (long,) = [option for option in action.option_strings if option.startswith("--")]
        typed = {"layers": "a.b,c", "mean": "0.1,0.2,0.3", "std": "0.1,0.2,0.3"}
        kinds = {int: "7", float: "0.25"}
        value = typed.get(action.dest) or kinds.get(action.type, "64")  # type: ignore[arg-type]
        if action.choices:
            value = str(list(action.choices)[-1])
        if action.nargs == 0:
            value = "1"
        variable = "EXTRACTOR_" + long[2:].upper().replace("-", "_")
        changed = parsed(["a"], **{variable: value})
        differ = {name for name in plain if plain[name] != changed[name]}
        assert differ == {action.dest}, variable


def test_what_is_typed_comes_first() -> None:
    variables = {"EXTRACTOR_BATCH_SIZE": "8", "EXTRACTOR_MODEL": "a,b", "EXTRACTOR_POOL": "max"}
    both = parsed(["x", "-b", "3", "-m", "c"], **variables)
    assert (both["batch_size"], both["model"], both["pool"]) == (3, ["c"], "max")
    assert parsed(["x"], **variables)["model"] == ["a", "b"]


@pytest.mark.parametrize("text", ["0", "false", "no", "off", "", "OFF"])
def test_a_flag_without_a_value_can_be_off(text: str) -> None:
    assert parsed(["x"], EXTRACTOR_NORMALIZE=text)["normalize"] is False


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("BATCH_SIZE", "many"),
        ("NORMALIZE", "perhaps"),
        ("DTYPE", "float64"),
        ("IMAGE_SIZE", "big"),
        ("MEAN", "1,2"),
        ("MAX_FAILURE_RATE", "1%"),
    ],
)
def test_a_value_that_no_flag_takes_is_wrong_usage(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"EXTRACTOR_{name}: got '{text}'"):
        parsed(["x"], **{f"EXTRACTOR_{name}": text})


def test_an_empty_variable_is_none(tmp_path: Path) -> None:
    assert parsed(["x"], EXTRACTOR_MAX_FAILURE_RATE="", EXTRACTOR_OUT="", EXTRACTOR_LAYER="") == (
        parsed(["x"])
    )


def test_a_variable_that_is_no_flag_is_told(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_, **__: mean_pixel())
    monkeypatch.setenv("EXTRACTOR_BACTH_SIZE", "3")
    monkeypatch.setenv("EXTRACTOR_TEST_SOMETHING", "3")
    assert cli.main([str(photos), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == (
        "extract: warning: EXTRACTOR_BACTH_SIZE is no flag; did you mean EXTRACTOR_BATCH_SIZE?\n"
    )


def test_the_command_heeds_the_environment(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_, **__: mean_pixel())
    monkeypatch.setenv("EXTRACTOR_OUT", str(tmp_path / "there"))
    monkeypatch.setenv("EXTRACTOR_DTYPE", "float16")
    assert cli.main([str(photos)]) == 0
    assert FeatureStore.open(tmp_path / "there").features.dtype == "float16"
    monkeypatch.setenv("EXTRACTOR_DTYPE", "int4")
    assert cli.main([str(photos)]) == 2
