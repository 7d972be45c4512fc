"""How what is here differs from what is in a checkpoint, in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch

from am_ckpt._sources import Source
from am_ckpt._train.pieces import dtype_name


def shape_difference(name: str, source: Source, tensor: torch.Tensor) -> list[str]:
    here = (dtype_name(tensor.dtype, name), tuple(tensor.shape))
    if tensor.is_meta:
        return [f"{name} is on the meta device: give it memory first (load_hf, or to_empty)"]
    if here == (source.dtype, source.shape):
        return []
    return [f"{name}: here {here[0]} {list(here[1])}, in the checkpoint {source.dtype} {list(source.shape)}"]


def nearest(name: str, candidates: Iterable[str]) -> str:
    """` (nearest: other)`, or nothing where no candidate is similar."""
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f" (nearest: {close[0]})" if close else ""


def name_differences(missing: list[str], unexpected: list[str], here: Iterable[str], there: Iterable[str]) -> list[str]:
    lines = []
    if missing:
        # Similarity is quadratic in the number of names: only for those that are shown.
        shown = ", ".join(name + nearest(name, unexpected or there) for name in missing[:5])
        lines.append(f"{len(missing)} not in the checkpoint: {shown}")
    if unexpected:
        shown = ", ".join(name + nearest(name, missing or here) for name in unexpected[:5])
        lines.append(f"{len(unexpected)} only in the checkpoint: {shown}")
    return lines


def raise_differences(what: str, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{what} does not match the checkpoint: {'; '.join(problems[:8])}{more}")
