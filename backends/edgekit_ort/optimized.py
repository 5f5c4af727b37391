"""A model as the runtime itself has optimized it, with its codes found again in that file.

Fusing the graph is most of the time that loading takes; a switch of bit-widths changes no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from edgekit.artifact import Artifact
from edgekit.widths import places_to_json


def optimized_artifact(
    artifact: Artifact, content: bytes, optimize: Callable[[bytes], bytes]
) -> Artifact | None:
    """``artifact`` with its main file optimized, or None where a code is not found there.

    ``content`` is that file, ``optimize`` gives what the runtime makes of a file. It is asked
    twice, the second time with every code inverted: the codes must lie in one place of the first
    result, be inverted in the second, and nothing between them may differ. So they were neither
    changed nor copied nor looked at.
    """
    codes = cast("Mapping[str, Any]", artifact.provenance["codes"])
    first = optimize(content)
    second = optimize(_inverted(content, codes["places"]))
    places = []
    for place in codes["places"]:
        sought = _at(content, place)
        offset = first.find(sought)
        found = {**place, "file": artifact.main, "offset": offset}
        if offset < 0 or first.find(sought, offset + 1) >= 0:
            return None
        places.append(found)
    start = min(place["offset"] for place in places)
    end = max(place["offset"] + place["count"] for place in places)
    expected = _inverted(first, places)
    if len(second) != len(first) or second[start:end] != expected[start:end]:
        return None
    return replace(
        artifact,
        files={artifact.main: first},
        provenance={"codes": places_to_json(places, str(codes["rounding"]))},
    )


def _at(content: bytes, place: Mapping[str, Any]) -> bytes:
    return content[place["offset"] : place["offset"] + place["count"]]


def _inverted(content: bytes, places: Sequence[Mapping[str, Any]]) -> bytes:
    changed = np.frombuffer(content, np.uint8).copy()
    for place in places:
        changed[place["offset"] : place["offset"] + place["count"]] ^= 0xFF
    return changed.tobytes()
