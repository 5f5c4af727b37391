"""Decoder to the two files that this runtime opens: the graph, and the weights beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from edgekit.artifact import Artifact
from edgekit.decoder import Decoder
from edgekit.errors import UnsupportedRecipe
from edgekit.host import installed_version
from edgekit.recipe import Recipe
from edgekit_ort.decoder_graph import graph_from_decoder
from edgekit_ort.decoder_layout import DATA, Layout
from edgekit_ort.decoder_products import Form
from edgekit_ort.decoder_weights import weight_file
from edgekit_ort.session import MAIN

FORMS: Mapping[str, Form] = {
    "fp32": Form(padded=True),
    "fp16": Form(half=True, padded=True),
    "int8-weights": Form(kernel=8, padded=True),
    "int4": Form(kernel=4),
}


def artifact_from_decoder(
    decoder: Decoder, recipe: Recipe, folder: Path, report: Callable[[str], None], kernel: int
) -> Artifact:
    """Write ``model.onnx`` and its weights into ``folder``.

    ``kernel`` is that of 4-bit codes: 4, or 8 to expand them when they are loaded. Raises
    ``UnsupportedRecipe`` or ``LoweringFailed``.
    """
    form = FORMS.get(recipe.precision)
    if form is None:
        raise UnsupportedRecipe("onnxruntime", recipe.precision, tuple(FORMS))
    if recipe.precision == "int4" and kernel == 8:
        form = FORMS["int8-weights"]
    if not recipe.quantized:
        decoder = replace(decoder, weights={n: decoder.floats(n) for n in decoder.weights})
    with weight_file(folder / DATA) as file:
        model, expand = graph_from_decoder(decoder, form, file, report)
    (folder / MAIN).write_bytes(model.SerializeToString())
    layout = Layout(decoder.spec, decoder.capacity, form.padded, form.exact_from, expand)
    facts = layout.to_json() | ({"kernel": form.kernel} if recipe.quantized else {})
    return Artifact(
        target="onnxruntime",
        recipe=recipe,
        main=MAIN,
        files={name: folder / name for name in (MAIN, DATA)},
        inputs=(),
        outputs=(),
        provenance={
            "decoder": facts,
            "nodes": len(model.graph.node),
            "versions": {"onnx": installed_version("onnx")},
        },
    )
