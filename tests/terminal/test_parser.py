from __future__ import annotations

import subprocess
import sys

import pytest

from extractor.cli.compare import compare
from extractor.cli.search import search_parser
from extractor.cli.view import view_parser
from extractor.flags import Option
from extractor.options import Options
from extractor.terminal.parser import CommandOptions, build_parser, command_options, parse


def test_a_bare_command_line_holds_the_defaults_of_the_library() -> None:
    command = parse([], {})
    assert command.options == Options()
    assert command.own == CommandOptions()
    assert command.warnings == ()


@pytest.mark.parametrize("each", command_options(), ids=lambda each: each.name)
def test_help_all_names_every_option_and_help_the_common_ones(each: Option) -> None:
    shown = [line.split() for line in build_parser().format_help().splitlines()]
    everything = [line.split() for line in build_parser(show_all=True).format_help().splitlines()]
    word = each.words[-1] if each.words else "INPUT"
    assert any(word in line for line in everything)
    assert any(word in line for line in shown) is not each.flag.advanced


def test_help_shows_about_a_dozen_options() -> None:
    assert 10 <= sum(not each.flag.advanced for each in command_options()) <= 15


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["-b", "x", "a"], "argument -b/--batch-size: got 'x', expected an integer"),
        (["--crop-pct", "x", "a"], "argument --crop-pct: got 'x', expected a number"),
        (["--mean", "1,2", "a"], "argument --mean: got '1,2', expected three numbers"),
        (["--scales", "abc", "a"], "argument --scales: got 'abc', expected numbers such as 1,0.71"),
        (["--augment", "twice", "a"], "argument --augment: invalid choice: 'twice'"),
        (["--precision", "int4", "a"], "argument --precision: invalid choice: 'int4'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_words_that_cannot_be_parsed_are_usage_errors(
    words: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(words, {})
    assert match in capsys.readouterr().err


def test_help_all_is_printed_by_the_command() -> None:
    words = [sys.executable, "-m", "extractor", "--help-all"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "--image-timeout SECONDS" in done.stdout


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["--modle", "resnet50", "a"], "unrecognized arguments: --modle; did you mean --model?"),
        (["--modle=resnet50", "a"], "--modle=resnet50; did you mean --model?"),
        (["--shard-image", "--oot", "a"], "did you mean --shard-images, --out?"),
        (["--xyzxyz", "a"], "unrecognized arguments: --xyzxyz"),
    ],
)
def test_mistyped_option_gets_a_suggestion(
    words: list[str], end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(words, {})
    assert capsys.readouterr().err.rstrip().endswith(end)


def test_an_option_of_the_verb_is_suggested_too(capsys: pytest.CaptureFixture[str]) -> None:
    for words, close in ((["a", "b", "--prob"], "--probe"), (["a", "--modle", "x"], "--model")):
        with pytest.raises(SystemExit, match="2"):
            compare(words)
        error = capsys.readouterr().err
        assert error.startswith("usage: extract compare STORE STORE...")
        assert error.rstrip().endswith(f"did you mean {close}?")


def test_options_may_stand_between_inputs() -> None:
    command = parse(["a", "-b", "4", "b", "--normalize", "c", "--exclude", "x"], {})
    assert command.own.inputs == ["a", "b", "c"]
    assert (command.options.batch_size, command.options.normalize) == (4, True)
    assert list(command.options.exclude) == ["x"]
    assert parse(["-b", "4", "--", "b", "-c"], {}).own.inputs == ["b", "-c"]


def test_options_may_stand_between_a_store_and_queries() -> None:
    words = ["store", "-k", "3", "a.jpg", "--plus", "p", "b.jpg", "--plus", "q"]
    parsed = search_parser().parse_args(words)
    assert (parsed.store, parsed.queries, parsed.k) == ("store", ["a.jpg", "b.jpg"], 3)
    assert parsed.plus == ["p", "q"]
    parsed = view_parser().parse_args(["store", "--no-browser", "other"])
    assert (parsed.store, parsed.other, parsed.no_browser) == ("store", "other", True)


def test_words_too_many_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        view_parser().parse_args(["store", "--no-browser", "other", "third"])
    assert capsys.readouterr().err.rstrip().endswith("unrecognized arguments: third")
