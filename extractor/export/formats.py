"""The formats of exports, by name and by the ending of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from extractor.errors import UsageError
from extractor.export.arrays import Hdf5Writer, NpyWriter
from extractor.export.faiss_file import FaissWriter
from extractor.export.tables import (
    ClipRetrievalWriter,
    CsvWriter,
    ParquetFileWriter,
    ParquetWriter,
)
from extractor.export.writers import Writer

__all__ = ["FORMATS", "Format", "format_for"]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: Its name.
        writer: What writes it.
        is_folder: Whether it is a folder of files.
        suffixes: Endings of a file that stand for it.
        only_float32: Whether its values are always float32.
    """

    name: str
    writer: type[Writer]
    is_folder: bool
    suffixes: tuple[str, ...] = ()
    only_float32: bool = False


FORMATS = {
    each.name: each
    for each in (
        Format("npy", NpyWriter, is_folder=True),
        Format("parquet", ParquetWriter, is_folder=True),
        Format("clip-retrieval", ClipRetrievalWriter, is_folder=True),
        Format("faiss", FaissWriter, False, (".faiss", ".index"), only_float32=True),
        Format("hdf5", Hdf5Writer, False, (".h5", ".hdf5")),
        Format("csv", CsvWriter, False, (".csv",)),
    )
}
_PARQUET_FILE = Format("parquet", ParquetFileWriter, False, (".parquet",))
# Endings that promise a file of another kind.
_OTHER_FILES = (
    *(".arrow", ".feather", ".gz", ".json", ".jsonl", ".npz", ".pickle", ".pkl", ".pq", ".pt"),
    *(".pth", ".sqlite", ".tar", ".tsv", ".txt", ".zip"),
)


def format_for(path: Path, name: str | None) -> Format:
    """Return the format of a target.

    Args:
        path: File or folder to write.
        name: Name of the format; None for that of the ending, or ``parquet``. A name that ends in
            ``.parquet`` stands for one file.

    Raises:
        UsageError: There is no such format, or the ending promises a file that none writes.
    """
    suffix = path.suffix.lower()
    if name is None:
        if suffix == ".npy":
            raise UsageError(
                f"format: {path} would be a folder of Parquet files; name a folder, and the format "
                "npy for arrays"
            )
        if suffix in _OTHER_FILES:
            known = [ending for each in FORMATS.values() for ending in each.suffixes]
            raise UsageError(
                f"format: {path} would be a folder of Parquet files; name a folder without "
                f"{suffix}, or a file that ends with {', '.join(['.parquet', *known])}"
            )
        endings = {ending: each.name for each in FORMATS.values() for ending in each.suffixes}
        name = endings.get(suffix, "parquet")
    if name not in FORMATS:
        raise UsageError(f"format: got {name!r}, expected one of {', '.join(FORMATS)}")
    if name == "parquet" and suffix == ".parquet" and not path.is_dir():
        return _PARQUET_FILE
    return FORMATS[name]
