#!/usr/bin/env bash
# Run ruff, mypy and pytest in .venv, which is made first if it is missing.
#
#   scripts/test.sh                      everything that matters, in about six minutes on two cores
#   scripts/test.sh --all                all families of backbones, many kills, long fuzzing, compiling
#   scripts/test.sh [--all] PYTEST ARGUMENTS   for example a test file, or -k NAME; -n 0 in one process
set -euo pipefail
cd "$(dirname "$0")/.."
selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    shift
    selection=()
    export EXTRACTOR_TEST_KILLS="${EXTRACTOR_TEST_KILLS:-12}"
    export EXTRACTOR_TEST_EXAMPLES="${EXTRACTOR_TEST_EXAMPLES:-40}"
    export EXTRACTOR_TEST_STRIDE="${EXTRACTOR_TEST_STRIDE:-1}"
    export EXTRACTOR_TEST_MUTATIONS="${EXTRACTOR_TEST_MUTATIONS:-200}"
fi
venv=$(scripts/setup.sh dev)
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
export OMP_NUM_THREADS=1 # one core per process; the networks are small
exec "$venv/bin/python" -m pytest -q -n auto --maxprocesses 8 --dist worksteal \
    ${selection[@]+"${selection[@]}"} "$@"
