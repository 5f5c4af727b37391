"""The script for devices, and the stepper that shares its code, with a fake TensorRT.

The fake speaks TensorRT 10.3's calls and lets ONNX Runtime do the work; CUDA's runtime is a stub in
C, so addresses, copies and what lies behind the cache are real.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.artifact import Artifact
from edgekit.decoder import Decoder
from edgekit.spec import Array
from edgekit_tensorrt.generate_on_jetson import pass_inputs

FAKES = Path(__file__).parent / "fake"
STUB = Path(__file__).parent.parent / "fake" / "cudart.c"
HOST_ONLY = "kind == 2 && fake_on_device(from) && !fake_on_device(to)"
ALSO_WITHIN = f"({HOST_ONLY}) || (kind == 3 && fake_on_device(from) && fake_on_device(to))"
Lowered = Callable[..., tuple[Decoder, Artifact]]
Eager = Callable[[Decoder, Sequence[int]], Array]

# A stepper on "the GPU": a chain cut in two, a rewind, a tree. Its logits go to a file.
STEPS = """
import sys, json, numpy as np
from pathlib import Path
from edgekit.artifact import Artifact
from edgekit.recipe import FP32
from edgekit_tensorrt.native_stepper import EngineStepper
folder = Path(sys.argv[1])
files = {name: folder / name for name in ("model.onnx", "model.weights")}
decoder = json.loads((folder / "decoder.json").read_text())
artifact = Artifact("tensorrt", FP32, "model.onnx", files, (), (), {"decoder": decoder})
tokens = json.loads(sys.argv[2])
with EngineStepper(artifact) as stepper:
    first = stepper.step(tokens[:5]).logits
    stepper.step([1, 2, 3])
    stepper.rewind(5)
    second = stepper.step(tokens[5:8], rows=[2]).logits
    tree = stepper.step(tokens[8:11], parents=[-1, 0, 0]).logits
np.savez(folder / "answers.npz", first=first, second=second, tree=tree)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where a child finds the fakes; gcc makes the stub, with copies within the device allowed."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed; on Debian run: apt-get install gcc")
    folder = tmp_path_factory.mktemp("cuda")
    text = STUB.read_text()
    assert text.count(HOST_ONLY) == 1
    source = folder / "cudart.c"
    source.write_text(text.replace(HOST_ONLY, ALSO_WITHIN))
    library = folder / "libcudart.so.12"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    ledger = str(folder / "ledger")
    return {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(FAKES),
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_CUDA_LEDGER": ledger,
    }


@pytest.fixture
def device(
    lowered: Lowered, environment: dict[str, str], tmp_path: Path
) -> tuple[Decoder, Path, Callable[..., Any]]:
    """A decoder, the artifact's folder as a device has it, and a way to run Python there."""
    decoder, artifact = lowered("fp32", "untied")
    folder = tmp_path / "tensorrt-fp32"
    folder.mkdir()
    for name, path in artifact.files.items():
        shutil.copy(str(path), folder / name)

    def run(*arguments: object) -> Any:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return decoder, folder, run


def test_a_pass_says_where_each_token_stands_and_what_it_sees() -> None:
    chain = pass_inputs([7, 8], None, [1], 3, "float32")
    assert chain["positions"].tolist() == [3, 4]
    assert chain["mask"].tolist() == [[0, 0, 0, 0, -1e4], [0, 0, 0, 0, 0]]
    assert chain["rows"].tolist() == [1]
    tree = pass_inputs([7, 8, 9, 6], (-1, 0, 0, 2), [0], 1, "float16")
    assert tree["positions"].tolist() == [1, 2, 2, 3]
    seen = tree["mask"] == 0
    assert seen.astype(int).tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert tree["mask"].dtype == np.float16
    assert tree["tokens"].dtype == np.int32


def test_the_script_continues_as_eager_does(
    device: tuple[Decoder, Path, Callable[..., Any]],
    eager: Eager,
    tokens: list[int],
    environment: dict[str, str],
) -> None:
    decoder, folder, run = device
    prompt = (tokens * 3)[:66]  # wider than one pass
    wanted = [*prompt]
    for _ in range(6):
        wanted.append(int(eager(decoder, wanted)[-1].argmax()))
    script, text = folder / "generate_on_jetson.py", ",".join(map(str, prompt))
    for built in (True, False):  # the second time the engine lies there
        done = run(script, "--tokens", text, "--limit", 6)
        assert done.returncode == 0, done.stderr
        assert [int(token) for token in done.stdout.split()] == wanted[66:]
        assert ("Built model.fake-orin.engine" in done.stderr) is built
        assert "tokens/s" in done.stderr
    assert Path(environment["FAKE_CUDA_LEDGER"]).read_text() == "0"  # all was given back
    stop = wanted[68]
    stopped = run(script, "--tokens", text, "--limit", 6, "--stops", stop)
    assert [int(token) for token in stopped.stdout.split()] == wanted[66 : wanted.index(stop, 66)]


def test_the_stepper_on_a_gpu_is_eagers(
    device: tuple[Decoder, Path, Callable[..., Any]], eager: Eager, tokens: list[int]
) -> None:
    decoder, folder, run = device
    done = run("-c", STEPS, folder, json.dumps(tokens))
    assert done.returncode == 0, done.stderr
    with np.load(folder / "answers.npz") as answers:
        chain = eager(decoder, tokens[:8])
        np.testing.assert_allclose(answers["first"], chain[:5], atol=1e-4)
        np.testing.assert_allclose(answers["second"], chain[7:], atol=1e-4)
        for node, path in enumerate(([8], [8, 9], [8, 10])):
            whole = [*tokens[:8], *(tokens[index] for index in path)]
            np.testing.assert_allclose(answers["tree"][node], eager(decoder, whole)[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--tokens", "1,x"), 2, "is no list of tokens"),
        (("--tokens", "1", "--limit", "96"), 3, "1 tokens and 96 more do not fit"),
        (("--tokens", "128"), 3, "token 128 is none of the model's 128"),
    ],
)
def test_what_the_script_cannot_do_is_a_sentence(
    device: tuple[Decoder, Path, Callable[..., Any]],
    arguments: tuple[str, ...],
    code: int,
    sentence: str,
) -> None:
    _, folder, run = device
    done = run(folder / "generate_on_jetson.py", *arguments)
    assert done.returncode == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_description_is_a_sentence(
    device: tuple[Decoder, Path, Callable[..., Any]],
) -> None:
    _, folder, run = device
    (folder / "decoder.json").write_text("{")
    done = run(folder / "generate_on_jetson.py", "--tokens", "1")
    assert done.returncode == 4
    assert done.stderr.startswith("decoder.json cannot be read")
