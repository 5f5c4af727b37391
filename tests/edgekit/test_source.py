"""MODEL, as typed or passed, becomes a model or a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import BadInput, BadModel, DamagedFile, UnknownName
from edgekit.source import resolve
from edgekit.spec import Dim, TensorSpec

USER_FILE = """
import torch
from torch import nn
from neighbour import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)

    def forward(self, x, scale=None):
        y = self.layer(x)
        return y if scale is None else y * scale

def make():
    return Net()

def example_inputs():
    return torch.ones(1, WIDTH)

def number():
    return 3

def nothing():
    pass

def boom():
    raise KeyError("no weights here")

def double():
    return Net().double()
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    path = tmp_path / "net.py"
    path.write_text(USER_FILE)
    return path


def test_a_factory_with_examples_beside_it_needs_nothing_more(user_file: Path) -> None:
    model = resolve(f"{user_file}:make")
    assert model.name == "net"
    assert model.inputs == (TensorSpec("x", (1, 4), "float32"),)
    np.testing.assert_array_equal(model.samples[0]["x"], np.ones((1, 4), np.float32))
    assert model.samples_source == "the example inputs and 3 random ones, seed 0"
    assert model.samples_drawn


def test_inputs_on_the_command_line_win_over_the_examples(user_file: Path) -> None:
    model = resolve(f"{user_file}:make", ["x=n:1..3x4", "scale=1"])
    assert [str(spec) for spec in model.inputs] == ["x=n:1..3x4", "scale=1"]
    assert [sample["x"].shape[0] for sample in model.samples] == [1, 3, 2, 1]


def test_a_factory_may_return_a_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import edgekit\nfrom torch import nn\n"
        "def make():\n"
        "    spec = edgekit.TensorSpec('x', (1, 4), 'float32')\n"
        "    return edgekit.Model(nn.Linear(4, 2), (spec,), labels=('no', 'yes'))\n"
    )
    model = resolve(f"{path}:make")
    assert (model.name, model.labels) == ("mine", ("no", "yes"))


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("number", r"number returned an int; return a torch\.nn\.Module"),
        ("nothing", r"nothing returned None; return a torch\.nn\.Module"),
        ("boom", r"raised KeyError at .*net\.py:\d+: raise KeyError.*'no weights here'"),
        ("double", r"layer\.weight is float64; .*Call \.float\(\)"),
    ],
)
def test_an_unusable_factory_is_a_sentence(user_file: Path, factory: str, sentence: str) -> None:
    with pytest.raises(BadModel, match=sentence):
        resolve(f"{user_file}:{factory}")


def test_a_misspelt_factory_names_the_nearest(user_file: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown factory 'mak'; did you mean 'make'\?"):
        resolve(f"{user_file}:mak")


def test_a_missing_file_and_a_missing_factory_say_what_to_write(user_file: Path) -> None:
    with pytest.raises(BadModel, match=r"no file .*; write path/to/file\.py:factory"):
        resolve("absent.py:make")
    with pytest.raises(BadModel, match=r"name the factory too"):
        resolve(str(user_file))


def test_a_file_that_fails_to_import_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import absent_package\n")
    with pytest.raises(BadModel, match=r"raised ModuleNotFoundError at .*bad\.py:1"):
        resolve(f"{path}:make")


def test_a_file_with_a_syntax_error_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def make(:\n")
    with pytest.raises(BadModel, match=r"raised SyntaxError"):
        resolve(f"{path}:make")


def test_a_module_without_inputs_says_how_to_give_them() -> None:
    with pytest.raises(BadInput, match=r"add a function example_inputs.*--input NAME=1x3x224x224"):
        resolve(nn.Linear(4, 2))


def test_examples_may_be_a_tensor_a_sequence_or_a_mapping() -> None:
    layer = nn.Bilinear(3, 4, 2)
    one, two = torch.zeros(1, 3), torch.zeros(1, 4)
    for given in ((one, two), [one, two], {"input1": one, "input2": two}):
        assert [spec.name for spec in resolve(layer, given).inputs] == ["input1", "input2"]
    assert resolve(nn.Linear(3, 1), one).inputs[0].shape == (1, 3)
    assert resolve(nn.Linear(3, 1), np.zeros((1, 3), np.float32)).inputs[0].shape == (1, 3)


@pytest.mark.parametrize(
    ("examples", "sentence"),
    [
        ((torch.zeros(1), torch.zeros(1)), r"2 example inputs and forward takes 1: input"),
        ((3,), r"example input 'input' is a int; give tensors or numpy arrays"),
        (torch.zeros(1, 3).double(), r"is float64; edgekit takes float32.*\.float\(\)"),
        ({}, r"there is no example input"),
        ((), r"there is no example input"),
    ],
)
def test_unusable_examples_are_a_sentence(examples: object, sentence: str) -> None:
    with pytest.raises(BadModel, match=sentence):
        resolve(nn.Linear(3, 1), examples)


def test_integer_examples_are_the_only_samples_since_random_ones_may_not_be_valid() -> None:
    model = resolve(nn.Embedding(10, 2), torch.tensor([[9, 3]]))
    assert [sample["input"].tolist() for sample in model.samples] == [[[9, 3]]]


def test_the_users_samples_are_read_from_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input=np.full((1, 3), 7, np.float32))
    model = resolve(nn.Linear(3, 1), ["input=1x3"], samples=tmp_path / "a.npz")
    assert model.samples[0]["input"].tolist() == [[7, 7, 7]]
    assert model.samples_source == "the user's files: a.npz"
    assert not model.samples_drawn


def test_samples_that_do_not_fit_are_a_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input=np.zeros((1, 4), np.float32))
    with pytest.raises(BadInput, match=r"shape 1x4; the model takes input=1x3"):
        resolve(nn.Linear(3, 1), ["input=1x3"], samples=tmp_path / "a.npz")


def test_zoo_images_are_grouped_into_the_batches_named() -> None:
    model = resolve("partialnet-nano", ["images=batch:1..4x1x32x32"])
    sizes = [sample["images"].shape[0] for sample in model.samples]
    assert sizes[:3] == [1, 4, 2]
    assert model.inputs[0].shape[0] == Dim("batch", 1, 4)
    assert "Fashion-MNIST" in model.samples_source


def test_a_zoo_model_refuses_inputs_it_cannot_take() -> None:
    with pytest.raises(BadInput, match=r"takes images=BATCHx1xHEIGHTxWIDTH"):
        resolve("partialnet-nano", ["images=1x3x32x32"])


def test_weights_in_both_formats_give_the_same_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = nn.Linear(3, 1)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pth", "w.pt"):
        layer = nn.Linear(3, 1)
        resolve(layer, ["input=1x3"], weights=tmp_path / name)
        assert torch.equal(layer.weight, source.weight)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 1), tmp_path / "w.pth")
    with pytest.raises(DamagedFile, match=r"cannot|safely.*safetensors"):
        resolve(nn.Linear(3, 1), ["input=1x3"], weights=tmp_path / "w.pth")


def test_weights_that_do_not_fit_say_how(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 1).state_dict(), tmp_path / "shape.pth")
    torch.save({"weigth": torch.zeros(1, 3)}, tmp_path / "names.pth")
    with pytest.raises(BadModel, match=r"weight is \(1, 4\), the model has \(1, 3\)"):
        resolve(nn.Linear(3, 1), ["input=1x3"], weights=tmp_path / "shape.pth")
    with pytest.raises(BadModel, match=r"missing: bias, weight; unknown: weigth"):
        resolve(nn.Linear(3, 1), ["input=1x3"], weights=tmp_path / "names.pth")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_damaged_weight_file_is_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(DamagedFile, match=rf"{name} is not a weight file"):
        resolve(nn.Linear(3, 1), ["input=1x3"], weights=tmp_path / name)


def test_weights_of_another_kind_or_absent_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"x")
    with pytest.raises(BadModel, match=r"weights are read from \.safetensors"):
        resolve(nn.Linear(3, 1), ["input=1x3"], weights=tmp_path / "w.bin")
    with pytest.raises(BadModel, match=r"there is no weight file"):
        resolve(nn.Linear(3, 1), ["input=1x3"], weights=tmp_path / "absent.pth")


def test_an_input_given_twice_is_a_sentence() -> None:
    with pytest.raises(BadInput, match=r"an input is given twice: input, input"):
        resolve(nn.Linear(3, 1), ["input=1x3", "input=1x3"])


def test_a_model_value_is_taken_as_it_is() -> None:
    spec = TensorSpec("input", (1, 3), "float32")
    assert resolve(edgekit.Model(nn.Linear(3, 1), (spec,), name="mine")).name == "mine"


def test_a_model_value_without_a_module_is_a_sentence() -> None:
    spec = TensorSpec("input", (1, 3), "float32")
    with pytest.raises(BadModel, match=r"mine returned None; return a torch\.nn\.Module"):
        resolve(edgekit.Model(None, (spec,), name="mine"))  # type: ignore[arg-type]


def test_a_factory_that_exits_or_prints_neither_ends_the_command_nor_fills_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "loud.py"
    path.write_text(
        "import sys\nfrom torch import nn\n"
        "print('hello')\n"
        "def leave():\n    sys.exit('bye')\n"
        "def make():\n    print('building')\n    return nn.Linear(3, 2)\n"
    )
    with pytest.raises(BadModel, match=r"raised SystemExit at .*loud\.py:5.*bye"):
        resolve(f"{path}:leave")
    resolve(f"{path}:make", ["input=1x3"])
    out, err = capsys.readouterr()
    assert out == ""
    assert "building" in err
