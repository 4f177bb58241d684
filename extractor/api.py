"""The library's entry points: :func:`extract` fills stores, :class:`Extractor` embeds in memory."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import numpy as np
import numpy.typing as npt
import torch

from extractor.errors import DecodeError, StoreError, UsageError
from extractor.images.listing import ImageList, Input
from extractor.images.types import Failure, ImageSource
from extractor.lease.describe import describe
from extractor.models.backbone import Backbone
from extractor.models.embedding import EmbeddingSpec, Model, load_specs
from extractor.options import DEFAULT_MODEL, SERVING, Options, signature_with_options
from extractor.parts.session import PartSession
from extractor.reading.groups import DIFFERENCES_SHOWN, SAME, JoinedRows, StoreGroup
from extractor.reading.reader import FeatureStore
from extractor.reading.rows import Rows, Selection
from extractor.reading.transform import Transform
from extractor.report import Progress, Report
from extractor.run.callbacks import Callbacks
from extractor.run.encoder import encoder_of
from extractor.run.preflight import check_output_name
from extractor.run.session import Session
from extractor.serving.service import EmbeddingService
from extractor.serving.sources import AnyImage, check_images
from extractor.store.format import Description
from extractor.system.devices import on_cpu_by_default
from extractor.system.installation import installation_errors

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from extractor.option_arguments import EmbeddingArguments, OptionArguments, ServingArguments

__all__ = ["Extractor", "Progress", "Report", "extract"]

MAX_WINDOW_MS = 60_000
SCALE = (".dtype", ".normalized")  # ends of keys of the manifest that change no direction


def extract(
    images: Input | Iterable[Input] | ImageList,
    model: Model | Sequence[Model] = DEFAULT_MODEL,
    out: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Unpack[OptionArguments],
) -> Report:
    """Embed folders of images into stores of ``.npy`` files, as the command does.

    An image that cannot be decoded has no row; the store lists it in ``failures.jsonl``. A run that
    is stopped or killed keeps its rows, and the same call resumes. On a finished store, the call
    computes new and changed images, and retires the rows of changed and missing ones.

    >>> report = extract("images", "resnet50", "features/resnet50")  # doctest: +SKIP
    >>> report.rows, report.store.features.shape  # doctest: +SKIP
    (25, (25, 2048))

    Several models, named or loaded, fill a store each in one pass over the images:

    >>> both = extract("images", ["resnet50", "torchvision:resnet18"], "both")  # doctest: +SKIP
    >>> [store.out.name for store in both.stores]  # doctest: +SKIP
    ['resnet50', 'torchvision-resnet18']

    Args:
        images: A folder, an image, several of them, or an :class:`ImageList`.
        model: A name as for :func:`load_backbone`, a :class:`Backbone`, or several. ``A+B`` joins
            the embeddings of A and B, each of unit length, to one vector. ``NAME=WEIGHTS`` has
            weights of its own, such as ``resnet50=weights.pth``. Several models fill one
            store each, and every image is decoded once.
        out: Folder of the store; with several stores the folder that holds them. None writes to
            ``features/<name>``, where the name is that of the model, with ``@layer`` if one was
            chosen.
        progress: Called with a :class:`Progress` when a phase begins and after every batch, in the
            calling thread; also if there is nothing to do. If it raises, the run ends as if
            stopped, with that exception. The run waits for it.
        stop: Asked after each of these calls until all rows are computed, so before the models are
            loaded as well. When it returns true, the run ends and keeps its rows.

    All other arguments are fields of :class:`Options`, such as ``weights`` and ``batch_size``.

    Returns:
        What the run did, with the stores.

    Raises:
        TypeError: An option that does not exist.
        InterruptedRunError: ``stop`` returned true.
        ExtractorError: No usable row was added; the subclass and the message say why.
    """
    checked = Options.from_arguments(options)
    is_one = isinstance(model, (str, Backbone, torch.nn.Module)) or not isinstance(model, Iterable)
    models: list[Any] = [model] if is_one else list(model)  # type: ignore[arg-type]
    for each in models:
        _check_model(each)
    for name, callback in (("progress", progress), ("stop", stop)):
        if callback is not None and not callable(callback):
            raise UsageError(f"{name}: got {callback!r}, expected a function or None")
    session = (Session if checked.part is None else PartSession)(
        models, check_output_name(out), checked
    )
    callbacks = Callbacks(progress, stop)
    with installation_errors(callbacks.has_raised), on_cpu_by_default():
        return session.run(images, callbacks)


# help() and editors show every option.
extract.__signature__ = signature_with_options(extract)  # type: ignore[attr-defined]


class Extractor:
    """Embeds images in memory, with the same pixels and the same model as :func:`extract`.

    It may be called from many threads. Decoding threads live as long as the extractor, and one
    thread of its own computes for all callers. Leave it to the garbage collector, call
    :meth:`close`, or use it as a context manager.

    >>> extractor = Extractor("torchvision:squeezenet1_0", weights="random", device="cpu")
    >>> extractor([np.zeros((300, 200, 3), np.uint8)]).shape
    (1, 512)

    Args:
        model: A name, ``A+B`` for both embeddings in one vector, or a :class:`Backbone`.
        batch_window_ms: Time in milliseconds in which calls of other threads are gathered into one
            forward pass. A lone call does not wait. None computes every call alone; then rows do
            not depend on other callers, not even in their last bits.

    The other arguments are fields of :class:`Options`. Those of stores and of reading files do not
    apply.

    Raises:
        TypeError: An option that does not apply, or does not exist.
        UsageError: Several layers without ``concat``, which are several embeddings per image; or
            ``decode="gpu"``.
        ExtractorError: As for :func:`load_backbone`.
    """

    def __init__(
        self,
        model: Model = DEFAULT_MODEL,
        *,
        batch_window_ms: float | None = None,
        **options: Unpack[EmbeddingArguments],
    ) -> None:
        checked = Options.from_arguments(options, scope="images")
        _check_model(model)
        _check_window(batch_window_ms)
        _check_decode(checked.decode)
        with on_cpu_by_default():
            specs = load_specs([model], checked, fold_given=False)
        if len(specs) != 1:
            names = ", ".join(spec.name for spec in specs)
            raise UsageError(
                f"layers: got {len(specs)} embeddings per image ({names}), expected one; try "
                "concat=True"
            )
        self._serve(specs[0], checked, batch_window_ms)

    @classmethod
    def for_store(
        cls,
        store: Rows | str | os.PathLike[str],
        *,
        device: str = "auto",
        weights: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
        backbone: Backbone | None = None,
        exact: bool = False,
        batch_window_ms: float | None = None,
        **options: Unpack[ServingArguments],
    ) -> Extractor:
        """Return an extractor whose rows can be compared with those of a store.

        The manifest of the store decides the model, its weights, layers and pooling, the pixels,
        the precision and the scaling. If ``extract transform`` made the store, the same transform
        is applied. Weights with another SHA-256 are refused. Files of your own are found where they
        were, as ``run.json`` keeps it.

        >>> store = FeatureStore.open("features/resnet50")  # doctest: +SKIP
        >>> with Extractor.for_store(store) as embed:  # doctest: +SKIP
        ...     scores = store.features[:] @ embed(["images/cats/tom.jpg"])[0]
        >>> scores.shape  # doctest: +SKIP
        (25,)

        Args:
            store: A store, a selection of one, stores of one backbone, or the folder of a store.
            device: Device to compute on. ``auto`` with ``exact`` is the kind of the store's.
            weights: File or tag of the weights, if they are no longer where they were. For a store
                of several backbones a mapping from model to file. ``FILE.py:FUNCTION`` for code of
                your own.
            backbone: The network, if the store was made with a :class:`Backbone` of your own.
            exact: Compute in batches of the store's size, with its threads, compiled if it was, and
                round to its ``dtype``. Rows then equal the store's bit by bit on the same machine.
                Without it their cosine similarity is at least 0.9999, in half precision 0.999.
            batch_window_ms: As for :class:`Extractor`.
            options: ``batch_size``, ``workers``, ``threads``, ``max_pixels`` and ``image_timeout``,
                as for :class:`Extractor`.

        Raises:
            TypeError: Another option, which the store decides.
            WeightsError: The weights are missing, or others than those of the store.
            StoreError: There is no store, or this installation would make other embeddings.
            UsageError: ``exact`` on another kind of device, or with options that contradict it.
            ExtractorError: The model cannot be loaded.
        """
        for name in options:
            if name not in SERVING:
                raise TypeError(
                    f"option {name!r} does not apply here: the store decides how images are "
                    f"embedded; expected {', '.join(SERVING)}"
                )
        _check_window(batch_window_ms)
        if backbone is not None and weights is not None:
            raise UsageError("weights: the backbone already has weights; leave this option out")
        if backbone is not None and not isinstance(backbone, Backbone):
            raise UsageError(
                f"backbone: got {type(backbone).__name__}, expected a Backbone; try "
                "Backbone.from_module"
            )
        opened = _store_of(store)
        with on_cpu_by_default():
            encoder = encoder_of(
                opened,
                options,
                weights=weights if backbone is None else backbone,
                device=device,
                exact=exact,
            )
        extractor = cls.__new__(cls)
        extractor._serve(
            encoder.spec,
            encoder.options,
            batch_window_ms,
            pad_to=encoder.pad_to,
            dtype=encoder.dtype,
        )
        extractor._made_for = opened.manifest.description
        if encoder.transform is not None:
            extractor._finish = _Finish(encoder.transform, np.dtype(encoder.result_dtype))
            extractor._shape = opened.info.shape
        return extractor

    def _serve(
        self,
        spec: EmbeddingSpec,
        options: Options,
        batch_window_ms: float | None,
        *,
        pad_to: int | None = None,
        dtype: str = "float32",
    ) -> None:
        """Start the threads for a loaded embedding, whose rows are rounded to a type."""
        self._process = os.getpid()
        self._is_closed = False
        self._spec = spec
        self._dtype = np.dtype(dtype)
        self._finish: _Finish | None = None
        self._options = options
        self._made_for: Description | None = None
        self._shape = spec.shape
        service = EmbeddingService(
            spec, options, pad_to=pad_to, window_seconds=_seconds(batch_window_ms)
        )
        self._service = service
        # No call is in progress when the garbage collector comes; at exit, none is waited for.
        self._finalizer = weakref.finalize(self, service.end)

    @property
    def backbones(self) -> tuple[Backbone, ...]:
        """Backbones that compute the embedding; one, except for ``A+B``."""
        return self._spec.backbones

    @property
    def dim(self) -> int:
        """Number of values in one embedding."""
        return math.prod(self._shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one embedding: ``(dim,)``, or the axes of a layer without pooling."""
        return self._shape

    def _check_fits(self, rows: Rows) -> None:
        """Check that rows of a store can be compared with embeddings of this extractor.

        Raises:
            StoreError: The store has other weights, another layer or other pixels.
        """
        while isinstance(rows, Selection):
            rows = rows.base
        if isinstance(rows, JoinedRows):  # their stores were made in several ways
            return
        store = _store_of(rows)
        for backbone in self.backbones:
            backbone._refresh_provenance()
        made = self._made_for or describe(self._spec, self._options, b"", 0)
        differences = [
            str(difference)
            for difference in store.manifest.description.differences(made)
            if difference.key.startswith(SAME) and not difference.key.endswith(SCALE)
        ]
        if differences:
            raise StoreError(
                f"extractor: {store.path} was not made as this extractor embeds "
                f"({'; '.join(differences[:DIFFERENCES_SHOWN])}); try Extractor.for_store"
            )

    def close(self) -> None:
        """End the threads. Calls in progress still get their rows; later ones are refused."""
        self._is_closed = True
        if os.getpid() == self._process:  # a fork has neither the threads nor the calls
            self._service.close()

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "an Extractor cannot be pickled or copied, as its threads belong to this process; make "
            "one in each process"
        )

    def __enter__(self) -> Extractor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def __call__(
        self, images: Iterable[AnyImage], *, on_error: Literal["raise"] = "raise"
    ) -> npt.NDArray[np.float32]: ...

    @overload
    def __call__(
        self, images: Iterable[AnyImage], *, on_error: Literal["return"]
    ) -> list[npt.NDArray[np.float32] | DecodeError]: ...

    def __call__(
        self, images: Iterable[AnyImage], *, on_error: Literal["raise", "return"] = "raise"
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32] | DecodeError]:
        """Embed images.

        A single image is decoded in the calling thread. Several images are decoded by the threads
        of the extractor, each within ``image_timeout``.

        Args:
            images: Paths, encoded images as bytes, binary files, PIL images, or uint8 RGB arrays
                ``(H, W, 3)``, mixed as you like. ``(H, W)`` is gray; a fourth channel is dropped.
                An array ``(N, H, W, 3)`` holds N images. Files are read and stay open.
            on_error: ``raise`` raises the error of the first image that cannot be decoded.
                ``return`` returns the errors in the places of their rows.

        Returns:
            ``(N, dim)`` float32, in the order of the images; ``(N, *shape)`` for a layer without
            pooling. With ``on_error="return"`` a list with a row ``(dim,)`` or a
            :class:`DecodeError` for each image.

        Raises:
            DecodeError: An image cannot be decoded; ``error.index`` says which one.
            UsageError: A single image instead of several, an object that is no image, a call after
                :meth:`close`, or in a process that was forked after the extractor was made.
        """
        if on_error not in ("raise", "return"):
            raise UsageError(f"on_error: got {on_error!r}, expected 'raise' or 'return'")
        if os.getpid() != self._process:
            # Threads do not survive a fork, and waiting for them would never end.
            raise UsageError("this Extractor belongs to another process; make one after the fork")
        if self._is_closed:
            raise UsageError("this Extractor is closed; make a new one")
        sources = check_images(images)
        rows, failures = self._service.embed(sources, stop_at_failure=on_error == "raise")
        if self._dtype != rows.dtype:
            with np.errstate(over="ignore"):  # infinite, as a run rounds it
                rows = rows.astype(self._dtype).astype(np.float32)
        if self._finish is not None:
            rows = self._finish(rows)
        errors = {i: _decode_error(sources[i], i, failure) for i, failure in failures.items()}
        if on_error == "return":
            return [errors[i] if i in errors else rows[i] for i in range(len(sources))]
        if errors:
            raise errors[min(errors)]
        return rows


@dataclass(frozen=True)
class _Finish:
    """What becomes of the embedding of an image in a store that a transform made."""

    transform: Transform
    dtype: np.dtype[Any]

    def __call__(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with np.errstate(all="ignore"):  # rows of failed images are undefined
            return self.transform.apply(rows).astype(self.dtype).astype(np.float32)


def _store_of(rows: object) -> FeatureStore:
    """Return a store that was made as all these rows were.

    Raises:
        StoreError: There is no store.
        UsageError: The rows have no common encoder.
    """
    while isinstance(rows, Selection):
        rows = rows.base
    if isinstance(rows, StoreGroup):
        return rows.stores[0]
    if isinstance(rows, (str, os.PathLike)):
        return FeatureStore.open(rows)
    if not isinstance(rows, FeatureStore):
        raise UsageError(
            f"store: got {type(rows).__name__}, expected a FeatureStore or the folder of one; for "
            "joined stores make an extractor for each"
        )
    return rows


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _check_window(milliseconds: Any) -> None:
    """Check the time in which calls are gathered.

    Raises:
        UsageError: It is no number of milliseconds within a minute.
    """
    is_number = isinstance(milliseconds, (int, float)) and not isinstance(milliseconds, bool)
    if milliseconds is not None and not (is_number and 0 <= milliseconds <= MAX_WINDOW_MS):
        raise UsageError(
            f"batch_window_ms: got {milliseconds!r}, expected None or a number from 0 to "
            f"{MAX_WINDOW_MS:,}"
        )


def _check_decode(decode: str) -> None:
    """Check how images in memory are to be decoded.

    Raises:
        UsageError: By a GPU, which only runs do.
    """
    if decode == "gpu":
        raise UsageError(
            "decode: got gpu, which only extract() offers; an Extractor decodes on the CPU, try "
            "scaled or exact"
        )


def _decode_error(source: ImageSource | Failure, index: int, failure: Failure) -> DecodeError:
    name = f" ({source})" if isinstance(source, (str, os.PathLike)) else ""
    error = DecodeError(failure.reason, f"image {index}{name}: {failure.message}")
    error.size, error.mtime_ns, error.index = failure.size, failure.mtime_ns, index
    return error


def _check_model(model: object) -> None:
    """Check that a value is a name or a loaded model.

    Raises:
        UsageError: It is neither.
    """
    if not isinstance(model, (str, Backbone)):
        advice = "Backbone.from_module for a network"
        if isinstance(model, Rows):
            advice = "Extractor.for_store"
        raise UsageError(
            f"model: got {type(model).__name__}, expected a name or a Backbone; try {advice}"
        )


Extractor.__signature__ = signature_with_options(Extractor, scope="images")  # type: ignore[attr-defined]
