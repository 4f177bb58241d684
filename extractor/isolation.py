"""What takes the whole process down: which images were at hand, and decoding them apart from it.

A decoder that crashes leaves no chance to say which image it was. So each decoding thread notes its
image in a file that is mapped into memory and outlives the process; the next run finds the names
there and decodes these images in a process of their own.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extractor.decode import ImageInfo, PixelBudget, allow_pixels, decode_into
from extractor.errors import DecodeError
from extractor.preprocess import Preprocess
from extractor.store.format import IN_FLIGHT, SUSPECTS

__all__ = ["InFlight", "Suspects", "decode_apart"]

SLOT_BYTES = 8192  # two for a length, and a path, which Linux does not take longer than 4095
LENGTH_BYTES = 2


class InFlight:
    """A file in which each thread keeps the path of the image that it decodes just now.

    A context manager; leaving it removes the file. Only a process that dies leaves it behind.
    """

    def __init__(self, path: Path, slots: int) -> None:
        self._path = path
        self._slots = slots

    def __enter__(self) -> InFlight:
        with self._path.open("w+b") as file:
            file.truncate(self._slots * SLOT_BYTES)
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


class Suspects:
    """The images during whose decoding a process died, kept until the store is complete.

    Args:
        folder: where an interrupted run keeps what it has done.
    """

    def __init__(self, folder: Path) -> None:
        self.in_flight = folder / IN_FLIGHT
        self._path = folder / SUSPECTS

    def load(self) -> tuple[list[bytes], list[bytes]]:
        """All of them, and those of the run that died last; these are kept with the others."""
        new = InFlight.left(self.in_flight)
        try:
            known = [os.fsencode(path) for path in json.loads(self._path.read_bytes())]
        except (FileNotFoundError, ValueError):
            known = []
        every = sorted({*known, *new})
        if new:
            beside = self._path.with_name(self._path.name + ".partial")
            beside.write_text(json.dumps([os.fsdecode(path) for path in every]))
            os.replace(beside, self._path)
        return every, new


def decode_apart(
    path: bytes,
    preprocesses: Sequence[Preprocess],
    outs: Iterable[npt.NDArray[np.uint8]],
    *,
    max_pixels: int,
    timeout_seconds: float,
) -> ImageInfo:
    """Decode one file as :func:`extractor.decode.decode_into` does, in a process of its own.

    Raises:
        DecodeError: as there; ``timeout`` or ``crashed`` where the process came to no end, or to a
            bad one.
    """
    task = pickle.dumps((path, tuple(preprocesses), max_pixels))
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "extractor.isolation"],
            input=task,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_seconds,
            check=False,
            env={**os.environ, "PYTHONPATH": found},
            start_new_session=True,  # Ctrl-C is for us, not for the image
        )
    except subprocess.TimeoutExpired:
        raise _ended(path, "timeout", f"not decoded within {timeout_seconds:g} s") from None
    head, _, pixels = done.stdout.partition(b"\n")
    if done.returncode != 0:
        how = f"exit code {done.returncode}"
        if done.returncode < 0:
            how = signal.Signals(-done.returncode).name
        raise _ended(path, "crashed", f"the decoder ended its process ({how})")
    result = json.loads(head)
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
    path, preprocesses, max_pixels = pickle.load(sys.stdin.buffer)
    allow_pixels(max_pixels)
    outs = [np.empty((*one.input_size, 3), np.uint8) for one in preprocesses]
    try:
        info = decode_into(path, preprocesses, outs, PixelBudget(max_pixels))
    except DecodeError as error:
        result = {"reason": error.reason, "message": str(error)}
        outs = []
        told = {**result, "size": error.size, "mtime_ns": error.mtime_ns}
    else:
        told = {
            "info": [info.size, info.mtime_ns, info.width, info.height],
            "sha256": info.sha256.hex(),
        }
    sys.stdout.buffer.write(json.dumps(told).encode() + b"\n")
    for out in outs:
        sys.stdout.buffer.write(out.tobytes())


if __name__ == "__main__":
    main()
