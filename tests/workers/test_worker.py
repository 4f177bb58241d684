"""A worker: whether its rows would be those that the driver described."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.networks import mean_pixel

from extractor.errors import DeviceError, UsageError
from extractor.lease.describe import describe
from extractor.models.embedding import EmbeddingPart, EmbeddingSpec
from extractor.options import Options
from extractor.workers.worker import ShardWorker
from extractor.workers.worker_process import NOT_FATAL


def worker_beside(**computation: object) -> tuple[ShardWorker, SimpleNamespace]:
    """Return a worker, and the target of a driver that computes otherwise."""
    options = Options(batch_size=2, shard_images=8)
    spec = EmbeddingSpec("mean", (EmbeddingPart(mean_pixel()),))
    worker = object.__new__(ShardWorker)
    vars(worker).update(_setup=SimpleNamespace(options=options, batch_size=2), _specs=[spec])
    own = describe(spec, options, b"/", 2)
    described = replace(own, computation={**own.computation, **computation})
    return worker, SimpleNamespace(description=described, spec=0)


def test_a_worker_that_computes_as_the_driver_does_works() -> None:
    worker, target = worker_beside()
    worker._check_same(target)  # type: ignore[arg-type]


def test_a_worker_that_cannot_compile_leaves_the_run_to_others() -> None:
    worker, target = worker_beside(compiled=True)
    with pytest.raises(DeviceError, match="a worker could not compile the model; try --compile of"):
        worker._check_same(target)  # type: ignore[arg-type]
    assert DeviceError.__name__ in NOT_FATAL


def test_a_worker_that_computes_otherwise_ends_the_run() -> None:
    worker, target = worker_beside(precision="float16")
    with pytest.raises(UsageError, match="precision: float16 in the driver, float32 in the worker"):
        worker._check_same(target)  # type: ignore[arg-type]
    assert UsageError.__name__ not in NOT_FATAL
