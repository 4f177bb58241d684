"""Origin of a backbone, down to the bytes of its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Provenance"]


@dataclass(frozen=True)
class Provenance:
    """Origin of a backbone, down to the bytes of its weights.

    Attributes:
        model: Full name, ``timm:resnet50`` or ``torchvision:resnet50``.
        library: Library that built the network.
        library_version: Version of that library.
        weights: ``hub``, ``package`` (installed by pip), ``file``, ``random``, or ``given`` for a
            module of the user's.
        tag: The library's name for the weights, such as ``a1_in1k``; else empty.
        sha256: Digest of the weights file; for random and given weights, of their values.
        source: Address of the weights, ``package NAME VERSION``, or the name of a local file; else
            empty.
        revision: Commit of the hub's repository; else empty.
        key: State dict that was asked for in a checkpoint with several; else empty.
        seed: Seed of random weights, or the one that a function of the user's ran with; else None.
        code: SHA-256 of a file of the user's that made the network, and of what it imported from
            its folder; else empty.
        prefix: Prefix of the names that was asked for in a checkpoint with several copies; else
            empty.
        file: Location of the weights on this machine, which no manifest records.
        function: Location of the code that made the network, ``FILE.py:FUNCTION``, likewise.
    """

    model: str
    library: str
    library_version: str
    weights: str
    tag: str
    sha256: str
    source: str = ""
    revision: str = ""
    key: str = ""
    seed: int | None = None
    code: str = ""
    prefix: str = ""
    file: str = field(default="", compare=False)
    function: str = field(default="", compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return what a manifest records."""
        described = asdict(self)
        del described["file"], described["function"]
        for rare in ("code", "prefix"):
            if not described[rare]:
                del described[rare]
        return described

    def __str__(self) -> str:
        if self.weights == "package":
            weights = f"weights {self.tag} of {self.source}"
        else:
            name = self.tag or (f"seed {self.seed}" if self.weights == "random" else self.source)
            weights = f"{self.weights} weights {name}".rstrip()
        return f"{self.model} ({weights}, sha256 {self.sha256[:12]})"
