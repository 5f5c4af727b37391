"""The decoder's files: what NVIDIA's parsers take, what its compiler plans, what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgekit.artifact import Artifact
from edgekit.block_quantize import quantized_decoder
from edgekit.blocks import Blocks
from edgekit.decoder import Decoder
from edgekit.errors import LoweringFailed, RuntimeFailed, UnsupportedRecipe
from edgekit.recipe import FP16, FP32, INT8, PRECISIONS
from edgekit.spec import Array
from edgekit.testing import tiny_decoder
from edgekit_tensorrt import BACKEND, decoder_lower
from edgekit_tensorrt.interpreter import NetworkInterpreter
from edgekit_tensorrt.processes import parse_onnx
from edgekit_tensorrt.versions import PARSERS

Lowered = Callable[..., tuple[Decoder, Artifact]]


def graph_of(artifact: Artifact) -> onnx.ModelProto:
    path = artifact.source
    assert isinstance(path, Path)
    return onnx.load(path, load_external_data=False)


def notes_of(artifact: Artifact) -> list[str]:
    notes = artifact.provenance["notes"]
    assert isinstance(notes, list)
    return notes


@pytest.mark.parametrize(
    ("precision", "opset"), [("fp32", 20), ("fp16", 20), ("int8-weights", 21), ("int4", 21)]
)
def test_the_file_is_one_that_the_oldest_parser_documents(
    lowered: Lowered, precision: str, opset: int
) -> None:
    _, artifact = lowered(precision)
    model = graph_of(artifact)
    assert model.opset_import[0].version == opset
    oldest = PARSERS["10.3"]
    assert opset in (oldest.opset, oldest.int4_opset)
    assert not {node.op_type for node in model.graph.node} & oldest.lacks
    onnx.checker.check_model(str(artifact.source), full_check=True)


def test_weights_lie_once_in_a_file_beside_the_model(lowered: Lowered) -> None:
    for precision, width in (("fp32", 4), ("fp16", 2)):
        decoder, artifact = lowered(precision)
        matrices = [w for w in decoder.weights.values() if isinstance(w, np.ndarray) and w.ndim > 1]
        least = width * sum(weight.size for weight in matrices)
        path = artifact.files["model.weights"]
        assert isinstance(path, Path)
        assert least <= path.stat().st_size < 1.3 * least + 40 * 4096
        assert artifact.source.stat().st_size < 150_000  # type: ignore[union-attr]


def test_codes_are_not_made_floats_in_the_file(lowered: Lowered) -> None:
    decoder, artifact = lowered("int4")
    blocks = [w for w in decoder.weights.values() if isinstance(w, Blocks)]
    external = [t for t in graph_of(artifact).graph.initializer if t.external_data]
    lengths = {t.name: int({e.key: e.value for e in t.external_data}["length"]) for t in external}
    stored = sum(size for name, size in lengths.items() if "table" not in name)
    assert stored <= sum(block.bytes for block in blocks)


@pytest.mark.parametrize("precision", ["int8-weights", "int4"])
def test_every_product_is_planned_from_codes(lowered: Lowered, precision: str) -> None:
    _, artifact = lowered(precision)
    (note,) = notes_of(artifact)
    assert note == "Planned for sm86: 9 of 9 products read 4-bit codes."
    assert artifact.provenance["quantized"] == 9


def test_attention_is_planned_as_one_kernel(lowered: Lowered, tmp_path: Path) -> None:
    decoder, _ = lowered("fp16")
    backend = BACKEND.with_options({"compute-capability": "sm86"})
    artifact = backend.lower_decoder(decoder, FP16, tmp_path, lambda _step: None)
    kernels: Any = artifact.provenance["kernels"]
    # 23 measured; with attention in pieces it would be 33 and more.
    assert kernels["sm86"]["layer_count"] < 28
    assert artifact.derived == {"model.sm86.engine"}
    engine = artifact.files["model.sm86.engine"]
    assert isinstance(engine, Path)
    assert engine.read_bytes()[:4] == b"vtrt"


def test_an_engine_that_nobody_named_is_not_kept(lowered: Lowered) -> None:
    _, artifact = lowered("fp16")
    scripts = {"build_engine.py", "generate_on_jetson.py", "evidence.py"}
    assert set(artifact.files) == {"model.onnx", "model.weights", "decoder.json"} | scripts
    assert "sm86" in artifact.provenance["kernels"]  # type: ignore[operator]
    path = artifact.files["decoder.json"]
    assert isinstance(path, Path)
    assert json.loads(path.read_text()) == artifact.provenance["decoder"]
    assert json.dumps(artifact.provenance)


@pytest.mark.parametrize("named", [True, False])
def test_a_compiler_that_gives_up_stops_only_an_engine_that_was_named(
    tensorrt: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeFailed("tensorrt could not build the engine: HW-specific datatypes: int4.")

    monkeypatch.setattr(decoder_lower, "engine_for", refuse)
    backend = BACKEND.with_options({"compute-capability": "sm75"} if named else {})
    decoder = tiny_decoder()
    if named:
        with pytest.raises(LoweringFailed, match=r"for sm75, .*Try --precision fp16"):
            backend.lower_decoder(decoder, FP32, tmp_path, lambda _step: None)
        return
    artifact = backend.lower_decoder(decoder, FP32, tmp_path, lambda _step: None)
    (note,) = notes_of(artifact)
    assert note.startswith("No plan was made for sm86: tensorrt could not build")


def test_a_recipe_that_is_not_for_language_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedRecipe, match="it can make: int4, fp16, int8-weights, fp32"):
        BACKEND.lower_decoder(tiny_decoder(), INT8, tmp_path, lambda _step: None)


def test_matrices_of_unlike_blocks_are_multiplied_apart(
    tensorrt: None, eager: Callable[[Decoder, Sequence[int]], Array], tmp_path: Path
) -> None:
    decoder = quantized_decoder(tiny_decoder(), 4)
    wide = quantized_decoder(tiny_decoder(), 8)
    weights = {**decoder.weights, "layers.0.k": wide.weights["layers.0.k"]}
    mixed = replace(decoder, weights=weights)
    artifact = BACKEND.lower_decoder(mixed, PRECISIONS["int4"], tmp_path, lambda _step: None)
    assert artifact.provenance["quantized"] == 11
    with BACKEND.open_decoder(artifact) as stepper:
        found = stepper.step([3, 1, 2]).logits
    wanted = eager(mixed, [3, 1, 2])
    assert np.abs(found - wanted).max() < 5e-3 * np.abs(wanted).max()


def test_folding_leaves_no_constant_work_and_the_same_answer(lowered: Lowered) -> None:
    _, artifact = lowered("int4")
    path = artifact.source
    assert isinstance(path, Path)
    network = parse_onnx(path).network
    assert network is not None
    half = np.float16
    feeds: dict[str, Array] = {
        "tokens": np.array([5, 6], np.int32),
        "positions": np.array([0, 1], np.int32),
        "mask": np.array([[0, -1e4], [0, 0]], half),
        "past_keys": np.zeros((0, 2, 2, 16), half),
        "past_values": np.zeros((0, 2, 2, 16), half),
        "rows": np.array([1], np.int32),
    }
    plain, folded = NetworkInterpreter(network), NetworkInterpreter(network)
    folded.fold()
    wanted = plain.run(feeds)
    made: list[str] = []
    for _ in range(2):
        found = folded.run(feeds, trace=lambda name, _value: made.append(name))
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)
    left = {layer.kind for layer in folded._network.layers}
    assert made
    assert not left & {"CONSTANT", "DEQUANTIZE"}
    assert not [name for name in made if name.endswith((".floats", ".codes", ".scales"))]
