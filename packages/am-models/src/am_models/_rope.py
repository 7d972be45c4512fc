"""Rotary embeddings whose frequencies depend on the length of the text: each document gets those of its own length.

transformers takes the longest row of a batch for all of it ("dynamic" scaling, which also remembers the longest so far,
and "longrope"), so that the neighbours of a document would change its loss. Here the module's own forward runs once for
every length that the batch has beyond the original one, as it would on that document alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from am_models import _forwards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class _Rotary(Protocol):
    config: PreTrainedConfig
    rope_type: str | dict[str, str]
    original_max_seq_len: int


def install_document_lengths(model: PreTrainedModel) -> None:
    """Make every rotary embedding of this instance that depends on the length look at one document at a time."""
    for module in model.modules():
        if depends_on_length(module) and "forward" not in vars(module):
            _forwards.install(module, _per_document(type(module).forward))


def depends_on_length(module: nn.Module) -> bool:
    """Whether transformers recomputes the frequencies of `module` in its forward."""
    kinds = vars(module).get("rope_type")
    return any(_recomputed(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))


def without_padding(position_ids: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    """Positions that do not go on through padding, which would count as length."""
    return position_ids.where(document_ids.to(position_ids.device) != 0, 0)


def _recomputed(kind: object) -> bool:
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def _per_document(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a rotary embedding, which gives tensors [B, S, ...], run for the documents of each length."""

    def per_document(
        self: _Rotary, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        further = () if layer_type is None else (layer_type,)
        kind = self.rope_type if isinstance(self.rope_type, str) else self.rope_type[str(layer_type)]
        if not _recomputed(kind):
            return forward(self, x, position_ids, *further)
        if position_ids.dim() != 2:
            raise ValueError(
                f"{self.config.model_type}: rope_type {kind!r} with position_ids {list(position_ids.shape)}; with "
                "several axes the length of a document is not known: use another rope_type"
            )
        lengths = _document_lengths(position_ids)
        if kind == "longrope":
            settings = self.config.rope_parameters
            settings = settings if layer_type is None else settings[layer_type]
            # Two sets of frequencies, whatever the lengths are.
            lengths = (lengths > settings["original_max_position_embeddings"]).long()
        else:
            lengths = lengths.clamp(min=self.original_max_seq_len)
        found: list[torch.Tensor] | None = None
        for length in lengths.unique().tolist():
            here = lengths == length
            _forget(self, x.device, layer_type)
            result = forward(self, x, position_ids.where(here, 0), *further)
            parts = [result] if isinstance(result, torch.Tensor) else list(result)
            chosen = [here.view(*here.shape, *[1] * (part.dim() - 2)) for part in parts]
            found = parts if found is None else [p.where(c, f) for p, c, f in zip(parts, chosen, found, strict=True)]
        _forget(self, x.device, layer_type)
        assert found is not None
        return found[0] if isinstance(result, torch.Tensor) else tuple(found)

    return per_document


def _document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """For every token the length of the text that it is in, [B, S]: one more than the last position of its run."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    run = begins.flatten().cumsum(0) - 1
    longest = torch.zeros_like(run).scatter_reduce(0, run, position_ids.flatten() + 1, "amax")
    return longest[run].view_as(position_ids)


def _forget(rotary: _Rotary, device: torch.device, layer_type: str | None) -> None:
    """Put back the original frequencies: "dynamic" keeps those of the longest text that it has seen."""
    module = cast(nn.Module, rotary)
    prefix = "" if layer_type is None else f"{layer_type}_"
    original = module.get_buffer(f"{prefix}original_inv_freq").to(device)
    module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
    vars(module)[f"{prefix}max_seq_len_cached"] = rotary.original_max_seq_len
