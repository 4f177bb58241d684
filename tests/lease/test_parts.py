"""Parts of a run: what schedulers say, and that all parts together are the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extractor.errors import UsageError
from extractor.lease.parts import Part, parse_part, part_from_environment

Launcher = Callable[[int, int], dict[str, str]]


def slurm_array(number: int, numbers: range) -> dict[str, str]:
    """Variables of a task of ``sbatch --array``, as Slurm 21.08 sets them in the batch script."""
    return {
        "SLURM_JOB_ID": "8536404",
        "SLURM_PROCID": "0",
        "SLURM_ARRAY_JOB_ID": "8535870",
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_MIN": str(numbers[0]),
        "SLURM_ARRAY_TASK_MAX": str(numbers[-1]),
        "SLURM_ARRAY_TASK_COUNT": str(len(numbers)),
        "SLURM_ARRAY_TASK_STEP": str(numbers.step),
    }


def srun(rank: int, tasks: int) -> dict[str, str]:
    """Variables of a task of ``srun --ntasks``."""
    return {
        "SLURM_JOB_ID": "8536404",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
    }


def torchrun(rank: int, world: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}


def kubernetes(index: int, count: int) -> dict[str, str]:
    return {"JOB_COMPLETION_INDEX": str(index), "JOB_COMPLETIONS": str(count)}


@given(total=st.integers(0, 2000), count=st.integers(1, 300))
def test_all_parts_together_are_the_run(total: int, count: int) -> None:
    parts = [Part(index, count).shards(total) for index in range(count)]
    assert list(itertools.chain(*parts)) == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_parts_are_written_from_one() -> None:
    assert parse_part("3/16", {}) == Part(2, 16)
    assert str(Part(2, 16)) == "3/16"
    assert parse_part("auto", torchrun(2, 16)) == Part(2, 16)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("0/4", "got 0/4, expected a part from 1/4 to 4/4"),
        ("5/4", "got 5/4, expected a part from 1/4 to 4/4"),
        ("a/b", "got 'a/b', expected K/N such as 3/16, or auto"),
        ("3", "got '3', expected K/N such as 3/16, or auto"),
    ],
)
def test_a_part_that_does_not_exist_is_refused(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse_part(text, {})


def test_a_part_has_an_index_below_its_count() -> None:
    with pytest.raises(ValueError, match="got part 4 of 4"):
        Part(4, 4)


@given(start=st.integers(0, 50), step=st.integers(1, 9), count=st.integers(1, 40))
def test_a_slurm_array_may_begin_anywhere_and_have_steps(start: int, step: int, count: int) -> None:
    numbers = range(start, start + step * count, step)
    parts = [part_from_environment(slurm_array(number, numbers)) for number in numbers]
    assert parts == [Part(index, count) for index in range(count)]


def test_an_old_slurm_says_neither_count_nor_step() -> None:
    environ = slurm_array(3, range(1, 9))
    del environ["SLURM_ARRAY_TASK_COUNT"], environ["SLURM_ARRAY_TASK_STEP"]
    assert part_from_environment(environ) == Part(2, 8)


@pytest.mark.parametrize(("number", "step"), [("6", "1"), ("6", "6"), ("0", "1"), ("17", "6")])
def test_a_slurm_array_with_gaps_is_refused(number: str, step: str) -> None:
    environ = slurm_array(0, range(0, 33)) | {  # --array=0,6,16-32
        "SLURM_ARRAY_TASK_ID": number,
        "SLURM_ARRAY_TASK_COUNT": "19",
        "SLURM_ARRAY_TASK_STEP": step,
    }
    with pytest.raises(UsageError, match="a Slurm array with gaps; expected one such as --array="):
        part_from_environment(environ)


@given(
    outer=st.integers(1, 8),
    inner=st.integers(1, 8),
    launcher=st.sampled_from([srun, torchrun]),
)
def test_tasks_of_an_array_divide_its_parts(outer: int, inner: int, launcher: Launcher) -> None:
    numbers = range(1, outer + 1)
    parts = [
        part_from_environment(slurm_array(number, numbers) | launcher(rank, inner))
        for number in numbers
        for rank in range(inner)
    ]
    assert parts == [Part(index, outer * inner) for index in range(outer * inner)]


@pytest.mark.parametrize("launcher", [srun, torchrun, kubernetes])
def test_a_launcher_alone_numbers_the_parts(launcher: Launcher) -> None:
    assert part_from_environment(launcher(0, 4)) == Part(0, 4)
    assert part_from_environment(launcher(3, 4)) == Part(3, 4)


def test_torchrun_numbers_the_processes_of_all_nodes_of_a_job() -> None:
    assert part_from_environment(srun(1, 2) | torchrun(5, 8)) == Part(5, 8)
    assert part_from_environment(kubernetes(1, 2) | torchrun(5, 8)) == Part(5, 8)


def test_a_batch_script_is_not_one_of_its_tasks() -> None:
    script = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    with pytest.raises(UsageError, match="a Slurm job with 4 tasks; start the command with srun"):
        part_from_environment(script)
    array = slurm_array(3, range(1, 9)) | {"SLURM_NTASKS": "4"}
    assert part_from_environment(array) == Part(2, 8)


@pytest.mark.parametrize(
    ("environ", "match"),
    [
        ({}, "got auto, and no scheduler has numbered this job; .* try K/N such as 3/16"),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, "no scheduler has numbered this job"),
        ({"WORLD_SIZE": "4", "RANK": ""}, "no scheduler has numbered this job"),
        ({"RANK": "0"}, "got auto with RANK and without WORLD_SIZE; set both"),
        ({"JOB_COMPLETION_INDEX": "0"}, "with JOB_COMPLETION_INDEX and without JOB_COMPLETIONS"),
        ({"SLURM_PROCID": "0"}, "with SLURM_PROCID and without SLURM_NTASKS"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "without SLURM_ARRAY_TASK_MIN"),
        (torchrun(4, 4), "got RANK=4 and WORLD_SIZE=4, expected an index from 0 that is smaller"),
        (kubernetes(0, 0), "got JOB_COMPLETION_INDEX=0 and JOB_COMPLETIONS=0"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "got RANK=x, expected a number from 0"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "got RANK=-1, expected a number from 0"),
    ],
)
def test_incomplete_numbers_are_refused(environ: dict[str, str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        part_from_environment(environ)
