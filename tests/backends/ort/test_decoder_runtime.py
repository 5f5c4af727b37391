"""The stepper of ONNX Runtime: exact widths, the edge of the cache, files, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.artifact import Artifact
from edgekit.block_quantize import quantized_decoder
from edgekit.blocks import Blocks
from edgekit.decode.stepper import Stepper, feed
from edgekit.decoder import Decoder
from edgekit.errors import (
    BadInput,
    DamagedFile,
    LoweringFailed,
    RuntimeFailed,
    UnsupportedRecipe,
    UsageError,
)
from edgekit.recipe import PRECISIONS
from edgekit.spec import Array
from edgekit.testing import tiny_decoder
from edgekit_ort import BACKEND

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, 128, 48)]


def lowered(decoder: Decoder, precision: str, folder: Path, kernel: str = "4") -> Artifact:
    if precision in ("int4", "int8-weights"):
        decoder = quantized_decoder(decoder, 4 if precision == "int4" else 8)
    backend = BACKEND.with_options({"kernel": kernel})
    return backend.lower_decoder(decoder, PRECISIONS[precision], folder, lambda _line: None)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return lowered(tiny_decoder(bits=4, capacity=32), "int4", tmp_path, "8")


@pytest.fixture
def stepper(artifact: Artifact) -> Iterator[Stepper]:
    with BACKEND.open_decoder(artifact, threads=1) as opened:
        yield opened


def in_widths(stepper: Stepper, width: int, rng: np.random.Generator) -> Array:
    """Logits of ``TOKENS`` in passes of ``width``, the last padded with tokens of chance."""
    stepper.rewind(0)
    found = []
    for start in range(0, len(TOKENS), width):
        part = TOKENS[start : start + width]
        padding = [int(token) for token in rng.integers(0, 128, width - len(part))]
        found.append(stepper.step([*part, *padding], rows=range(len(part))).logits.copy())
        stepper.rewind(start + len(part))
    return np.concatenate(found)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("precision", "kernel", "least"),
    [
        ("fp32", "4", 1),
        ("fp16", "4", 1),
        ("int8-weights", "4", 1),
        ("int4", "8", 1),
        ("int4", "4", 2),
    ],
)
def test_rows_are_equal_to_the_bit_at_every_exact_width(
    precision: str, kernel: str, least: int, threads: int, tmp_path: Path
) -> None:
    decoder = tiny_decoder(bits=4 if precision.startswith("int") else None)
    artifact = lowered(decoder, precision, tmp_path, kernel)
    rng = np.random.default_rng(threads)
    with BACKEND.open_decoder(artifact, threads=threads) as stepper:
        assert stepper.widths == range(1, 97)
        assert stepper.exact_widths == range(least, 97)
        expected = in_widths(stepper, 48, rng)
        for width in (least, 2, 3, 5, 8, 17, 32, 61):
            assert np.array_equal(in_widths(stepper, width, rng), expected), width


def test_the_cache_takes_its_last_token_and_not_one_more(stepper: Stepper) -> None:
    whole = stepper.step(TOKENS[:32]).logits[-1].copy()
    assert stepper.length == stepper.capacity == 32
    with pytest.raises(BadInput, match="1 tokens after 32 do not fit the 32"):
        stepper.step([1])
    stepper.rewind(31)
    assert np.array_equal(stepper.step([TOKENS[31]]).logits[0], whole)
    stepper.rewind(30)
    with pytest.raises(BadInput, match="3 tokens after 30"):
        stepper.step([1, 2, 3])
    assert stepper.length == 30


def test_a_prompt_fed_in_chunks_ends_as_in_one_pass(stepper: Stepper) -> None:
    whole = stepper.step(TOKENS[:31], rows=[30]).logits[0].copy()
    stepper.rewind(0)
    assert np.array_equal(feed(stepper, TOKENS[:31], chunk=4).logits[0], whole)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tokens": []}, "at least one"),
        ({"tokens": [128]}, "vocabulary has 0 to 127"),
        ({"tokens": [3, -1]}, "vocabulary has 0 to 127"),
        ({"tokens": [1, 2], "rows": [2]}, "the pass has 0 to 1"),
        ({"tokens": [1, 2], "rows": [-1]}, "the pass has 0 to 1"),
        ({"tokens": [1, 2], "parents": [-1]}, "1 parents were given for 2 tokens"),
        ({"tokens": [1, 2], "parents": [-1, 1]}, "token 1 has the parent 1"),
        ({"tokens": [1, 2], "parents": [-2, 0]}, "token 0 has the parent -2"),
    ],
)
def test_what_makes_no_pass_is_refused_and_changes_nothing(
    arguments: dict[str, Any], said: str, stepper: Stepper
) -> None:
    stepper.step([1, 2, 3])
    with pytest.raises(BadInput, match=said):
        stepper.step(**arguments)
    assert stepper.length == 3


def test_only_what_is_kept_can_be_rewound_to(stepper: Stepper) -> None:
    stepper.step([1, 2, 3])
    for length in (-1, 4):
        with pytest.raises(BadInput, match=f"holds 3 tokens and cannot be rewound to {length}"):
            stepper.rewind(length)


def test_answers_hold_until_the_next_pass_of_any_shape(stepper: Stepper) -> None:
    first = stepper.step(TOKENS[:4])
    kept = first.logits.copy()
    stepper.rewind(0)
    assert np.array_equal(first.logits, kept)
    for width in range(1, 12):  # more shapes than buffers are kept for
        stepper.step(TOKENS[:width])
        stepper.rewind(0)
    assert np.array_equal(stepper.step(TOKENS[:4]).logits, kept)


def test_a_closed_stepper_says_so_and_opens_anew(artifact: Artifact) -> None:
    stepper = BACKEND.open_decoder(artifact, threads=1)
    with pytest.raises(BadInput, match="not open"):
        stepper.step([1])
    with stepper:
        first = stepper.step(TOKENS[:5]).logits.copy()
    with pytest.raises(BadInput, match="not open"):
        stepper.step([1])
    with stepper:
        assert stepper.length == 0
        assert np.array_equal(stepper.step(TOKENS[:5]).logits, first)


def test_the_files_open_in_another_folder_and_from_memory(
    artifact: Artifact, stepper: Stepper, tmp_path: Path
) -> None:
    expected = stepper.step(TOKENS[:5]).logits.copy()
    moved = tmp_path / "moved"
    moved.mkdir()
    files: dict[str, Path] = {}
    for name, path in artifact.files.items():
        assert isinstance(path, Path)
        files[name] = Path(shutil.copy(path, moved / name))
        path.rename(path.with_suffix(".gone"))
    with BACKEND.open_decoder(replace(artifact, files=files), threads=1) as opened:
        assert np.array_equal(opened.step(TOKENS[:5]).logits, expected)
    memory = {name: path.read_bytes() for name, path in files.items()}
    with BACKEND.open_decoder(replace(artifact, files=memory), threads=1) as opened:
        assert np.array_equal(opened.step(TOKENS[:5]).logits, expected)


def test_provenance_survives_json(artifact: Artifact, stepper: Stepper) -> None:
    expected = stepper.step(TOKENS[:5]).logits.copy()
    read = json.loads(json.dumps(artifact.provenance))
    assert read["decoder"]["kernel"] == 8
    with BACKEND.open_decoder(replace(artifact, provenance=read), threads=1) as opened:
        assert np.array_equal(opened.step(TOKENS[:5]).logits, expected)


def test_weights_that_are_cut_short_or_gone_are_a_sentence(artifact: Artifact) -> None:
    path = artifact.files["weights.bin"]
    assert isinstance(path, Path)
    content = path.read_bytes()
    path.write_bytes(content[:4096])
    with (
        pytest.raises((DamagedFile, RuntimeFailed), match=r"weights\.bin|onnxruntime"),
        BACKEND.open_decoder(artifact),
    ):
        pass
    path.unlink()
    with pytest.raises(DamagedFile, match="are gone"), BACKEND.open_decoder(artifact):
        pass
    with pytest.raises(DamagedFile, match="export again"):
        BACKEND.open_decoder(replace(artifact, provenance={}))


def test_the_four_bit_file_is_as_small_for_the_eight_bit_kernel(tmp_path: Path) -> None:
    sizes = {}
    for kernel in "48":
        (tmp_path / kernel).mkdir()
        sizes[kernel] = lowered(tiny_decoder(bits=4), "int4", tmp_path / kernel, kernel).size
    assert sizes["8"] < 1.05 * sizes["4"]


def test_what_the_target_does_not_make_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="kernel is 4 or 8, not '5'"):
        BACKEND.with_options({"kernel": "5"})
    with pytest.raises(UnsupportedRecipe, match="cannot make palette4"):
        lowered(tiny_decoder(), "palette4", tmp_path)
    decoder = tiny_decoder(bits=4)
    weight = decoder.weights["layers.0.o"]
    assert isinstance(weight, Blocks)
    scales = np.repeat(weight.scales, 4, 1)
    narrow = replace(weight, scales=scales, offsets=None)
    with pytest.raises(LoweringFailed, match=r"layers\.0\.o is quantized in blocks of 8"):
        lowered(
            replace(decoder, weights={**decoder.weights, "layers.0.o": narrow}), "int4", tmp_path
        )


def test_blocks_wider_than_the_kernels_take_are_cut(tmp_path: Path) -> None:
    decoder = tiny_decoder(bits=4, ffn=768)
    weight = decoder.weights["layers.1.down"]
    assert isinstance(weight, Blocks)
    wide = replace(weight, scales=weight.scales[:, :1], offsets=None)
    same = replace(weight, scales=np.repeat(wide.scales, 3, 1), offsets=None)
    answers: list[Array] = []
    for index, each in enumerate((wide, same)):
        (tmp_path / str(index)).mkdir()
        changed = replace(decoder, weights={**decoder.weights, "layers.1.down": each})
        artifact = lowered(changed, "int4", tmp_path / str(index))
        with BACKEND.open_decoder(artifact, threads=1) as opened:
            answers.append(opened.step(TOKENS[:5]).logits.copy())
    assert np.array_equal(answers[0], answers[1])


def test_the_device_needs_numpy_and_the_runtime_alone() -> None:
    code = (
        "import sys, edgekit_ort.stepper; "
        "print(sorted({'torch', 'onnx', 'gguf', 'onnxscript'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
