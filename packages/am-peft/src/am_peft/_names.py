"""Names of modules and parameters as users and files write them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from torch import nn

# Parts that torch.compile and activation checkpointing put into names.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def clean_name(name: str) -> str:
    """``name`` without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``model.named_parameters()`` with clean names."""
    for name, parameter in model.named_parameters():
        yield clean_name(name), parameter


def nearest(pattern: str, names: Iterable[str]) -> str:
    """The names most like ``pattern``, compared whole and by their last part, for an error message."""
    names = list(names)
    last = {name.rpartition(".")[2]: name for name in names}
    close = difflib.get_close_matches(pattern, [*names, *last], n=5, cutoff=0.5)
    found = close or sorted(last)[:8]
    return ", ".join(found) or "none"
