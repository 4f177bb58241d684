#!/usr/bin/env bash
# Makes .venv with the program in it, or reuses the one that is there.
#
#   scripts/setup.sh [EXTRA]     EXTRA: test or dev, as in pyproject.toml
#
# PYTHON names the interpreter (default: python3). An environment of your own that is active is used
# as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv; torch is large, this takes a few minutes" >&2
        "${PYTHON:-python3}" -m venv .venv
    fi
    VIRTUAL_ENV=$PWD/.venv
fi

wanted=".${1:+[$1]}"
stamp=$VIRTUAL_ENV/.extractor-$(cat pyproject.toml extractor/__init__.py <(echo "$wanted $PWD") | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    "$VIRTUAL_ENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$wanted" >&2
    touch "$stamp"
fi
echo "$VIRTUAL_ENV"
