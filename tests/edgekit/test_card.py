"""The card of a bundle says what it is, what was proven and how to run it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgekit.bundle import Bundle
from edgekit.card import readme
from edgekit.gate import Attempt
from edgekit.recipe import INT8
from edgekit.speed import Speed
from edgekit.testing import example_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("card") / "bundle")


def text(bundle: Bundle, *, card: str = "", overrides: tuple[str, ...] = ()) -> str:
    manifest = replace(bundle.manifest, overrides=overrides)
    return readme(manifest, [bundle.proof("replay-fp32")], card)


def test_the_card_names_the_model_its_licence_and_its_tensors(bundle: Bundle) -> None:
    written = text(bundle)
    assert written.startswith("# double\n")
    assert "Licence: Apache-2.0." in written
    assert "Inputs: `x=1x4`. Outputs: `scores=1x4`." in written
    assert written.endswith("\n")
    assert not written.endswith("\n\n")


def test_a_licence_that_is_not_known_is_not_made_up(bundle: Bundle) -> None:
    assert "Licence: not stated." in readme(replace(bundle.manifest, licence=""), [], "")


def test_every_proof_has_a_row_and_says_what_it_ran_on(bundle: Bundle) -> None:
    written = text(bundle)
    assert "on 3 samples (random, seed 0)." in written
    assert "| replay-fp32 | executed | yes | 0.00e+00 | 0.00e+00 |" in written


def test_a_failed_proof_is_not_dressed_up(bundle: Bundle) -> None:
    proof = replace(bundle.proof("replay-fp32"), failures=("It differs.",))
    reason = "replay-fp32 was kept unproven: It differs."
    written = readme(replace(bundle.manifest, overrides=(reason,)), [proof], "")
    assert "| **no** |" in written
    assert f"Overrides:\n- {reason}\n" in written


def test_without_overrides_there_is_no_word_of_them(bundle: Bundle) -> None:
    assert "Overrides" not in text(bundle)


def test_the_lines_to_run_name_the_runtime(bundle: Bundle) -> None:
    assert "pip install 'edgekit-sdk[replay]'\nedgekit verify ." in text(bundle)


def test_the_models_own_card_comes_last(bundle: Bundle) -> None:
    assert text(bundle, card="\nTrained on cats.\n").endswith("## Model card\n\nTrained on cats.\n")
    assert "Model card" not in text(bundle)


@pytest.mark.parametrize(
    ("level", "meaning"),
    [
        ("static", "checked op by op and not run"),
        ("emulated", "run by edgekit's own interpreter"),
        ("executed", "run by the vendor's runtime, on the machine that made the bundle."),
    ],
)
def test_the_card_says_what_its_levels_mean_and_no_others(
    bundle: Bundle, level: str, meaning: str
) -> None:
    proof = replace(bundle.proof("replay-fp32"), level=level)
    written = readme(bundle.manifest, [proof, proof], "")
    assert f"\n\n`{level}` means: {meaning}" in written
    assert written.count("` means: ") == 1


def test_a_proof_without_numbers_has_none_on_the_card(bundle: Bundle) -> None:
    proof = replace(bundle.proof("replay-fp32"), level="static", outputs=())
    assert "| replay-fp32 | static | yes | - | - |" in readme(bundle.manifest, [proof], "")


REFUSED = Attempt("replay-int8", INT8, sqnr_db=12.5, size_bytes=1, float_bytes=4).judged(
    "refused", "it is far off."
)
CHOSEN = Attempt(
    "replay-int8", INT8, speed=Speed(2.0, 1.0, 2.0, 1.9, 2.1, 1.0, 2), float_bytes=0
).judged("chosen", "the fastest")


def test_everything_tried_is_a_row_with_what_was_measured_and_why(bundle: Bundle) -> None:
    written = readme(bundle.manifest, [], "", [REFUSED, CHOSEN])
    assert "## Quantization\n" in written
    assert (
        "\n| replay-int8 | refused | 12.5 dB, 25% of float's size | it is far off. |\n" in written
    )
    assert (
        "| replay-int8 | chosen | 2.00x (1.90 to 2.10) of float's speed | the fastest |" in written
    )
    assert "Ranges were measured" not in written


def test_a_candidate_of_which_nothing_is_known_has_a_dash(bundle: Bundle) -> None:
    nothing = Attempt("replay-int8", INT8).judged("not tried", "there is no kernel")
    assert "| not tried | - | there is no kernel |" in readme(bundle.manifest, [], "", [nothing])


def test_the_data_of_the_ranges_is_named(bundle: Bundle) -> None:
    data = {"samples": 128, "source": "photos", "sha256": "0" * 64}
    manifest = replace(bundle.manifest, calibration=data)
    assert "Ranges were measured on 128 inputs of photos." in readme(manifest, [], "", [CHOSEN])


def test_where_nothing_was_quantized_there_is_no_word_of_it(bundle: Bundle) -> None:
    assert "Quantization" not in text(bundle)


def test_a_reason_with_a_bar_in_it_stays_in_its_cell(bundle: Bundle) -> None:
    odd = Attempt("replay-int8", INT8).judged("not tried", "a | b")
    written = readme(bundle.manifest, [], "", [odd])
    assert "| replay-int8 | not tried | - | a \\| b |" in written
