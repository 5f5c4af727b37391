#!/bin/sh
# Puts Debian's package of Fashion-MNIST where the tools look, with or without root.
# Usage: tools/fetch_fashion_mnist.sh FOLDER   prints the folder that holds the four files.
set -eu
installed=/usr/share/datasets/fashion-mnist
local_copy="$1/usr/share/datasets/fashion-mnist"
for folder in "$installed" "$local_copy"; do
  if [ -f "$folder/t10k-images-idx3-ubyte.gz" ]; then echo "$folder"; exit 0; fi
done
mkdir -p "$1"
if ! (cd "$1" && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .) >&2; then
  if ! (apt-get update && cd "$1" && apt-get download dataset-fashion-mnist \
        && dpkg -x dataset-fashion-mnist_*.deb .) >&2; then
    echo "Fashion-MNIST is not here. On Debian run: apt-get install dataset-fashion-mnist;" \
         "elsewhere put its four IDX files in a folder and run: make demo DATA=FOLDER" >&2
    exit 1
  fi
fi
rm -f "$1"/dataset-fashion-mnist_*.deb
echo "$local_copy"
