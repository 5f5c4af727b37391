"""Why a proof fails, or where it would: an artifact's layers against the eager ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from edgekit.artifact import Artifact
from edgekit.contract import Backend, Inside
from edgekit.errors import EdgekitError
from edgekit.layers import Layer, LayerDeviation, compare_layers, first_divergence, sentence
from edgekit.program import Program, Reference
from edgekit.recipe import FP32
from edgekit.verify import Proof, limits_of

LayersOf = Callable[[Backend], list[Layer]]  # asked only where they are needed


def explained(
    proof: Proof, backend: Backend, artifact: Artifact, program: Program, layers: LayersOf
) -> Proof:
    """A proof that failed, with the first layer that differs, where the session can show it."""
    from edgekit.trace import source_of

    try:
        found = deviations_of(
            backend, artifact, layers(backend), program.reference, program=program
        )
    except EdgekitError:  # a failed search for the reason must not hide what was found
        return proof
    first = first_divergence(found)
    if first is None:
        return proof
    why = sentence(first, artifact.recipe.precision, source_of(program, first.node))
    return replace(proof, failures=(*proof.failures, why))


def warned(
    proof: Proof, backend: Backend, artifact: Artifact, program: Program, layers: LayersOf
) -> Proof:
    """A proof that holds here, and would not where the file's float16 is computed as such.

    ONNX Runtime's CPU kernels compute float16 in float32: what overflows on the way to a right
    result is infinite only where each value is looked at.
    """
    if artifact.recipe == FP32 or proof.level != "executed":
        return proof  # an interpreter rounds every value itself
    try:
        found = deviations_of(backend, artifact, layers(backend), program.reference)
    except EdgekitError:  # the proof stands without it
        return proof
    lost = next((layer for layer in found if not layer.finite), None)
    if lost is None:
        return proof
    note = (
        f"Node {lost.node!r} ({lost.op}) of module {lost.module or 'the model itself'!r} is beyond "
        "float16. The runtime here computes it in float32; one that computes in float16 gives "
        "infinity. For such devices export with --precision fp32."
    )
    return replace(proof, notes=(*proof.notes, note))


def deviations_of(
    backend: Backend,
    artifact: Artifact,
    layers: Sequence[Layer],
    reference: Reference,
    *,
    program: Program | None = None,
) -> list[LayerDeviation]:
    """How far each layer of ``artifact`` is from the eager one, on the first sample.

    A runtime that shows nothing of its inside needs ``program``: the same program is lowered
    again, with every layer among its outputs. Without it there is nothing to compare: [].
    """
    if not layers:
        return []
    sample, names = reference.samples[0], [layer.node for layer in layers]
    with backend.open(artifact) as session:
        if isinstance(session, Inside):
            found = session.layers(sample)
        elif program is None:
            return []
        else:
            from edgekit.making import lowered  # which needs this module first
            from edgekit.trace import revealing

            shown = lowered(backend, artifact.recipe, revealing(program, names))
            with backend.open(shown) as other:
                found = other.run(sample)
    return compare_layers(layers, found, limits_of(artifact).sqnr_db)
