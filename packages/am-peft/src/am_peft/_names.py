"""Names of modules and parameters as users and files write them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from torch import nn

# Parts that torch.compile and activation checkpointing put into names.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
# How the names of LoRA factors end.
FACTORS = (".lora_A.weight", ".lora_B.weight")


def clean_name(name: str) -> str:
    """`name` without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` with clean names."""
    for name, parameter in model.named_parameters():
        yield clean_name(name), parameter


def nearest(pattern: str, names: Iterable[str]) -> str:
    """The names, the modules they are in and the parts of them that are most like `pattern`, for an error message."""
    split = [name.split(".") for name in names]
    paths = {".".join(parts[:end]): None for parts in split for end in range(1, len(parts) + 1)}
    parts = {part: None for parts in split for part in parts if not part.isdecimal()}
    close = difflib.get_close_matches(
        pattern, [*parts, *(path for path in paths if path not in parts)], n=5, cutoff=0.5
    )
    found = close or sorted(parts.keys() - {"weight", "bias"})[:8]
    return ", ".join(found) or "none"
