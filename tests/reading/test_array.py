"""A sharded array indexes like the concatenation of its parts in numpy."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extractor.reading import array
from extractor.reading.array import KeptRows, ShardedArray, map_array

DIM = 4
LAYOUTS = {
    "no part": [],
    "one part": [10],
    "one row": [1],
    "parts of one row": [1] * 6,
    "mixed parts": [3, 1, 4, 2],
    "some parts empty": [0, 3, 0, 2, 0],
}
NUMPY_2 = np.lib.NumpyVersion(np.__version__) >= "2.0.0"


def shown(value: object) -> str:
    return " ".join(repr(value).split())


def build(lengths: list[int]) -> tuple[ShardedArray, np.ndarray]:
    whole = np.arange(sum(lengths) * DIM, dtype=np.float32).reshape(-1, DIM)
    cuts = np.cumsum([0, *lengths])
    parts = [whole[a:b].copy() for a, b in itertools.pairwise(cuts)]
    return ShardedArray(parts, row_shape=(DIM,), dtype=np.dtype(np.float32)), whole


@pytest.fixture(params=[*LAYOUTS.values()], ids=[*LAYOUTS])
def both(request: pytest.FixtureRequest) -> tuple[ShardedArray, np.ndarray]:
    return build(request.param)


@pytest.fixture
def mixed() -> tuple[ShardedArray, np.ndarray]:
    return build(LAYOUTS["mixed parts"])


def assert_same(actual: Any, expected: Any, index: object) -> None:
    assert np.shape(actual) == np.shape(expected), index
    assert actual.dtype == expected.dtype, index
    assert np.array_equal(actual, expected), index


def test_shape_length_and_bytes_equal_those_of_the_concatenation(
    both: tuple[ShardedArray, np.ndarray],
) -> None:
    array, whole = both
    assert array.shape == whole.shape
    assert len(array) == len(whole)
    assert (array.ndim, array.size, array.nbytes) == (whole.ndim, whole.size, whole.nbytes)
    assert array.dtype == whole.dtype


def test_row_number_returns_its_row(both: tuple[ShardedArray, np.ndarray]) -> None:
    array, whole = both
    for row in range(-len(whole), len(whole)):
        for kind in (int, np.int64, np.int8, np.array):
            assert_same(array[kind(row)], whole[row], (kind, row))
        if row >= 0:
            assert_same(array[np.uint8(row)], whole[row], row)


@pytest.mark.parametrize("distance", [0, 1, 1000])
def test_row_out_of_range_raises_index_error(
    both: tuple[ShardedArray, np.ndarray], distance: int
) -> None:
    array, whole = both
    for row in (len(whole) + distance, -len(whole) - 1 - distance):
        for index in (row, np.int64(row), [row], np.array([[row]]), (row, 0), ([row], [0])):
            with pytest.raises(
                IndexError, match=rf"row {row} is out of range for {len(whole)} row"
            ):
                array[index]


def test_slice_equals_slice_of_concatenation(both: tuple[ShardedArray, np.ndarray]) -> None:
    array, whole = both
    ends = [None, *range(-len(whole) - 2, len(whole) + 3)]
    for start, stop in itertools.product(ends, ends):
        for step in (None, 1, 2, 3, 7, 100, -1, -2, -3, -100):
            index = slice(start, stop, step)
            assert_same(array[index], whole[index], index)


def test_slice_step_of_zero_is_rejected(mixed: tuple[ShardedArray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="slice step cannot be zero"):
        mixed[0][::0]


@pytest.mark.parametrize(
    "index",
    [
        [],
        [3],
        [0, 9, 3, 3, -1, -10],
        [[0, 9], [-1, 4]],
        range(9, -1, -2),
        np.array([2, 1, 9]),
        np.array([[0, 9, 5], [-1, 4, 4]]),
        np.array([[[8]]]),
        np.array([3, 250 - 241], np.uint8),
        np.array([-10, 9], np.int8),
        np.array([7, 0], np.uint64),
        np.empty((0,), np.int64),
        np.empty((2, 0), np.int64),
        np.arange(10) % 3 == 0,
        [True, False] * 5,
        np.zeros(10, bool),
        np.ones(10, bool),
        ...,
    ],
    ids=shown,
)
def test_lists_arrays_and_masks_select_the_same_rows_as_numpy(
    mixed: tuple[ShardedArray, np.ndarray], index: Any
) -> None:
    array, whole = mixed
    assert_same(array[index], whole[index], index)


@pytest.mark.parametrize("rows", [1, 300, 40_000])
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int32, np.uint64])
def test_index_type_may_be_too_small_for_all_rows(rows: int, kind: Any) -> None:
    array, whole = build([rows, 5])
    index = np.array([0, 5], kind)
    assert_same(array[index], whole[index], index)


def test_numpy_integers_and_empty_masks_are_accepted() -> None:
    array, whole = build([])
    assert_same(array[np.zeros(0, bool)], whole[np.zeros(0, bool)], "mask")
    assert_same(array[[]], whole[[]], "list")
    array, whole = build([2, 2])
    assert_same(array[[np.int64(3), np.int8(-4)]], whole[[3, 0]], "numbers")


ROWS: list[Any] = [
    2,
    -1,
    np.int64(4),
    slice(None),
    slice(2, 9, 3),
    slice(None, None, -1),
    slice(5, 5),
    [0, 9],
    [],
    np.array([-1, 3]),
    np.array([[0, 9], [4, 5]]),
    np.arange(10) > 7,
    ...,
]
ONE_COLUMN_SET: list[Any] = [0, -1, np.int64(2), slice(None), slice(None, None, -2), slice(1, 1)]
COLUMN_LISTS: list[Any] = [[3, 0], [], np.array([1, 1, 2]), np.array([True, False, True, True])]


def is_list(index: Any) -> bool:
    return isinstance(index, (list, np.ndarray))


# A list of rows with a list of columns means pairs, which have tests of their own.
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (rows, columns)
        for rows, columns in itertools.product(ROWS, [*ONE_COLUMN_SET, *COLUMN_LISTS])
        if not (is_list(rows) and is_list(columns))
    ],
    ids=shown,
)
def test_rows_with_columns_select_the_same_values_as_numpy(
    mixed: tuple[ShardedArray, np.ndarray], rows: Any, columns: Any
) -> None:
    array, whole = mixed
    assert_same(array[rows, columns], whole[rows, columns], (rows, columns))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([0, 9, 4], [1, 0, 3]),
        ([0, 9], [2]),
        ([5], [0, 3]),
        ([], []),
        (np.array([-1, -10]), [-1, 0]),
        (np.arange(10) > 7, [0, 3]),
        ([1, 2], np.array([False, True, False, True])),
        (range(3), range(3)),
    ],
    ids=shown,
)
def test_lists_of_rows_and_columns_are_paired(
    mixed: tuple[ShardedArray, np.ndarray], rows: Any, columns: Any
) -> None:
    array, whole = mixed
    assert_same(array[rows, columns], whole[rows, columns], (rows, columns))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        np.ix_([0, 9], [1, 2]),
        np.ix_([0, 9, 5], [1, 2, 3]),
        (np.array([[0, 9], [4, 5]]), [1, 2]),
        (np.array([[0, 9], [4, 5]]), np.array([[0, 1], [2, 3]])),
        ([0, 9], np.array([[0, 1], [2, 3]])),
        ([7, 3, 1], np.array([[0], [2]])),
    ],
    ids=shown,
)
def test_grids_of_rows_and_columns_broadcast(
    mixed: tuple[ShardedArray, np.ndarray], rows: Any, columns: Any
) -> None:
    array, whole = mixed
    assert_same(array[rows, columns], whole[rows, columns], (rows, columns))


def test_lists_of_different_lengths_are_rejected(mixed: tuple[ShardedArray, np.ndarray]) -> None:
    with pytest.raises(IndexError, match=r"shape mismatch|could not be broadcast"):
        mixed[0][[0, 1, 2], [0, 1]]


@pytest.mark.parametrize(
    "index",
    [(), (3,), ([1, 9],), (slice(2, 8),), (..., 1), (..., [0, 2]), (3, ...), (slice(4), ...)],
    ids=shown,
)
def test_short_tuples_and_ellipses_work_as_in_numpy(
    mixed: tuple[ShardedArray, np.ndarray], index: Any
) -> None:
    array, whole = mixed
    assert_same(array[index], whole[index], index)


@pytest.mark.parametrize(
    "index", [((0, 9),), ((0, 9), 2), ([0, 9], (0, 1)), (0, (0, 1))], ids=shown
)
def test_tuple_inside_an_index_works_like_a_list(
    mixed: tuple[ShardedArray, np.ndarray], index: Any
) -> None:
    array, whole = mixed
    assert_same(array[index], whole[index], index)


def test_random_indices_agree_with_numpy() -> None:
    rng = np.random.default_rng(20)

    def end() -> int | None:
        return None if rng.random() < 0.2 else int(rng.integers(-45, 46))

    for _ in range(300):
        array, whole = build(rng.integers(1, 9, rng.integers(1, 6)).tolist())
        count = len(whole)
        rows: list[Any] = [
            int(rng.integers(-count, count)),
            slice(end(), end(), int(rng.choice([-5, -2, -1, 1, 2, 3, 11]))),
            rng.integers(-count, count, rng.integers(0, 12)),
            rng.integers(-count, count, rng.integers(0, 12)).tolist(),
            rng.integers(-count, count, (3, 2)),
            rng.random(count) < 0.4,
        ]
        for row in rows:
            column = slice(*sorted(rng.integers(0, DIM + 1, 2).tolist()))
            assert_same(array[row], whole[row], row)
            assert_same(array[row, column], whole[row, column], (row, column))


@pytest.mark.parametrize("length", [0, 9, 11])
def test_mask_of_wrong_length_is_rejected(
    mixed: tuple[ShardedArray, np.ndarray], length: int
) -> None:
    with pytest.raises(IndexError, match=rf"mask of shape \({length},\) for 10 rows"):
        mixed[0][np.ones(length, bool)]


def test_new_axis_alone_works_as_in_numpy(both: tuple[ShardedArray, np.ndarray]) -> None:
    sharded, whole = both
    assert_same(sharded[np.newaxis], whole[np.newaxis], None)


@pytest.mark.parametrize("index", [[0.0], np.array([1.5]), ["a"]], ids=shown)
def test_noninteger_rows_are_rejected(mixed: tuple[ShardedArray, np.ndarray], index: Any) -> None:
    with pytest.raises(IndexError, match="expected integers or a mask"):
        mixed[0][index]


@pytest.mark.parametrize("index", [1.0, "1", {}, np.float32(1), (1.0, 0)], ids=shown)
def test_index_of_unsupported_type_is_rejected(
    mixed: tuple[ShardedArray, np.ndarray], index: Any
) -> None:
    with pytest.raises(IndexError, match=r"got (float|str|dict|float32), expected an integer, a"):
        mixed[0][index]


def test_too_many_indices_are_rejected(mixed: tuple[ShardedArray, np.ndarray]) -> None:
    with pytest.raises(IndexError, match="2 dimensions, got 3"):
        mixed[0][0, 0, 0]


@pytest.mark.parametrize("rows", [0, [0, 1], slice(None)], ids=shown)
def test_column_out_of_range_raises_index_error(
    mixed: tuple[ShardedArray, np.ndarray], rows: Any
) -> None:
    with pytest.raises(IndexError, match="index 4 is out of bounds"):
        mixed[0][rows, 4]


def test_iteration_yields_every_row_once_in_order(both: tuple[ShardedArray, np.ndarray]) -> None:
    array, whole = both
    rows = list(array)
    assert len(rows) == len(whole)
    for row, expected in zip(rows, whole, strict=True):
        assert_same(row, expected, "iteration")


def test_asarray_returns_the_concatenation(both: tuple[ShardedArray, np.ndarray]) -> None:
    array, whole = both
    assert_same(np.asarray(array), whole, "asarray")
    assert_same(np.array(array), whole, "array")
    assert_same(np.asarray(array, dtype=np.float64), whole.astype(np.float64), "float64")
    assert_same(np.asarray(array, dtype=np.float16), whole.astype(np.float16), "float16")
    assert np.sum(array) == whole.sum()


def test_results_are_plain_arrays_even_over_memory_maps(tmp_path: Any) -> None:
    _, whole = build([6])
    for number, part in enumerate((whole[:2], whole[2:])):
        np.save(tmp_path / f"{number}.npy", part)
    maps = [np.load(tmp_path / f"{number}.npy", mmap_mode="r") for number in range(2)]
    array = ShardedArray(maps, row_shape=(DIM,), dtype=np.dtype(np.float32))
    for index in (0, slice(1), [0, 5], (slice(2), 0)):
        assert type(array[index]) is np.ndarray, index
    assert type(np.asarray(array)) is np.ndarray
    assert_same(array[:], whole, ":")


def test_slice_inside_one_part_is_a_view() -> None:
    parts = [np.zeros((3, DIM)), np.ones((4, DIM))]
    array = ShardedArray(parts, row_shape=(DIM,), dtype=np.dtype(float))
    index: Any
    for index in (slice(0, 3), slice(1, 2), slice(0, 3, 2), slice(2, None, -1), 1, -6, (1,)):
        assert np.shares_memory(array[index], parts[0]), index
    for index in (slice(3, 7), slice(-2, None), slice(6, 3, -1), 3, (slice(4, 6), 1)):
        assert np.shares_memory(array[index], parts[1]), index


def test_other_indices_return_copies() -> None:
    parts = [np.zeros((3, DIM)), np.ones((4, DIM))]
    array = ShardedArray(parts, row_shape=(DIM,), dtype=np.dtype(float))
    for index in (slice(2, 4), slice(None), ..., [0, 1], np.ones(7, bool), ([0], [1])):
        assert not any(np.shares_memory(array[index], part) for part in parts), index


def test_asarray_of_one_part_shares_memory_and_array_copies() -> None:
    part = np.ones((3, DIM))
    array = ShardedArray([part], row_shape=(DIM,), dtype=np.dtype(float))
    assert np.shares_memory(np.asarray(array), part)
    assert not np.shares_memory(np.array(array), part)
    assert not np.shares_memory(array.__array__(copy=True), part)
    assert np.shares_memory(array.__array__(copy=False), part)


def test_several_parts_need_a_copy(
    mixed: tuple[ShardedArray, np.ndarray],
) -> None:
    with pytest.raises(ValueError, match="without a copy"):
        mixed[0].__array__(copy=False)


def test_another_dtype_needs_a_copy() -> None:
    array = ShardedArray([np.ones((3, DIM))], row_shape=(DIM,), dtype=np.dtype(float))
    with pytest.raises(ValueError, match="copy"):
        array.__array__(np.float16, copy=False)


@pytest.mark.skipif(not NUMPY_2, reason="numpy 1 does not pass copy on")
def test_copy_argument_of_numpy_2_is_respected(mixed: tuple[ShardedArray, np.ndarray]) -> None:
    part = np.ones((3, DIM))
    one = ShardedArray([part], row_shape=(DIM,), dtype=np.dtype(float))
    assert np.shares_memory(np.asarray(one, copy=False), part)
    assert not np.shares_memory(np.asarray(one, copy=True), part)
    with pytest.raises(ValueError, match="copy"):
        np.asarray(mixed[0], copy=False)


@pytest.mark.parametrize(
    "part", [np.zeros((2, DIM + 1)), np.zeros(DIM), np.zeros((2, DIM), np.float32)], ids=shown
)
def test_part_of_wrong_shape_or_dtype_is_rejected(part: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected rows of \(4,\) float64 in every part"):
        ShardedArray([np.zeros((2, DIM)), part], row_shape=(DIM,), dtype=np.dtype(float))


def test_repr_names_shape_dtype_and_shards(mixed: tuple[ShardedArray, np.ndarray]) -> None:
    assert repr(mixed[0]) == "ShardedArray(shape=(10, 4), dtype=float32, shards=4)"


# What NumPy users write, with and without numpy's functions.
USES: dict[str, Callable[[Any], Any]] = {
    "a > 0": lambda a: a > 3,
    "a == row": lambda a: a == a[0],
    "a != 0": lambda a: a != 0,
    "a / 2": lambda a: a / 2,
    "2 / a": lambda a: 2 / (a + 1),
    "-a": lambda a: -a,
    "a + a": lambda a: a + a,
    "array - a": lambda a: np.ones(DIM, np.float32) - a,
    "a @ a.T": lambda a: a @ a.T,
    "array @ a": lambda a: np.ones((3, len(a)), np.float32) @ a,
    "mean": lambda a: a.mean(0),
    "np.mean": lambda a: np.mean(a, axis=0),
    "sum": lambda a: a.sum(),
    "std": lambda a: a.std(axis=1, keepdims=True),
    "max": lambda a: a.max(1),
    "np.min": lambda a: np.min(a, axis=1),
    "astype": lambda a: a.astype(np.float16),
    "reshape": lambda a: a.reshape(-1, 2),
    "flat": lambda a: np.array(a.flat),
    "tolist": lambda a: np.array(a.tolist(), np.float32),
    "norm": lambda a: np.linalg.norm(a, axis=1),
    "concatenate": lambda a: np.concatenate([a, a]),
    "where": lambda a: np.where(a > 5, a, 0),
    "reduce": lambda a: np.add.reduce(a, axis=1),
    "isfinite": lambda a: np.isfinite(a).all(),
    "out of an operation": lambda a: np.add(a, 1, out=np.empty(a.shape, np.float32)),
    "in": lambda a: np.array([5.0 in a, 5.5 in a]),
}


def kept_rows() -> tuple[KeptRows, np.ndarray]:
    whole = np.arange(40, dtype=np.float32).reshape(10, DIM)
    return KeptRows(whole, np.arange(10) % 3 > 0), whole[np.arange(10) % 3 > 0]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(
    "pair", [build([10]), build([3, 1, 4, 2]), kept_rows()], ids=["one part", "four", "kept"]
)
def test_array_does_what_numpy_arrays_do(
    pair: tuple[Any, np.ndarray], use: Callable[[Any], Any]
) -> None:
    made, expected = use(pair[0]), use(pair[1])
    assert type(made) is type(expected)
    assert_same(made, expected, use)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "item": lambda a: a.__setitem__(0, 1),
    "in place": lambda a: a.__iadd__(1),
    "out": lambda a: np.add(1, 1, out=a),
    "sort": lambda a: a.sort(),
    "fill": lambda a: a.fill(0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_of_a_stored_row_is_refused(
    mixed: tuple[ShardedArray, np.ndarray], change: Callable[[Any], Any]
) -> None:
    with pytest.raises((TypeError, ValueError), match=r"read-only"):
        change(mixed[0])
    assert np.array_equal(mixed[0], mixed[1])


def test_looking_for_a_method_reads_no_row(
    mixed: tuple[ShardedArray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ShardedArray, "__array__")
    assert hasattr(mixed[0], "mean")
    assert not hasattr(mixed[0], "__array_interface__")
    with pytest.raises(AttributeError, match="'ShardedArray' object has no attribute 'means'"):
        _ = mixed[0].means


def failing_first(times: int) -> Callable[..., Any]:
    """numpy's function, after so many failures as threads that parse at a time cause them."""
    attempts = iter(range(times))
    real = np.lib.format.read_array_header_1_0

    def read_header(*args: Any, **options: Any) -> Any:
        if next(attempts, None) is not None:
            raise SystemError("AST constructor recursion depth mismatch (before=156, after=39)")
        return real(*args, **options)

    return read_header


@pytest.mark.parametrize("times", [0, 1, array.ATTEMPTS - 1])
def test_mapping_survives_threads_that_disturb_the_header_parser(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "rows.npy", expected)
    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", failing_first(times))
    assert np.array_equal(map_array(tmp_path / "rows.npy"), expected)


def test_mapping_gives_up_on_a_parser_that_always_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "rows.npy", np.zeros(3))
    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", failing_first(array.ATTEMPTS))
    with pytest.raises(SystemError, match="recursion depth mismatch"):
        map_array(tmp_path / "rows.npy")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files")
def test_mapped_array_keeps_no_file_open(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(6))
    before = open_files()
    kept = [map_array(tmp_path / "rows.npy") for _ in range(20)]
    assert open_files() == before
    assert kept[-1].tolist() == [0, 1, 2, 3, 4, 5]


def test_mapped_array_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, np.arange(6000))
    last = map_array(path)[-1:]
    path.unlink()
    gc.collect()
    assert last.tolist() == [5999]


@pytest.mark.skipif(not os.path.isfile("/proc/self/maps"), reason="no list of mapped files")
def test_mapping_ends_with_its_last_view(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(6))
    view = map_array(tmp_path / "rows.npy")[2:]
    name = str(tmp_path / "rows.npy")
    assert name in Path("/proc/self/maps").read_text()
    del view
    gc.collect()
    assert name not in Path("/proc/self/maps").read_text()


def test_mapped_array_cannot_become_writable(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(6))
    rows = map_array(tmp_path / "rows.npy")
    with pytest.raises(ValueError, match="WRITEABLE"):
        rows.flags.writeable = True


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (), (2, 3, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_mapped_array_equals_what_numpy_loads(tmp_path: Path, shape: Any, order: Any) -> None:
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    np.save(tmp_path / "rows.npy", np.asarray(values, order=order))
    mapped = map_array(tmp_path / "rows.npy")
    assert isinstance(mapped, np.memmap)
    assert (mapped.dtype, mapped.shape) == (np.float32, shape)
    assert np.array_equal(mapped, np.load(tmp_path / "rows.npy"))


def test_truncated_array_cannot_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, np.arange(6000))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"too few for \(6000,\) int64"):
        map_array(path)


def test_array_of_objects_cannot_be_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.array([object], object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        map_array(tmp_path / "rows.npy")


def test_index_may_be_a_tensor(mixed: tuple[ShardedArray, np.ndarray]) -> None:
    torch = pytest.importorskip("torch")
    array, whole = mixed
    for rows in ([7, 0, 3, 3, -1], [True, False] * 5):
        assert_same(array[torch.tensor(rows)], whole[rows], rows)
        assert_same(array[torch.tensor(rows), 1], whole[rows, 1], rows)
