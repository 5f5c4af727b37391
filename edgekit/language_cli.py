"""What the verbs do with a language model: generate, verify, profile, spec plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edgekit.arguments import Arguments
from edgekit.bundle import Bundle
from edgekit.decode.sampling import Sampling
from edgekit.errors import BadInput, UsageError
from edgekit.exactness import Certificate
from edgekit.generation import AUTO, Answer, TextModel
from edgekit.language_profile import LanguageMeasurement, profile_language
from edgekit.language_proof import prove_language
from edgekit.registry import language_backend
from edgekit.render import Progress, size_text, table
from edgekit.speculation import SpeculationPlan, plan_speculation
from edgekit.trials import Prediction
from edgekit.verify import Proof


def generate(asked: Arguments) -> int:
    """Stream an answer to stdout; what it took goes to stderr. With --json, one document."""
    prompt = _prompt(asked)
    sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.seed)
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if not asked.json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    with TextModel(asked.bundle, asked.artifact, threads=asked.threads) as model:
        with Progress().shown() as progress:
            stream = model.stream(
                prompt,
                chat=asked.chat,
                limit=asked.max_tokens,
                sampling=sampling,
                drafter=asked.drafter,
                grade=asked.grade,
                report=lambda fed: progress(f"reading the prompt: {fed} tokens"),
            )
            first = next(stream, "")
        show(first)
        for piece in stream:
            show(piece)
        answer, name = model.answer, model.artifact.name
        plan = model.plan(asked.grade) if asked.drafter == AUTO else None
    assert answer is not None  # the first piece came with one
    if asked.json:
        print(json.dumps({"artifact": name, "text": "".join(pieces), **answer.to_json()}, indent=1))
    else:
        sys.stdout.write("\n")
        print(_took(answer, name, plan), file=sys.stderr)
    return 0


def _prompt(asked: Arguments) -> str:
    if (asked.prompt is None) == (asked.prompt_file is None):
        raise UsageError("say one of --prompt TEXT and --prompt-file FILE.")
    return str(asked.prompt) if asked.prompt_file is None else _read(asked.prompt_file)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as cause:
        raise BadInput(f"there is no file {path}.") from cause
    except (OSError, UnicodeDecodeError) as cause:
        raise BadInput(f"{path} is no text in UTF-8: {cause}.") from cause


def _took(answer: Answer, artifact: str, plan: SpeculationPlan | None) -> str:
    rate = f"{answer.tokens_per_second:.1f} tokens/s" if answer.tokens > 1 else "one token"
    if answer.drafter:
        held = "" if answer.grade == "bitwise" else f" ({answer.grade})"
        rate += f" with {answer.drafter}{held}, {answer.tokens_per_pass:.2f} tokens a pass"
        if answer.plain_tokens_per_second:
            rate += f", plain would have been {answer.plain_tokens_per_second:.1f} tokens/s"
    elif plan is not None:
        rate += ", plain: speculation was measured not to pay here"
    return (
        f"[{artifact}: {answer.tokens} tokens, {rate}; {answer.prompt_tokens} prompt tokens, first "
        f"token after {answer.first_token_seconds:.2f} s; ended by {answer.stopped}]"
    )


def verify(bundle: Bundle, names: Sequence[str]) -> list[Proof]:
    """Prove artifacts of a language bundle again, each held to the limits it was made with."""
    reference = bundle.language_reference()
    proofs = []
    for name in names:
        artifact = bundle.artifact(name)
        adapter = language_backend(artifact.target)
        with Progress().shown() as progress:
            report = _prefixed(progress, name)
            rise = bundle.language.max_rise
            proofs.append(
                prove_language(adapter, artifact, reference, max_rise=rise, report=report)
            )
    return proofs


def plan(bundle: Bundle, names: Sequence[str], asked: Arguments) -> int:
    """Measure whether speculation is exact and pays, and keep the plan in the bundle."""
    plans, prompts = [], _plan_prompts(bundle, asked)
    for name in names:
        with Progress().shown() as progress:
            report = _prefixed(progress, name)
            words = {"grade": asked.grade, "threads": asked.threads, "prompts": prompts}
            plans.append(plan_speculation(bundle, name, report=report, **words))
    if asked.json:
        print(json.dumps([each.to_json() for each in plans], indent=1))
    else:
        print("\n\n".join(map(plan_text, plans)))
    return 0 if all(each.certificate.granted for each in plans) else 1


def _plan_prompts(bundle: Bundle, asked: Arguments) -> list[list[int]] | None:
    """The user's own, parted by empty lines, as the chat template puts them; or None."""
    if asked.prompts is None:
        return None
    texts = [part.strip() for part in _read(asked.prompts).split("\n\n") if part.strip()]
    if not texts:
        raise BadInput(f"{asked.prompts} holds no prompt; part them by empty lines.")
    model = TextModel(bundle)
    return [model.encoded(text, chat=bool(bundle.language.template)) for text in texts]


def plan_text(plan: SpeculationPlan) -> str:
    """The certificate, the costs, what each drafter is predicted and was measured to bring."""
    single = plan.single_seconds
    passes = [
        (
            width,
            f"{1e3 * seconds:.2f} ms",
            f"{seconds / single:.2f}",
            *(_predicted(each.fixed.get(width)) for each in plan.candidates),
        )
        for width, seconds in plan.costs.passes
    ]
    tried = [f"{each.drafter}, predicted" for each in plan.candidates]
    rows = [
        (
            each.drafter,
            f"{each.tokens_per_pass:.2f}",
            " ".join(f"{share:.2f}" for share in each.acceptance[:4]) or "-",
            f"{1e6 * each.drafting_seconds:.0f} us",
            f"{1e6 * each.round_seconds:.0f} us, {each.round_seconds / single:.1%}",
            _predicted(each.predicted),
            f"{each.measured:.2f}",
            "chosen" if each.drafter == plan.chosen else "",
        )
        for each in plan.candidates
    ]
    header = ["with the switch", "tokens a pass", "right at depth 1 2 3 4", "drafting"]
    header += ["a round beside its pass", "predicted", "measured", ""]
    return "\n\n".join(
        [
            f"{plan.artifact}, {plan.threads} threads: {certificate_text(plan.certificate)}",
            f"A pass of one token takes {1e3 * single:.2f} ms; the price of exactness, the "
            f"narrowest pass that is kept to, is {plan.exact_seconds / single:.2f} times that.",
            table(("width", "a pass", "against one token", *tried), passes),
            *([table(header, rows)] if rows else []),
            f"speculation: {plan.chosen}",
        ]
    )


def _predicted(each: Prediction | None) -> str:
    if each is None:
        return "-"
    return f"{each.speedup:.2f} ({each.low:.2f} to {each.high:.2f})"


def certificate_text(proof: Certificate) -> str:
    """One sentence or two."""
    texts = (
        f"{proof.equal} of {proof.texts} speculative texts on {proof.prompts} prompts, greedy and "
        f"sampled, are plain ones, {proof.tokens:,} tokens, {proof.drafted:,} drafted."
    )
    verdict = proof.grade if proof.granted else f"{proof.grade} is refused"
    if (found := proof.deviation) is None:
        return f"{verdict}: {texts}"
    plain, own = found.plain_from_eager, found.from_eager
    return (
        f"{verdict}: tokens on side branches of trees differ from plain ones by "
        f"{found.from_plain.nats:.4f} nats (at most {found.from_plain.worst:.2f}), and "
        f"{found.from_plain.flipped:.2%} of {found.rows:,} rows have another likeliest token; from "
        f"the eager model they differ by {own.nats:.4f} nats and {own.flipped:.2%}, plain ones by "
        f"{plain.nats:.4f} and {plain.flipped:.2%}. {texts}"
    )


def _prefixed(progress: Progress, name: str) -> Callable[[str], None]:
    return lambda step: progress(f"{name}: {step}")


def decoding_table(proofs: Sequence[Proof]) -> str:
    """What language proofs measured; "" where none was of a language model."""
    rows = [
        (
            proof.artifact,
            proof.level if proof.passed else "not proven",
            f"{d.decoded} of {d.compared}" if d.compared else "-",
            f"{d.agreed / d.tokens:.2%} of {d.tokens:,}",
            f"{d.perplexity:.3f}",
            f"{d.eager_perplexity:.3f}",
            f"{d.text_agreement:.2%} of {d.text_tokens:,}",
            " ".join(map(str, d.exact_widths)) or "-",
        )
        for proof in proofs
        if (d := proof.decoding) is not None
    ]
    header = ("artifact", "proof", "decoded as eager", "foreseen", "perplexity", "eager")
    return table((*header, "same next token", "exact widths"), rows) if rows else ""


def profile(bundle: Bundle, names: Sequence[str], asked: Arguments) -> int:
    """Time artifacts of a language bundle, and show the cost of wider passes."""
    measured = []
    for name in names:
        with Progress().shown() as progress:
            progress(f"timing {name}")
            measured.append(
                profile_language(
                    bundle, name, threads=asked.threads, runs=asked.runs, noisy_ok=asked.noisy_ok
                )
            )
    if asked.json:
        print(json.dumps([m.to_json() for m in measured], indent=1))
    else:
        print(measurement_table(measured), *map(pass_table, measured), sep="\n\n")
    return 0


def measurement_table(measured: Sequence[LanguageMeasurement]) -> str:
    """One row for each artifact measured."""
    header = ("artifact", "threads", "decode", "prefill", "first token", "cold load", "warm load")
    rows = [
        (
            m.artifact,
            m.threads,
            f"{m.decode_tokens_per_second:.1f} tokens/s",
            f"{m.prefill_tokens_per_second:.0f} tokens/s",
            f"{m.first_token_ms:.0f} ms ({m.prompt_tokens} tokens)",
            *(f"{ms:.0f} ms" for ms in (m.cold_load_ms, m.warm_load_ms)),
            size_text(m.peak_memory_bytes),
            size_text(m.size_bytes),
            m.noise or "quiet",
        )
        for m in measured
    ]
    return table((*header, "peak memory", "size", "machine"), rows)


def pass_table(m: LanguageMeasurement) -> str:
    """T(N): what a pass of N tokens costs, and in passes of one."""
    widths = list(next(iter(m.passes_ms.values()), {}))
    rows = [
        (f"{length} cached", *(f"{curve[w]:.2f} ({curve[w] / curve['1']:.2f}x)" for w in widths))
        for length, curve in m.passes_ms.items()
    ]
    return f"{m.artifact}, ms for a pass of N tokens:\n" + table(("", *widths), rows)
