"""Decoding in a child process, for images that may crash their decoder.

The child is started with ``python -m extractor.loading.subprocess_decode``. It reads a pickled task
from its standard input, and writes a line of JSON and the raw pictures to its standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import extractor
from extractor.errors import DecodeError
from extractor.images.budget import PixelBudget, allow_pixels
from extractor.images.decode import decode_into
from extractor.images.files import with_file_status
from extractor.images.types import ImageInfo
from extractor.options import DECODE
from extractor.preprocess import Preprocess
from extractor.system.process_tuning import die_with_parent
from extractor.system.running_clock import LOOK_SECONDS, running_seconds
from extractor.text import exit_in_words

__all__ = ["decode_apart"]

# Time for the child to start, in addition to the time for the image. Most of it is torch's import.
START_SECONDS = 30.0

# Signals that end a run. Schedulers send them to all its processes, also to one that decodes an
# image of the batch that may still finish.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def decode_apart(
    path: bytes,
    preprocesses: Sequence[Preprocess],
    outs: Sequence[npt.NDArray[np.uint8]],
    *,
    max_pixels: int,
    timeout_seconds: float,
    decode_mode: str = DECODE,
) -> ImageInfo:
    """Decode a file like :func:`extractor.images.decode.decode_into`, in a child process.

    Raises:
        DecodeError: The image cannot be decoded. The reason is ``timeout`` if the child did not
            finish in time, and ``crashed`` if it died.
    """
    task = pickle.dumps((os.path.abspath(path), tuple(preprocesses), max_pixels, decode_mode))
    try:
        ended = _run_child(task, timeout_seconds + START_SECONDS)
    except subprocess.TimeoutExpired:
        message = f"not decoded within {timeout_seconds:g} s"
        with with_file_status(path):
            raise DecodeError("timeout", message) from None
    head, _, pixels = ended.stdout.partition(b"\n")
    answer = _parse_answer(head)
    is_short = answer is not None and "info" in answer and len(pixels) != _total_bytes(outs)
    if ended.returncode != 0 or answer is None or is_short:
        message = f"the decoder ended its process ({exit_in_words(ended.returncode)})"
        with with_file_status(path):
            raise DecodeError("crashed", message)
    if "reason" in answer:
        error = DecodeError(answer["reason"], answer["message"])
        error.size, error.mtime_ns = answer["size"], answer["mtime_ns"]
        raise error
    start = 0
    for out in outs:
        out[...] = np.frombuffer(pixels, np.uint8, out.size, start).reshape(out.shape)
        start += out.size
    size, mtime_ns, width, height = answer["info"]
    return ImageInfo(size, mtime_ns, width, height, bytes.fromhex(answer["sha256"]))


def _run_child(task: bytes, timeout_seconds: float) -> subprocess.CompletedProcess[bytes]:
    folder = str(Path(extractor.__file__).resolve().parents[1])
    python_path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    deadline = running_seconds() + timeout_seconds
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # the child inherits it
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "extractor.loading.subprocess_decode"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,  # Python looks for modules in the current folder first
            env={**os.environ, "PYTHONPATH": python_path},
            start_new_session=True,  # signals of the terminal are for the run, not for the image
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with child:
        left: bytes | None = task
        try:
            while running_seconds() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, _ = child.communicate(left, LOOK_SECONDS)
                    return subprocess.CompletedProcess(child.args, child.returncode, output)
                left = None  # a further call goes on with the input of the first one
            raise subprocess.TimeoutExpired(child.args, timeout_seconds)
        except BaseException:
            child.kill()
            raise


def _parse_answer(head: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(head)
    except ValueError:  # the child died before it answered
        return None
    return answer if isinstance(answer, dict) and ("info" in answer or "reason" in answer) else None


def _total_bytes(outs: Sequence[npt.NDArray[np.uint8]]) -> int:
    return sum(out.nbytes for out in outs)


def main() -> None:
    """Decode the image named on standard input, and write it to standard output."""
    die_with_parent()
    # Keep the answer apart from anything that a library prints.
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    path, preprocesses, max_pixels, decode_mode = pickle.load(sys.stdin.buffer)
    allow_pixels(max_pixels)
    outs = [np.empty((*preprocess.input_size, 3), np.uint8) for preprocess in preprocesses]
    answer: dict[str, Any]
    try:
        info = decode_into(path, preprocesses, outs, PixelBudget(max_pixels), decode_mode)
    except DecodeError as error:
        outs = []
        answer = {"reason": error.reason, "message": str(error)}
        answer |= {"size": error.size, "mtime_ns": error.mtime_ns}
    else:
        answer = {"info": [info.size, info.mtime_ns, info.width, info.height]}
        answer["sha256"] = info.sha256.hex()
    with stream:
        stream.write(json.dumps(answer).encode() + b"\n")
        for out in outs:
            stream.write(out.tobytes())


if __name__ == "__main__":
    main()
