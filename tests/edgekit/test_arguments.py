"""What is typed becomes what ``export`` takes, and what makes no sense is a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.arguments import options, parser, quantization
from edgekit.errors import UsageError
from edgekit.gate import Budget
from edgekit.planning import Quantization

EXPORT = ("export", "net", "--target", "onnxruntime", "-o", "out")


def asked(*words: str) -> Quantization:
    return quantization(parser().parse_args([*EXPORT, *words]))


def test_nothing_said_of_quantization_is_its_default() -> None:
    assert asked() == Quantization()


def test_all_that_can_be_said_arrives() -> None:
    words = (
        *("--calibration", "photos", "--calibration-method", "entropy", "--labels", "val.npz"),
        *("--metric", "top1", "--max-drop", "1.5", "--min-sqnr", "30", "--prefer", "size"),
        *("--cpu", "avx2", "--keep-float", "head,softmax", "--recipe", "mixed.toml"),
    )
    assert asked(*words) == Quantization(
        calibration=Path("photos"),
        labelled=Path("val.npz"),
        metric="top1",
        budget=Budget(1.5, 30.0, "size"),
        method="entropy",
        cpu="avx2",
        keep_float=("head", "softmax"),
        recipe=Path("mixed.toml"),
    )


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (("--keep-float", ""), ()),
        (("--keep-float", ",a,,b,"), ("a", "b")),
        (("--keep-float", "a", "--keep-float", "b,%conv2d"), ("a", "b", "%conv2d")),
    ],
)
def test_layers_to_keep_float_add_up(words: tuple[str, ...], kept: tuple[str, ...]) -> None:
    assert asked(*words).keep_float == kept


@pytest.mark.parametrize("amount", ["-0.1", "nan", "inf", "1000", "half", ""])
@pytest.mark.parametrize("option", ["--max-drop", "--min-sqnr"])
def test_an_amount_that_is_none_is_refused(option: str, amount: str) -> None:
    with pytest.raises(
        UsageError, match=rf"{option}: '{amount}' is not a number of 0 or more.*--help"
    ):
        asked(f"{option}={amount}")


def test_no_drop_at_all_may_be_asked_for() -> None:
    assert asked("--max-drop", "0").budget.max_drop == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--metric", "bleu"), "--metric: invalid choice: 'bleu'"),
        (("--prefer", "speed"), "--prefer: invalid choice: 'speed'"),
        (("--bits", "4"), "unrecognized arguments: --bits 4"),
    ],
)
def test_what_there_is_not_is_a_sentence(words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        asked(*words)


def test_settings_of_targets_are_told_from_the_rest() -> None:
    words = parser().parse_args([*EXPORT, "--coreml-minimum", "iOS18", "--cpu", "avx2"])
    assert options(words) == {"coreml-minimum": "iOS18"}


def test_a_width_is_said_where_a_bundle_is_run() -> None:
    run = parser().parse_args(["run", "bundle", "in.npz", "--bits", "4,head=8"])
    assert run.bits == "4,head=8"
    assert parser().parse_args(["run", "bundle", "in.npz"]).bits is None


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", "²"])
def test_a_count_that_is_none_is_refused(count: str) -> None:
    with pytest.raises(UsageError, match=r"--runs"):
        parser().parse_args(["profile", "bundle", f"--runs={count}"])
