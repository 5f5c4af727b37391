"""Zoo names to models: configuration, weights, samples, preprocessing, labels, model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.errors import BadInput
from edgekit.image import ImageInput
from edgekit.model import Model
from edgekit.spec import Arrays, Dim, TensorSpec
from edgekit.weights import load_weights, read_state
from edgekit_zoo import fashion_mnist
from edgekit_zoo.partialnet import VARIANTS, PartialNet, PartialNetConfig
from edgekit_zoo.partialnet_deploy import deploy

INPUT, OUTPUT = "images", "logits"
NANO = "partialnet-nano"
_WEIGHTS = Path(str(files("edgekit_zoo"))) / "weights"


def load_model(
    name: str, *, weights: Path | None = None, inputs: tuple[TensorSpec, ...] = ()
) -> Model:
    """The zoo model ``name`` for the input sizes and the weights given.

    Without weights a shipped set is used where there is one; the rest are initialised from
    seed 0. The number of classes follows the weights.
    """
    config = VARIANTS[name]
    spec = TensorSpec(INPUT, (1, config.in_channels, *config.size), "float32")
    for wanted in inputs:
        spec = _checked(wanted, spec)
    size = cast("tuple[int, int]", spec.sizes()[2:])
    if weights is not None:
        config = _for_weights(config, read_state(weights))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PartialNet(replace(config, size=size)).eval()
    model = Model(
        module=network,
        inputs=(spec,),
        name=name,
        outputs=(OUTPUT,),
        deploy=_deploy,
        licence="Apache-2.0",
        card=f"{name} of edgekit's zoo, weights drawn from seed 0: for measuring, not for use.",
    )
    if weights is not None:
        load_weights(network, weights)
        return replace(model, licence="", card=f"{name} of edgekit's zoo, with the user's weights.")
    return _trained_nano(model) if name == NANO else model


def _checked(wanted: TensorSpec, spec: TensorSpec) -> TensorSpec:
    fixed = wanted.shape[1:2] == spec.shape[1:2] and not any(
        isinstance(dim, Dim) for dim in wanted.shape[1:]
    )
    if wanted.name != spec.name or len(wanted.shape) != 4 or not fixed:
        raise BadInput(
            f"--input {wanted} does not fit: this model takes {INPUT}=BATCHx{spec.shape[1]}"
            "xHEIGHTxWIDTH, where the batch may be a named dim (batch:1..8) and the other "
            "sizes are fixed when it is exported."
        )
    return wanted


def _for_weights(config: PartialNetConfig, state: Mapping[str, Tensor]) -> PartialNetConfig:
    classifier = state.get("head.classifier.weight")
    return config if classifier is None else replace(config, classes=classifier.shape[0])


def _deploy(module: nn.Module, form: str, inputs: tuple[TensorSpec, ...]) -> nn.Module:
    network, (height, width) = cast(PartialNet, module), inputs[0].sizes()[2:]
    kind = cast(Literal["concat", "two-stream"], form)
    attends = network.config.channel_attention or network.config.self_attention
    if not attends and not inputs[0].dims:
        # FasterNet at a fixed batch is slices and joins only, which two-stream runtimes take
        # too; measured, the fewer convolutions of this form are a few percent faster there.
        kind = "concat"
    try:
        return deploy(network, form=kind, size=(height, width))
    except ValueError as cause:
        raise BadInput(f"this model cannot be deployed for {inputs[0]}: {cause}.") from cause


def _trained_nano(model: Model) -> Model:
    """With the shipped weights, and with real test images to prove on."""
    load_weights(model.module, _WEIGHTS / "partialnet_nano.safetensors")
    channels, height, width = model.inputs[0].sizes()[1:]
    pad = fashion_mnist.PADDING
    image = ImageInput(
        name=INPUT,
        channels=cast(Literal[1, 3], channels),
        height=height - 2 * pad,
        width=width - 2 * pad,
        mean=(fashion_mnist.MEAN,),
        std=(fashion_mnist.STD,),
        pad=pad,
    )
    return replace(
        model,
        image=image,
        labels=fashion_mnist.LABELS,
        samples=_real_samples(image),
        samples_source="32 test images of Fashion-MNIST (Zalando, MIT)",
        card=(_WEIGHTS / "partialnet_nano.md").read_text(),
    )


def _real_samples(image: ImageInput) -> tuple[Arrays, ...]:
    with np.load(_WEIGHTS / "samples.npz", allow_pickle=False) as shipped:
        pictures: Any = shipped["images"]
    return tuple({image.name: image.prepare(picture)} for picture in pictures)
