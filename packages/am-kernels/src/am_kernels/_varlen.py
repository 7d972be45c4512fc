"""All documents of a batch in one call of torch's `varlen_attn` (CUDA).

Asked for by name only: `window`, `mask`, `sink` and `softcap` are refused, as torch's function has none of the last
three and counts its window otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from am_kernels._documents import Documents

# The first whose documentation has `window_size` for causality, `enable_gqa` and `scale`.
FIRST_TORCH = "2.12"


def why_not(device_type: str, dtype: torch.dtype | None = None) -> list[str]:
    """What stands against it, empty where nothing does."""
    reasons = []
    if TorchVersion(torch.__version__) < FIRST_TORCH:
        reasons.append(f"torch {torch.__version__} (needs {FIRST_TORCH})")
    if device_type != "cuda":
        reasons.append(f"device {device_type}")
    if dtype not in (torch.float16, torch.bfloat16, None):
        reasons.append(f"{dtype} (float16 and bfloat16 only)")
    return reasons


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, causal: bool, scale: float) -> Tensor:
    """Attention within documents; `q [B, H, S, P]`, `k, v [B, K, S, P]`, result `[B, S, H, P]`, zeros for padding."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, S, _ = q.shape
    offsets, tokens = _index(documents, q.device)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    if documents.num_padding:
        packed = [x.index_select(0, tokens) for x in packed]
    longest = max(documents.lengths)
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(
        packed[0],
        packed[1],
        packed[2],
        offsets,
        offsets,
        longest,
        longest,
        scale=scale,
        window_size=window,
        enable_gqa=k.shape[1] != H,
    )
    assert isinstance(out, Tensor)  # A tuple only where auxiliary outputs are asked for.
    if documents.num_padding:
        out = out.new_zeros(B * S, H, out.shape[-1]).index_copy(0, tokens, out)
    return out.view(B, S, H, -1)


def _index(documents: Documents, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the documents begin and end among the real tokens, int32 [documents + 1], and these tokens in [B * S]."""
    key = ("varlen", device)
    found = documents.derived.get(key)
    if not isinstance(found, tuple):
        lengths = torch.tensor(documents.lengths)
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = lengths.cumsum(0)
        real = torch.tensor(documents.is_document).repeat_interleave(torch.tensor(documents.runs))
        found = (offsets.to(device), real.nonzero().view(-1).to(device))
        documents.derived[key] = found
    return found
