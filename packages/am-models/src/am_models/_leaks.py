"""Proof at start-up that a token is predicted from what stands before it in its own document, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from am_models._attention import CutDocuments, uses_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# By what changes: whose logits must not move, when, and what to do where they do.
_LEAKS = {
    "future": (
        "earlier tokens",
        "later ones change",
        "it is no causal language model as configured: set is_decoder to true in its config if it has that key, or "
        "choose a causal model",
    ),
    "padding": ("a document", "the padding behind it changes", "give it rows without padding, one at a time"),
    "neighbour": (
        "document 2",
        "document 1 changes",
        'do not pack, or use kernels={"attention": True} if the family is declared',
    ),
    "length": (
        "a document",
        "its neighbour gets longer",
        "give it one document at a time, or only documents of one length",
    ),
    "positions": (
        "a document",
        "its positions are given, counted from 0",
        "it counts them in a way of its own; choose a model that counts from 0",
    ),
    "cut": (
        "documents",
        "their row is cut over ranks",
        "more than its attention looks at a whole document; train it without context parallelism (cp=1)",
    ),
}


class Cut(NamedTuple):
    """How sequences are cut over ranks: `am_mesh.shard_sequence`, and what the length of a row is a multiple of.

    `shard(batch)` gives this rank's `input_ids`, `position_ids` and `document_ids`, the last a `CutDocuments` with the
    `positions [s]` in the rows too.
    """

    shard: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    multiple: int


@torch.no_grad()
def require_no_leak(
    model: PreTrainedModel,
    *,
    packed: bool,
    param_dtype: torch.dtype | None = None,
    document_length: int = 5,
    seed: int = 0,
    cut: Cut | None = None,
) -> None:
    """Check on the model itself that it predicts a token from the earlier ones of the same document, and nothing else.

    Its logits must not depend on the future, on padding, on neighbours (`packed`: other documents of the row; the other
    rows of a batch always) or their length; and positions counted from 0 must be those that it counts by itself.
    Forwards of random tokens that differ in one of these, whose other logits must not move by more than 16 epsilons of
    the parameters' dtype times the largest logit; `param_dtype` is that of the products, where it is another. Costs 10
    rows of 2 * document_length + 2 tokens; nothing is changed. Every rank that holds a shard calls it. Needs weights,
    whose attention is not all zero. Where rotary frequencies depend on the length, a `document_length` that reaches the
    original one shows it.

    cut: how training cuts sequences over ranks; the logits of cut rows must be those of whole ones, too.

    Raises ValueError naming the family, what leaked and what to do, and where logits are NaN or infinite. The model is
    fed as `forward_with_loss` feeds it: with stock attention, packing is in `position_ids` alone.
    """
    if model.device.type == "meta":
        raise ValueError("require_no_leak needs weights and the model is on the meta device; call it after loading")
    length, multiple = document_length, 1 if cut is None else cut.multiple
    width = -(-(2 * document_length + 2) // multiple) * multiple
    base = [length, length] if packed else [length]
    end, first = sum(base), slice(0, length)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (4, width), generator=generator)
    tokens[1:] = tokens[0]
    # Less than a whole turn of the vocabulary: other tokens for sure.
    other = (tokens[0] + 1 + torch.randint(vocabulary - 1, (1,), generator=generator)) % vocabulary
    changed = {"future": slice(end - 1, end), "padding": slice(end, width), "neighbour": slice(0, end - length)}
    stays = {"future": slice(0, end - 1), "padding": slice(0, end), "neighbour": slice(end - length, end)}
    for row, span in enumerate(changed.values(), start=1):
        tokens[row, span] = other[span]
    longer = [length, width - length] if packed else [width]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    together = _logits(model, tokens, [base] * 4)
    beside_longer = _logits(model, tokens, [longer if packed else base, longer, longer, longer])
    alone = _logits(model, tokens[:1], [[width]])
    pieces = None if cut is None else _piece(model, tokens, [base] * 4, cut)
    by_itself = model(input_ids=tokens[:1].to(model.device), use_cache=False).logits.float()
    for module, training in modes:
        module.training = training
    _require_finite(model, together)
    moved = {name: _distance(together[0], together[row], stays[name]) for row, name in enumerate(changed, start=1)}
    moved["length"] = _distance(together[0], beside_longer[0], first)
    if pieces is not None:
        positions, logits = pieces
        moved["cut"] = _distance(together[:, positions], logits, positions < end)
    moved["positions"] = _distance(alone[0], by_itself[0], slice(None))
    epsilon = max(torch.finfo(dtype).eps for dtype in (model.dtype, param_dtype or model.dtype))
    _refuse(model, moved, 16 * epsilon * together.abs().max().item())


def _require_finite(model: PreTrainedModel, logits: torch.Tensor) -> None:
    if not logits.isfinite().all():
        raise ValueError(
            f"{model.config.model_type}: {int((~logits.isfinite()).sum())} of {logits.numel()} logits of random tokens "
            "are NaN or infinite; the weights are broken, or their values do not fit the dtype: load them again"
        )


def _refuse(model: PreTrainedModel, moved: Mapping[str, float], limit: float) -> None:
    attention = model.config.get_text_config()._attn_implementation
    for name, distance in moved.items():
        whose, cause, fix = _LEAKS[name]
        if not distance <= limit:
            raise ValueError(
                f"{model.config.model_type}: the logits of {whose} move by {distance:.3g} (limit {limit:.3g}) when "
                f"{cause}, with attention {attention!r}; {fix}"
            )


def _piece(
    model: PreTrainedModel, tokens: torch.Tensor, rows: Sequence[Sequence[int]], cut: Cut
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the rows this rank's tokens are `[s]`, and their logits."""
    inputs = cut.shard(_batch(tokens, rows))
    documents = inputs["document_ids"]
    assert isinstance(documents, CutDocuments)
    moved = {name: inputs[name].to(model.device) for name in ("input_ids", "position_ids")}
    return documents.positions, model(**moved, document_ids=documents, use_cache=False).logits.float()


def _logits(model: PreTrainedModel, tokens: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    inputs = _batch(tokens, rows)
    if not uses_documents(model):
        del inputs["document_ids"]
    return model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=False).logits.float()


def _batch(tokens: torch.Tensor, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Rows that begin with documents of these lengths; the rest is padding."""
    positions, documents = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        begin = 0
        for number, length in enumerate(lengths, start=1):
            here = slice(begin, begin + length)
            positions[row, here] = torch.arange(length)
            documents[row, here] = number
            begin += length
    return {"input_ids": tokens, "position_ids": positions, "document_ids": documents}


def _distance(ours: torch.Tensor, theirs: torch.Tensor, span: slice | torch.Tensor) -> float:
    """The largest difference at the tokens `span`; NaN counts as one. Nothing to compare is no difference."""
    differences = (ours - theirs)[..., span, :].abs()
    return differences.max().item() if differences.numel() else 0.0
