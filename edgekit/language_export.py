"""One language model to proven artifacts in a bundle: what ``export`` does for decoders."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import host
from edgekit.artifact import Artifact
from edgekit.bundle import Bundle, check_destination, write_bundle
from edgekit.card import readme
from edgekit.chat import Turns, render, turns_of
from edgekit.contract import Backend, Decodes
from edgekit.errors import BadInput, UnknownName, UnsupportedRecipe, UsageError
from edgekit.files import storage_errors
from edgekit.language import LanguageModel
from edgekit.language_proof import prove_language
from edgekit.language_reference import REFERENCE, LanguageReference
from edgekit.making import Report, silent
from edgekit.manifest import ArtifactEntry, LanguageEntry, Manifest
from edgekit.planning import AUTO, target_names
from edgekit.program import Reference
from edgekit.recipe import PRECISIONS, Recipe
from edgekit.registry import configured
from edgekit.tokenizer import Tokenizer
from edgekit.verify import Proof

if TYPE_CHECKING:
    from edgekit.decoder import Decoder

CONTEXT = 1024
PROMPTS, CONTINUED = 20, 64  # what every artifact is proven on: prompts, tokens after each
PASSAGE = 24  # tokens of a prompt that is cut from the user's own text
TOKENIZER, TEMPLATE = "language/tokenizer.json", "language/chat_template.jinja"
_NAMES = {"int8": "int8-weights"}  # nothing of a decoder is calibrated


@dataclass(frozen=True)
class DecoderPlan:
    """One artifact to make."""

    adapter: Decodes
    recipe: Recipe

    @property
    def name(self) -> str:
        """``onnxruntime-int4``."""
        return f"{self.adapter.name}-{self.recipe.precision}"


def plan_decoders(
    targets: Sequence[str | Backend], precision: str, options: Mapping[str, str] | None
) -> list[DecoderPlan]:
    """Every target in every precision asked for; ``auto`` is a target's first.

    Raises ``UnknownName``, ``MissingRuntime``, ``UnsupportedRecipe`` or ``UsageError``.
    """
    options = options or {}
    names = target_names(targets, options)
    plans = []
    for name in names:
        adapter = configured(name, options) if isinstance(name, str) else name
        if not isinstance(adapter, Decodes):
            raise UsageError(
                f"{adapter.name} runs no language models; leave it out, or choose another target."
            )
        plans += [DecoderPlan(adapter, each) for each in _recipes(adapter, precision)]
    return list({each.name: each for each in plans}.values())


def _recipes(adapter: Decodes, precision: str) -> list[Recipe]:
    supported = {recipe.precision: recipe for recipe in adapter.decoder_recipes}
    if precision == AUTO:
        return [adapter.decoder_recipes[0]]
    found = []
    for asked in precision.split(","):
        name = _NAMES.get(asked, asked)
        if name not in PRECISIONS:
            raise UnknownName("precision", asked, (AUTO, "fp32", "fp16", "int8", "int4"))
        if name not in supported:
            raise UnsupportedRecipe(adapter.name, asked, supported)
        found.append(supported[name])
    return found


def export_language(
    model: LanguageModel,
    *,
    source: str,
    targets: Sequence[str | Backend],
    out: Path,
    precision: str = AUTO,
    context: int = CONTEXT,
    text: Path | None = None,
    max_rise: float,
    overwrite: bool = False,
    unproven_ok: bool = False,
    options: Mapping[str, str] | None = None,
    report: Report = silent,
) -> Bundle:
    """Lower ``model`` for every target, decode and read with each, and write the bundle ``out``.

    ``context`` is the most tokens of a conversation. ``text`` is a file of the user's own to
    prove on: perplexity is measured on it, and prompts are cut from it. ``max_rise`` is the most
    percent of perplexity that integers may cost. Raises ``NotProven`` where eager is not met.
    """
    check_destination(out, overwrite=overwrite)
    plans = plan_decoders(targets, precision, options)
    _check_context(model, context)
    reference = _reference(model, context, text, report)
    kept: list[tuple[Artifact, Proof]] = []
    overrides: list[str] = []
    parent = _existing(out)
    with storage_errors(out), tempfile.TemporaryDirectory(dir=parent, prefix=".edgekit-") as place:
        for plan in plans:
            artifact, proof = _made(plan, model, context, reference, Path(place), max_rise, report)
            if not proof.passed and unproven_ok:
                reasons = " ".join(proof.failures)
                overrides.append(f"{plan.name} was kept unproven: {reasons}")
            else:
                proof.require()
            kept.append((artifact, proof))
        manifest = _manifest(model, source, context, max_rise, reference, kept, overrides)
        report(f"writing {out}")
        proofs = [proof for _, proof in kept]
        return write_bundle(
            out,
            manifest,
            artifacts=[artifact for artifact, _ in kept],
            proofs=proofs,
            reference=Reference((), (), reference.source),
            readme=readme(manifest, proofs, model.card),
            extra=_words(model, reference),
            overwrite=overwrite,
        )


def _made(
    plan: DecoderPlan,
    model: LanguageModel,
    context: int,
    reference: LanguageReference,
    place: Path,
    max_rise: float,
    report: Report,
) -> tuple[Artifact, Proof]:
    folder = place / plan.name
    folder.mkdir()

    def step(text: str) -> None:
        report(f"{plan.name}: {text}")

    step("lowering")
    decoder = _decoder(model, plan.recipe, context)
    artifact = plan.adapter.lower_decoder(decoder, plan.recipe, folder, step)
    del decoder
    step("proving")
    proof = prove_language(plan.adapter, artifact, reference, max_rise=max_rise, report=step)
    return artifact, proof


def _decoder(model: LanguageModel, recipe: Recipe, context: int) -> Decoder:
    from edgekit.block_quantize import quantized_decoder

    decoder = model.decoder(context)
    if not recipe.quantized:
        return decoder
    return quantized_decoder(decoder, int(recipe.weights.removeprefix("int")))


def _check_context(model: LanguageModel, context: int) -> None:
    if not 2 * PASSAGE <= context <= model.spec.context:
        raise BadInput(
            f"--context {context} is not possible: {model.name} knows {model.spec.context} "
            f"positions, and proofs need {2 * PASSAGE}; choose a number between them."
        )


def _existing(out: Path) -> Path:
    return next(part for part in out.absolute().parents if part.exists())


def _reference(
    model: LanguageModel, context: int, text: Path | None, report: Report
) -> LanguageReference:
    from edgekit.language_eager import reference_of

    tokenizer = Tokenizer(model.tokenizer)
    reading = _text(text) if text else (files("edgekit") / "texts/reading.txt").read_text("utf-8")
    tokens = tokenizer.encode(reading)[:context]
    if len(tokens) < 2 * PASSAGE:
        raise BadInput(f"{text} holds {len(tokens)} tokens; a proof needs {2 * PASSAGE} or more.")
    if text:
        step = max(1, (len(tokens) - PASSAGE) // PROMPTS)
        starts = range(0, len(tokens) - PASSAGE, step)
        prompts = [tokens[start : start + PASSAGE] for start in starts][:PROMPTS]
        source = f"the user's text {text.name}"
    else:
        shipped = (files("edgekit") / "texts/prompts.txt").read_text("utf-8")
        questions = [part.strip() for part in shipped.split("\n\n") if part.strip()]
        prompts = [_prompt(model, tokenizer, question) for question in questions]
        source = "edgekit's own prompts and text"
    count = min(CONTINUED, context - max(map(len, prompts)))
    if count < 1:
        raise BadInput(
            f"--context {context} leaves no room behind a prompt of {max(map(len, prompts))} "
            "tokens; choose a longer one."
        )
    return reference_of(model, prompts, tokens, count=count, source=source, report=report)


def _prompt(model: LanguageModel, tokenizer: Tokenizer, question: str) -> list[int]:
    if not model.template:
        return tokenizer.encode(question)
    messages = [{"role": "user", "content": question}]
    return tokenizer.encode(render(model.template, messages), special=False)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as cause:
        raise BadInput(
            f"there is no file {path}; --samples of a language model is a text."
        ) from cause
    except (OSError, UnicodeDecodeError) as cause:
        raise BadInput(f"{path} is no text in UTF-8: {cause}.") from cause


def _words(model: LanguageModel, reference: LanguageReference) -> dict[str, bytes]:
    words = {TOKENIZER: model.tokenizer.encode(), REFERENCE: reference.to_bytes()}
    if model.template:
        words[TEMPLATE] = model.template.encode()
    return words


def _manifest(
    model: LanguageModel,
    source: str,
    context: int,
    max_rise: float,
    reference: LanguageReference,
    kept: Sequence[tuple[Artifact, Proof]],
    overrides: Sequence[str],
) -> Manifest:
    turns: Turns | None = turns_of(model.template) if model.template else None
    return Manifest(
        model=model.name,
        source=Path(source).name,  # the folders of the maker's machine are nobody's business
        licence=model.licence,
        inputs=(),
        outputs=(),
        image=None,
        labels=(),
        artifacts=tuple(
            ArtifactEntry(
                artifact.target,
                artifact.recipe,
                artifact.main,
                tuple(artifact.files),
                json.loads(json.dumps(artifact.provenance)),
            )
            for artifact, _ in kept
        ),
        samples=(),
        samples_source=reference.source,
        versions=host.tool_versions(),
        overrides=tuple(overrides),
        language=LanguageEntry(
            context=context,
            stops=model.stops,
            tokenizer=TOKENIZER,
            template=TEMPLATE if model.template else "",
            reference=REFERENCE,
            max_rise=max_rise,
            turns=turns.to_json() if turns else None,
        ),
    )
