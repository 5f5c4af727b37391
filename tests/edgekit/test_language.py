"""A language model from export to text, on a tiny trained one and the first runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit import cli
from edgekit.contract import Decodes
from edgekit.decode.generate import generate
from edgekit.errors import (
    BadInput,
    DamagedFile,
    NotProven,
    UnknownName,
    UnsupportedRecipe,
    UsageError,
)
from edgekit.gate import Budget
from edgekit.language_export import plan_decoders
from edgekit.language_proof import prove_language
from edgekit.language_reference import LanguageReference
from edgekit.planning import Quantization
from edgekit.testing import example_bundle

pytest.importorskip("onnxruntime")

MODEL = "tiny-llama"
PROMPT = "Write a short letter"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> edgekit.Bundle:
    out = tmp_path_factory.mktemp("language") / "tiny"
    return edgekit.export(
        MODEL, targets=["onnxruntime"], precision="fp32,int4", context=160, out=out
    )


@pytest.fixture
def text(bundle: edgekit.Bundle) -> Iterator[edgekit.TextModel]:
    with edgekit.TextModel(bundle, "onnxruntime-fp32", threads=1) as model:
        yield model


@pytest.fixture
def copied(bundle: edgekit.Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_floats_decode_every_token_of_eager(bundle: edgekit.Bundle) -> None:
    proof = bundle.proof("onnxruntime-fp32")
    decoding = proof.decoding
    assert decoding is not None
    assert proof.level == "executed"
    assert proof.passed
    assert decoding.prompts == 20
    assert decoding.tokens > 200
    assert decoding.decoded == decoding.compared == decoding.agreed == decoding.tokens
    assert decoding.rise == pytest.approx(0, abs=1e-3)


def test_integers_are_held_to_perplexity_and_the_proof_says_what_agreed(
    bundle: edgekit.Bundle,
) -> None:
    decoding = bundle.proof("onnxruntime-int4").decoding
    assert decoding is not None
    assert 0.7 < decoding.agreed / decoding.tokens < 1
    assert abs(decoding.rise) < 10
    assert 4 in decoding.exact_widths


def test_a_bundle_opens_again_with_its_words(bundle: edgekit.Bundle) -> None:
    opened = edgekit.open_bundle(bundle.folder)
    assert opened.manifest == bundle.manifest
    assert opened.language.context == 160
    reference = opened.language_reference()
    assert len(reference.prompts) == len(reference.continuations) == 20
    assert reference.perplexity == opened.proof("onnxruntime-fp32").decoding.eager_perplexity  # type: ignore[union-attr]


def test_the_card_says_what_was_foreseen_and_how_to_ask(bundle: edgekit.Bundle) -> None:
    card = (bundle.folder / "README.md").read_text()
    decoding = bundle.proof("onnxruntime-fp32").decoding
    assert decoding is not None
    assert f"| {decoding.agreed:,} of {decoding.tokens:,} |" in card
    assert "conversations of up to 160 tokens" in card
    assert "edgekit generate . --chat" in card
    assert "Inputs:" not in card


def test_a_reference_survives_the_file(bundle: edgekit.Bundle) -> None:
    reference = bundle.language_reference()
    again = LanguageReference.from_bytes(reference.to_bytes())
    assert again.prompts == reference.prompts
    assert again.margins == reference.margins
    np.testing.assert_array_equal(again.logits, reference.logits)
    with pytest.raises(DamagedFile, match="malformed"):
        LanguageReference.from_bytes(reference.to_bytes()[:200])


def test_another_models_answers_are_not_proven(bundle: edgekit.Bundle) -> None:
    adapter = edgekit.backend("onnxruntime")
    assert isinstance(adapter, Decodes)
    artifact = bundle.artifact("onnxruntime-fp32")
    reference = bundle.language_reference()
    swapped = (*reference.continuations[0][:3], 5, *reference.continuations[0][4:])
    wrong = replace(reference, continuations=(swapped, *reference.continuations[1:]))
    proof = prove_language(adapter, artifact, wrong, max_rise=10, threads=1)
    assert not proof.passed
    assert any("decodes greedily" in why for why in proof.failures)
    assert any("Decoded one by one" in why for why in proof.failures)
    easier = replace(reference, losses=reference.losses * 0.9)
    proof = prove_language(adapter, artifact, easier, max_rise=10, threads=1)
    assert any("Perplexity rises" in why for why in proof.failures)


def test_a_tie_is_no_failure_and_a_wrong_token_is(bundle: edgekit.Bundle) -> None:
    adapter = edgekit.backend("onnxruntime")
    assert isinstance(adapter, Decodes)
    reference = bundle.language_reference()
    last = (*reference.continuations[0][:-1], 5)
    gaps = (*reference.margins[0][:-1], 1e-6)
    tied = replace(
        reference,
        continuations=(last, *reference.continuations[1:]),
        margins=(gaps, *reference.margins[1:]),
    )
    artifact = bundle.artifact("onnxruntime-fp32")
    proof = prove_language(adapter, artifact, tied, max_rise=10, threads=1)
    assert proof.passed, proof.failures
    assert proof.decoding is not None
    assert proof.decoding.ties == 1


def test_streamed_pieces_are_the_text_of_the_tokens(text: edgekit.TextModel) -> None:
    streamed = "".join(text.stream(PROMPT, limit=30))
    tokens = list(text.tokens(text.encoded(PROMPT), limit=30))
    assert streamed == text.tokenizer.decode([t for t in tokens if t not in text.stops])
    assert text.answer is not None
    assert text.answer.tokens == len(tokens)


def test_a_second_prompt_reuses_what_it_shares_and_says_the_same(
    bundle: edgekit.Bundle, text: edgekit.TextModel
) -> None:
    prompt = text.encoded(PROMPT)
    first = list(text.tokens(prompt, limit=8))
    longer = [*prompt, *first, 40, 41]
    with edgekit.TextModel(bundle, "onnxruntime-fp32", threads=1) as fresh:
        wanted = list(fresh.tokens(longer, limit=8))
    assert list(text.tokens(longer, limit=8)) == wanted
    assert text.answer is not None
    assert text.answer.reused == len(prompt) + len(first) - 1


def test_a_stream_that_is_left_early_harms_nothing(text: edgekit.TextModel) -> None:
    prompt = text.encoded(PROMPT)
    wanted = list(text.tokens(prompt, limit=12))
    for _ in text.tokens([*prompt, 9], limit=12):
        break
    assert list(text.tokens(prompt, limit=12)) == wanted


def test_an_answer_ends_at_the_context(text: edgekit.TextModel) -> None:
    prompt = [(7 * i) % 500 + 3 for i in range(150)]
    tokens = list(text.tokens(prompt, limit=99))
    assert text.answer is not None
    if tokens[-1] not in text.stops:
        assert len(tokens) == text.context - len(prompt)
        assert text.answer.stopped == "context"


def test_a_prompt_as_long_as_the_context_is_refused_with_the_figures(
    text: edgekit.TextModel,
) -> None:
    with pytest.raises(BadInput, match="has 160 tokens and the bundle's context is 160"):
        next(text.tokens([5] * 160))


@pytest.mark.parametrize("chat", [False, True])
def test_an_empty_prompt_is_refused(text: edgekit.TextModel, chat: bool) -> None:
    with pytest.raises(BadInput, match="empty"):
        next(text.stream("", chat=chat))


def test_the_same_seed_says_the_same(text: edgekit.TextModel) -> None:
    sampling = edgekit.Sampling(temperature=1.0, seed=7)
    first = list(text.tokens(text.encoded(PROMPT), limit=20, sampling=sampling))
    assert first == list(text.tokens(text.encoded(PROMPT), limit=20, sampling=sampling))


def test_the_loop_over_the_stepper_is_what_text_gives(bundle: edgekit.Bundle) -> None:
    adapter = edgekit.backend("onnxruntime")
    assert isinstance(adapter, Decodes)
    reference = bundle.language_reference()
    with adapter.open_decoder(bundle.artifact("onnxruntime-fp32"), threads=1) as stepper:
        for prompt, wanted in zip(reference.prompts[:4], reference.continuations, strict=False):
            stepper.rewind(0)
            assert tuple(generate(stepper, prompt, limit=len(wanted))) == wanted


def test_generate_streams_and_says_what_it_took(
    bundle: edgekit.Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", str(bundle.folder), "--prompt", PROMPT, "--max-tokens", "12")
    code, out, err = run(capsys, *words)
    assert code == 0
    assert "tokens/s; " in err
    assert "onnxruntime-int4" in err  # the smallest
    code, document, _ = run(capsys, *words, "--json")
    value = json.loads(document)
    assert value["text"] + "\n" == out
    assert value["tokens"] <= 12


def test_generate_reads_a_prompt_from_a_file(
    bundle: edgekit.Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    words = ("generate", str(bundle.folder), "--max-tokens", "5")
    _, direct, _ = run(capsys, *words, "--prompt", PROMPT)
    code, read, _ = run(capsys, *words, "--prompt-file", str(path))
    assert (code, read) == (0, direct)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "", "--chat"], "the prompt is empty"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1; it is a number from 0"),
        (["--prompt", "x", "--top-p", "2"], "top-p is 2"),
        (["--prompt", "x", "--max-tokens", "0"], "'0' is not a number of 1 or more"),
        (["--prompt", "word " * 200_000], "the bundle's context is 160"),
        (["--prompt", "x", "--artifact", "coreml-fp16"], "unknown artifact 'coreml-fp16'"),
        (["--prompt", "\udcff\udcfe"], "UTF-8"),
        ([], "one of --prompt TEXT and --prompt-file FILE"),
        (["--prompt", "x", "--prompt-file", "y"], "one of --prompt TEXT and --prompt-file FILE"),
        (["--prompt-file", "/nowhere/at/all"], "there is no file /nowhere/at/all"),
    ],
)
def test_what_generate_cannot_do_is_a_sentence(
    bundle: edgekit.Bundle,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    code, out, err = run(capsys, "generate", str(bundle.folder), *words)
    assert code == 2
    assert sentence in err
    assert not out


def test_a_prompt_file_that_is_no_text_is_a_sentence(
    bundle: edgekit.Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(b"\xff\xfe\x00")
    code, _, err = run(capsys, "generate", str(bundle.folder), "--prompt-file", str(path))
    assert code == 2
    assert "is no text in UTF-8" in err


def test_verify_proves_a_language_bundle_again(
    bundle: edgekit.Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "verify", str(bundle.folder))
    assert code == 0
    assert "onnxruntime-fp32  executed" in out
    assert "100.00% of" in out
    code, _, err = run(capsys, "verify", str(bundle.folder), "--layers")
    assert code == 2
    assert "--layers is not of language models" in err


def test_profile_gives_rates_and_the_cost_of_wider_passes(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("profile", str(copied), "--artifact", "onnxruntime-int4", "--runs", "20", "--noisy-ok")
    code, document, _ = run(capsys, *words, "--json")
    assert code == 0
    (measured,) = json.loads(document)
    assert measured["decode_tokens_per_second"] > 0
    assert list(measured["passes_ms"]) == ["40", "80"]
    assert list(measured["passes_ms"]["40"]) == ["1", "2", "4", "8", "16", "32"]
    assert measured["peak_memory_bytes"] > measured["model_memory_bytes"] >= 0
    opened = edgekit.open_bundle(copied)
    assert opened.measurement("onnxruntime-int4")["p50_ms"] == measured["p50_ms"]  # type: ignore[index]
    code, out, _ = run(capsys, *words)
    assert "ms for a pass of N tokens" in out
    page = copied.with_name("report.html")
    code, out, _ = run(capsys, "report", str(copied), "-o", str(page))
    assert code == 0
    drawn = page.read_text()
    assert "40 tokens cached; 1: 1.00, 2: " in drawn
    assert drawn.count("<polyline") == 2


def test_what_is_for_images_is_refused_for_language(
    bundle: edgekit.Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = run(capsys, "run", str(bundle.folder), "x.png")
    assert code == 2
    assert "use edgekit generate" in err
    with pytest.raises(UsageError, match="profile_language"):
        edgekit.profile(bundle)
    given: list[dict[str, Any]] = [
        {"inputs": ["x=1x3"]},
        {"quantization": Quantization(keep_float=("head",))},
        {"quantization": Quantization(calibration=tmp_path)},
    ]
    for words in given:
        with pytest.raises(UsageError, match="means nothing for a language model"):
            edgekit.export(MODEL, targets=["onnxruntime"], out=tmp_path / "o", **words)
    with pytest.raises(UsageError, match="--context is of language models"):
        edgekit.export("partialnet-nano", targets=["onnxruntime"], out=tmp_path / "o", context=9)


def test_generate_is_refused_for_a_bundle_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example_bundle(tmp_path / "images")
    code, _, err = run(capsys, "generate", str(tmp_path / "images"), "--prompt", "x")
    assert code == 2
    assert "is no language model" in err


def test_an_export_that_costs_too_much_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "o"
    budget = Quantization(budget=Budget(max_rise=-50))
    with pytest.raises(NotProven, match="Perplexity rises from"):
        edgekit.export(
            MODEL,
            targets=["onnxruntime"],
            precision="int4",
            context=96,
            out=out,
            quantization=budget,
        )
    assert not out.exists()
    assert not list(tmp_path.iterdir())
    bundle = edgekit.export(
        MODEL,
        targets=["onnxruntime"],
        precision="int4",
        context=96,
        out=out,
        quantization=budget,
        unproven_ok=True,
    )
    assert "kept unproven" in bundle.manifest.overrides[0]
    assert bundle.standing("onnxruntime-int4") == "not proven"


def test_a_text_of_the_users_own_is_what_it_is_proven_on(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 12)
    bundle = edgekit.export(
        MODEL,
        targets=["onnxruntime"],
        precision="int4",
        context=128,
        samples=path,
        out=tmp_path / "o",
    )
    reference = bundle.language_reference()
    assert reference.source == "the user's text own.txt"
    assert len(reference.prompts) == 20
    assert reference.prompts[0] == reference.text[:24]
    path.write_text("short")
    with pytest.raises(BadInput, match="a proof needs 48 or more"):
        edgekit.export(MODEL, targets=["onnxruntime"], samples=path, out=tmp_path / "p")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="is no text in UTF-8"):
        edgekit.export(MODEL, targets=["onnxruntime"], samples=path, out=tmp_path / "p")
    with pytest.raises(BadInput, match="there is no file"):
        edgekit.export(
            MODEL, targets=["onnxruntime"], samples=tmp_path / "no.txt", out=tmp_path / "p"
        )


@pytest.mark.parametrize("context", [10, 100_000])
def test_a_context_that_the_model_does_not_know_is_refused(tmp_path: Path, context: int) -> None:
    with pytest.raises(BadInput, match=f"--context {context} is not possible"):
        edgekit.export(MODEL, targets=["onnxruntime"], context=context, out=tmp_path / "o")


def test_precisions_are_planned_by_what_each_target_makes() -> None:
    names = [each.name for each in plan_decoders(["onnxruntime"], "int8,int4,int8-weights", None)]
    assert names == ["onnxruntime-int8-weights", "onnxruntime-int4"]
    with pytest.raises(UnknownName, match="int5"):
        plan_decoders(["onnxruntime"], "int5", None)
    with pytest.raises(UnsupportedRecipe, match="palette4"):
        plan_decoders(["onnxruntime"], "palette4", None)


def test_a_damaged_tokenizer_or_reference_is_found_when_the_bundle_opens(copied: Path) -> None:
    path = copied / "language/tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(DamagedFile, match="was altered or cut short"):
        edgekit.open_bundle(copied)
