"""What takes the whole process down: which images were at hand, and decoding them apart from it.

A decoder that crashes leaves no chance to say which image it was. So each decoding thread notes its
image in a file that is mapped into memory and outlives the process; the next run finds the names
there and decodes these images in a process of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget, allow_pixels
from extractor.images.decode import decode_into
from extractor.images.types import ImageInfo
from extractor.options import DECODE
from extractor.preprocess import Preprocess
from extractor.store.publish import explained

__all__ = ["InFlight", "decode_apart"]

SLOT_BYTES = 8192  # two for a length, and a path, which Linux does not take longer than 4095
LENGTH_BYTES = 2

# What a process gets to start, beside the time for the image.
START_SECONDS = 30.0  # of which torch takes most

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class InFlight:
    """A file in which each thread keeps the path of the image that it decodes just now.

    A context manager; leaving it removes the file. Only a process that dies leaves it behind.
    """

    def __init__(self, path: Path, slots: int) -> None:
        self._path = path
        self._slots = slots

    def __enter__(self) -> InFlight:
        with explained(self._path.parent.parent), self._path.open("w+b") as file:
            # Written and not only made that long: on a full disk, to touch it would be fatal.
            file.write(bytes(self._slots * SLOT_BYTES))
            file.flush()
            self._map = mmap.mmap(file.fileno(), self._slots * SLOT_BYTES)
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        # Not closed: a thread that was given up may still note something.

    def note(self, slot: int, path: bytes) -> None:
        """Keep a path, or nothing in its place (``b""``)."""
        if slot >= self._slots or len(path) > SLOT_BYTES - LENGTH_BYTES:
            return
        start = slot * SLOT_BYTES
        self._map[start : start + LENGTH_BYTES] = bytes(LENGTH_BYTES)
        self._map[start + LENGTH_BYTES : start + LENGTH_BYTES + len(path)] = path
        self._map[start : start + LENGTH_BYTES] = len(path).to_bytes(LENGTH_BYTES, "little")

    @staticmethod
    def left(path: Path) -> list[bytes]:
        """The paths that a process had at hand when it died; none where it did not."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return []
        found = []
        for start in range(0, len(content), SLOT_BYTES):
            slot = content[start : start + SLOT_BYTES]
            length = int.from_bytes(slot[:LENGTH_BYTES], "little")
            found.append(slot[LENGTH_BYTES : LENGTH_BYTES + length])
        return sorted({name for name in found if name})


def decode_apart(
    path: bytes,
    preprocesses: Sequence[Preprocess],
    outs: Iterable[npt.NDArray[np.uint8]],
    *,
    max_pixels: int,
    timeout_seconds: float,
    how: str = DECODE,
) -> ImageInfo:
    """Decode one file as :func:`extractor.images.decode.decode_into` does, in a process of its own.

    Raises:
        DecodeError: as there; ``timeout`` or ``crashed`` where the process came to no end, or to a
            bad one.
    """
    task = pickle.dumps((os.path.abspath(path), tuple(preprocesses), max_pixels, how))
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    found = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "extractor.loading.crash_log"],
            input=task,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_seconds + START_SECONDS,
            check=False,
            cwd=package,  # Python looks for modules there first
            env={**os.environ, "PYTHONPATH": found},
            start_new_session=True,  # Ctrl-C is for us, not for the image
        )
    except subprocess.TimeoutExpired:
        raise _ended(path, "timeout", f"not decoded within {timeout_seconds:g} s") from None
    outs = list(outs)
    head, _, pixels = done.stdout.partition(b"\n")
    result = _answer(head)
    if done.returncode != 0 or result is None or ("info" in result and len(pixels) != _bytes(outs)):
        told = _how_it_ended(done.returncode)
        raise _ended(path, "crashed", f"the decoder ended its process ({told})")
    if "reason" in result:
        error = DecodeError(result["reason"], result["message"])
        error.size, error.mtime_ns = result["size"], result["mtime_ns"]
        raise error
    start = 0
    for out in outs:
        out[...] = np.frombuffer(pixels, np.uint8, out.size, start).reshape(out.shape)
        start += out.size
    size, mtime_ns, width, height = result["info"]
    return ImageInfo(size, mtime_ns, width, height, bytes.fromhex(result["sha256"]))


def _answer(head: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(head)
    except ValueError:  # it came to its end without one
        return None
    return answer if isinstance(answer, dict) and ("info" in answer or "reason" in answer) else None


def _bytes(outs: Iterable[npt.NDArray[np.uint8]]) -> int:
    return sum(out.nbytes for out in outs)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _ended(path: bytes, reason: str, message: str) -> DecodeError:
    error = DecodeError(reason, message)
    try:
        status = os.stat(path)
    except OSError:
        return error
    error.size, error.mtime_ns = status.st_size, status.st_mtime_ns
    return error


def main() -> None:
    """Decode the image that standard input names, and write it to standard output."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no prctl
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # not to outlive the run
    # What a library prints is not to be taken for the answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    path, preprocesses, max_pixels, how = pickle.load(sys.stdin.buffer)
    allow_pixels(max_pixels)
    outs = [np.empty((*one.input_size, 3), np.uint8) for one in preprocesses]
    try:
        info = decode_into(path, preprocesses, outs, PixelBudget(max_pixels), how)
    except DecodeError as error:
        result = {"reason": error.reason, "message": str(error)}
        outs = []
        told = {**result, "size": error.size, "mtime_ns": error.mtime_ns}
    else:
        told = {
            "info": [info.size, info.mtime_ns, info.width, info.height],
            "sha256": info.sha256.hex(),
        }
    with answer:
        answer.write(json.dumps(told).encode() + b"\n")
        for out in outs:
            answer.write(out.tobytes())


if __name__ == "__main__":
    main()
