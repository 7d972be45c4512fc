"""Losses and answers of a model that is not training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

import am_data
import am_loss
import am_mesh
import am_models
from am_recipes.data import count_targets, share
from am_recipes.progress import seed_everything
from am_recipes.run_config import RunConfig


@torch.no_grad()
def evaluate(
    config: RunConfig,
    model: PreTrainedModel,
    loaders: Mapping[str, Iterable[Sequence[am_data.Batch]]],
    dims: am_mesh.ParallelDims,
    device: torch.device,
) -> dict[str, float]:
    """Mean cross-entropy per target token of each validation set, whatever the loss that trains: it compares runs.

    Every rank calls it; all get the same numbers.
    """
    model.eval()
    losses = {}
    for name, loader in loaders.items():
        total, count = torch.zeros((), device=device), 0
        for micro_batches in loader:
            for batch in micro_batches:
                inputs, targets = share(config, model, batch, dims, device)
                labels = {"shift_labels": targets["shift_labels"]}
                total += am_models.forward_with_loss(model, am_loss.linear_cross_entropy, inputs, labels)
            count += count_targets(micro_batches)
        targets_of_all = am_mesh.sum_over(dims.row_ranks, count)
        if targets_of_all == 0:
            raise ValueError(f"{name}: its dataset has no target at all, so there is no loss; look at its labels")
        losses[name] = am_mesh.sum_over(dims.loss_ranks, total).item() / targets_of_all
    return losses


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    variables: Mapping[str, Any],
) -> list[tuple[str, str]]:
    """(prompt, answer) pairs, decoded greedily with the tokenizer's chat template and its `variables`.

    Every rank calls it.
    """
    answers = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **variables)
        # The template has written the special tokens.
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        answers.append((prompt, _written(model, tokenizer, inputs, max_new_tokens, do_sample=False)))
    return answers


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs, each sampled from the 20 likeliest tokens with `seed`. Every rank calls it."""
    answers: list[tuple[str, str]] = []
    for prompt in prompts:
        seed_everything(seed, len(answers))
        inputs = tokenizer(prompt, return_tensors="pt")
        text = _written(model, tokenizer, inputs, max_new_tokens, do_sample=True, top_k=20, temperature=0.8)
        answers.append((prompt, text))
    return answers


def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchEncoding,
    max_new_tokens: int,
    **options: Any,
) -> str:
    """What `model` writes after `inputs [1, S]`."""
    ids = generate(model, inputs.to(model.device), max_new_tokens=max_new_tokens, **options)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@torch.no_grad()
def generate(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """The token ids `[N]` that `model` writes after `inputs`, of one row. Every rank calls it."""
    model.eval()
    # transformers types it for its own generative classes, which an Auto class does not tell.
    write = cast(Callable[..., torch.Tensor], model.generate)
    return write(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
