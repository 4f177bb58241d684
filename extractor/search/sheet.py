"""Contact sheet: queries and hits as labeled thumbnails in one picture."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from extractor.errors import DecodeError, UsageError
from extractor.images.time_limit import decode_within
from extractor.preprocess import Preprocess
from extractor.store.atomic import write_atomically
from extractor.store.publish import enclosing_store
from extractor.text import plural

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "SQUARE",
    "Tile",
    "check_new_file",
    "check_sheet",
    "draw_sheet",
    "lies_in",
    "write_new_file",
    "write_sheet",
]

THUMBNAIL = 150  # pixels
LABEL = 34
GAP = 10
LABEL_COLUMNS = 26  # characters below a thumbnail
FRAME = (30, 110, 200)
EMPTY = (225, 225, 225)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_EDGE = 16_000  # pixels, which WebP can hold; JPEG and viewers of PNG have limits, too

SQUARE = Preprocess(
    (THUMBNAIL, THUMBNAIL),
    "contain",
    (THUMBNAIL, THUMBNAIL),
    "lanczos",  # a filter that needs no torch
    (0.5, 0.5, 0.5),
    (0.5, 0.5, 0.5),
    (255, 255, 255),
)


@dataclass(frozen=True)
class Tile:
    """One thumbnail.

    Attributes:
        image: A path, or another image.
        label: Text below it, at most two lines.
    """

    image: Any
    label: str


def check_sheet(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Check that a sheet may be written to a file.

    Raises:
        UsageError: The suffix is none of an image, or the file exists.
    """
    check_new_file(path, "sheet", FORMATS, overwrite=overwrite)


def check_new_file(
    path: str | os.PathLike[str], what: str, suffixes: Iterable[str] = (), *, overwrite: bool
) -> None:
    """Check that a result may be written to a file.

    Args:
        path: The file.
        what: What the file is, for messages.
        suffixes: Ends of the name that are known, in lower case; none allow any name.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        UsageError: The suffix is unknown, the file exists, or its folder is missing or that of a
            store.
    """
    if suffixes and Path(path).suffix.lower() not in suffixes:
        expected = ", ".join(suffixes)
        raise UsageError(f"{what}: got {path}, expected a file that ends with {expected}")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(
            f"{what}: {path} exists; replace it with --overwrite, or name another file"
        )
    if os.path.isdir(path):
        raise UsageError(f"{what}: {path} is a folder, expected a file")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"{what}: there is no folder {Path(path).parent}")
    if (store := enclosing_store(path)) is not None:
        raise UsageError(f"{what}: {path} is in the store {store}; name a file beside it")


def lies_in(path: str | os.PathLike[str], folder: str) -> bool:
    """Return whether a path is a folder or below it."""
    above = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), above]) == above


def write_sheet(path: str | os.PathLike[str], rows: Sequence[Sequence[Tile]]) -> None:
    """Draw a sheet and write it to a file, which appears whole or not at all.

    Raises:
        UsageError: The sheet would be too large, or the file cannot be written.
    """
    picture = draw_sheet(rows)
    content = io.BytesIO()
    picture.save(content, FORMATS[Path(path).suffix.lower()])
    write_new_file(path, "sheet", content.getvalue())


def write_new_file(path: str | os.PathLike[str], what: str, content: bytes) -> None:
    """Write a result to a file, which appears whole or not at all.

    Args:
        path: The file.
        what: What the file is, for messages.
        content: Its bytes.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        with contextlib.suppress(OSError):
            Path(f"{os.fspath(path)}.partial").unlink()
        raise UsageError(f"{what}: cannot write {path}: {error.strerror}") from error


def draw_sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Draw labeled thumbnails: a row for each query, which stands first, in a frame.

    An image that cannot be read is an empty tile with the reason.

    Raises:
        UsageError: The sheet would be too large.
    """
    from PIL import Image, ImageDraw

    columns = max(map(len, rows), default=1)
    width, height = THUMBNAIL + GAP, THUMBNAIL + LABEL + GAP
    size = (columns * width + 2 * GAP, len(rows) * height + GAP)
    if max(size) > MAX_EDGE:
        raise UsageError(
            f"sheet: {plural(len(rows), 'query', 'queries')} with {plural(columns, 'tile')} each "
            "are too many for one picture; try fewer queries, or a smaller -k"
        )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            left, top = GAP + x * width + (GAP if x else 0), GAP + y * height
            thumbnail, problem = _thumbnail(tile.image)
            sheet.paste(thumbnail, (left, top))
            if problem:
                draw.text((left + 8, top + THUMBNAIL // 2), _shown(problem), fill="black")
            if x == 0:
                edges = (left - 4, top - 4, left + THUMBNAIL + 3, top + THUMBNAIL + 3)
                draw.rectangle(edges, outline=FRAME, width=4)
            lines = "\n".join(_shown(line) for line in tile.label.splitlines()[:2])
            draw.text((left, top + THUMBNAIL + 4), lines, fill="black")
    return sheet


def _thumbnail(image: Any) -> tuple[Image.Image, str]:
    """Return a thumbnail, and why it is empty."""
    from PIL import Image

    pixels = np.empty((THUMBNAIL, THUMBNAIL, 3), np.uint8)
    try:
        decode_within(image, [SQUARE], [pixels])
    except DecodeError as error:
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), EMPTY), error.reason
    return Image.fromarray(pixels), ""


def _shown(text: str) -> str:
    """Return text that the font has, no wider than a thumbnail; the end of a path tells most."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= LABEL_COLUMNS else f"...{plain[3 - LABEL_COLUMNS :]}"
