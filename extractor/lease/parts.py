"""Parts of a run for job arrays: ``3/16``, and what schedulers say about it. Pure; no torch.

https://slurm.schedmd.com/job_array.html, https://slurm.schedmd.com/srun.html,
https://docs.pytorch.org/docs/stable/elastic/run.html and
https://kubernetes.io/docs/concepts/workloads/controllers/job/ define the variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from extractor import options
from extractor.errors import UsageError

__all__ = ["COUNT_VARIABLE", "Part", "parse_part", "part_from_environment"]

# Kubernetes tells a pod its index, and not how many there are. The job's manifest sets this one.
COUNT_VARIABLE = "JOB_COMPLETIONS"


@dataclass(frozen=True)
class Part:
    """One of several equal parts of a run.

    Attributes:
        index: Index of the part, from 0.
        count: Number of parts.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"got part {self.index} of {self.count}, expected 0 to the number - 1")

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def shards(self, total: int) -> range:
        """Return the shards of this part out of all; the sizes of two parts differ by at most 1.

        >>> [list(Part(index, 3).shards(5)) for index in range(3)]
        [[0], [1, 2], [3, 4]]
        """
        begin, end = (total * index // self.count for index in (self.index, self.index + 1))
        return range(begin, end)


def parse_part(text: str, environ: Mapping[str, str]) -> Part:
    """Return the part written as ``3/16``, or the one that ``auto`` finds in the environment.

    Raises:
        UsageError: There is no such part, or ``auto`` finds none.
    """
    parsed = options.parse_part(text)
    if parsed == "auto":
        return part_from_environment(environ)
    number, count = parsed
    return Part(number - 1, count)


def part_from_environment(environ: Mapping[str, str]) -> Part:
    """Return the part of this job, as Slurm, torchrun or Kubernetes numbers it.

    A task of a job array that starts several processes itself, by ``srun`` or ``torchrun``, divides
    its part between them.

    Raises:
        UsageError: No scheduler has numbered this job, or its numbers are incomplete.
    """
    array = _slurm_array(environ)
    inner = _torchrun(environ) or _slurm_step(environ) or _kubernetes(environ)
    if inner is None and array is None:
        _refuse_batch_script(environ)
        raise UsageError(
            "part: got auto, and no scheduler has numbered this job; expected a Slurm array or "
            "srun, torchrun, or an indexed job of Kubernetes; try K/N such as 3/16"
        )
    outer, inner = array or Part(0, 1), inner or Part(0, 1)
    return Part(outer.index * inner.count + inner.index, outer.count * inner.count)


def _slurm_array(environ: Mapping[str, str]) -> Part | None:
    """Return the part of a task of ``sbatch --array=MIN-MAX:STEP``."""
    number = _number(environ, "SLURM_ARRAY_TASK_ID")
    if number is None:
        return None
    least, most = (
        _required(environ, f"SLURM_ARRAY_TASK_{end}", "SLURM_ARRAY_TASK_ID")
        for end in ("MIN", "MAX")
    )
    step = _number(environ, "SLURM_ARRAY_TASK_STEP") or 1
    count = (most - least) // step + 1
    said = _number(environ, "SLURM_ARRAY_TASK_COUNT")
    is_regular = not (number - least) % step and said in (None, count)
    if not is_regular or not least <= number <= most:
        raise UsageError(
            f"part: got auto in task {number} of a Slurm array with gaps; expected one such as "
            "--array=1-16, or try --part K/N"
        )
    return Part((number - least) // step, count)


def _slurm_step(environ: Mapping[str, str]) -> Part | None:
    """Return the part of a task of ``srun``. A batch script is a task of no step."""
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
        return None
    count = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    return _index_of(environ, "SLURM_PROCID", count)


def _refuse_batch_script(environ: Mapping[str, str]) -> None:
    tasks = _number(environ, "SLURM_NTASKS") or 1
    if "SLURM_JOB_ID" in environ and tasks > 1:
        raise UsageError(
            f"part: got auto in the script of a Slurm job with {tasks} tasks; start the command "
            "with srun, so that it runs in each of them"
        )


def _torchrun(environ: Mapping[str, str]) -> Part | None:
    return _index_of(environ, "RANK", "WORLD_SIZE")


def _kubernetes(environ: Mapping[str, str]) -> Part | None:
    return _index_of(environ, "JOB_COMPLETION_INDEX", COUNT_VARIABLE)


def _index_of(environ: Mapping[str, str], index: str, count: str) -> Part | None:
    found = _number(environ, index)
    if found is None:
        return None
    parts = _required(environ, count, index)
    if found >= parts:
        raise UsageError(
            f"part: got {index}={found} and {count}={parts}, expected an index from 0 that is "
            "smaller than the number of parts"
        )
    return Part(found, parts)


def _required(environ: Mapping[str, str], variable: str, beside: str) -> int:
    number = _number(environ, variable)
    if number is None:
        raise UsageError(f"part: got auto with {beside} and without {variable}; set both")
    return number


def _number(environ: Mapping[str, str], variable: str) -> int | None:
    """Return the number in a variable, or None if it is not set."""
    text = environ.get(variable, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"part: got {variable}={text}, expected a number from 0")
    return int(text)
