"""The recurrent layers over ``x [s, b, I]``. Source: the MIL op reference, group recurrent.

Gates lie behind each other in the weights: reset, output, update in a GRU, and input, forget,
output, cell in an LSTM. A reverse layer reads the sequence from its end and returns its steps in
that order; only the second half of a bidirectional one is turned back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgekit_coreml.ops.arguments import Flag, Real, flag, real

# By coremltools' own checks: scaled_tanh scales by one.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "sigmoid_hard": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "linear": lambda x: x,
    "relu": torch.relu,
    "scaled_tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name.lower() not in _ACTIVATIONS:
        raise ValueError(f"there is no recurrent activation {name!r}")
    return _ACTIVATIONS[name.lower()]


def _steps(x: Tensor, direction: str) -> Tensor:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"there is no direction {direction!r}")
    return x.flip(0) if direction == "reverse" else x


def _sequence(states: list[Tensor], output_sequence: Flag) -> Tensor:
    return torch.stack(states if flag(output_sequence) else states[-1:])


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Flag = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    active, h, states = _activation(activation), initial_h, []
    for step in _plus(_steps(x, direction) @ weight_ih.T, bias):
        h = active(step + h @ weight_hh.T)
        states.append(h)
    return _sequence(states, output_sequence), h


def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Flag = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: Flag = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Resets the state before its product, or with ``reset_after`` the product and its bias."""
    gate, active = _activation(recurrent_activation), _activation(activation)
    zeros = weight_hh.new_zeros(weight_hh.shape[0])
    b_r, b_o, b_z = (zeros if bias is None else bias).chunk(3)
    w_r, w_o, w_z = weight_hh.chunk(3)
    h, states = initial_h, []
    for step in _plus(_steps(x, direction) @ weight_ih.T, input_bias):
        x_r, x_o, x_z = step.chunk(3, -1)
        r = gate(x_r + h @ w_r.T + b_r)
        z = gate(x_z + h @ w_z.T + b_z)
        kept = r * (h @ w_o.T + b_o) if flag(reset_after) else (r * h) @ w_o.T + b_o
        h = (1 - z) * active(x_o + kept) + z * h
        states.append(h)
    return _sequence(states, output_sequence), h


def _lstm_pass(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    activations: tuple[str, str, str],
    clip: Real | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """One direction: the state of each step, then the last state and cell."""
    gate, cell, active = (_activation(name) for name in activations)
    weight_ih, weight_hh, bias, peephole = weights
    zeros = weight_hh.new_zeros(3 * weight_hh.shape[1])
    p_i, p_f, p_o = (zeros if peephole is None else peephole).chunk(3)
    (h, c), states = state, []
    for step in _plus(x @ weight_ih.T, bias):
        i, f, o, g = (step + h @ weight_hh.T).chunk(4, -1)
        c = gate(f + p_f * c) * c + gate(i + p_i * c) * cell(g)
        if clip is not None:
            c = c.clamp(-real(clip), real(clip))
        h = gate(o + p_o * c) * active(c)
        states.append(h)
    return states, h, c


def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Flag = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: Real | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output gate looks at the new cell, the other two at the old one."""
    activations = (recurrent_activation, cell_activation, activation)
    forward = (weight_ih, weight_hh, bias, peephole)
    if direction != "bidirectional":
        ordered = _steps(x, direction)
        states, h, c = _lstm_pass(ordered, (initial_h, initial_c), forward, activations, clip)
        return _sequence(states, output_sequence), h, c
    if weight_ih_back is None or weight_hh_back is None:
        raise ValueError("a bidirectional lstm needs weight_ih_back and weight_hh_back")
    backward = (weight_ih_back, weight_hh_back, bias_back, peephole_back)
    (h_f, h_b), (c_f, c_b) = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    states, h_f, c_f = _lstm_pass(x, (h_f, c_f), forward, activations, clip)
    turned, h_b, c_b = _lstm_pass(x.flip(0), (h_b, c_b), backward, activations, clip)
    h, c = torch.cat([h_f, h_b], -1), torch.cat([c_f, c_b], -1)
    both = [torch.cat(pair, -1) for pair in zip(states, reversed(turned), strict=True)]
    return torch.stack(both) if flag(output_sequence) else h.unsqueeze(0), h, c


OPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"gru": gru, "lstm": lstm, "rnn": rnn}
