"""am_kernels.attention behind transformers' attention and mask registries, under a name of our own.

The two registries are used together: an attention name without a mask function silently gets no mask. The mask
function is transformers' own `sdpa_mask`, except that a training batch without padding mask or cache gets a
`LazyMask`: what transformers asked for, not yet built. The attention call knows the document ids, which the mask
function does not, and then needs no [B, 1, S, S] tensor; without document ids it builds the mask transformers meant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

import am_kernels
from am_models._rope import depends_on_length, without_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "am_kernels"
_GIVEN = f"{NAME}.given"
# What a caller gives for am_kernels.attention, with its signature, such as am_mesh.context_attention(...).
AttentionFunction = Callable[..., torch.Tensor]
# By the names that they are registered under, in the order in which they came.
_given: dict[str, AttentionFunction] = {}
# These compute packed documents alone: generation and padding masks go to the backend that am_kernels chooses.
_FOR_DOCUMENTS = ("bucketed", "varlen")


@runtime_checkable
class CutDocuments(Protocol):
    """Documents of sequences that were cut over ranks, such as `am_mesh.SequenceShard`: only an attention that is given
    to `optimize` can read them.
    """

    @property
    def local_ids(self) -> torch.Tensor:
        """The document ids of this rank's tokens, `[B, s]`."""
        ...

    @property
    def positions(self) -> torch.Tensor:
        """Where in the rows these tokens are, `[s]`."""
        ...


class LazyMask:
    """The arguments of transformers' `sdpa_mask` for a square, unpadded, uncached causal mask, built on first use."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._built: torch.Tensor | None = None

    @property
    def window(self) -> int | None:
        """Tokens a query sees including itself in a sliding-window layer; None in a full-attention layer."""
        return self.arguments["local_size"]

    @property
    def plain(self) -> bool:
        """Whether the mask is causality (and the window) alone: no packing found in `position_ids`."""
        return self.arguments["allow_is_causal_skip"]

    def tensor(self) -> torch.Tensor:
        """The mask, bool [B, 1, S, S], True = attend."""
        from transformers.masking_utils import sdpa_mask

        if self._built is None:
            self._built = sdpa_mask(**{**self.arguments, "allow_is_causal_skip": False})
        # None is for what may be skipped, and nothing may.
        assert self._built is not None
        return self._built

    def contiguous(self) -> torch.Tensor:
        """What `generate` asks of the masks that it prepares for a static cache: the mask, built."""
        return self.tensor()


def register(backend: str | AttentionFunction | None) -> str:
    """Register attention and mask function for `backend` and return the name they share.

    backend: of am_kernels (None: chosen per call), or a function to call in place of `am_kernels.attention`. Raises
    ValueError, from am_kernels, for a backend that it does not know.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if callable(backend):
        name = next((name for name, known in _given.items() if known is backend), f"{_GIVEN}{len(_given)}")
        _given[name] = backend
        AttentionInterface.register(name, partial(_attention, backend=backend))
        AttentionMaskInterface.register(name, _mask)
        return name
    if backend not in _FOR_DOCUMENTS:
        one_token = torch.zeros(1, 1, 1, 8)
        am_kernels.attention(one_token, one_token, one_token, backend=backend)

    name = NAME if backend is None else f"{NAME}.{backend}"
    AttentionInterface.register(name, partial(_attention, backend=backend))
    AttentionMaskInterface.register(name, _mask)
    return name


def uses_documents(model: PreTrainedModel) -> bool:
    """Whether the attention of `model` is ours, so that `document_ids` given to its forward separate documents."""
    return str(model.config.get_text_config()._attn_implementation).startswith(NAME)


def reads_cut_documents(model: PreTrainedModel) -> bool:
    """Whether the attention of `model` was given to `optimize`: am_kernels' own knows nothing of cut sequences."""
    return str(model.config.get_text_config()._attn_implementation) in _given


def plan_documents(
    decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the decoder: find the documents once per batch, not once per layer.

    Raises ValueError where stock attention would take `document_ids` and ignore them.
    """
    document_ids = kwargs.get("document_ids")
    if document_ids is None:
        return args, kwargs
    if not uses_documents(decoder):
        raise ValueError(
            f"document_ids given, but attention {decoder.config.get_text_config()._attn_implementation!r} of "
            f"{decoder.config.model_type} ignores them; leave them out and let position_ids restart at 0 in every "
            "document"
        )
    if isinstance(document_ids, CutDocuments) and not reads_cut_documents(decoder):
        raise ValueError(
            f"sequences are cut over ranks, and attention {decoder.config.get_text_config()._attn_implementation!r} of "
            f"{decoder.config.model_type} would see pieces of them; give optimize one that puts them together: "
            'kernels={"attention": am_mesh.context_attention(...)}'
        )
    if isinstance(document_ids, torch.Tensor):
        if kwargs.get("position_ids") is not None and any(map(depends_on_length, decoder.modules())):
            kwargs = {**kwargs, "position_ids": without_padding(kwargs["position_ids"], document_ids)}
        kwargs = {**kwargs, "document_ids": am_kernels.document_segments(document_ids)}
    return args, kwargs


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **arguments: Any,
) -> torch.Tensor | LazyMask | None:
    """transformers' mask interface: a bool mask [B, 1, q, kv], None where causality alone suffices, or a LazyMask."""
    from transformers.masking_utils import sdpa_mask

    arguments |= {
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        "use_vmap": use_vmap,
    }
    # `use_vmap` marks overlays on causality, `allow_is_bidirectional_skip` attention in both directions. Static caches
    # have a tensor as offset.
    causal = not use_vmap and not allow_is_bidirectional_skip
    square = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    if causal and square and attention_mask is None and not (allow_is_causal_skip and local_size is None):
        return LazyMask(arguments)
    return sdpa_mask(**arguments)


class _AttentionModule(Protocol):
    is_causal: bool


def _attention(
    module: _AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | LazyMask | None,
    *,
    backend: str | AttentionFunction | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    document_ids: torch.Tensor | am_kernels.Documents | CutDocuments | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, S, P], key and value [B, K, S', P] to [B, S, H, P]."""
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported: set config.attention_dropout to 0")
    # What else a model passes on is in the mask already, all but these two.
    if others.get("position_bias") is not None or others.get("cache") is not None:
        raise ValueError("position_bias and paged caches are not supported; use kernels={'attention': False}")
    causal = module.is_causal if is_causal is None else is_causal
    mask, window = None, None
    if not isinstance(attention_mask, LazyMask):
        mask = attention_mask
    elif attention_mask.plain or document_ids is not None:
        window = attention_mask.window
    else:
        mask = attention_mask.tensor()
    if document_ids is None and backend in _FOR_DOCUMENTS:
        backend = None
    function: AttentionFunction = backend if callable(backend) else am_kernels.attention
    # A mask already holds causality. One query is the last and sees every key; more than one without a mask are the
    # first, and what an empty static cache has behind them is of the future.
    num_queries = query.shape[2]
    if mask is not None:
        causal = False
    elif causal and 1 < num_queries < key.shape[2]:
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    output = function(
        query,
        key,
        value,
        causal=causal,
        mask=mask,
        document_ids=document_ids,
        window=window,
        sink=s_aux,
        softcap=softcap,
        scale=scaling,
        backend=None if callable(backend) else backend,
    )
    return output, None
