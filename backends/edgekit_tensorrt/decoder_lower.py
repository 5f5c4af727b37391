"""Decoder to typed ONNX that NVIDIA's parser takes, its weights in a file beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from edgekit import evidence
from edgekit.artifact import Artifact
from edgekit.decoder import Decoder
from edgekit.errors import LoweringFailed, RuntimeFailed, UnsupportedRecipe
from edgekit.host import installed_version
from edgekit.recipe import Recipe
from edgekit_tensorrt import DECODER_RECIPES, Settings, build_engine, generate_on_jetson
from edgekit_tensorrt.choice import left_in_float
from edgekit_tensorrt.decoder_graph import onnx_from_decoder
from edgekit_tensorrt.decoder_passes import MAIN, WEIGHTS
from edgekit_tensorrt.faults import faults_of_file
from edgekit_tensorrt.processes import Built, parse_onnx
from edgekit_tensorrt.processes import build_engine as engine_for
from edgekit_tensorrt.versions import PARSERS

DECODER = generate_on_jetson.DECODER
WIDEST = 64  # tokens in a pass: the range that engines are built for


def artifact_from_decoder(
    decoder: Decoder,
    recipe: Recipe,
    folder: Path,
    settings: Settings,
    report: Callable[[str], None],
) -> Artifact:
    """Write the graph, give it to NVIDIA's parser, and build the engines that were asked for.

    Raises ``UnsupportedRecipe``, ``LoweringFailed`` or ``RuntimeFailed``.
    """
    if recipe not in DECODER_RECIPES:
        names = [each.precision for each in DECODER_RECIPES]
        raise UnsupportedRecipe("tensorrt", recipe.precision, names)
    report("writing the graph and its weights")
    with (folder / WEIGHTS).open("wb") as file:
        model, quantized = onnx_from_decoder(decoder, recipe, file, WEIGHTS)
    _refuse_by_version(model, settings.version)
    onnx.save(model, folder / MAIN)
    report("NVIDIA's parser reads it")
    runtime = _accepted(folder / MAIN)
    described = _described(decoder, recipe)
    engines = _Engines(folder, described, settings, quantized)
    # TensorRT proper builds for the GPU it runs on alone.
    if runtime.startswith("tensorrt_rtx"):
        engines.build(report)
    scripts = [Path(str(each.__file__)) for each in (build_engine, generate_on_jetson, evidence)]
    (folder / DECODER).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    for script in scripts:
        (folder / script.name).write_bytes(script.read_bytes())
    names = [MAIN, WEIGHTS, DECODER, *engines.files, *(script.name for script in scripts)]
    return Artifact(
        target="tensorrt",
        recipe=recipe,
        main=MAIN,
        files={name: folder / name for name in names},
        inputs=(),
        outputs=(),
        provenance={
            "decoder": described,
            "version": settings.version,
            "runtime": runtime,
            "nodes": len(model.graph.node),
            "quantized": len(quantized),
            "kernels": engines.kernels,
            "notes": engines.notes,
            "versions": {name: installed_version(name) for name in ("onnx", "numpy")},
        },
        derived=frozenset(engines.files),
    )


def _described(decoder: Decoder, recipe: Recipe) -> dict[str, Any]:
    """All that a stepper, here or on the device, needs to know."""
    return {
        "spec": decoder.spec.to_json(),
        "capacity": decoder.capacity,
        "widest": WIDEST,
        "dtype": "float32" if recipe.weights == "float32" else "float16",
    }


def _refuse_by_version(model: onnx.ModelProto, version: str) -> None:
    parser, opset = PARSERS[version], model.opset_import[0].version
    newest = max(parser.opset, parser.int4_opset or 0) if opset == 21 else parser.opset
    if opset > newest:
        raise LoweringFailed(
            f"the model needs ONNX opset {opset}; TensorRT {version} takes {newest}."
        )


def _accepted(path: Path) -> str:
    """The parser that took the file as it is meant. Raises ``LoweringFailed``."""
    parsed = parse_onnx(path)
    reasons = [str(error) for error in parsed.errors] or list(
        faults_of_file(path, parsed) if parsed.network is not None else ()
    )
    if reasons:
        raise LoweringFailed(f"NVIDIA's parser does not take the decoder: {'; '.join(reasons)}")
    return parsed.runtime


@dataclass
class _Engines:
    """Engines of TensorRT-RTX, and what their plans say of the file.

    One is built in any case, for the plan; engines are kept for GPUs that the user named, as they
    weigh as much as the model.
    """

    folder: Path
    decoder: dict[str, Any]
    settings: Settings
    quantized: tuple[str, ...]
    files: list[str] = field(default_factory=list)
    kernels: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def build(self, report: Callable[[str], None]) -> None:
        """Raises ``LoweringFailed`` where an engine that the user named cannot be built."""
        named = self.settings.named
        for name in self.settings.compute_capabilities:
            report(f"NVIDIA's compiler plans it for {name}")
            try:
                built = self._built(name)
            except RuntimeFailed as cause:
                if not named:
                    self.notes.append(f"No plan was made for {name}: {cause}")
                    continue
                typed = any(words in str(cause) for words in ("FP32", "HW-specific datatypes"))
                more = " Try --precision fp16." if typed else ""
                raise LoweringFailed(f"for {name}, {cause}{more}") from cause
            plan = built.plan.to_json()
            keys = ("layer_count", "dtypes", "moved_bytes", "constant_bytes")
            self.kernels[name] = {key: plan[key] for key in keys}
            self._note(name, built)
            if named:
                self.files.append(f"model.{name}.engine")
                (self.folder / self.files[-1]).write_bytes(built.engine)

    def _built(self, name: str) -> Built:
        return engine_for(
            self.folder / MAIN,
            compute_capabilities=[name],
            profiles=generate_on_jetson.profiles_of_decoder(self.decoder),
            seconds=self.settings.build_seconds,
            memory_gb=self.settings.build_memory_gb,
        )

    def _note(self, name: str, built: Built) -> None:
        """Whether products read their codes: where they do not, the compiler says nothing."""
        if not self.quantized:
            return
        left = left_in_float(built.plan, self.quantized, "Int4")
        fused = len(self.quantized) - len(left)
        note = f"Planned for {name}: {fused} of {len(self.quantized)} products read 4-bit codes"
        more = f"; floats are made of the weights of {', '.join(left[:5])} in every pass"
        self.notes.append(f"{note}{more if left else ''}.")
