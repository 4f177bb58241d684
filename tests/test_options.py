from __future__ import annotations

import inspect
import json
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extractor.errors import UsageError
from extractor.flags import SCOPES, Option, options_in
from extractor.option_arguments import BackboneArguments, EmbeddingArguments, OptionArguments
from extractor.options import Options, signature_with_options

ARGUMENTS = {"backbone": BackboneArguments, "images": EmbeddingArguments, "run": OptionArguments}
DECLARED = options_in(Options)


def test_every_field_is_an_option() -> None:
    assert list(DECLARED) == list(Options.__dataclass_fields__)


@pytest.mark.parametrize("scope", SCOPES)
def test_keyword_types_and_signature_follow_the_fields(scope: Any) -> None:
    def function(images: str, **options: Any) -> None: ...

    expected = {name for name, each in DECLARED.items() if each.is_in(scope)}
    assert set(ARGUMENTS[scope].__annotations__) == expected
    shown = signature_with_options(function, scope=scope).parameters
    assert set(shown) == {"images", *expected}
    assert shown["precision"].default == "auto"
    assert shown["precision"].kind is inspect.Parameter.KEYWORD_ONLY


def test_arguments_become_options() -> None:
    options = Options.from_arguments({"weights": Path("a/b.pth"), "batch_size": 3})
    assert options == Options(weights="a/b.pth", batch_size=3)


@pytest.mark.parametrize(
    ("name", "scope", "match"),
    [
        ("batchsize", "run", "unexpected option 'batchsize'; did you mean 'batch_size'?"),
        ("zzz", "run", "unexpected option 'zzz'$"),
        ("overwrite", "images", r"'overwrite' does not apply here, but to extract\(\)"),
        ("workers", "backbone", r"'workers' does not apply here, but to Extractor\(\)"),
    ],
)
def test_an_unknown_name_is_a_type_error_with_a_suggestion(
    name: str, scope: Any, match: str
) -> None:
    with pytest.raises(TypeError, match=match):
        Options.from_arguments({name: 1}, scope=scope)


@pytest.mark.parametrize("each", DECLARED.values(), ids=lambda each: each.name)
def test_a_value_beyond_a_declared_bound_is_a_usage_error(each: Option) -> None:
    flag = each.flag
    beyond: list[Any] = [flag.above, *([] if flag.minimum is None else [flag.minimum - 1])]
    beyond += [] if flag.maximum is None else [flag.maximum + 1]
    beyond += ["nonsense"] if each.choices or each.type in (int, float) else []
    for value in filter(lambda value: value is not None, beyond):
        with pytest.raises(UsageError, match=f"^{each.label}: got .*, expected "):
            Options(**{each.name: value})


def test_default_and_bounds_agree() -> None:
    for each in DECLARED.values():
        each.check(each.default)
        if each.choices and each.default is not None:
            assert each.default in typing.get_args(each.type)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("overwrite", "no", "overwrite: got 'no', expected True or False"),
        ("normalize", 1, "normalize: got 1, expected True or False"),
        ("device", 0, "device: got 0, expected a string"),
        ("weights", 3, "weights: got 3, expected a string"),
    ],
)
def test_a_value_of_another_type_is_a_usage_error(name: str, value: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Options(**{name: value})


def test_numbers_of_numpy_and_lists_become_plain_values() -> None:
    options = Options(batch_size=np.int64(4), image_size=(np.int32(8), 6), mean=[0.5, 0.5, 0.5])  # type: ignore[arg-type]
    assert options == Options(batch_size=4, image_size=(8, 6), mean=(0.5, 0.5, 0.5))
    assert json.dumps([options.batch_size, options.image_size]) == "[4, [8, 6]]"
    assert hash(options) == hash(Options(batch_size=4, image_size=(8, 6), mean=(0.5, 0.5, 0.5)))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"devices": "gpu"}, "devices: got 'gpu', expected all, cpu or numbers of GPUs"),
        ({"devices": ""}, "devices: got '', expected all, cpu or numbers"),
        ({"devices": "0,,1"}, "devices: got '0,,1', expected all, cpu or numbers"),
        ({"devices": "-1"}, "devices: got '-1', expected all, cpu or numbers"),
        ({"devices": "²"}, "devices: got '²', expected all, cpu or numbers"),
        ({"devices": "0,1,0"}, "devices: got GPU 0 more than once; .* try --processes"),
        ({"devices": "0", "device": "cuda:1"}, "leave out one of --devices and --device"),
        ({"devices": "all", "engine": "ray"}, "assigns GPUs to workers; leave out --devices"),
        ({"part": "0/4"}, "part: got 0/4, expected a part from 1/4 to 4/4"),
        ({"part": "5/4"}, "part: got 5/4, expected a part from 1/4 to 4/4"),
        ({"part": "1/0"}, "part: got 1/0, expected at least one part"),
        ({"part": "a/b"}, "part: got 'a/b', expected K/N such as 3/16, or auto"),
        ({"part": "3"}, "part: got '3', expected K/N such as 3/16, or auto"),
        ({"part": "-1/4"}, "part: got '-1/4', expected K/N"),
        ({"part": "1/4", "engine": "ray"}, "leave out --part or --engine ray"),
        ({"part": "1/4", "lock": False}, "parts need file locks .* leave out --no-lock"),
        ({"address": "auto"}, "address: applies to --engine ray only"),
        ({"address": "ray://a:1", "engine": "ray"}, "expected auto or HOST:PORT such as"),
        ({"address": "", "engine": "ray"}, "expected auto or HOST:PORT such as"),
        ({"profile": "a.json", "processes": 2}, "profile: traces one process"),
        ({"profile": "a.json", "devices": "0,1"}, "profile: traces one process"),
        ({"profile": "a.json", "engine": "ray"}, "profile: traces one process"),
    ],
)
def test_options_of_several_workers_that_contradict_are_refused(
    given: dict[str, Any], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        Options(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"devices": "0, 1,3"},
        {"devices": "cpu", "processes": 4},
        {"device": "cuda:1", "processes": 4},
        {"part": "16/16", "processes": 2, "devices": "all"},
        {"part": "auto"},
        {"engine": "ray", "address": "[::1]:6379", "processes": 2, "device": "cuda"},
        {"profile": "a.json", "devices": "0", "processes": 1},
    ],
)
def test_options_of_several_workers_that_fit_are_accepted(given: dict[str, Any]) -> None:
    Options(**given)


def test_none_is_refused_where_it_has_no_meaning() -> None:
    for name, each in DECLARED.items():
        if each.default is None:
            assert getattr(Options(**{name: None}), name) is None
        else:
            with pytest.raises(UsageError, match=f"^{each.label}: got None; leave it out for "):
                Options(**{name: None})


def test_colors_may_be_arrays() -> None:
    mean = np.array([0.5, 0.25, 0.125], np.float32)
    assert Options(mean=mean, std=mean.tolist()).mean == (0.5, 0.25, 0.125)
