"""Pictures for tests."""

from __future__ import annotations

import numpy as np
from PIL import Image


def color(i: int) -> tuple[int, int, int]:
    """Return the color of image ``i`` of the fixture ``photos``."""
    return 20 * i, 255 - 20 * i, 100


def noise(seed: int, height: int, width: int) -> Image.Image:
    """Return a picture with structure at several scales, as a photo has. The seed fixes it."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for scale in (4, 16, 64):
        coarse = random.integers(0, 256, (height // scale + 2, width // scale + 2, 3), np.uint8)
        picture += np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        )
    return Image.fromarray((picture / 3).astype(np.uint8))
