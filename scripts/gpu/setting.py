"""What all checks of a GPU share: the setting of a run, its results, and images. No torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "benchmarks")]

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        name: What was checked or measured.
        is_right: Whether the check passed; None for a figure, or for what could not be checked.
        detail: Figures and reasons in one line.
        figures: The same for programs.
    """

    name: str
    is_right: bool | None
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where checks run, and on what.

    Attributes:
        device: ``cuda``, or ``cpu`` in a rehearsal.
        is_rehearsal: Whether small stand-ins take the place of networks and images.
        out: Folder of the results.
        photos: Folder of images.
        weights: Folder of weights; empty if there is none.
    """

    device: str
    is_rehearsal: bool
    out: str
    photos: str
    weights: str = ""

    def pick(self, real: T, stand_in: T) -> T:
        """Return what belongs to a device, or to a rehearsal."""
        return stand_in if self.is_rehearsal else real

    @property
    def network(self) -> str:
        """Small network with convolutions and batch normalizations."""
        return self.pick("resnet18", "test_resnet")

    @property
    def scratch(self) -> Path:
        """Folder for stores and copies of images; removed at the end."""
        return Path(self.out) / "scratch"

    def results_of(self, check: str) -> list[Result]:
        """Return the results that a check has written."""
        try:
            lines = (Path(self.out) / f"{check}.jsonl").read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [Result(**json.loads(line)) for line in lines]

    def record(self, check: str, result: Result) -> None:
        """Write a result at once."""
        with (Path(self.out) / f"{check}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    @contextmanager
    def links(self, name: str, count: int) -> Iterator[Path]:
        """Yield a folder with about ``count`` links to the images, and at least that many."""
        photos = sorted(path for path in Path(self.photos).rglob("*") if path.is_file())
        folder = self.scratch / f"links-{name}"
        for copy in range(-(-count // len(photos))):
            target = folder / f"{copy:05d}"
            target.mkdir(parents=True, exist_ok=True)
            for number, path in enumerate(photos):
                if copy * len(photos) + number < count:
                    os.symlink(path.resolve(), target / f"{number:05d}{path.suffix}")
        yield folder
