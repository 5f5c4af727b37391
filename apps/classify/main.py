"""Classifies images from a bundle, with numpy and one runtime.

python main.py BUNDLE IMAGE...             labels for image files
python main.py BUNDLE --dataset FOLDER     top-1 on the Fashion-MNIST test images
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import edgekit
from edgekit_zoo import fashion_mnist


def classify(bundle: edgekit.Bundle, artifact: str | None, images: Sequence[Path]) -> None:
    """Print the three best labels of each image."""
    prepare = preprocessing(bundle)
    opened = bundle.artifact(artifact)
    with edgekit.backend(opened.target).open(opened) as session:
        for path in images:
            outputs = session.run({prepare.name: prepare.prepare(edgekit.read_image(path))})
            best = edgekit.top_labels(outputs, bundle.manifest.labels, 3)
            print(f"{path}: " + ", ".join(f"{label} {share:.1%}" for label, share in best))


def evaluate(
    bundle: edgekit.Bundle, artifact: str | None, folder: Path, limit: int | None = None
) -> dict[str, Any]:
    """Top-1 on the test images, or the first ``limit``, one by one as a device would see them."""
    images, truth = (part[:limit] for part in fashion_mnist.read(folder, "test"))
    prepare = preprocessing(bundle)
    (output,) = bundle.manifest.outputs
    opened = bundle.artifact(artifact)
    predicted = []
    with edgekit.backend(opened.target).open(opened) as session:
        for image in images:
            scores = session.run({prepare.name: prepare.prepare(image)})[output.name]
            predicted.append(int(np.argmax(scores)))
    right = float((np.array(predicted) == truth).mean())
    return {
        "artifact": opened.name,
        "images": len(images),
        "top1": right,
        "predicted": predicted,
    }


def preprocessing(bundle: edgekit.Bundle) -> edgekit.ImageInput:
    """How this bundle wants its images."""
    if bundle.manifest.image is None:
        raise edgekit.UsageError(
            f"{bundle.folder} does not say how an image becomes its input; export a model whose "
            "factory returns edgekit.Model(image=..., labels=...)."
        )
    return bundle.manifest.image


def main(arguments: Sequence[str] | None = None) -> int:
    """Run once; errors are sentences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="*")
    parser.add_argument("--artifact", help="such as onnxruntime-fp32; default: the first")
    parser.add_argument("--dataset", type=Path, help="folder of the four Fashion-MNIST files")
    parser.add_argument("--limit", type=int, help="of the dataset, the first so many images")
    parser.add_argument("--json", action="store_true", help="the dataset's result as JSON")
    asked = parser.parse_args(arguments)
    if bool(asked.images) == bool(asked.dataset):
        parser.error("give image files, or --dataset FOLDER")
    if asked.limit is not None and asked.limit < 1:
        parser.error("--limit is a number of images, 1 or more")
    try:
        bundle = edgekit.open_bundle(asked.bundle)
        if asked.images:
            classify(bundle, asked.artifact, asked.images)
            return 0
        result = evaluate(bundle, asked.artifact, asked.dataset, asked.limit)
    except edgekit.EdgekitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    text = f"{result['artifact']}: top-1 {result['top1']:.2%} on {result['images']} images"
    print(json.dumps(result) if asked.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
