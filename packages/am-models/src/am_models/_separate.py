"""Proof at start-up that packed documents and padding do not see each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from am_models._attention import uses_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def require_separate_documents(model: PreTrainedModel, *, document_length: int = 5, seed: int = 0) -> None:
    """Check on the model itself that documents packed into one row do not influence each other, nor padding them.

    One forward of four rows of random tokens, each two documents of `document_length` tokens and two padding tokens:
    the rows differ from the first in one document or in the padding alone, whose logits elsewhere must not move by more
    than 16 epsilons of the parameters' dtype times the largest logit. Costs a forward of 4 * (2 * document_length + 2)
    tokens; nothing is changed. Every rank that holds a shard calls it. Needs weights, whose attention is not all zero.

    Raises ValueError naming the family and what leaked, and where logits are NaN or infinite. Models with
    stock attention are tested as `forward_with_loss` feeds them: packing by `position_ids` alone.
    """
    device = model.device
    if device.type == "meta":
        raise ValueError(
            "require_separate_documents needs weights and the model is on the meta device; call it after loading"
        )
    generator = torch.Generator().manual_seed(seed)
    length = document_length
    positions = [*range(length), *range(length), 0, 0]
    documents = [1] * length + [2] * length + [0, 0]
    spans = {
        "document 1": slice(0, length),
        "document 2": slice(length, 2 * length),
        "padding": slice(2 * length, None),
    }
    vocabulary = model.config.get_text_config().vocab_size
    attention = model.config.get_text_config()._attn_implementation
    tokens = torch.randint(vocabulary, (1, 2 * length + 2), generator=generator).repeat(4, 1)
    for row, span in enumerate(spans.values(), start=1):
        # Less than a whole turn of the vocabulary: another token for sure.
        tokens[row, span] = (
            tokens[row, span] + 1 + torch.randint(vocabulary - 1, (1,), generator=generator)
        ) % vocabulary
    inputs = {"input_ids": tokens, "position_ids": torch.tensor([positions] * 4)}
    if uses_documents(model):
        inputs["document_ids"] = torch.tensor([documents] * 4, dtype=torch.int32)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False).logits.float()
    for module, training in modes:
        module.training = training
    if not logits.isfinite().all():
        raise ValueError(
            f"{model.config.model_type}: {int((~logits.isfinite()).sum())} of {logits.numel()} logits of random tokens "
            "are NaN or infinite; the weights are broken, or their values do not fit the dtype: load them again"
        )
    limit = 16 * torch.finfo(model.dtype).eps * logits.abs().max().item()
    for row, changed in enumerate(spans, start=1):
        for watched, span in spans.items():
            moved = (logits[row, span] - logits[0, span]).abs().max().item()
            if watched not in (changed, "padding") and not moved <= limit:
                raise ValueError(
                    f"{model.config.model_type}: the logits of {watched} move by {moved:.3g} (limit {limit:.3g}) when "
                    f"{changed} changes, with attention {attention!r}; do not pack, or use "
                    'kernels={"attention": True} if the family is declared'
                )
