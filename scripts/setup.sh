#!/usr/bin/env bash
# Makes .venv with the program in it, or reuses the one that is there, and prints where it is.
#
#   scripts/setup.sh [EXTRA]     EXTRA: test or dev, as in pyproject.toml
#
# PYTHON names the interpreter to make it with (default: python3).
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
