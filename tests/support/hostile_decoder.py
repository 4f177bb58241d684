"""A faulty decoder for child processes."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image
from support.pictures import noise

import extractor

# Every Python that finds this module at its start gets a faulty decoder. An image that ends in
# "hostile:" and a deed triggers the deed, which is recorded in a file if one is named.
HOSTILE_DECODER = """
import os, signal, sys, time
from PIL import Image

opened = Image.open
deeds = {
    "hang": lambda: time.sleep(60),
    "slow": lambda: time.sleep(0.5),
    "print": lambda: os.write(1, b"a library that prints\\n"),
    "deaf": lambda: os.close(1),
}

def hostile(file, *rest, **options):
    content = file.read()
    file.seek(0)
    _, mark, deed = content.rpartition(b"hostile:")
    if mark:
        deed = deed.decode()
        if "HOSTILE_LOG" in os.environ:
            with open(os.environ["HOSTILE_LOG"], "a") as log:
                log.write(f"{os.getpid()} {os.getsid(0)} {deed}\\n")
        kind, _, number = deed.partition(" ")
        if kind == "exit":
            os._exit(int(number))
        elif kind == "signal":
            signal.raise_signal(int(number))  # to this thread, like a segmentation fault
        else:
            deeds[kind]()
    return opened(file, *rest, **options)

Image.open = hostile
"""


def hostile_python(folder: Path) -> str:
    """Return a PYTHONPATH with the faulty decoder and the package under test."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOSTILE_DECODER)
    return os.pathsep.join([str(folder), str(Path(extractor.__file__).parents[1])])


def write_hostile(path: Path, deed: str, image: Image.Image | None = None) -> bytes:
    """Write a valid PNG that triggers a deed of the faulty decoder. Return its path."""
    (image or noise(1, 20, 30)).save(path, "PNG")
    with path.open("ab") as file:
        file.write(b"hostile:" + deed.encode())
    return os.fsencode(path)
