"""Recurrent layers against torch's modules with mapped weights, and against steps by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit_coreml import ops

# Any, because most ops return one tensor and some a tuple.
OPS: dict[str, Any] = {**ops.OPS}
# Steps, batch, input and hidden size.
S, B, N, H = 4, 2, 3, 5


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _regated(weight: Tensor, order: str, wanted: str) -> Tensor:
    """Rows of gates in another order of their letters."""
    parts = dict(zip(order, weight.chunk(len(order)), strict=True))
    return torch.cat([parts[letter] for letter in wanted])


def _given(module: nn.RNNBase, order: str, wanted: str, back: bool = False) -> dict[str, Tensor]:
    tail = "_reverse" if back else ""
    weights = {name: getattr(module, f"{name}_l0{tail}").detach() for name in (
        "weight_ih", "weight_hh", "bias_ih", "bias_hh"
    )}  # fmt: skip
    mapped = {name: _regated(value, order, wanted) for name, value in weights.items()}
    end = "_back" if back else ""
    return {
        f"weight_ih{end}": mapped["weight_ih"],
        f"weight_hh{end}": mapped["weight_hh"],
        f"bias{end}": mapped["bias_ih"] + mapped["bias_hh"],
    }


def _check(found: Any, output: Tensor, *last: Tensor) -> None:
    for ours, theirs in zip(found, (output, *last), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_rnn(direction: str, every: bool, activation: str) -> None:
    torch.manual_seed(0)
    module = nn.RNN(N, H, nonlinearity=activation)
    x, h = _random(1, S, B, N), _random(2, B, H)
    output, last = module(x.flip(0) if direction == "reverse" else x, h[None])
    found = OPS["rnn"](
        x=x, initial_h=h, **_given(module, "a", "a"), direction=direction, activation=activation,
        output_sequence=torch.tensor(every),
    )  # fmt: skip
    _check(found, output if every else output[-1:], last[0])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("every", [True, False])
def test_lstm(direction: str, every: bool) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(N, H)
    x, h, c = _random(1, S, B, N), _random(2, B, H), _random(3, B, H)
    turned = x.flip(0) if direction == "reverse" else x
    output, (last, cell) = module(turned, (h[None], c[None]))
    found = OPS["lstm"](
        x=x, initial_h=h, initial_c=c, **_given(module, "ifzo", "ifoz"), direction=direction,
        output_sequence=torch.tensor(every),
    )  # fmt: skip
    _check(found, output if every else output[-1:], last[0], cell[0])


@pytest.mark.parametrize("every", [True, False])
def test_lstm_in_both_directions(every: bool) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(N, H, bidirectional=True)
    x, h, c = _random(1, S, B, N), _random(2, 2, B, H), _random(3, 2, B, H)
    output, (last, cell) = module(x, (h, c))
    found = OPS["lstm"](
        x=x,
        initial_h=torch.cat([h[0], h[1]], -1),
        initial_c=torch.cat([c[0], c[1]], -1),
        **_given(module, "ifzo", "ifoz"),
        **_given(module, "ifzo", "ifoz", back=True),
        direction="bidirectional",
        output_sequence=torch.tensor(every),
    )
    ends = torch.cat([output[-1, :, :H], output[0, :, H:]], -1)[None]
    _check(found, output if every else ends, torch.cat([*last], -1), torch.cat([*cell], -1))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_lstm_with_peepholes_clip_and_activations(clip: float | None) -> None:
    """The step of the reference, for one sequence."""
    x, wx, wh = _random(1, S, 1, N), _random(2, 4 * H, N), _random(3, 4 * H, H)
    bias, peep = _random(4, 4 * H), _random(5, 3 * H)
    (xi, xf, xo, xz), (hi, hf, ho, hz) = (w.double().numpy().reshape(4, H, -1) for w in (wx, wh))
    bi, bf, bo, bz = bias.double().numpy().reshape(4, H)
    pi, pf, po = peep.double().numpy().reshape(3, H)
    h, c, states = np.zeros(H), np.zeros(H), []
    for step in x[:, 0].double().numpy():
        i = _sigmoid(xi @ step + hi @ h + bi + pi * c)
        f = _sigmoid(xf @ step + hf @ h + bf + pf * c)
        z = np.clip(0.2 * (xz @ step + hz @ h + bz) + 0.5, 0, 1)
        c = f * c + i * z
        c = c if clip is None else np.clip(c, -clip, clip)
        o = _sigmoid(xo @ step + ho @ h + bo + po * c)
        h = o * np.maximum(c, 0)
        states.append(h)
    found = OPS["lstm"](
        x=x, initial_h=torch.zeros(1, H), initial_c=torch.zeros(1, H), weight_ih=wx, weight_hh=wh,
        bias=bias, peephole=peep, cell_activation="hard_sigmoid", activation="relu",
        output_sequence=torch.tensor(True), clip=None if clip is None else torch.tensor(clip),
    )  # fmt: skip
    np.testing.assert_allclose(found[0][:, 0], np.stack(states), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2][0], c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gru_that_resets_after_its_product_is_torchs(direction: str) -> None:
    torch.manual_seed(0)
    module = nn.GRU(N, H)
    x, h = _random(1, S, B, N), _random(2, B, H)
    output, last = module(x.flip(0) if direction == "reverse" else x, h[None])
    parts = {
        name: _regated(getattr(module, f"{name}_l0").detach(), "rzo", "roz")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    found = OPS["gru"](
        x=x, initial_h=h, weight_ih=parts["weight_ih"], weight_hh=parts["weight_hh"],
        bias=parts["bias_hh"], input_bias=parts["bias_ih"], reset_after=torch.tensor(True),
        output_sequence=torch.tensor(True), direction=direction,
    )  # fmt: skip
    _check(found, output, last[0])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("every", [True, False])
def test_gru_resets_the_state_before_its_product(biased: bool, every: bool) -> None:
    x, h = _random(1, S, 1, N), _random(2, 1, H)
    wx, wh = _random(3, 3 * H, N), _random(4, 3 * H, H)
    bias = _random(5, 3 * H) if biased else None
    xr, xo, xz = wx.double().numpy().reshape(3, H, N)
    hr, ho, hz = wh.double().numpy().reshape(3, H, H)
    br, bo, bz = (np.zeros(3 * H) if bias is None else bias.double().numpy()).reshape(3, H)
    state, states = h[0].double().numpy(), []
    for step in x[:, 0].double().numpy():
        r = np.tanh(xr @ step + hr @ state + br)
        z = np.tanh(xz @ step + hz @ state + bz)
        o = _sigmoid(xo @ step + ho @ (r * state) + bo)
        state = (1 - z) * o + z * state
        states.append(state)
    found = OPS["gru"](
        x=x, initial_h=h, weight_ih=wx, weight_hh=wh, bias=bias, recurrent_activation="tanh",
        activation="sigmoid", output_sequence=torch.tensor(every),
    )  # fmt: skip
    expected = np.stack(states if every else states[-1:])
    np.testing.assert_allclose(found[0][:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hard_sigmoid", 0.6),
        ("sigmoid_hard", 0.6),
        ("linear", 0.5),
        ("relu", 0.5),
        ("scaled_tanh", math.tanh(0.5)),
        ("sigmoid", 1 / (1 + math.exp(-0.5))),
        ("TANH", math.tanh(0.5)),
    ],
)
def test_activations(name: str, value: float) -> None:
    one = torch.ones(1, 1)
    found = OPS["rnn"](
        x=one[None] * 0.5, initial_h=one * 0, weight_ih=one, weight_hh=one, activation=name
    )
    assert found[1].item() == pytest.approx(value, rel=1e-6)


def test_what_the_reference_lacks_is_refused() -> None:
    one = torch.ones(1, 1)
    arguments = {"x": one[None], "initial_h": one, "weight_ih": one, "weight_hh": one}
    with pytest.raises(ValueError, match="activation 'elu'"):
        OPS["rnn"](**arguments, activation="elu")
    with pytest.raises(ValueError, match="direction 'both'"):
        OPS["rnn"](**arguments, direction="both")
    with pytest.raises(ValueError, match="weight_ih_back"):
        OPS["lstm"](**arguments, initial_c=one, direction="bidirectional")
