"""A decoder with a fault, for child processes."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image
from support.pictures import noise

import extractor

# A decoder with a fault, in every Python that finds it as it starts: an image that ends in
# "hostile:" and a deed does it. What it did is written to a file, where one is wanted.
HOSTILE_DECODER = """
import os, signal, sys, time
from PIL import Image

opened = Image.open
deeds = {
    "hang": lambda: time.sleep(60),
    "slow": lambda: time.sleep(0.5),
    "print": lambda: os.write(1, b"a library that talks\\n"),
    "deaf": lambda: os.close(1),
}

def hostile(file, *rest, **options):
    content = file.read()
    file.seek(0)
    _, mark, deed = content.rpartition(b"hostile:")
    if mark:
        deed = deed.decode()
        if "HOSTILE_TOLD" in os.environ:
            with open(os.environ["HOSTILE_TOLD"], "a") as told:
                told.write(f"{os.getpid()} {os.getsid(0)} {deed}\\n")
        kind, _, number = deed.partition(" ")
        if kind == "exit":
            os._exit(int(number))
        elif kind == "signal":
            signal.raise_signal(int(number))  # to this thread, as a fault of its own is
        else:
            deeds[kind]()
    return opened(file, *rest, **options)

Image.open = hostile
"""


def hostile_python(folder: Path) -> str:
    """A PYTHONPATH with that decoder, and with the package that is tested."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOSTILE_DECODER)
    return os.pathsep.join([str(folder), str(Path(extractor.__file__).parents[1])])


def write_hostile(path: Path, deed: str, image: Image.Image | None = None) -> bytes:
    """A good PNG, but for a decoder with that fault."""
    (image or noise(1, 20, 30)).save(path, "PNG")
    with path.open("ab") as file:
        file.write(b"hostile:" + deed.encode())
    return os.fsencode(path)
