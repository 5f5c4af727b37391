"""Weight files: safetensors, or a state dict that is read without running what it pickles."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from edgekit.errors import BadModel, DamagedFile


def load_weights(module: nn.Module, path: Path) -> None:
    """Load ``.safetensors``, or a ``.pt``/``.pth`` state dict without its pickled code."""
    state = read_state(path)
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    misfits = [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    problems = [
        f"{title}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
        for title, names in (("missing", missing), ("unknown", extra), ("shapes", sorted(misfits)))
        if names
    ]
    if problems:
        raise BadModel(f"the weights in {path} do not fit the model; {'; '.join(problems)}.")
    module.load_state_dict(state)


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a weight file. Raises ``BadModel`` or ``DamagedFile``."""
    if not path.is_file():
        raise BadModel(f"there is no weight file {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: object = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise BadModel(f"{path}: weights are read from .safetensors, .pth or .pt files.")
    except BadModel:
        raise
    except Exception as cause:  # what a damaged file makes each library raise is not documented
        reason = str(cause).split("\n", 1)[0]
        raise DamagedFile(
            f"{path} is not a weight file that can be read safely: {reason}. Save a state dict, "
            "best with safetensors.torch.save_file(model.state_dict(), path)."
        ) from cause
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise BadModel(f"{path} holds no state dict: a mapping of names to tensors is needed.")
    return state
