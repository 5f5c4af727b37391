"""Whether what a file holds is the decoder that its sizes announce, said before it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from edgekit.decoder import DecoderSpec
from edgekit.errors import BadModel

# The largest that is believed: a number beyond is a slip, and would cost all the memory.
_MOST = {
    **{"layers": 1024, "hidden": 1 << 17, "heads": 4096, "kv_heads": 4096, "head_dim": 4096},
    **{"ffn": 1 << 20, "vocabulary": 1 << 22, "context": 1 << 24},
}


def check_sizes(spec: DecoderSpec, source: Path) -> None:
    """Raises ``BadModel`` for sizes that no model has, or that contradict each other."""
    for name, most in _MOST.items():
        size = getattr(spec, name)
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= most:
            raise BadModel(f"{source} says {name} is {size!r}; believed are 1 to {most}.")
    if spec.heads % spec.kv_heads:
        raise BadModel(
            f"{source} has {spec.heads} query heads for {spec.kv_heads} of keys; the first must "
            "be a multiple of the second."
        )
    if spec.head_dim % 2:
        raise BadModel(f"{source} has heads of {spec.head_dim}; only even sizes can be rotated.")
    if not 0 < spec.epsilon < 1:
        raise BadModel(f"{source} says its norms add {spec.epsilon!r}; expected is about 1e-5.")


def check_tensors(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    source: Path,
    *,
    ignored: Collection[str] = (),
) -> None:
    """Raises ``BadModel`` for tensors that lack, are too many, or have another shape."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and name not in ignored]
    misfits = [
        f"{name} is {_size(found[name])} where {_size(shape)} is expected"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{title}: {'; '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
        for title, names in (("missing", missing), ("unknown", extra), ("sizes", misfits))
        if names
    ]
    if problems:
        raise BadModel(
            f"the weights in {source} do not fit its configuration; {'; '.join(problems)}."
        )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
