"""Draw images of eight kinds to try the program on, a folder for each kind. Needs only Pillow.

Images of one kind differ in color, scale, position and rotation.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

SIZES = ((500, 375), (375, 500), (640, 480))
EDGE = 900  # of the square on which a pattern is drawn, before it is rotated and cropped


class Palette(NamedTuple):
    """Two colors that contrast, and a third one."""

    light: tuple[int, int, int]
    dark: tuple[int, int, int]
    accent: tuple[int, int, int]


def palette(rng: random.Random) -> Palette:
    """Return random colors."""
    light = rng.randint(170, 255), rng.randint(170, 255), rng.randint(170, 255)
    dark = rng.randint(0, 110), rng.randint(0, 110), rng.randint(0, 110)
    return Palette(light, dark, rng.choice([(214, 40, 40), (240, 140, 20), (30, 110, 200)]))


# ---------------------------------------------------------------------------------------------
# Patterns: each fills a square of EDGE pixels


def stripes(draw: ImageDraw.ImageDraw, colors: Palette, rng: random.Random) -> None:
    width = rng.randint(18, 50)
    for x in range(0, EDGE, 2 * width):
        draw.rectangle((x, 0, x + width, EDGE), fill=colors.dark)


def checkerboard(draw: ImageDraw.ImageDraw, colors: Palette, rng: random.Random) -> None:
    size = rng.randint(30, 75)
    for row in range(EDGE // size + 1):
        for column in range(row % 2, EDGE // size + 1, 2):
            x, y = column * size, row * size
            draw.rectangle((x, y, x + size, y + size), fill=colors.dark)


def dots(draw: ImageDraw.ImageDraw, colors: Palette, rng: random.Random) -> None:
    step = rng.randint(45, 90)
    radius = step * rng.uniform(0.2, 0.35)
    for row in range(EDGE // step + 1):
        for column in range(EDGE // step + 1):
            x, y = (column + row % 2 / 2) * step, row * step
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colors.dark)


def bricks(draw: ImageDraw.ImageDraw, colors: Palette, rng: random.Random) -> None:
    height = rng.randint(28, 50)
    width = int(height * 2.4)
    for row in range(EDGE // height + 1):
        for column in range(-1, EDGE // width + 1):
            x, y = column * width + row % 2 * width // 2, row * height
            red = rng.randint(135, 200)
            fill = (red, red * 2 // 5 + rng.randint(-12, 12), red // 4)
            draw.rectangle((x, y, x + width - 5, y + height - 5), fill=fill)


def honeycomb(draw: ImageDraw.ImageDraw, colors: Palette, rng: random.Random) -> None:
    radius = rng.randint(28, 55)
    step = radius * math.sqrt(3)
    for row in range(int(EDGE / radius / 1.5) + 2):
        for column in range(int(EDGE / step) + 2):
            center = ((column + row % 2 / 2) * step, row * radius * 1.5)
            fill = (rng.randint(215, 250), rng.randint(140, 185), rng.randint(10, 60))
            draw.regular_polygon(
                (*center, radius), 6, rotation=30, fill=fill, outline=(110, 60, 5), width=5
            )


# ---------------------------------------------------------------------------------------------
# Objects: each is drawn on a transparent square of 400 pixels


def clock(draw: ImageDraw.ImageDraw, colors: Palette, rng: random.Random) -> None:
    draw.ellipse((10, 10, 390, 390), fill=colors.dark)
    draw.ellipse((32, 32, 368, 368), fill=(250, 248, 240))
    for hour in range(12):
        _hand(draw, hour / 12, 140, 160, 6)
    _hand(draw, rng.random(), 0, 90, 12)
    _hand(draw, rng.random(), 0, 135, 8)
    _hand(draw, rng.random(), 0, 145, 3, fill=colors.accent)


def _hand(
    draw: ImageDraw.ImageDraw,
    turn: float,
    start: float,
    stop: float,
    width: int,
    fill: tuple[int, int, int] = (20, 20, 25),
) -> None:
    x, y = math.sin(2 * math.pi * turn), -math.cos(2 * math.pi * turn)
    draw.line((200 + start * x, 200 + start * y, 200 + stop * x, 200 + stop * y), fill, width)


def traffic_light(draw: ImageDraw.ImageDraw, colors: Palette, rng: random.Random) -> None:
    draw.rectangle((186, 300, 214, 400), fill=(70, 70, 75))
    draw.rounded_rectangle((130, 5, 270, 345), 24, fill=(28, 32, 30))
    lit = rng.randrange(3)
    for i, (red, green, blue) in enumerate([(235, 40, 30), (250, 190, 20), (40, 210, 90)]):
        shade = 1.0 if i == lit else 0.25
        fill = (int(red * shade), int(green * shade), int(blue * shade))
        draw.ellipse((158, 25 + 105 * i, 242, 109 + 105 * i), fill=fill)


# ---------------------------------------------------------------------------------------------


def sunset(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draw a low sun above the sea and a line of hills."""
    width, height = size
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    horizon = int(height * rng.uniform(0.5, 0.7))
    blue, glow = rng.randint(60, 140), rng.randint(90, 170)
    for y in range(horizon):
        t = y / horizon
        color = (int(70 + 185 * t), int(50 + glow * t), int(blue * (1 - t) + 40 * t))
        draw.line((0, y, width, y), fill=color)
    x, radius = rng.randint(width // 5, width * 4 // 5), rng.randint(28, 60)
    y = horizon - rng.randint(0, radius)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 236, 150))
    for row in range(horizon, height, 3):
        t = (row - horizon) / (height - horizon)
        draw.rectangle((0, row, width, row + 3), fill=(int(150 - 110 * t), int(80 - 50 * t), 70))
        reach = radius * (1 - t) * rng.uniform(0.5, 1.3)
        draw.line((x - reach, row, x + reach, row), fill=(255, 205, 120), width=2)
    peaks = [(i * width // 6, horizon - rng.randint(4, height // 6)) for i in range(7)]
    draw.polygon([(0, horizon), *peaks, (width, horizon)], fill=(48, 28, 52))
    return image


def pattern(paint: Callable[..., None], size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draw a pattern that fills the image."""
    colors = palette(rng)
    square = Image.new("RGB", (EDGE, EDGE), colors.light)
    paint(ImageDraw.Draw(square), colors, rng)
    square = square.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC)
    left, top = (EDGE - size[0]) // 2, (EDGE - size[1]) // 2
    return square.crop((left, top, left + size[0], top + size[1]))


def scene(paint: Callable[..., None], size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draw an object on a soft background."""
    colors = palette(rng)
    noise = Image.frombytes("L", (32, 24), rng.randbytes(32 * 24)).resize(size).convert("RGB")
    image = Image.blend(noise, Image.new("RGB", size, colors.light), 0.8)
    layer = Image.new("RGBA", (400, 400))
    paint(ImageDraw.Draw(layer), colors, rng)
    edge = int(min(size) * rng.uniform(0.6, 0.95))
    layer = layer.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC).resize((edge, edge))
    place = rng.randint(0, size[0] - edge), rng.randint(0, size[1] - edge)
    image.paste(layer, place, layer)
    return image


PATTERNS = {
    "bricks": bricks,
    "checkerboard": checkerboard,
    "dots": dots,
    "honeycomb": honeycomb,
    "stripes": stripes,
}
OBJECTS = {"clock": clock, "traffic-light": traffic_light}
KINDS = (*PATTERNS, *OBJECTS, "sunset")


def picture(kind: str, seed: int) -> Image.Image:
    """Draw one image; the same for the same kind and seed."""
    rng = random.Random(f"{kind} {seed}")
    size = rng.choice(SIZES)
    if kind in PATTERNS:
        return pattern(PATTERNS[kind], size, rng)
    if kind in OBJECTS:
        return scene(OBJECTS[kind], size, rng)
    return sunset(size, rng)


def main() -> None:
    """Write the images that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=40, help="images (default: %(default)s)")
    options = parser.parse_args()
    for i in range(options.count):
        kind = KINDS[i % len(KINDS)]
        path = options.folder / kind / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(kind, i).save(path, quality=90)
    print(f"{options.count} images of {min(options.count, len(KINDS))} kinds in {options.folder}")


if __name__ == "__main__":
    main()
