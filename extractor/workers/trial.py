"""Precision and compilation, chosen on the device that computes where the driver has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from extractor.compute.inputs import Inputs
from extractor.compute.tune import Recorded, TuneSettings, tune
from extractor.lease.describe import describe
from extractor.models.embedding import load_specs
from extractor.options import Options
from extractor.system.cpu import compute_threads
from extractor.workers.worker import decode_sample

__all__ = ["Trial", "run_trial"]


@dataclass(frozen=True)
class Trial:
    """What precision and compilation are chosen by.

    Attributes:
        models: Names of the models.
        options: Options of the run, with the device that computes.
        weights: SHA-256 of the weights by full name of the model.
        recorded: For each embedding how the rows of its store were computed.
        settings: What to choose, and for how many images.
        sample: Absolute paths of the images to try.
    """

    models: tuple[str, ...]
    options: Options
    weights: Mapping[str, str]
    recorded: tuple[Recorded | None, ...]
    settings: TuneSettings
    sample: tuple[bytes, ...]


def run_trial(trial: Trial) -> list[dict[str, Any]]:
    """Return what the manifest says about the computation of each embedding.

    Raises:
        ExtractorError: A model cannot be loaded, or the device refuses.
    """
    options, batch_size = trial.options, trial.settings.batch_size
    with compute_threads(options.threads):
        specs = load_specs(trial.models, options, recorded_sha256=trial.weights)
        inputs = Inputs(options, batch_size)

        def sample(count: int) -> Sequence[torch.Tensor]:
            return decode_sample(trial.sample, specs, inputs)

        tuned = tune(specs, trial.recorded, trial.settings, sample)
    return [dict(describe(spec, options, b"/", batch_size).computation) for spec in tuned]
