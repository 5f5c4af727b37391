"""Where things come from: the op of a graph node, and the user's source line of a node or an error.

Also ``quiet``, which every module that drives torch or a converter needs.
"""

from __future__ import annotations

import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import BuiltinFunctionType

import torch
from torch._ops import OpOverload

_TORCH = Path(torch.__file__).parent
_HERE = Path(__file__).parent


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings, log lines and prints of torch and the converters away from the user."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def source_line(error: BaseException) -> str:
    """``file.py:12: the code`` of the innermost frame that is the user's, or ""."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not (path.is_relative_to(_TORCH) or path.is_relative_to(_HERE)):
            return f"{path}:{frame.lineno}: {frame.line}"
    return ""


def node_source(node: torch.fx.Node) -> tuple[str, str]:
    """Where a graph node comes from: the user's source line, and the module's path."""
    owners = list((node.meta.get("nn_module_stack") or {}).values())
    owner = str(owners[-1][0]) if owners else ""
    lines = str(node.meta.get("stack_trace") or "").splitlines()
    for index in range(len(lines) - 2, -1, -1):
        head = lines[index].strip()
        if head.startswith('File "') and str(_TORCH) not in head and str(_HERE) not in head:
            name, _, rest = head[6:].partition('", line ')
            return f"{name}:{rest.split(',')[0]}: {lines[index + 1].strip()}", owner
    return "", owner


def op_name(node: torch.fx.Node) -> str:
    """``aten.sort.default``: how PyTorch writes the op that a graph node calls."""
    operator = operator_of(node)
    if isinstance(operator, BuiltinFunctionType):  # one result of an op that has several
        return operator.__name__
    return str(operator).removeprefix("torch.ops.")


def operator_of(node: torch.fx.Node) -> object:
    """What a graph node calls, without the wrapper that a converter may have put around it."""
    target = node.target
    return target if isinstance(target, OpOverload) else getattr(target, "_op", target)
