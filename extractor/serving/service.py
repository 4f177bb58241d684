"""Decoding threads and a model thread that embed images for many callers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from extractor.compute.embed import PictureEmbedder
from extractor.compute.inputs import Inputs, batch_size_for, device_of, pictures_of
from extractor.errors import UsageError
from extractor.images.types import Failure, ImageSource
from extractor.models.embedding import EmbeddingSpec
from extractor.options import Options
from extractor.serving.decode_pool import DecodeOptions, DecodePool
from extractor.serving.model_thread import Calls, GatherOptions, ModelThread

__all__ = ["EmbeddingService"]

# Batches of one call on a GPU at a time: the next is decoded while one computes. On a CPU both
# would share the same cores.
GPU_BATCHES = 2

# Time that calls in progress get while close() waits; the last of them then ends the threads.
PATIENCE_SECONDS = 2.0


class EmbeddingService:
    """Embeds images for many callers at a time.

    Args:
        spec: Embedding to compute.
        options: Options of the extractor.
        pad_to: Number of images in every forward pass, see
            :class:`~extractor.compute.embed.PictureEmbedder`.
        window_seconds: Time to gather calls, see
            :class:`~extractor.serving.model_thread.GatherOptions`.
    """

    def __init__(
        self,
        spec: EmbeddingSpec,
        options: Options,
        *,
        pad_to: int | None = None,
        window_seconds: float | None = None,
    ) -> None:
        inputs = Inputs(options, batch_size_for([spec], options))
        self._shape = spec.shape
        self._batch_size = pad_to or inputs.batch_size
        self._batches = GPU_BATCHES if device_of([spec]).type == "cuda" else 1
        self._calls = Calls()
        self._state = threading.Condition()
        self._running = 0
        self._is_closed = False
        self._decoding = DecodePool(
            pictures_of([spec]),
            DecodeOptions(
                inputs.workers, options.max_pixels, options.image_timeout, inputs.decode_on_cpu
            ),
        )
        self._model = ModelThread(
            PictureEmbedder(spec, normalize=options.normalize, pad_to=pad_to),
            options.threads,
            GatherOptions(self._batch_size, window_seconds),
            self._calls,
        )

    def close(self) -> None:
        """Refuse further calls, and end the threads after those in progress.

        Waits for these calls for a while. If they take longer, the last one ends the threads.
        """
        with self._state:
            self._is_closed = True
            if not self._state.wait_for(lambda: not self._running, PATIENCE_SECONDS):
                return
        self.end()

    def end(self) -> None:
        """End the threads after the batches that they have."""
        self._model.close()
        self._decoding.close()

    def embed(
        self, sources: Sequence[ImageSource | Failure], *, stop_at_failure: bool
    ) -> tuple[npt.NDArray[np.float32], dict[int, Failure]]:
        """Embed images.

        Args:
            sources: Images; a failure in the place of one that could not be read.
            stop_at_failure: Compute nothing more once an image cannot be decoded.

        Returns:
            ``(N, *shape)`` float32, with undefined rows for failed images, and the failures by
            index.

        Raises:
            DeviceError: The device is full, busy or broken.
            SourceError: So many decoders hang that the disk must be the reason.
            UsageError: The service is closed.
        """
        with self._call():
            return self._embed(sources, stop_at_failure=stop_at_failure)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Count a call, so that the threads live until it has its rows."""
        with self._state:
            if self._is_closed:
                raise UsageError("this Extractor is closed; make a new one")
            self._running += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        """Count a call that has its rows; the last one after :meth:`close` ends the threads."""
        with self._state:
            self._running -= 1
            self._state.notify_all()
            is_last = self._is_closed and not self._running
        if is_last:
            self.end()

    def _embed(
        self, sources: Sequence[ImageSource | Failure], *, stop_at_failure: bool
    ) -> tuple[npt.NDArray[np.float32], dict[int, Failure]]:
        failures: dict[int, Failure] = {}
        computed = list(self._computed(sources, failures, stop_at_failure=stop_at_failure))
        if len(computed) == 1:
            return computed[0], failures
        empty = np.empty((0, *self._shape), np.float32)
        return (np.concatenate(computed) if computed else empty), failures

    def _computed(
        self,
        sources: Sequence[ImageSource | Failure],
        failures: dict[int, Failure],
        *,
        stop_at_failure: bool,
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Decode batch after batch, and yield the rows of each."""
        flights: list[Future[npt.NDArray[np.float32]]] = []
        size = self._batch_size
        for start in range(0, len(sources), size):
            batch = sources[start : start + size]
            self._calls.enter()
            try:
                decoded = self._decoding.decode(batch)
            finally:
                self._calls.leave()  # before the model thread can see the batch
            for index, outcome in enumerate(decoded.outcomes, start):
                if isinstance(outcome, Failure):
                    failures[index] = outcome
            if failures and stop_at_failure:
                return
            flights.append(self._model.submit(decoded.pictures))
            if len(flights) == self._batches:
                yield flights.pop(0).result()
        for flight in flights:
            yield flight.result()
