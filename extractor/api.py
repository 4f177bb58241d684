"""The library's entry points: :func:`extract` fills stores, :class:`Extractor` embeds in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from extractor.compute.embed import embed
from extractor.compute.inputs import Inputs, batch_size_for
from extractor.errors import DecodeError, UsageError
from extractor.images.listing import ImageList, Input
from extractor.images.types import EncodedImage, Failure, ImageSource
from extractor.models.backbone import Backbone
from extractor.models.embedding import Model, load_specs
from extractor.options import DEFAULT_MODEL, Options, signature_with_options
from extractor.report import Progress, Report
from extractor.run.passes import Callbacks
from extractor.run.preflight import check_output_name
from extractor.run.session import Session
from extractor.system.cpu import compute_threads
from extractor.system.installation import installation_errors

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from extractor.option_arguments import EmbeddingArguments, OptionArguments

__all__ = ["Extractor", "Progress", "Report", "extract"]


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
    (334, (334, 2048))

    Args:
        images: A folder, an image, several of them, or an :class:`ImageList`.
        model: A name as for :func:`load_backbone`, a :class:`Backbone`, or several. ``A+B`` joins
            the embeddings of A and B, each of unit length, to one vector. Several models fill one
            store each, and every image is decoded once.
        out: Folder of the store; with several stores the folder that holds them. None writes to
            ``features/<name>``, where the name is that of the model, with ``@layer`` if one was
            chosen.
        progress: Called after every batch, in the calling thread.
        stop: Asked after every batch. When it returns true, the run ends and keeps its rows.

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
    session = Session(models, check_output_name(out), checked)
    with installation_errors():
        return session.run(images, Callbacks(progress, stop))


# help() and editors show every option.
extract.__signature__ = signature_with_options(extract)  # type: ignore[attr-defined]


AnyImage: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[np.uint8]"
)
_SINGLE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)


class Extractor:
    """Embeds images in memory, with the same pixels and the same model as :func:`extract`.

    >>> extractor = Extractor("torchvision:squeezenet1_0", weights="random", device="cpu")
    >>> extractor([np.zeros((300, 200, 3), np.uint8)]).shape
    (1, 512)

    Args:
        model: A name, ``A+B`` for both embeddings in one vector, or a :class:`Backbone`.

    The other arguments are fields of :class:`Options`. Those of stores and of reading files do not
    apply.

    Raises:
        TypeError: An option that does not apply, or does not exist.
        UsageError: Several layers without ``concat``, which are several embeddings per image.
        ExtractorError: As for :func:`load_backbone`.
    """

    def __init__(
        self,
        model: Model = DEFAULT_MODEL,
        **options: Unpack[EmbeddingArguments],
    ) -> None:
        self._process = os.getpid()
        self._options = Options.from_arguments(options, scope="images")
        _check_model(model)
        specs = load_specs([model], self._options, fold_given=False)
        if len(specs) != 1:
            names = ", ".join(spec.name for spec in specs)
            raise UsageError(
                f"layers: got {len(specs)} embeddings per image ({names}), expected one; try "
                "concat=True"
            )
        self._spec = specs[0]

    @property
    def backbones(self) -> tuple[Backbone, ...]:
        """Backbones that compute the embedding; one, except for ``A+B``."""
        return self._spec.backbones

    @property
    def dim(self) -> int:
        """Number of values in one embedding."""
        return self._spec.dim

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one embedding: ``(dim,)``, or the axes of a layer without pooling."""
        return self._spec.shape

    def __call__(self, images: Iterable[AnyImage]) -> npt.NDArray[np.float32]:
        """Embed images.

        Args:
            images: Paths, encoded images as bytes, PIL images, or uint8 RGB arrays ``(H, W, 3)``,
                mixed as you like. ``(H, W)`` is gray; a fourth channel is dropped. An array
                ``(N, H, W, 3)`` holds N images.

        Returns:
            ``(N, dim)`` float32, in the order of the images; ``(N, *shape)`` for a layer without
            pooling.

        Raises:
            DecodeError: An image cannot be decoded; the message has its index.
            UsageError: A single image instead of several, an object that is no image, or a call in
                a process that was forked after the extractor was made.
        """
        _check_several(images)
        if os.getpid() != self._process:
            # torch's threads do not survive a fork, and waiting for them would never end.
            raise UsageError("this Extractor belongs to another process; make one after the fork")
        sources = [_check_image(image, index) for index, image in enumerate(images)]
        if not sources:
            return np.empty((0, *self.shape), np.float32)
        # A single image should not pay for a full batch of padding.
        size = min(batch_size_for([self._spec], self._options), len(sources))
        starts = range(0, len(sources), size)
        batches = (sources[i : i + size] for i in starts)
        rows = []
        with (
            compute_threads(),
            Inputs(self._options, size).loader(batches, [self._spec]) as loader,
        ):
            computed = embed([self._spec], loader, normalize=self._options.normalize)
            for start, embedded in zip(starts, computed, strict=True):
                for i, outcome in enumerate(embedded.outcomes, start):
                    if isinstance(outcome, Failure):
                        source = sources[i]
                        name = f" ({source})" if isinstance(source, (str, os.PathLike)) else ""
                        raise DecodeError(outcome.reason, f"image {i}{name}: {outcome.message}")
                rows.append(embedded.rows[0])
        return np.concatenate(rows)


def _check_model(model: object) -> None:
    """Check that a value is a name or a loaded model.

    Raises:
        UsageError: It is neither.
    """
    if not isinstance(model, (str, Backbone)):
        raise UsageError(
            f"model: got {type(model).__name__}, expected a name or a Backbone; try "
            "Backbone.from_module for a network"
        )


def _check_several(images: object) -> None:
    """Check that a value holds several images in an order of their own.

    Raises:
        UsageError: A single image, or a collection that is no list of images.
    """
    advice = ""
    if isinstance(images, Mapping):
        advice = "list(images.values())"
    elif isinstance(images, torch.Tensor):
        advice = "[images.permute(1, 2, 0).numpy()] for uint8 (3, H, W) on the CPU"
        if images.ndim > 3:
            advice = "list(images.permute(0, 2, 3, 1).numpy()) for uint8 (N, 3, H, W) on the CPU"
    elif isinstance(images, (set, frozenset)):
        advice = "sorted(images), since a set has no order"
    elif hasattr(images, "read"):
        advice = "[images.read()]"
    elif isinstance(images, _SINGLE) or _is_one_array(images) or not isinstance(images, Iterable):
        advice = "[image]"
    if advice:
        count = "a single " if advice == "[image]" else ""
        raise UsageError(
            f"images: got {count}{type(images).__name__}, expected a list of images; try {advice}"
        )


def _is_one_array(images: object) -> bool:
    """Return whether an array of any library has too few axes for several images.

    One axis of strings or objects may be a list of paths.
    """
    axes = getattr(images, "ndim", None)
    kind = getattr(getattr(images, "dtype", None), "kind", "")
    return isinstance(axes, int) and axes < 4 and (axes != 1 or kind not in "OSU")


def _check_image(image: object, index: int) -> ImageSource:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return EncodedImage(bytes(image))
    if isinstance(image, (str, os.PathLike, Image.Image, np.ndarray)):
        return image
    advice = "; try image.permute(1, 2, 0).numpy()" if isinstance(image, torch.Tensor) else ""
    raise UsageError(
        f"image {index}: got {type(image).__name__}, expected a path, bytes, a PIL image or a "
        f"uint8 array{advice}"
    )


Extractor.__signature__ = signature_with_options(Extractor, scope="images")  # type: ignore[attr-defined]
