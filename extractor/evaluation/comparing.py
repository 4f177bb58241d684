"""``compare_stores()``: which embeddings of the same images tell classes apart better."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import UsageError
from extractor.evaluation.bootstrap import LEVEL, RESAMPLES, score_of
from extractor.evaluation.cka import linear_cka
from extractor.evaluation.evaluating import Evaluation, evaluate_store
from extractor.evaluation.labels import Labels, labels_of
from extractor.evaluation.speed import Speed, speed_of
from extractor.reading.groups import join_stores
from extractor.reading.reader import FeatureStore
from extractor.reading.rows import Rows, Selection
from extractor.search.knn import Metric
from extractor.text import plural

__all__ = ["ComparedStore", "Comparison", "Difference", "compare_stores"]

MAX_RESAMPLES = 20_000


@dataclass(frozen=True)
class ComparedStore:
    """One store of a comparison.

    Attributes:
        name: Short name, different from the others.
        evaluation: Its measures, over the images that all stores have in common.
        dim: Number of values in one embedding.
        bytes_per_image: Size of one embedding.
        left_out: Number of its rows whose images are not in all stores.
        parameters: Number of parameters of the network; None if it was not measured.
        images_per_second: Speed of the network, without reading and decoding; None if it was not
            measured.
    """

    name: str
    evaluation: Evaluation
    dim: int
    bytes_per_image: int
    left_out: int
    parameters: int | None = None
    images_per_second: float | None = None


@dataclass(frozen=True)
class Difference:
    """Difference of two stores in one measure, over the same queries.

    Attributes:
        better: Name of the store with the higher value.
        worse: Name of the other one.
        measure: Name of the measure.
        value: Mean over queries of the difference.
        low: Lower end of its interval.
        high: Upper end of its interval.
    """

    better: str
    worse: str
    measure: str
    value: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Several stores of the same images, side by side.

    >>> both = ["both/resnet50", "both/torchvision-resnet18"]  # doctest: +SKIP
    >>> comparison = compare_stores(both)  # doctest: +SKIP
    >>> sorted(each.dim for each in comparison.stores), comparison.images  # doctest: +SKIP
    ([512, 2048], 25)

    Attributes:
        images: Number of images that all stores have in common.
        measure: Measure by which the stores are sorted.
        stores: The stores, the best first.
        differences: Differences of all pairs in all measures.
        level: Probability that each interval of a difference covers; all of them together have
            95 % per measure (Bonferroni).
        cka: ``(stores, stores)``, linear CKA of each pair, in the order of :attr:`stores`.
    """

    images: int
    measure: str
    stores: tuple[ComparedStore, ...]
    differences: tuple[Difference, ...]
    level: float
    cka: npt.NDArray[np.float64] = field(compare=False)

    def to_mapping(self) -> dict[str, Any]:
        """Return the comparison for JSON; an undefined number is None."""
        stores = [
            {
                "name": each.name,
                "dim": each.dim,
                "bytes_per_image": each.bytes_per_image,
                "left_out": each.left_out,
                "parameters": each.parameters,
                "images_per_second": each.images_per_second,
                "evaluation": each.evaluation.to_mapping(),
            }
            for each in self.stores
        ]
        return {
            "images": self.images,
            "measure": self.measure,
            "stores": stores,
            "differences": [{**asdict(each), "is_real": each.is_real} for each in self.differences],
            "level": self.level,
            "cka": [[None if np.isnan(v) else v for v in row] for row in self.cka.tolist()],
        }


def compare_stores(
    stores: Sequence[FeatureStore | str | os.PathLike[str]],
    labels: Labels = None,
    *,
    k: Sequence[int] | None = None,
    metric: Metric = "cosine",
    probe: bool = False,
    speed: bool = False,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare embeddings of the same images: of several models, layers or variants.

    An image counts if it has the same path and the same content in all stores.

    >>> both = ["both/resnet50", "both/torchvision-resnet18"]  # doctest: +SKIP
    >>> comparison = compare_stores(both, k=[1])  # doctest: +SKIP
    >>> comparison.measure, [each.left_out for each in comparison.stores]  # doctest: +SKIP
    ('accuracy@1', [0, 0])

    Args:
        stores: Stores or their folders, two or more.
        labels: As for :func:`evaluate_store`; one label per row are those of the first store.
        k: Numbers of neighbors; None for 1, 5 and 20.
        metric: ``cosine``, ``ip`` or ``l2``.
        probe: Also train a linear classifier; needs scikit-learn.
        speed: Load each network, count its parameters and measure its speed.
        device: Device to measure the speed on.
        seed: Seed of the intervals, and of the parts of the linear probe.
        progress: Called with the phase (``measuring`` the speed, ``comparing``, ``training`` the
            linear classifier, or ``resampling``), the number of queries of all stores that are
            done, and how many there are.

    Raises:
        UsageError: Fewer than two stores, the same folder twice, or as for
            :func:`evaluate_store`.
        StoreError: No image is in all stores, or their embeddings are no vectors.
        InstallationError: The linear probe needs scikit-learn.
    """
    if isinstance(stores, (str, os.PathLike)) or len(stores) < 2:
        count = 1 if isinstance(stores, (str, os.PathLike)) else len(stores)
        raise UsageError(f"compare: got {plural(count, 'store')}, expected at least two")
    opened = [s if isinstance(s, FeatureStore) else FeatureStore.open(s) for s in stores]
    joined = join_stores(opened, unit_parts=False)
    names = labels_of(opened[0], labels)
    common = [names[row] for row in _rows(joined.sources[0]).tolist()]
    show = progress or (lambda *_: None)
    total = len(opened) * len(common)
    if speed:
        show("measuring", 0, total)
    speeds = [speed_of(store, device) if speed else None for store in opened]

    def evaluated(number: int, rows: Rows) -> Evaluation:
        def show_all(phase: str, done: int, _: int) -> None:
            show(phase, number * len(common) + done, total)

        return evaluate_store(
            rows, common, k=k, metric=metric, probe=probe, seed=seed, progress=show_all
        )

    compared = [
        _compared(name, evaluated(number, rows), rows, left_out, measured)
        for number, (name, rows, left_out, measured) in enumerate(
            zip(_short_names(opened), joined.sources, joined.left_out, speeds, strict=True)
        )
    ]
    show("resampling", total, total)
    measure = next(iter(compared[0].evaluation.scores))
    order = sorted(
        range(len(compared)), key=lambda i: -compared[i].evaluation.scores[measure].value
    )
    sorted_stores = tuple(compared[i] for i in order)
    level = 1 - (1 - LEVEL) / max(len(order) * (len(order) - 1) // 2, 1)
    return Comparison(
        images=len(common),
        measure=measure,
        stores=sorted_stores,
        differences=_differences(sorted_stores, level, seed),
        level=level,
        cka=_similarities([joined.sources[i] for i in order]),
    )


def _rows(rows: Rows) -> npt.NDArray[np.int64]:
    assert isinstance(rows, Selection)
    return rows.rows


def _compared(
    name: str, evaluation: Evaluation, rows: Rows, left_out: int, speed: Speed | None
) -> ComparedStore:
    return ComparedStore(
        name,
        evaluation,
        rows.dim,
        rows.dim * rows.features.dtype.itemsize,
        left_out,
        None if speed is None else speed.parameters,
        None if speed is None else speed.images_per_second,
    )


def _short_names(stores: Sequence[FeatureStore]) -> list[str]:
    """Return the names of the folders, or their paths if two have the same name."""
    names = [store.path.absolute().name for store in stores]
    return names if len(set(names)) == len(names) else [str(store.path) for store in stores]


def _differences(
    stores: Sequence[ComparedStore], level: float, seed: int
) -> tuple[Difference, ...]:
    resamples = min(round(RESAMPLES * (1 - LEVEL) / (1 - level)), MAX_RESAMPLES)
    found = []
    for measure in stores[0].evaluation.scores:
        for first, second in itertools.combinations(stores, 2):
            values = first.evaluation.values[measure] - second.evaluation.values[measure]
            score = score_of(values, seed, level=level, resamples=resamples)
            better, worse, low, high = first.name, second.name, score.low, score.high
            if score.value < 0:
                better, worse, low, high = worse, better, -high, -low
            found.append(Difference(better, worse, measure, abs(score.value), low, high))
    return tuple(found)


def _similarities(sources: Sequence[Rows]) -> npt.NDArray[np.float64]:
    similarities = np.eye(len(sources))
    for i, j in itertools.combinations(range(len(sources)), 2):
        similarities[i, j] = linear_cka(sources[i].features, sources[j].features)
        similarities[j, i] = similarities[i, j]
    return similarities
