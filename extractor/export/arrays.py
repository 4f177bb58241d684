"""Exports as arrays: ``.npy`` with a list of paths, and HDF5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from extractor.errors import InstallationError, UsageError
from extractor.export.blocks import Block
from extractor.export.writers import Layout, Writer

__all__ = ["Hdf5Writer", "NpyWriter", "open_npy"]

CHUNK_BYTES = 2**20


def open_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> BinaryIO:
    """Return a ``.npy`` file that has its header and waits for the bytes of its rows."""
    file = path.open("wb")
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(file, header)
    return file


class NpyWriter(Writer):
    """``features.npy``, ``ids.npy`` and ``paths.txt``, one path per line."""

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        shape = (layout.rows, *layout.shape)
        self._features = open_npy(path / "features.npy", shape, layout.dtype)
        self._ids = open_npy(path / "ids.npy", (layout.rows,), np.dtype(np.int64))
        self._paths = (path / "paths.txt").open("wb")

    def append(self, block: Block) -> None:
        """Write the next rows.

        Raises:
            UsageError: A path has a line break.
        """
        for path in block.paths:
            if b"\n" in path or b"\r" in path:
                raise UsageError(
                    f"npy: {path!r} has a line break, so it is no line of paths.txt; "
                    "export to another format"
                )
        self._features.write(block.rows.data)
        self._ids.write(block.ids.data)
        self._paths.write(b"".join(path + b"\n" for path in block.paths))

    def close(self) -> None:
        """Complete the files."""
        for file in (self._features, self._ids, self._paths):
            file.close()


class Hdf5Writer(Writer):
    """One file with the datasets ``embedding``, ``id``, ``path``, ``sha256``, width and height.

    Raises:
        InstallationError: h5py is not installed.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        try:
            import h5py
        except ImportError as error:
            raise InstallationError(
                "hdf5: h5py is not installed; pip install 'backbone-extractor[export]'"
            ) from error
        self._file = h5py.File(path, "w")
        self._file.attrs["extractor"] = json.dumps(layout.provenance)
        row_bytes = layout.dim * layout.dtype.itemsize
        chunk = max(min(CHUNK_BYTES // row_bytes, layout.rows), 1)
        # Dataset paths hold the bytes of the names, which need not be UTF-8.
        text = h5py.string_dtype("utf-8" if layout.text_paths else "ascii")
        rows = layout.rows
        self._file.create_dataset(
            layout.column,
            (rows, *layout.shape),
            layout.dtype,
            chunks=(chunk, *layout.shape) if rows else None,
        )
        for name, kind in (
            ("id", np.int64),
            ("path", text),
            ("width", np.int32),
            ("height", np.int32),
            ("sha256", "V32"),
        ):
            self._file.create_dataset(name, (rows,), kind)
        self._done = 0

    def append(self, block: Block) -> None:
        """Write the next rows."""
        rows = slice(self._done, self._done + len(block))
        self._done = rows.stop
        digests = [digest or bytes(32) for digest in block.index.column("sha256").to_pylist()]
        columns = {
            self.layout.column: block.rows,
            "id": block.ids,
            "path": np.array(block.paths, object),
            "width": block.index.column("width").to_numpy(),
            "height": block.index.column("height").to_numpy(),
            "sha256": np.frombuffer(b"".join(digests), "V32"),
        }
        for name, values in columns.items():
            self._file[name][rows] = values

    def close(self) -> None:
        """Complete the file."""
        self._file.close()
