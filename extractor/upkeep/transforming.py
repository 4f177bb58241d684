"""``transform_store()``: the rows of a store normalized, projected and whitened, as a new store."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from extractor.errors import StoreDamagedError, StoreError, UnknownTokenError, UsageError
from extractor.reading.groups import check_comparable
from extractor.reading.reader import FeatureStore
from extractor.reading.transform import Transform, array_files, read_transform, unit_length
from extractor.store.atomic import write_atomically
from extractor.store.claim import ClaimedFolder
from extractor.store.format import (
    MANIFEST,
    RUN,
    Description,
    FileEntry,
    Manifest,
    with_checksum,
)
from extractor.store.job import Job
from extractor.store.plan import Plan
from extractor.store.publish import enclosing_store, finish_publishing
from extractor.store.writer import (
    ExistingStore,
    InterruptedRun,
    StoreRun,
    has_rows_of_list,
    take_up,
)
from extractor.text import plural
from extractor.upkeep.pca import Components, principal_components
from extractor.upkeep.source_rows import SourceRows

__all__ = ["TransformReport", "transform_store"]

OnProgress: TypeAlias = Callable[[str, int, int], None]

log = logging.getLogger(__name__)

BLOCK_BYTES = 32 * 2**20  # of rows in float64 at a time
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class TransformReport:
    """What ``transform_store`` did.

    >>> report = transform_store("features/resnet50", "small")  # again  # doctest: +SKIP
    >>> report.rows, report.added, report.is_changed  # doctest: +SKIP
    (25, 0, False)

    Attributes:
        out: Folder of the result.
        rows: Number of rows in it.
        added: Number of rows that were transformed by this call.
        removed: Number of rows that no longer count, since the source lacks them.
        shape: Shape of one row.
        dtype: Type of the stored values.
        is_fitted: Whether this call fitted the PCA; False where it reused that of the result, and
            without PCA.
        is_changed: Whether anything changed in the result.
    """

    out: Path
    rows: int
    added: int
    removed: int
    shape: tuple[int, ...]
    dtype: str
    is_fitted: bool
    is_changed: bool


@dataclass(frozen=True)
class _Request:
    """Steps that a caller asks for; see :func:`transform_store`."""

    normalize: bool
    pca: int | None
    whiten: bool
    dtype: str | None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: One makes no sense.
        """
        for name, value in (("normalize", self.normalize), ("whiten", self.whiten)):
            if not isinstance(value, bool):
                raise UsageError(f"{name}: got {value!r}, expected True or False")
        is_integer = isinstance(self.pca, (int, np.integer)) and not isinstance(self.pca, bool)
        if self.pca is not None and not (is_integer and self.pca >= 1):
            raise UsageError(f"pca: got {self.pca!r}, expected an integer of at least 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")

    @property
    def is_empty(self) -> bool:
        """Whether no step was asked for."""
        return self.steps == (False, None, False) and self.dtype is None

    @property
    def steps(self) -> tuple[bool, int | None, bool]:
        """Normalization, dimensions and whitening, as a manifest records them."""
        return self.normalize, None if self.pca is None else int(self.pca), self.whiten


def transform_store(
    store: FeatureStore | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    normalize: bool = False,
    pca: int | None = None,
    whiten: bool = False,
    dtype: str | None = None,
    fit: FeatureStore | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    lock: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> TransformReport:
    """Write a store whose rows are those of another one, normalized, projected and whitened.

    The steps that were asked for are taken in this order. Each row is scaled to unit length. The
    mean is subtracted, and the row projected onto the principal components. Each value is divided
    by the standard deviation in its direction. The row is scaled to unit length again. The result
    keeps the mean, the components and the scales, and applies them to the images of queries. Row i
    of the result is row i of the source, with the same path. Failures are carried over.

    On a result that exists, the call brings it up to date with its source. New rows are transformed
    as the old ones were, without a new fit, and old rows stay as they are.

    Jégou, Chum: Negative Evidences and Co-occurences in Image Retrieval, 2012.

    >>> report = transform_store(
    ...     "features/resnet50", "small", normalize=True, pca=8, whiten=True
    ... )  # doctest: +SKIP
    >>> report.shape, FeatureStore.open("small").features.shape  # doctest: +SKIP
    ((8,), (25, 8))

    Args:
        store: The source, or its folder.
        out: Folder of the result.
        normalize: Scale rows to unit length, before the PCA and at the end. Rows of zeros stay.
        pca: Number of dimensions to keep; all of them with ``whiten`` alone.
        whiten: Scale the kept dimensions to variance 1.
        dtype: ``float32`` or ``float16``; None for that of the source.
        fit: Store, or its folder, to fit the PCA on; None for the source. It must have been made
            as the source was.
        overwrite: Replace a store that is there, and fit anew.
        lock: Fail if the file system does not support locks.
        progress: Called with the phase (``fitting`` or ``writing``), the number of rows that are
            done, and how many there are.

    Raises:
        UsageError: An argument that makes no sense, or more dimensions than the rows have.
        StoreNotFoundError: No finished store.
        StoreDamagedError: A damaged store, or a row that is not finite.
        StoreBusyError: A run is writing to the result.
        StoreError: The result is another store or was made with other options, or the source is
            a result of a transform itself.
    """
    request = _Request(normalize, pca, whiten, dtype)
    progress = progress or (lambda *_: None)
    source = _source(store)
    fit_on = source if fit is None else _source(fit)
    out = Path(out)
    _check_out(out, source, fit_on)
    _check_shapes(request, source)
    check_comparable(source, fit_on, advice="fit on a store that was made as the source was")
    finish_publishing(out, lock=lock)
    with ClaimedFolder(out, overwrite=overwrite, extend=True, lock=lock) as claim:
        existing = _existing(claim, source)
        is_fitted = existing is None and _projects(request)
        if existing is None:
            _check_new(request, has_fit=fit is not None)
            transform, described = _new_transform(request, source, fit_on, progress)
        else:
            _check_request(out, request, existing.description, None if fit is None else fit_on)
            transform, described = existing.transform, existing.description
        try:
            made = _described(source, described)
            report = _write(claim, source, transform, made, is_fitted, progress)
        except UsageError:  # the same call would fail again
            claim.discard_work()
            raise
    _keep_run_json(source, out)
    return report


# ---------------------------------------------------------------------------------------------
# What to do


def _source(store: FeatureStore | str | os.PathLike[str]) -> FeatureStore:
    """Open a store to read.

    Raises:
        UsageError: Something else than a store.
        StoreError: It has no rows, or a transform made them.
    """
    if isinstance(store, (list, tuple)):
        raise UsageError(
            f"store: got a {type(store).__name__}, expected one store or its folder; transform "
            "each, with the same fit"
        )
    source = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    if source.manifest.description.transform is not None:
        origin = source.manifest.description.transform["source"]["store"]
        raise StoreError(
            f"{source.path} was made by extract transform; transform its source {origin} with all "
            "steps at once"
        )
    if not len(source):
        raise StoreError(f"{source.path} holds no rows, so there is nothing to transform")
    return source


def _check_out(out: Path, *read: FeatureStore) -> None:
    """Check where the result is to lie.

    Raises:
        UsageError: It is a store to read, or lies in a store, whose folder holds nothing else.
    """
    if os.path.realpath(out) in {os.path.realpath(each.path) for each in read}:
        raise UsageError(f"out: got {out}, which is the store to read; choose another folder")
    if (store := enclosing_store(out)) is not None:
        raise UsageError(f"out: {out} is in the store {store}; choose a folder beside it")


def _projects(request: _Request) -> bool:
    return request.pca is not None or request.whiten


def _check_shapes(request: _Request, source: FeatureStore) -> None:
    if not _projects(request):
        return
    if len(source.info.shape) != 1:
        raise UsageError(
            f"pca: {source.path} holds embeddings of shape {source.info.shape}, expected vectors; "
            "extract them with --pool avg"
        )
    if request.pca is not None and request.pca > source.dim:
        raise UsageError(
            f"pca: got {request.pca}, expected at most {source.dim}, the dim of {source.path}"
        )


def _check_new(request: _Request, *, has_fit: bool) -> None:
    if request.is_empty:
        raise UsageError(
            "transform: got no step, expected one of normalize, pca, whiten and dtype; try "
            "--normalize --pca 256 --whiten"
        )
    if has_fit and not _projects(request):
        raise UsageError("fit: only a PCA is fitted; add pca or whiten, or leave fit out")


@dataclass(frozen=True)
class _Existing:
    """The transform of a result that exists, or of a run that was interrupted."""

    transform: Transform
    description: Description


def _existing(claim: ClaimedFolder, source: FeatureStore) -> _Existing | None:
    """Return the transform of the result; None if there is none yet, or it is replaced.

    Raises:
        StoreError: The result is no transform, or one of another store.
        StoreDamagedError: A file of the transform is missing or changed.
    """
    job = claim.staged_job()
    if claim.overwrite:
        return None
    if (claim.out / MANIFEST).is_file():
        folder, description = claim.out, Manifest.read(claim.out / MANIFEST).description
    elif job is not None:
        folder, description = claim.staging, job.description
    else:
        return None
    transform = read_transform(folder, description)
    if transform is None or description.transform is None:
        raise StoreError(
            f"{claim.out} holds {description.made_with}, and no transform made its rows; choose "
            "another --out, or replace it with --overwrite"
        )
    origin = description.transform["source"]["store"]
    if not _is_source(source, description.transform["source"]):
        raise StoreError(
            f"{claim.out} was made from {origin}, got {source.path}; choose another --out, or "
            "replace it with --overwrite"
        )
    return _Existing(transform, description)


def _is_source(store: FeatureStore, origin: Mapping[str, str]) -> bool:
    """Return whether a result was made from a store, which may have been moved since."""
    if os.path.realpath(origin["store"]) == os.path.realpath(store.path):
        return True
    if (Path(origin["store"]) / MANIFEST).is_file():
        return False
    if origin["token"] == store.token:
        return True
    try:
        store.changes_since(origin["token"])
    except UnknownTokenError:
        return False
    return True


def _check_request(
    out: Path, request: _Request, description: Description, fit: FeatureStore | None
) -> None:
    """Check that a caller asks for what the result has; asking for nothing means the same.

    Raises:
        StoreError: It has other steps, or was fitted on another store.
    """
    made: Mapping[str, Any] = description.transform or {}
    fitted = made["fit"]
    has_other_fit = fit is not None and (
        fitted is None
        or (
            fitted["token"] != fit.token
            and os.path.realpath(fitted["store"]) != os.path.realpath(fit.path)
        )
    )
    normalize, pca, whiten = (made[name] for name in ("normalize", "pca", "whiten"))
    if request.whiten and request.pca is None:
        request = replace(request, pca=description.before_transform.dim)
    is_other = request.steps != (normalize, pca, whiten) or request.dtype not in (
        None,
        description.dtype,
    )
    if has_other_fit or (is_other and not request.is_empty):
        parts = [
            "--normalize" if normalize else "",
            f"--pca {pca}" if pca is not None else "",
            "--whiten" if whiten else "",
            f"--dtype {description.dtype}",
            f"--fit {fitted['store']}" if has_other_fit and fitted is not None else "",
        ]
        raise StoreError(
            f"{out} was made with {' '.join(filter(None, parts))}; repeat these options or leave "
            "all out to bring it up to date, or start over with --overwrite"
        )


# ---------------------------------------------------------------------------------------------
# Fitting


def _new_transform(
    request: _Request, source: FeatureStore, fit_on: FeatureStore, progress: OnProgress
) -> tuple[Transform, Description]:
    """Return a transform, fitted if it needs to be, and the description of its result."""
    dim, normalized = source.dim, request.normalize or source.info.normalized
    shape: list[int] = list(source.info.shape)
    transform, fit = Transform(request.normalize), None
    if _projects(request):
        dim = int(source.dim if request.pca is None else request.pca)
        found = principal_components(_fit_blocks(fit_on, request.normalize, progress), source.dim)
        _check_rank(found, dim, fit_on)
        scales = 1 / np.sqrt(found.variances[:dim]) if request.whiten else None
        transform = Transform(request.normalize, found.mean, found.directions[:dim], scales)
        fit = {"store": _folder(fit_on), "token": fit_on.token, "rows": found.rows}
        shape, normalized = [dim], request.normalize
    before = source.manifest.description
    made = {
        "normalize": request.normalize,
        "pca": dim if _projects(request) else None,
        "whiten": request.whiten,
        "files": [asdict(entry) for entry in _entries(array_files(transform))],
        "of": _before(before),
        "source": {},
        "fit": fit,
    }
    embedding = {
        **before.embedding,
        "dim": math.prod(shape),
        "shape": shape,
        "dtype": request.dtype or before.dtype,
        "normalized": normalized,
        "transform": made,
    }
    return transform, replace(before, embedding=embedding)


def _entries(files: Mapping[str, bytes]) -> list[FileEntry]:
    return [
        FileEntry(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    ]


def _described(source: FeatureStore, made: Description) -> Description:
    """Return the description of a result, with the present state of its source."""
    origin = {"store": _folder(source), "token": source.token}
    present = source.manifest.description  # the source may be another one now: take_up() compares
    transform = {**(made.transform or {}), "of": _before(present), "source": origin}
    result = {name: made.embedding[name] for name in ("dim", "shape", "dtype", "normalized")}
    embedding = {**present.embedding, **result, "transform": transform}
    return replace(present, embedding=embedding, shard_images=made.shard_images)


def _before(description: Description) -> dict[str, Any]:
    """Return what a transform changes in the manifest's embedding."""
    embedding = description.embedding
    return {
        "dim": description.dim,
        "shape": list(description.shape),
        "dtype": description.dtype,
        "normalized": bool(embedding.get("normalized", False)),
    }


def _folder(store: FeatureStore) -> str:
    return os.path.realpath(store.path)


def _check_rank(found: Components, dim: int, fit_on: FeatureStore) -> None:
    if dim > found.rank:
        fewer = f"try --pca {found.rank}, or " if found.rank else ""
        raise UsageError(
            f"pca: got {plural(dim, 'dimension')}, but the {plural(found.rows, 'row')} of "
            f"{fit_on.path} vary in {found.rank}; {fewer}fit on a store of more images"
        )


def _fit_blocks(
    store: FeatureStore, normalize: bool, progress: OnProgress
) -> Iterator[npt.NDArray[np.float64]]:
    progress("fitting", 0, len(store))
    for start, stop in _blocks(len(store), store.dim):
        rows = _finite(store, np.asarray(store.features[start:stop]), start)
        yield unit_length(rows) if normalize else rows.astype(np.float64)
        progress("fitting", stop, len(store))


def _blocks(rows: int, dim: int) -> Iterator[tuple[int, int]]:
    size = max(BLOCK_BYTES // (8 * max(dim, 1)), 1)
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def _finite(store: FeatureStore, rows: npt.NDArray[Any], start: int) -> npt.NDArray[Any]:
    """Return rows of a store, which start at a number.

    Raises:
        StoreDamagedError: One holds NaN or infinity.
    """
    wrong = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))
    if len(wrong):
        raise StoreDamagedError(
            f"{store.path}: row {start + int(wrong[0])} holds NaN or infinity; see extract verify "
            f"{store.path}"
        )
    return rows


# ---------------------------------------------------------------------------------------------
# Writing


def _write(
    claim: ClaimedFolder,
    source: FeatureStore,
    transform: Transform,
    description: Description,
    is_fitted: bool,
    progress: OnProgress,
) -> TransformReport:
    """Bring the result up to date, and report what changed."""
    wanted = SourceRows(source)
    existing = take_up(claim, description)
    run, plan, todo = _begin(existing, wanted, description, transform)
    if run is None:
        manifest = existing.base
        assert manifest is not None  # only a finished store is up to date
    else:
        _write_rows(run, wanted, todo, transform, progress)
        manifest = run.publish(plan, listing=source.manifest.listing, listed=wanted.listed)
    return TransformReport(
        out=claim.out,
        rows=manifest.rows,
        added=len(todo) if run is not None else 0,
        removed=plan.gone + plan.changed,
        shape=manifest.description.shape,
        dtype=manifest.description.dtype,
        is_fitted=is_fitted,
        is_changed=run is not None,
    )


def _begin(
    existing: ExistingStore | InterruptedRun,
    wanted: SourceRows,
    description: Description,
    transform: Transform,
) -> tuple[StoreRun | None, Plan, npt.NDArray[np.int64]]:
    """Begin a run, or resume an interrupted one.

    Returns:
        The run, None if the result is up to date; what becomes of its rows; and the rows of the
        source to transform.
    """
    files = array_files(transform) if existing.base is None else {}
    if isinstance(existing, InterruptedRun):
        plan = wanted.plan(existing.stored(planned=False, digests=True))
        todo = wanted.todo(plan)
        run = existing.resume(_job(existing, wanted, todo, description))
        if run is not None:
            _restore(existing.claim, files)
            return run, plan, todo
        existing = existing.seal()
    stored = existing.stored(digests=True)
    plan = wanted.plan(stored)
    todo = wanted.todo(plan)
    base = existing.base
    if (
        base is not None
        and not (existing.sealed or len(todo) or plan.changes(stored))
        and base.description.root == description.root
        and (wanted.listed is None or has_rows_of_list(existing.claim.out, base, wanted.listed))
    ):
        return None, plan, todo
    return existing.begin(_job(existing, wanted, todo, description), files), plan, todo


def _restore(claim: ClaimedFolder, files: Mapping[str, bytes]) -> None:
    """Write files of an interrupted run again that have other content by now."""
    for name, content in files.items():
        path = claim.staging / name
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)


def _job(
    existing: ExistingStore | InterruptedRun,
    wanted: SourceRows,
    todo: npt.NDArray[np.int64],
    description: Description,
) -> Job:
    checksum = existing.base.checksum if existing.base is not None else ""
    return Job(description, len(todo), wanted.digest(todo), existing.first_shard, checksum)


def _write_rows(
    run: StoreRun,
    wanted: SourceRows,
    todo: npt.NDArray[np.int64],
    transform: Transform,
    progress: OnProgress,
) -> None:
    """Transform rows of the source, shard by shard.

    Raises:
        UsageError: A value is too large for the type.
    """
    source, description = wanted.source, run.job.description
    dtype = np.dtype(description.dtype)
    done = run.resumed
    progress("writing", done, len(todo))
    for number in run.missing():
        start = (number - run.job.first) * description.shard_images
        rows = todo[start : start + description.shard_images]
        with run.shard(number) as shard:
            rows = rows[shard.images :]
            for first, stop in _blocks(len(rows), source.dim):
                block = rows[first:stop]
                read = _finite(source, wanted.features(block), int(block[0]))
                with np.errstate(over="ignore"):
                    written = transform.apply(read).astype(dtype)
                if not np.isfinite(written).all():
                    raise UsageError(
                        f"dtype: got {dtype}, but a value of the result is too large for it; use "
                        "float32, or normalize"
                    )
                shard.append(written, wanted.records(block))
                done += len(block)
                progress("writing", done, len(todo))
            shard.finish()


def _keep_run_json(source: FeatureStore, out: Path) -> None:
    """Keep what ``run.json`` of the source tells about its models, to embed queries.

    The request is left out, since no run over images made the result.
    """
    try:
        run = json.loads((source.path / RUN).read_text("ascii"))
        names = ("format", "version", "backbones", "computed")
        known = {name: run[name] for name in names if name in run}
        token = Manifest.read(out / MANIFEST).checksum
        content = {**known, "store": token, "request": None, "files": None, "checksum": ""}
        text = with_checksum(json.dumps(content, indent=2, ensure_ascii=True) + "\n").encode()
        if not (out / RUN).is_file() or (out / RUN).read_bytes() != text:
            write_atomically(out / RUN, text)
    except FileNotFoundError:
        (out / RUN).unlink(missing_ok=True)  # of a store that was replaced
    except (OSError, ValueError, KeyError, TypeError) as error:  # the result itself is complete
        log.warning("cannot write %s: %s", out / RUN, error)
