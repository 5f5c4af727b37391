"""Zoo names become models with the right sizes, weights, samples and words."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekit.errors import BadInput, BadModel
from edgekit.spec import parse_spec
from edgekit_zoo import ZOO, fashion_mnist
from edgekit_zoo.catalog import load_model
from edgekit_zoo.partialnet import VARIANTS, PartialNet


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_list_names_every_variant_and_no_other() -> None:
    assert set(ZOO.models) - set(ZOO.language_models) == set(VARIANTS)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_line_about_a_model_counts_its_parameters(name: str) -> None:
    with torch.device("meta"):
        count = parameters(PartialNet(VARIANTS[name]))
    (stated,) = re.findall(r"([\d.]+) M parameters", ZOO.models[name])
    assert f"{count / 1e6:.1f}" == stated


def test_a_model_without_weights_is_the_same_every_time() -> None:
    before = torch.random.get_rng_state()
    first, second = (load_model("fasternet-t0").module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.random.get_rng_state())


def test_sizes_follow_the_inputs() -> None:
    model = load_model("partialnet-t0", inputs=(parse_spec("images=n:1..4x3x96x64"),))
    assert str(model.inputs[0]) == "images=n:1..4x3x96x64"
    assert model.deploy is not None
    deployed = model.deploy(model.module.eval(), "concat", model.inputs)
    assert deployed(torch.zeros(2, 3, 96, 64)).shape == (2, 1000)


@pytest.mark.parametrize("text", ["x=1x3x224x224", "images=1x3x224", "images=1x3xh:1..9x224"])
def test_inputs_that_do_not_fit_say_what_would(text: str) -> None:
    with pytest.raises(BadInput, match=r"takes images=BATCHx3xHEIGHTxWIDTH"):
        load_model("partialnet-t0", inputs=(parse_spec(text),))


def test_the_number_of_classes_follows_the_users_weights(tmp_path: Path) -> None:
    from dataclasses import replace

    from safetensors.torch import save_file

    trained = PartialNet(replace(VARIANTS["partialnet-nano"], classes=3))
    save_file(trained.state_dict(), tmp_path / "mine.safetensors")
    model = load_model("partialnet-nano", weights=tmp_path / "mine.safetensors")
    assert model.module(torch.zeros(1, 1, 32, 32)).shape == (1, 3)
    assert model.labels == ()  # the shipped labels are not the user's


def test_weights_of_another_variant_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(PartialNet(VARIANTS["partialnet-nano"]).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BadModel, match=r"do not fit the model; missing: .*shapes: "):
        load_model("partialnet-t0", weights=tmp_path / "w.safetensors")


def test_nano_is_small_and_ships_what_a_user_needs() -> None:
    model = load_model("partialnet-nano")
    assert parameters(model.module) < 400_000
    weights = Path(fashion_mnist.__file__).parent / "weights/partialnet_nano.safetensors"
    assert weights.stat().st_size < 2_000_000
    assert model.labels == fashion_mnist.LABELS
    assert len(model.samples) == 32
    for word in ("MIT", "Zalando", "tools/train_nano.py", "seed 0", "top-1"):
        assert word in model.card


def test_images_are_prepared_as_in_training() -> None:
    model = load_model("partialnet-nano")
    picture = np.arange(28 * 28, dtype=np.uint32).reshape(28, 28).astype(np.uint8)
    assert model.image is not None
    np.testing.assert_array_equal(
        model.image.prepare(picture), fashion_mnist.prepare(picture[None])
    )


def test_nano_names_more_than_91_percent_of_the_real_test_images() -> None:
    folder = Path(os.environ.get("FASHION_MNIST", fashion_mnist.FOLDER))
    if not folder.is_dir():
        pytest.skip("Fashion-MNIST is not here; make test fetches it")
    images, labels = fashion_mnist.read(folder, "test")
    model = load_model("partialnet-nano")
    parts = torch.tensor_split(torch.from_numpy(fashion_mnist.prepare(images)), 20)
    with torch.inference_mode():
        named = torch.cat([model.module(part).argmax(1) for part in parts]).numpy()
    accuracy = float((named == labels).mean())
    assert accuracy > 0.91
    (stated,) = re.findall(r"top-1 ([\d.]+) % on 10000", model.card)
    assert f"{100 * accuracy:.2f}" == stated


def test_weights_that_diverged_are_a_sentence(tmp_path: Path) -> None:
    model = load_model("partialnet-nano")
    with torch.no_grad():
        next(model.module.parameters()).fill_(float("nan"))
    assert model.deploy is not None
    with pytest.raises(BadInput, match=r"cannot be deployed for images=.*not finite"):
        model.deploy(model.module, "concat", model.inputs)


def test_fasternet_takes_the_form_with_fewer_convolutions_unless_its_batch_is_named() -> None:
    for text, same in (("images=1x3x64x64", True), ("images=n:1..4x3x64x64", False)):
        model = load_model("fasternet-t0", inputs=(parse_spec(text),))
        assert model.deploy is not None
        concat, streams = (
            model.deploy(model.module.eval(), form, model.inputs)
            for form in ("concat", "two-stream")
        )
        assert (concat.state_dict().keys() == streams.state_dict().keys()) is same


def test_an_activation_replaced_by_its_approximation_does_not_pass_as_float32() -> None:
    from edgekit.artifact import Artifact
    from edgekit.capture import reference_from
    from edgekit.recipe import FP32
    from edgekit.verify import prove

    model = load_model("partialnet-nano")
    exact = reference_from(model)
    for part in model.module.modules():
        if isinstance(part, nn.GELU):
            part.approximate = "tanh"
    approximate = reference_from(model)
    artifact = Artifact("some", FP32, "model", {}, model.inputs, ())
    proof = prove(artifact, ["logits"], exact, approximate.expected)
    assert any("SQNR in dB is 61" in failure for failure in proof.failures)
