"""The card of a bundle says what it is, what was proven and how to run it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgekit.bundle import Bundle
from edgekit.card import readme
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
