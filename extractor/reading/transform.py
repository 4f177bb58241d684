"""What ``extract transform`` does to a row: unit length, PCA, whitening, unit length again."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreDamagedError
from extractor.store.format import TRANSFORM, Description, FileEntry
from extractor.store.publish import locate

__all__ = ["Transform", "array_files", "read_transform", "unit_length"]

Floats = npt.NDArray[np.float64]

TINY = 1e-12  # a row of zeros stays one, as in torch.nn.functional.normalize
# Rows of every matrix product. Where all products have one shape, a row comes out the same in its
# last bits, whichever rows are beside it.
BLOCK_ROWS = 256


@dataclass(frozen=True)
class Transform:
    """Normalization, PCA and whitening of rows, as :func:`transform_store` describes them.

    Attributes:
        normalize: Whether rows are scaled to unit length before the PCA, and at the end.
        mean: ``(dim,)``, subtracted before the projection; None without PCA.
        components: ``(k, dim)``, directions of the largest variance, of unit length.
        scales: ``(k,)``, factors of the projected values; None without whitening.
    """

    normalize: bool
    mean: Floats | None = None
    components: Floats | None = None
    scales: Floats | None = None

    @property
    def arrays(self) -> list[Floats | None]:
        """Mean, components and scales, in the order of their files."""
        return [self.mean, self.components, self.scales]

    def apply(self, rows: npt.NDArray[Any]) -> Floats:
        """Return rows ``(n, *shape)`` transformed, ``(n, k)``; without PCA in their own shape.

        A row of zeros counts as one: it has no direction, so that normalization leaves it alone.
        """
        if self.mean is None or self.components is None:
            wide = rows.astype(np.float64)
            return unit_length(wide) if self.normalize else wide
        out = np.empty((len(rows), len(self.components)))
        block = np.zeros((BLOCK_ROWS, len(self.mean)))
        for start in range(0, len(rows), BLOCK_ROWS):
            some = rows[start : start + BLOCK_ROWS].astype(np.float64)
            block[: len(some)] = (unit_length(some) if self.normalize else some) - self.mean
            projected = (block @ self.components.T)[: len(some)]
            if self.scales is not None:
                projected *= self.scales
            out[start : start + len(some)] = projected
        return unit_length(out) if self.normalize else out

    def gain(self, row: npt.NDArray[Any]) -> float:
        """Return by how much a relative error of one row may grow."""
        if self.components is None:
            return 1.0
        length = 1.0 if self.normalize else float(np.linalg.norm(row.astype(np.float64)))
        plain = Transform(False, self.mean, self.components, self.scales)
        start = unit_length(row[None]) if self.normalize else row[None]
        moved = float(np.linalg.norm(plain.apply(start)))
        largest = 1.0 if self.scales is None else float(self.scales.max())
        return max(largest * length / max(moved, TINY), 1.0)


def unit_length(rows: npt.NDArray[Any]) -> Floats:
    """Return rows scaled to unit length; a row of zeros stays one."""
    wide = rows.astype(np.float64, copy=False)
    flat = wide.reshape(len(wide), -1)
    lengths = np.sqrt(np.einsum("ij,ij->i", flat, flat)).clip(TINY)
    scaled: Floats = wide / lengths.reshape(-1, *[1] * (wide.ndim - 1))
    return scaled


def array_files(transform: Transform) -> dict[str, bytes]:
    """Return the content of the files that keep a transform, by name."""
    files = {}
    for name, array in zip(TRANSFORM, transform.arrays, strict=True):
        if array is not None:
            content = io.BytesIO()
            np.save(content, array.astype("<f8"))
            files[name] = content.getvalue()
    return files


def read_transform(folder: Path, description: Description) -> Transform | None:
    """Return the transform that made the rows of a store; None if there is none.

    Args:
        folder: Folder of the store, or its staging folder.
        description: Description of the store.

    Raises:
        StoreDamagedError: A file is missing, or has other content than the manifest says.
    """
    made = description.transform
    if made is None:
        return None
    arrays: dict[str, Floats] = {}
    for entry in description.transform_files:
        path = locate(folder, entry.name)
        arrays[entry.name] = _array(path, _checked(path, entry))
    transform = Transform(bool(made["normalize"]), *(arrays.get(name) for name in TRANSFORM))
    dims = [description.before_transform.dim, description.dim]
    expected: Sequence[tuple[int, ...]] = [(dims[0],), (dims[1], dims[0]), (dims[1],)]
    wanted = [made["pca"] is not None] * 2 + [bool(made["whiten"])]
    for name, array, shape, is_wanted in zip(
        TRANSFORM, transform.arrays, expected, wanted, strict=True
    ):
        found = "no file" if array is None else f"{array.shape} {array.dtype}"
        needed = f"{shape} float64" if is_wanted else "no file"
        if found != needed:
            raise StoreDamagedError(
                f"{folder / name} does not fit the manifest: got {found}, expected {needed}; make "
                "the store again with extract transform --overwrite"
            )
    return transform


def _checked(path: Path, entry: FileEntry) -> bytes:
    """Return the content of a file.

    Raises:
        StoreDamagedError: It is not the content that the manifest says.
    """
    advice = "restore it, or make the store again with extract transform --overwrite"
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for its writer
            raise OSError(errno.EINVAL, "not a regular file")
        content = path.read_bytes()
    except OSError as error:
        raise StoreDamagedError(
            f"{path}, the transform of this store, cannot be read ({error.strerror}); {advice}"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry.sha256:
        raise StoreDamagedError(
            f"{path}, the transform of this store, was changed: got SHA-256 {digest}, expected "
            f"{entry.sha256}; {advice}"
        )
    return content


def _array(path: Path, content: bytes) -> Floats:
    try:
        array: Floats = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python and raises anything
        raise StoreDamagedError(f"{os.fspath(path)} is not a numpy array: {error}") from error
    return array
