"""Every public name is in the API reference, with an example that runs."""

from __future__ import annotations

import doctest
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import api_reference
import numpy as np
import pytest
import torch
from support.pictures import noise

import extractor
from extractor.models import embedding
from extractor.models import load as load_module
from extractor.options import Options

NAMES = [
    name
    for title, names in api_reference.GROUPS.items()
    if title != "Errors"
    for name in names
    if hasattr(extractor, name)
]


def docstrings(name: str) -> dict[str, str]:
    """Docstrings of a public name and its public members."""
    value = getattr(extractor, name)
    found = {name: inspect.getdoc(value) or ""}
    for member_name, member in api_reference.documented_members(value):
        function = api_reference._function(member)
        found[f"{name}.{member_name}"] = inspect.getdoc(function) or ""
    return found


def random_weights(load: Callable[..., Any]) -> Callable[..., Any]:
    """Load every model with random weights, which need no download."""

    @functools.wraps(load)
    def patched(model: str, options: Options, *rest: Any) -> Any:
        return load(model, replace(options, weights="random", precision="float32"), *rest)

    return patched


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``images`` with 12 cats and 13 dogs."""
    folder = tmp_path_factory.mktemp("api")
    names = (
        [f"cats/{i:02d}" for i in range(11)] + ["cats/tom"] + [f"dogs/{i:02d}" for i in range(13)]
    )
    for seed, name in enumerate(names):
        path = folder / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(seed, 32, 40).save(path)
    return folder


@pytest.mark.slow
def test_every_example_of_the_api_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for module in (embedding, load_module):
        monkeypatch.setattr(module, "load", random_weights(module.load))
    names: dict[str, Any] = {
        **{name: getattr(extractor, name) for name in extractor.__all__},
        **{"np": np, "torch": torch, "nn": torch.nn},
    }
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    parser = doctest.DocTestParser()
    ran = 0
    for public in NAMES:
        for name, docstring in docstrings(public).items():
            text = re.sub(r" *# doctest: \+SKIP", "", docstring)
            example = parser.get_doctest(text, names, name, None, None)
            example.globs = names  # examples build on each other
            if example.examples:
                output: list[str] = []
                failures = runner.run(example, out=output.append, clear_globs=False)
                assert not failures.failed, "".join(output)
                ran += 1
    assert ran >= len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example(name: str) -> None:
    assert any(">>>" in docstring for docstring in docstrings(name).values())


def test_every_error_is_in_the_table() -> None:
    errors = {
        name
        for name in extractor.__all__
        if inspect.isclass(getattr(extractor, name))
        and issubclass(getattr(extractor, name), BaseException)
    }
    assert errors == {n for n in api_reference.GROUPS["Errors"] if hasattr(extractor, n)}
    page = api_reference.api_reference()
    for name in errors:
        assert f"| `{name}` | `{getattr(extractor, name).__base__.__name__}` |" in page


def test_public_name_without_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor, "__all__", [*extractor.__all__, "Surprise"])
    with pytest.raises(ValueError, match=r"not in GROUPS .*Surprise"):
        api_reference.api_reference()
