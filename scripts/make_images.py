"""Makes a folder of coloured shapes to try the program on; needs only Pillow."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("ellipse", "rectangle", "triangle")


def picture(shape: str, seed: int) -> Image.Image:
    """One shape of random colour, size and place on a soft background; the same for a seed."""
    draw_from = random.Random(f"{shape} {seed}")
    width, height = draw_from.choice([(500, 375), (375, 500), (640, 480)])
    background = Image.effect_noise((width, height), 40).convert("RGB")
    image = background.filter(ImageFilter.GaussianBlur(3))
    size = draw_from.randint(120, 300)
    left, top = draw_from.randint(0, width - size), draw_from.randint(0, height - size)
    colour = tuple(draw_from.randint(0, 255) for _ in range(3))
    brush = ImageDraw.Draw(image)
    if shape == "ellipse":
        brush.ellipse((left, top, left + size, top + size), fill=colour)
    elif shape == "rectangle":
        brush.rectangle((left, top, left + size, top + size), fill=colour)
    else:
        corners = [(left, top + size), (left + size, top + size), (left + size // 2, top)]
        brush.polygon(corners, fill=colour)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=24, help="images (default: %(default)s)")
    options = parser.parse_args()
    for i in range(options.count):
        shape = SHAPES[i % len(SHAPES)]
        path = options.folder / shape / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(shape, i).save(path, quality=90)
    print(f"{options.count} images in {options.folder}")


if __name__ == "__main__":
    main()
