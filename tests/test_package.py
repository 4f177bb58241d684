"""What the package shows, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import extractor


def test_the_public_names_are_the_ones_that_are_meant() -> None:
    assert extractor.__all__ == [
        "Backbone",
        "Extractor",
        "ExtractorError",
        "FeatureStore",
        "Preprocess",
        "Report",
        "__version__",
        "extract",
        "load_backbone",
    ]
    for name in extractor.__all__:
        assert getattr(extractor, name) is not None
    assert set(extractor.__all__) <= set(dir(extractor))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        extractor.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import extractor", {"torch", "numpy", "PIL", "pyarrow", "timm"}),
        ("from extractor import FeatureStore", {"torch", "PIL", "pyarrow", "timm", "torchvision"}),
        ("from extractor import ExtractorError", {"torch", "numpy"}),
    ],
)
def test_imports_are_as_light_as_they_can_be(statement: str, absent: set[str]) -> None:
    code = f"import sys; {statement}; print(*({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
