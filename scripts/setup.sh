#!/usr/bin/env bash
# Make .venv with the program installed in it, or reuse it, and print its path.
#
#   scripts/setup.sh [EXTRA]     EXTRA: lite, test or dev, as in pyproject.toml
#
# PYTHON names the interpreter for a new .venv (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$PWD/.venv

if [ ! -x "$venv/bin/python" ]; then
    echo "making .venv; torch is large, this takes a few minutes" >&2
    "${PYTHON:-python3}" -m venv "$venv"
fi

wanted=".${1:+[$1]}"
stamp=$venv/.installed-$(cat pyproject.toml <(echo "$wanted $PWD") | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$wanted" >&2
    touch "$stamp"
fi
echo "$venv"
