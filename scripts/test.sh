#!/usr/bin/env bash
# Passes the tests: ruff, mypy and pytest, in .venv, which is made where it is not there.
#
#   scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(scripts/setup.sh dev)
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
"$venv/bin/python" -m pytest -q "$@"
