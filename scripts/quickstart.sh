#!/usr/bin/env bash
# From a fresh clone to embeddings: installs the program into .venv, makes a few images, runs the main
# job on them and shows what came out.
#
#   scripts/quickstart.sh [MODEL]     MODEL: as for extract --model (default: resnet50)
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-resnet50}

venv=$(scripts/setup.sh)
work=$(mktemp -d)
"$venv/bin/python" scripts/make_images.py "$work/images" --count 24

run() { # prints the command as a user would type it, and runs it
    echo
    echo "\$ extract $*"
    "$venv/bin/extract" "$@"
}

if ! run --model "$model" "$work/images" -o "$work/features" 2> >(tee "$work/errors" >&2); then
    grep -q "weights are not on this machine" "$work/errors" || exit 1
    echo
    echo "The weights of $model are out of reach from here, so this goes on OFFLINE WITH RANDOM WEIGHTS:"
    echo "everything works, but the embeddings mean nothing."
    run --model "$model" --weights random "$work/images" -o "$work/features"
fi

echo
echo "The store:"
(cd "$work" && find features -type f | sort | sed 's/^/  /')
echo
echo "Three lines that read it:"
cat <<'EOT'
  >>> from extractor import FeatureStore
  >>> store = FeatureStore.open("features")
  >>> store.features.shape, store.paths[0]
EOT
cd "$work"
"$venv/bin/python" - <<'EOT'
from extractor import FeatureStore

store = FeatureStore.open("features")
print(f"  {store.features.shape, store.paths[0]}")
EOT
echo
echo "All of it is in $work; for your own images:"
echo "  $venv/bin/extract --model $model path/to/images"
