"""``evaluate_store()``: how often the nearest rows have the class of a query."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import UsageError
from extractor.evaluation.bootstrap import Score, score_of
from extractor.evaluation.labels import Labels, labels_of, store_of
from extractor.evaluation.metrics import (
    average_precision_at_r,
    knn_accuracy,
    r_precision,
    recall,
)
from extractor.evaluation.probe import probe as linear_probe
from extractor.evaluation.ranking import Ranking
from extractor.reading.groups import StoreGroup
from extractor.reading.reader import FeatureStore
from extractor.reading.rows import Rows
from extractor.search.knn import Metric, check_metric, nearest
from extractor.text import plural

__all__ = ["DEFAULT_K", "ClassScores", "Evaluation", "evaluate_store"]

DEFAULT_K = (1, 5, 20)
NEIGHBOR_BYTES = 64 * 2**20  # of neighbor lists at a time
MAX_QUERIES = 1024  # at a time
# Ranking all rows is faster than a search if a list has more than 1/16 of them: 1.1 against 15.8
# processor seconds for 2,500 rows of 512 numbers in two classes.
LONG_LISTS = 16

Codes = npt.NDArray[np.int64]
Values = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class ClassScores:
    """Measures of one class.

    Attributes:
        rows: Number of rows of this class in the store.
        queries: Number of queries of this class.
        scores: Mean of each measure over these queries; NaN where it is undefined.
    """

    rows: int
    queries: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """How well the rows of a store tell classes apart.

    >>> evaluation = evaluate_store("features/resnet50")  # doctest: +SKIP
    >>> sorted(evaluation.classes), list(evaluation.scores)[:3]  # doctest: +SKIP
    (['cats', 'dogs'], ['accuracy@1', 'accuracy@5', 'accuracy@20'])

    Attributes:
        store: Folder of the store.
        model: Name of the model.
        metric: How rows are compared.
        rows: Number of rows that are searched.
        queries: Number of queries.
        unmatched: Number of queries whose class no other row has. They count as wrong for the
            accuracy, and not at all for the other measures.
        scores: Each measure over all queries, with its interval.
        classes: Each class by name.
        values: Each measure, ``(queries,)``; NaN where it is undefined.
    """

    store: str
    model: str
    metric: str
    rows: int
    queries: int
    unmatched: int
    scores: Mapping[str, Score]
    classes: Mapping[str, ClassScores]
    values: Mapping[str, npt.NDArray[np.float64]] = field(repr=False, compare=False)

    def to_mapping(self) -> dict[str, Any]:
        """Return everything but :attr:`values`, for JSON; an undefined number is None."""
        content = {
            "store": self.store,
            "model": self.model,
            "metric": self.metric,
            "rows": self.rows,
            "queries": self.queries,
            "unmatched": self.unmatched,
            "scores": {name: asdict(score) for name, score in self.scores.items()},
            "classes": {
                name: {"rows": each.rows, "queries": each.queries, "scores": dict(each.scores)}
                for name, each in self.classes.items()
            },
        }
        plain: dict[str, Any] = _without_nan(content)
        return plain


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


def evaluate_store(
    store: Rows | str | os.PathLike[str],
    labels: Labels = None,
    *,
    k: Sequence[int] | None = None,
    metric: Metric = "cosine",
    queries: Rows | str | os.PathLike[str] | None = None,
    query_labels: Labels = None,
    probe: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Measure how well the nearest rows tell the class of an image.

    Each row is a query whose own row is left out, or queries come from another store. The measures
    are defined in ``docs/evaluate.md``. Equal distances go to the lower row.

    >>> evaluation = evaluate_store("features/resnet50", k=[1, 5])  # doctest: +SKIP
    >>> evaluation.rows, evaluation.scores["accuracy@1"].queries  # doctest: +SKIP
    (25, 25)

    Args:
        store: The store, its folder, or a selection of its rows.
        labels: None or ``folders`` for the names of the folders that hold the images; a CSV file
            with the columns ``path`` and ``label``; ``FILE.py:FUNCTION`` or a function, which gets
            a path; a mapping of paths; or one label per row.
        k: Numbers of neighbors; None for those of 1, 5 and 20 that are smaller than the store.
        metric: ``cosine``, ``ip`` for the inner product, or ``l2`` for the Euclidean distance.
        queries: Another store of the same backbone, whose rows are the queries.
        query_labels: Labels of these, as for ``labels``.
        probe: Also train a linear classifier; needs scikit-learn.
        seed: Seed of the intervals, and of the parts of the linear probe.
        progress: Called with the phase (``comparing``, or ``training`` the linear classifier), the
            number of queries that are done, and how many there are.

    Raises:
        UsageError: Labels are missing or unknown, no class has two rows, or k is too large.
        StoreError: A store is damaged, or the two are of different backbones.
        InstallationError: The linear probe needs scikit-learn.
    """
    rows = store if isinstance(store, Rows) else FeatureStore.open(store)
    source = store_of(rows)
    check_metric(metric)
    _check_seed(seed)
    names = _labels(rows, labels)
    asked = _Queries.of(rows, names, queries, query_labels)
    chosen = _checked_k(k, len(rows) - asked.is_own)
    classes = sorted(set(names))
    code_of = {name: code for code, name in enumerate(classes)}
    codes = np.array([code_of[name] for name in names], np.int64)
    truth = np.array([code_of.get(name, -1) for name in asked.names], np.int64)
    counts = np.append(np.bincount(codes, minlength=len(classes)), 0)
    relevant = counts[truth] - (asked.is_own & (truth >= 0))
    if not relevant.any():
        raise UsageError(
            f"labels: no query has another row of its class "
            f"({plural(len(rows), 'row')} in {plural(len(classes), 'class', 'classes')}), so "
            "nothing can be found"
        )
    show = progress or (lambda *_: None)
    show("comparing", 0, len(truth))
    parts: list[Values] = []
    for done, part in _retrieved(rows, codes, asked, truth, relevant, metric=metric, k=chosen):
        parts.append(part)
        show("comparing", done, len(truth))
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if probe:
        show("training", 0, len(truth))
        vectors = np.asarray(rows.features[:]).reshape(len(rows), -1).astype(np.float32)
        other = None if asked.is_own else asked.vectors(slice(None)).astype(np.float32)
        values["linear probe"] = linear_probe(vectors, codes, other, truth, seed=seed)
    return Evaluation(
        store=str(source.path),
        model=source.info.model,
        metric=metric,
        rows=len(rows),
        queries=len(truth),
        unmatched=int((relevant == 0).sum()),
        scores={name: score_of(each, seed) for name, each in values.items()},
        classes=_by_class(asked.names, names, values),
        values=values,
    )


def _labels(rows: Rows, labels: Labels) -> list[str]:
    if not len(rows):
        raise UsageError(f"{store_of(rows).path} holds no rows, so nothing can be evaluated")
    names = labels_of(rows, labels)
    if len(set(names)) == 1:
        raise UsageError(
            f"labels: all rows of {store_of(rows).path} have the label {names[0]!r}; expected two "
            "classes or more"
        )
    return names


@dataclass(frozen=True)
class _Queries:
    """Rows that are searched for.

    Attributes:
        rows: The rows.
        names: The label of each.
        is_own: Whether they are the rows of the store that is evaluated.
    """

    rows: Rows
    names: Sequence[str]
    is_own: bool

    @classmethod
    def of(
        cls,
        rows: Rows,
        names: Sequence[str],
        queries: Rows | str | os.PathLike[str] | None,
        labels: Labels,
    ) -> _Queries:
        if queries is None:
            if labels is not None:
                raise UsageError("query labels: there are no queries; name their store")
            return cls(rows, names, True)
        other = queries if isinstance(queries, Rows) else FeatureStore.open(queries)
        StoreGroup([store_of(rows), store_of(other)])  # refuses stores of different backbones
        if not len(other):
            raise UsageError(f"queries: {store_of(other).path} holds no rows")
        return cls(other, labels_of(other, labels), False)

    def vectors(self, rows: slice) -> npt.NDArray[Any]:
        """Return some of the queries, ``(n, dim)``."""
        picked = np.asarray(self.rows.features[rows])
        return picked.reshape(len(picked), -1)


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UsageError(f"seed: got {seed!r}, expected an integer of at least 0")


def _checked_k(k: Sequence[int] | None, available: int) -> list[int]:
    if k is None:
        return [each for each in DEFAULT_K if each <= available]
    if not isinstance(k, Iterable):
        raise UsageError(f"k: got {k!r}, expected a list of integers")
    for each in k:
        if isinstance(each, bool) or not isinstance(each, (int, np.integer)) or each < 1:
            raise UsageError(f"k: got {each!r}, expected integers of at least 1")
        if each > available:
            raise UsageError(f"k: got {each}, but a query has {plural(available, 'other row')}")
    if not k:
        raise UsageError("k: got an empty list, expected a number of neighbors")
    return sorted({int(each) for each in k})


def _retrieved(
    rows: Rows,
    codes: Codes,
    queries: _Queries,
    truth: Codes,
    relevant: Codes,
    *,
    metric: Metric,
    k: Sequence[int],
) -> Iterator[tuple[int, Values]]:
    """Yield each measure of retrieval for a few queries at a time, and how many are done."""
    depth = max([*k, int(relevant.max())])
    classes = int(codes.max()) + 1
    is_long = depth * LONG_LISTS > len(rows)
    ranking = Ranking(rows.features, metric) if is_long else None
    step = max(min(NEIGHBOR_BYTES // (16 * (len(rows) if is_long else depth)), MAX_QUERIES), 1)
    with_none = np.append(codes, -1)  # a neighbor of -1 has no class
    for start in range(0, len(truth), step):
        chunk = slice(start, min(start + step, len(truth)))
        own = np.arange(chunk.start, chunk.stop) if queries.is_own else None
        vectors = queries.vectors(chunk)
        if ranking is not None:
            found = ranking.nearest(vectors, depth, own)
        else:
            found = nearest(rows.features, vectors, depth, metric=metric, own_rows=own).rows
        neighbors, wanted = with_none[found], relevant[chunk]
        matches = (neighbors == truth[chunk, None]) & (neighbors >= 0)
        yield (
            chunk.stop,
            {
                **{
                    f"accuracy@{each}": knn_accuracy(neighbors, truth[chunk], classes, each)
                    for each in k
                },
                **{f"recall@{each}": recall(matches, wanted, each) for each in k},
                "MAP@R": average_precision_at_r(matches, wanted),
                "R-precision": r_precision(matches, wanted),
            },
        )


def _by_class(
    query_names: Sequence[str], row_names: Sequence[str], values: Values
) -> dict[str, ClassScores]:
    names = sorted({*query_names, *row_names})
    code_of = {name: code for code, name in enumerate(names)}
    asked = np.array([code_of[name] for name in query_names], np.int64)
    stored = np.array([code_of[name] for name in row_names], np.int64)
    rows, queries = (np.bincount(codes, minlength=len(names)) for codes in (stored, asked))
    means = {}
    for measure, each in values.items():
        defined = ~np.isnan(each)
        sums = np.bincount(asked[defined], each[defined], len(names))
        counts = np.bincount(asked[defined], minlength=len(names))
        means[measure] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return {
        name: ClassScores(
            int(rows[code]),
            int(queries[code]),
            {measure: float(mean[code]) for measure, mean in means.items()},
        )
        for name, code in code_of.items()
    }
