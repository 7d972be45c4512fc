"""Router auxiliary losses and load statistics.

All of them are sums over tokens or documents, so that neither micro-batches nor ranks change them: as for every loss of
this repository, the caller divides by the number of target tokens of the whole step. Which documents there are comes
from `document_ids [B, S]`: 1.. within a row, 0 = padding, which counts nowhere. A batch of unpacked rows without
padding is `torch.ones(B, S, dtype=torch.int32)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def balance_loss(
    router_logits: Sequence[Tensor],
    document_ids: Tensor | None,
    *,
    num_experts_per_token: int,
    coefficient: float,
    z_loss: float = 0.0,
    sum_counts: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The sequence-wise balance loss of DeepSeek-V3 (arXiv:2412.19437, eq. 17-20), summed; a scalar with a graph.

    For a document of T tokens in one layer, with softmax scores p and A = `num_experts_per_token`:

        f_i = E / (A T) * (number of its tokens whose A best experts include i)      no gradient
        P_i = 1 / T * (sum over its tokens of p_i)
        loss = coefficient * T * sum_i f_i P_i  +  z_loss * sum over its tokens of logsumexp(logits)^2

    summed over documents and layers. The factor T weighs every token alike, so the sum over micro-batches and ranks is
    that of the whole batch, provided that no document is cut or that `sum_counts` counts it whole. Even loads give
    `sum_i f_i P_i = 1`, all tokens on the same A experts up to E / A. The second term is the router z-loss of ST-MoE
    (arXiv:2202.08906, eq. 5).

    sum_counts: where ranks have pieces of the documents (context parallelism), gives the sum of an int64 tensor over
    these ranks, all of which call `balance_loss` with as many tokens of equally numbered documents. Each then returns
    its tokens' share of the loss.

    `router_logits`: per layer `[T, E]`, T = B * S tokens in the order of `document_ids [B, S]`. The choice is that of
    the logits: a correction bias or group limit of the router is not seen. Computed and returned in float32 (float64
    for float64 logits). No real token gives a 0 with a graph. Raises ValueError for impossible sizes,
    and for no `document_ids`: they say what a sequence is.
    """
    real, document, lengths = _real_tokens(router_logits, document_ids, num_experts_per_token, sum_counts)
    total = torch.zeros((), device=document.device)
    for logits in router_logits:
        E = logits.shape[-1]
        wide = logits[real].to(torch.promote_types(logits.dtype, torch.float32))
        index = wide.detach().topk(num_experts_per_token, dim=-1).indices
        counts = _count(document[:, None] * E + index, len(lengths) * E).view(-1, E)
        if sum_counts is not None:
            counts = sum_counts(counts)
        fraction = counts.to(wide.dtype) * (E / num_experts_per_token) / lengths[:, None]
        # T * sum_i f_i P_i as a sum over tokens: its gradient gathers, which is deterministic on any device.
        total = total + coefficient * (fraction[document] * wide.softmax(dim=-1)).sum()
        if z_loss:
            total = total + z_loss * wide.logsumexp(dim=-1).square().sum()
    return total


def expert_counts(router_logits: Sequence[Tensor], document_ids: Tensor | None, k: int) -> Tensor:
    """How many real tokens have each expert among their k best: `[L, E]` int64 of this rank's tokens, no gradient.

    Arguments and errors as in `balance_loss`; layers must have one E. Sum over ranks and micro-batches, then
    `load_metrics`.
    """
    real, _, _ = _real_tokens(router_logits, document_ids, k, None)
    rows = [_count(logits.detach()[real].topk(k, dim=-1).indices, logits.shape[-1]) for logits in router_logits]
    return torch.stack(rows)


def load_metrics(counts: Tensor) -> dict[str, float]:
    """How even the loads `counts [L, E]` are (of `expert_counts`, summed over ranks and micro-batches by the caller).

    - `max_violation`: the largest load over the mean load, minus 1 (MaxVio of arXiv:2408.15664), of the worst layer.
      0 = even, E / A - 1 = all tokens on the same A experts.
    - `entropy`: of the shares of the load, over log E, mean of the layers. 1 = even, 0 = one expert has it all.
    - `idle_experts`: the share of the L * E experts without a token.

    Reads the counts on the host. Raises ValueError where a layer has no token or fewer than two experts.
    """
    if counts.dim() != 2 or counts.shape[0] < 1 or counts.shape[1] < 2:
        raise ValueError(f"counts {tuple(counts.shape)} must be [L, E] with at least one layer and two experts")
    loads = counts.double().cpu()
    totals = loads.sum(dim=1, keepdim=True)
    if not bool((totals > 0).all()):
        layers = (totals[:, 0] == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"counts of layers {layers} are all 0, so there is no load to measure; count a batch first")
    shares = loads / totals
    E = counts.shape[1]
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1) / torch.tensor(E, dtype=torch.float64).log()
    return {
        "max_violation": float(shares.max() * E - 1),
        "entropy": float(entropy.mean()),
        "idle_experts": float((counts == 0).double().mean()),
    }


def _real_tokens(
    router_logits: Sequence[Tensor],
    document_ids: Tensor | None,
    num_experts_per_token: int,
    sum_counts: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are no padding `[T]` bool, of these the number of their document, from 0, and all their lengths."""
    if not router_logits:
        raise ValueError("router_logits is empty; give one tensor [T, E] for each layer that has a router")
    if document_ids is None:
        raise ValueError(
            "document_ids is None, so it is unknown which tokens form a sequence and which are padding; give the "
            "batch's, or torch.ones(B, S, dtype=torch.int32) for rows that are one document each"
        )
    if document_ids.dim() != 2:
        raise ValueError(f"document_ids {tuple(document_ids.shape)} must be [B, S]")
    for layer, logits in enumerate(router_logits):
        if logits.dim() != 2 or logits.shape[0] != document_ids.numel():
            raise ValueError(
                f"router_logits[{layer}] {tuple(logits.shape)} must be [T, E] with T = {document_ids.numel()}, the "
                f"tokens of document_ids {tuple(document_ids.shape)}"
            )
        if not 1 <= num_experts_per_token <= logits.shape[1]:
            raise ValueError(
                f"num_experts_per_token={num_experts_per_token} must be between 1 and the {logits.shape[1]} experts "
                f"of router_logits[{layer}]"
            )
    real = document_ids.reshape(-1) > 0
    # A document has a token on some rank, so there are at most as many in a row as it has tokens.
    pieces = 1 if sum_counts is None else int(sum_counts(torch.ones((), dtype=torch.int64, device=real.device)))
    stride = document_ids.shape[1] * pieces + 1
    rows = torch.arange(document_ids.shape[0], device=document_ids.device)
    # Ids start over in every row.
    keys = (rows[:, None] * stride + document_ids).reshape(-1)[real]
    tokens = _count(keys, document_ids.shape[0] * stride)
    if sum_counts is not None:
        tokens = sum_counts(tokens)
    present = tokens > 0
    return real, (present.cumsum(0) - 1)[keys], tokens[present]


def _count(index: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 occurs: `[size]` int64."""
    return torch.bincount(index.reshape(-1), minlength=size)
