#!/usr/bin/env bash
# Check the program on a CUDA device, and measure it. Needs no network and installs nothing.
#
#   scripts/check_gpu.sh [OUT_FOLDER]                       both parts; results in OUT_FOLDER (default: gpu-results)
#   scripts/check_gpu.sh --only correctness|performance     at most 150 and 240 seconds
#   scripts/check_gpu.sh --only stores --only rivals        single checks (--help names them all)
#   scripts/check_gpu.sh --rehearse                         every step on the CPU with small stand-ins
#
# PYTHON names an interpreter with torch, torchvision, timm, pyarrow and tqdm (default: python3). With pytest, the tests
# marked cuda run as well. EXTRACTOR_TEST_DATA may name a folder of photos and weights (data/README.md); else images are
# generated and weights are random. Ends with 1 if a check of correctness fails, or anything in a rehearsal.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" scripts/gpu/run_checks.py "$@"
