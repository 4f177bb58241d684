from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.networks import mean_pixel

from extractor import FeatureStore
from extractor.cli import main as cli
from extractor.errors import UsageError
from extractor.flags import Option
from extractor.models import embedding
from extractor.terminal.parser import command_options, parse


def parsed(words: list[str], **variables: str) -> dict[str, Any]:
    command = parse(words, variables)
    return {**vars(command.own), **vars(command.options)}


OPTIONS = [each for each in command_options() if each.words]
TEXTS = {
    "mean": "0.1,0.2,0.3",
    "scales": "1,0.71",
    "std": "0.1,0.2,0.3",
    "device": "cpu",
    "pool": "gem:4",
    "layers": "a.b,c",
    "gray_bits": "12",
    "part": "3/16",
    "address": "10.0.0.1:6379",
}


def text_for(each: Option) -> str:
    """A value other than the default."""
    if each.choices:
        return each.choices[-1]
    numbers = {bool: "1", int: "7", float: "0.25"}
    return TEXTS.get(each.name) or numbers.get(each.type, "64")


@pytest.mark.parametrize("each", OPTIONS, ids=lambda each: each.name)
def test_every_option_is_read_from_its_variable(each: Option) -> None:
    more = {"EXTRACTOR_LAYER": "a,b"} if each.name in ("pool", "concat") else {}
    more |= {"EXTRACTOR_ENGINE": "ray"} if each.name == "address" else {}
    plain = parsed(["a"], **more)
    changed = parsed(["a"], **more, **{each.variable: text_for(each)})
    assert {name for name in plain if plain[name] != changed[name]} == {each.name}


def test_typed_options_win_over_variables() -> None:
    variables = {"EXTRACTOR_BATCH_SIZE": "8", "EXTRACTOR_MODEL": "a,b", "EXTRACTOR_LAYER": "x"}
    both = parsed(["x", "-b", "3", "-m", "c"], **variables)
    assert (both["batch_size"], both["model"], both["layers"]) == (3, ["c"], ["x"])
    assert parsed(["x"], **variables)["model"] == ["a", "b"]


@pytest.mark.parametrize("text", ["0", "false", "no", "off", "", "OFF"])
def test_a_variable_can_switch_an_option_off(text: str) -> None:
    assert parsed(["x"], EXTRACTOR_NORMALIZE=text)["normalize"] is False


@pytest.mark.parametrize(("text", "lock"), [("1", False), ("0", True)])
def test_a_negative_switch_keeps_its_meaning(text: str, lock: bool) -> None:
    assert parsed(["x"], EXTRACTOR_NO_LOCK=text)["lock"] is lock


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
def test_a_wrong_value_names_the_variable(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"EXTRACTOR_{name}: got '{text}', expected "):
        parsed(["x"], **{f"EXTRACTOR_{name}": text})


def test_an_empty_variable_counts_as_not_set() -> None:
    assert parsed(["x"], EXTRACTOR_MAX_FAILURE_RATE="", EXTRACTOR_OUT="", EXTRACTOR_LAYER="") == (
        parsed(["x"])
    )


def test_a_misspelled_variable_is_a_warning_with_a_suggestion(
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
        "extract: warning: environment variable EXTRACTOR_BACTH_SIZE sets no option; "
        "did you mean EXTRACTOR_BATCH_SIZE?\n"
    )


def test_the_command_reads_the_environment(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "load", lambda *_, **__: mean_pixel())
    monkeypatch.setenv("EXTRACTOR_OUT", str(tmp_path / "there"))
    monkeypatch.setenv("EXTRACTOR_DTYPE", "float16")
    assert cli.main([str(photos)]) == 0
    assert FeatureStore.open(tmp_path / "there").features.dtype == "float16"
    monkeypatch.setenv("EXTRACTOR_DTYPE", "int4")
    assert cli.main([str(photos)]) == 2


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("EXTRACTOR_BATCH_SIZE", "0", "EXTRACTOR_BATCH_SIZE: got 0, expected an integer from 1"),
        ("EXTRACTOR_IMAGE_SIZE", "0", "EXTRACTOR_IMAGE_SIZE: got 0, expected an integer from 1"),
        ("EXTRACTOR_SEED", "x", "EXTRACTOR_SEED: got 'x', expected an integer"),
    ],
)
def test_value_out_of_range_names_its_variable(variable: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["a"], {variable: value})


def test_typed_value_out_of_range_names_no_variable() -> None:
    with pytest.raises(UsageError, match=r"^batch size: got 0"):
        parse(["a", "--batch-size", "0"], {"EXTRACTOR_BATCH_SIZE": "7"})
