"""Several memory-mapped arrays that look like one."""

from __future__ import annotations

import bisect
import ctypes
import itertools
import math
import mmap
import operator
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib.mixins import NDArrayOperatorsMixin

from extractor.text import plural

__all__ = ["ConcatenatedRows", "KeptRows", "LazyArray", "ShardedArray", "map_array"]

ATTEMPTS = 10
MAP_FAILED = ctypes.c_void_p(-1).value
TINY = 1e-12  # a row of zeros stays one, as in torch.nn.functional.normalize
READ_ONLY = "the rows of a store are read-only; change a copy of them: np.array(store.features)"


def map_array(path: Path) -> npt.NDArray[Any]:
    """Map a ``.npy`` file into memory, read-only, without keeping the file open.

    numpy's own function keeps a file descriptor for each array, of which a process has 1,024 on
    many systems, and a large store has more shards than that.

    numpy parses the header as a Python literal. Python's parser counts its depth for all threads
    together, and raises SystemError if two of them disturb each other. Another attempt succeeds.

    Raises:
        Exception: Whatever numpy raises for a file that is no array.
    """
    with open(path, "rb") as file:
        for _ in range(ATTEMPTS - 1):
            try:
                shape, is_fortran, dtype = _header(file)
                break
            except SystemError:
                file.seek(0)
        else:
            shape, is_fortran, dtype = _header(file)
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        if dtype.hasobject:
            raise ValueError("Python objects in the array cannot be mapped into memory")
        if start + math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"the file has {size} bytes, too few for {shape} {dtype}")
        content = np.asarray(_Mapping(file.fileno(), size))
    order: Any = "F" if is_fortran else "C"
    array: npt.NDArray[Any] = np.ndarray.__new__(
        np.memmap, shape, dtype, content, start, order=order
    )
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and type of the array in a file, and leave the file at its values."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"format version {version} of numpy's files is unknown")


class _Mapping:
    """Bytes of a mapped file, for numpy; unlike :class:`mmap.mmap`, it keeps no descriptor."""

    def __init__(self, file: int, size: int) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = ctypes.c_void_p
        numbers = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
        library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *numbers]
        library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
        if address == MAP_FAILED:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        # At the end of the process the system does it.
        weakref.finalize(self, library.munmap, address, size).atexit = False
        is_read_only = True
        self.__array_interface__ = {
            "version": 3,
            "data": (address, is_read_only),
            "shape": (size,),
            "typestr": "|u1",
        }


class LazyArray(NDArrayOperatorsMixin, ABC):
    """Operators, methods and attributes of ``numpy.ndarray``; each of them reads all rows.

    Without this, ``array == 0`` would compare identities, and ``array.mean(0)`` would not exist
    although ``numpy.mean(array, 0)`` works.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @abstractmethod
    def __getitem__(self, index: Any) -> Any: ...

    @abstractmethod
    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]: ...

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple[Any, ...] = (), **details: Any
    ) -> Any:
        if any(isinstance(each, LazyArray) for each in out):
            raise TypeError(READ_ONLY)
        if out:
            details["out"] = out
        arrays = [np.asarray(each) if isinstance(each, LazyArray) else each for each in inputs]
        return getattr(ufunc, method)(*arrays, **details)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(READ_ONLY)

    def __contains__(self, value: Any) -> bool:
        return value in np.asarray(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if not callable(getattr(np.ndarray, name)):
            return getattr(self._whole(), name)
        # Programs ask whether a method exists; only a call should read the rows.
        return lambda *arguments, **named: getattr(self._whole(), name)(*arguments, **named)

    def _whole(self) -> npt.NDArray[Any]:
        """Return all rows in an array that methods such as ``sort`` cannot change."""
        whole: npt.NDArray[Any] = np.asarray(self).view()
        whole.flags.writeable = False
        return whole


class KeptRows(LazyArray):
    """Array of selected rows of another array; reads only rows that are indexed.

    The rows are those of a mask, or of indices in any order.

    >>> rows = KeptRows(np.arange(8).reshape(4, 2), np.array([True, False, False, True]))
    >>> rows.shape, rows[1], rows[:].tolist()
    ((2, 2), array([6, 7]), [[0, 1], [6, 7]])
    """

    def __init__(
        self,
        array: npt.NDArray[Any] | LazyArray,
        kept: npt.NDArray[np.bool_] | npt.NDArray[np.int64],
    ):
        self._array: Any = array
        self._rows = np.flatnonzero(kept) if kept.dtype == bool else kept
        self.shape: tuple[int, ...] = (len(self._rows), *array.shape[1:])
        self.ndim = len(self.shape)
        self.dtype = array.dtype

    @property
    def whole(self) -> Any:
        """The array that the rows were selected from."""
        return self._array

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return (self._array[row] for row in self._rows.tolist())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            picked = (self._rows[index[0]], *index[1:])
            return self._array[picked]
        return self._array[self._rows[index]]

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("selected rows cannot become one array without a copy")
        return np.asarray(self[:], dtype=dtype)


class ConcatenatedRows(LazyArray):
    """Array whose rows are those of several arrays, joined to longer ones.

    >>> array = ConcatenatedRows([np.zeros((4, 2)), np.ones((4, 1))])
    >>> array.shape, array[1].tolist()
    ((4, 3), [0.0, 0.0, 1.0])

    Args:
        arrays: Arrays ``(N, dim)`` of the same length.
        unit_parts: Scale the part of each array to unit length.
    """

    def __init__(self, arrays: Sequence[npt.NDArray[Any] | LazyArray], *, unit_parts: bool = False):
        self._arrays: Sequence[Any] = arrays
        self._unit_parts = unit_parts
        self.shape = (arrays[0].shape[0], sum(array.shape[1] for array in arrays))
        self.ndim = 2
        self.dtype = np.result_type(*(array.dtype for array in arrays))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        rows, *axes = index if isinstance(index, tuple) else (index,)
        parts = [np.asarray(array[rows], self.dtype) for array in self._arrays]
        if self._unit_parts:
            parts = [part / _lengths(part).clip(TINY) for part in parts]
        joined = np.concatenate(parts, axis=-1)
        of_row = (..., *axes)
        return joined[of_row]

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("joined rows cannot become one array without a copy")
        return np.asarray(self[:], dtype=dtype)


def _lengths(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the Euclidean length of each row, computed in float32 at least."""
    wide = rows.astype(np.result_type(rows.dtype, np.float32), copy=False)
    lengths: npt.NDArray[Any] = np.linalg.norm(wide, axis=-1, keepdims=True)
    return lengths.astype(rows.dtype)


class ShardedArray(LazyArray):
    """Array made of several arrays, one after the other, without copying them.

    Index it with a row, a slice, a list or a mask, and with further indices for the axes of a row.
    A slice inside one shard is a view of its file, everything else a copy. ``numpy.asarray``, and
    whatever else NumPy's arrays can do, reads all rows: ``array > 0``, ``array.mean(0)``,
    ``array.T``. Take slices of a store that is larger than the memory.

    >>> parts = [np.zeros((2, 3)), np.ones((4, 3))]
    >>> array = ShardedArray(parts, row_shape=(3,), dtype=np.dtype(float))
    >>> array.shape, array[-1], array[[0, 5]].shape, array[1:3, 0]
    ((6, 3), array([1., 1., 1.]), (2, 3), array([0., 1.]))
    >>> array.max(0), (array > 0).sum(1).tolist()
    (array([1., 1., 1.]), [0, 0, 3, 3, 3, 3])
    """

    def __init__(
        self,
        parts: Sequence[npt.NDArray[Any] | KeptRows],
        *,
        row_shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ):
        for part in parts:
            if part.shape[1:] != row_shape or part.ndim == 0 or part.dtype != dtype:
                raise ValueError(
                    f"got {part.shape} {part.dtype}, expected rows of {row_shape} {dtype} in every "
                    "part"
                )
        self._parts = tuple(parts)
        self._starts = [0, *itertools.accumulate(len(part) for part in parts)]
        self.shape = (self._starts[-1], *row_shape)
        self.dtype = dtype

    @property
    def parts(self) -> tuple[npt.NDArray[Any] | KeptRows, ...]:
        """The arrays, in order."""
        return self._parts

    @property
    def ndim(self) -> int:
        """Number of axes, including that of the rows."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Total number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Total number of bytes."""
        return self.size * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"ShardedArray(shape={self.shape}, dtype={self.dtype}, shards={len(self._parts)})"

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return itertools.chain.from_iterable(self._parts)

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        if copy is False and dtype is not None and np.dtype(dtype) != self.dtype:
            raise ValueError(f"{self.dtype} cannot become {np.dtype(dtype)} without a copy")
        if len(self._parts) == 1 and not copy:
            return np.asarray(self._parts[0], dtype=dtype)
        if copy is False:
            raise ValueError("several shards cannot become one array without a copy")
        parts = [np.asarray(part) for part in self._parts]
        joined = np.concatenate(parts) if parts else np.empty(self.shape, self.dtype)
        return joined if dtype is None else joined.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return self._index_axes(index)
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        if index is Ellipsis:
            return self._slice(0, len(self), 1)
        if index is None:
            return self[:][np.newaxis]
        if _is_list(index):
            return self._take(np.asarray(index))
        if isinstance(index, bool):
            raise IndexError("a single bool is not a row; expected a mask of all rows")
        try:
            row = operator.index(index)
        except TypeError as error:
            raise IndexError(
                f"got {type(index).__name__}, expected an integer, a slice, a list of integers or "
                "a mask"
            ) from error
        return self._row(row)

    def _index_axes(self, index: tuple[Any, ...]) -> Any:
        items = [list(item) if isinstance(item, tuple) else item for item in index]
        gaps = [at for at, item in enumerate(items) if item is Ellipsis]
        if len(gaps) > 1:
            raise IndexError("an index can only have a single ellipsis ('...')")
        if gaps:
            left = self.ndim - sum(map(_axes, items))
            items[gaps[0] : gaps[0] + 1] = [slice(None)] * left
        used = sum(map(_axes, items))
        if used > self.ndim:
            raise IndexError(f"too many indices: the array has {self.ndim} dimensions, got {used}")
        rows, *axes = items or [slice(None)]
        if rows is None:
            return self[tuple(axes)][np.newaxis]
        # Read only the rows that are needed; numpy indexes the other axes by its own rules.
        if isinstance(rows, slice):
            index = (slice(None), *axes)
            return self[rows][index]
        if _is_list(rows):
            numbers = self._numbers(np.asarray(rows))
            taken = self._take(numbers.ravel())
            pairs = (np.arange(numbers.size).reshape(numbers.shape), *axes)
            return taken[pairs]
        first = (0, *axes)
        return self[rows][np.newaxis][first]

    def _row(self, row: int) -> npt.NDArray[Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} is out of range for {plural(len(self), 'row')}")
        row %= len(self)
        part = bisect.bisect_right(self._starts, row) - 1
        return np.asarray(self._parts[part][row - self._starts[part]])

    def _slice(self, start: int, stop: int, step: int) -> npt.NDArray[Any]:
        if step < 0:
            rows = range(start, stop, step)
            return self._slice(rows[-1], rows[0] + 1, -step)[::-1] if rows else self._empty()
        pieces = []
        for part, begin in zip(self._parts, self._starts, strict=False):
            first = max(start, begin + (start - begin) % step if begin > start else start)
            if first < min(stop, begin + len(part)):
                pieces.append(part[first - begin : stop - begin : step])
        if len(pieces) == 1:
            return np.asarray(pieces[0])
        return np.concatenate(pieces) if pieces else self._empty()

    def _numbers(self, index: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise IndexError(
                    f"got a mask of shape {index.shape} for {plural(len(self), 'row')}"
                )
            index = np.flatnonzero(index)
        elif index.size == 0:
            index = index.astype(np.intp)
        elif index.dtype.kind not in "iu":
            raise IndexError(f"got {index.dtype}, expected integers or a mask")
        wrong = index[(index < -len(self)) | (index >= len(self))]
        if wrong.size:
            raise IndexError(f"row {wrong.flat[0]} is out of range for {plural(len(self), 'row')}")
        rows = index.astype(np.intp)
        return np.where(rows < 0, rows + len(self), rows)

    def _take(self, index: npt.NDArray[Any]) -> npt.NDArray[Any]:
        rows = self._numbers(index)
        taken = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(parts):
            mask = parts == part
            taken[mask] = self._parts[part][rows[mask] - self._starts[part]]
        return taken

    def _empty(self) -> npt.NDArray[Any]:
        return np.empty((0, *self.shape[1:]), self.dtype)


def _axes(index: Any) -> int:
    """Return the number of axes that one item of an index uses."""
    if index is None or index is Ellipsis:
        return 0
    array = np.asarray(index) if isinstance(index, (list, np.ndarray)) else None
    return array.ndim if array is not None and array.dtype == bool else 1


def _is_list(index: Any) -> bool:
    """Return whether an index is a list, or an array of any library, such as a tensor."""
    is_array = hasattr(index, "__array__") and getattr(index, "ndim", 0) > 0
    return isinstance(index, (list, range)) or is_array
