"""Double Rounding: every lower bit-width of a weight from its stored 8-bit codes, to the bit.

Self-contained and one file on purpose: numpy and the standard library, Python 3.10. Scripts that
run on a device carry a copy of it, since edgekit may not be installed there.

From the paper (arXiv 2502.01199): with h = 8 stored bits, l wanted and D = h - l,

    q_l = clip(round(q_h / 2**D), -2**(l - 1), 2**(l - 1) - 1)        W_l = q_l * s_h * 2**D

so one scale serves every width. An int8 graph runs at l bits when its codes are replaced by
``q_l * 2**D`` ("in the container"): its scale stays s_h, and nothing but these bytes changes.
Always from the stored codes: 8 to 4 to 2 is not 8 to 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int8]
STORED = 8
WIDTHS = (8, 6, 4, 2)
# Ties go to the even code, as torch.round and ONNX QuantizeLinear do; the rule is stored with
# the codes, since shift instructions of some processors round half up.
RULES = ("rne", "half_up")


def second_rounding(codes: Codes, bits: int, rule: str = "rne") -> Codes:
    """The ``bits``-wide codes of 8-bit ones, of the same shape, by integer arithmetic alone."""
    if rule not in RULES or not 1 <= bits <= STORED:
        raise ValueError(f"{bits} bits by {rule!r}: there are 1 to {STORED}, by {', '.join(RULES)}")
    shift = STORED - bits
    if not shift:
        return codes.copy()
    wide = codes.astype(np.int32)
    half = 1 << (shift - 1)
    # Half to even: a tie goes up only where the quotient is odd.
    up = half - 1 + ((wide >> shift) & 1) if rule == "rne" else half
    bound = 1 << (bits - 1)
    narrow: Codes = np.clip((wide + up) >> shift, -bound, bound - 1).astype(np.int8)
    return narrow


def in_container(codes: Codes, bits: int, rule: str = "rne") -> Codes:
    """8-bit codes with the values of the ``bits``-wide ones, at the scale of the stored ones."""
    table = np.arange(-128, 128).astype(np.int8)
    narrow = second_rounding(table, bits, rule).astype(np.int32) << (STORED - bits)
    # By a table of all 256 codes: one pass over the weights instead of six.
    widened: Codes = narrow.astype(np.int8)[codes.view(np.uint8) ^ 0x80]
    return widened


def rewritten(
    files: Mapping[str, bytes],
    places: Sequence[Mapping[str, Any]],
    bits: Mapping[str, int],
    rule: str = "rne",
) -> dict[str, bytes]:
    """Copies of ``files`` whose codes are at the width that ``bits`` gives each layer.

    ``places`` say where codes lie: ``layer``, ``file``, ``offset`` and ``count`` in bytes.
    """
    changed = {name: bytearray(files[name]) for name in {str(place["file"]) for place in places}}
    for place in places:
        width, start = bits[str(place["layer"])], int(place["offset"])
        if width == STORED:
            continue
        view = memoryview(changed[str(place["file"])])[start : start + int(place["count"])]
        codes = np.frombuffer(view, np.int8)
        codes[:] = in_container(codes, width, rule)
    return {name: bytes(content) for name, content in changed.items()}
