"""Losses and answers of a model that is not training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import am_data
import am_loss
import am_mesh
import am_models
from am_recipes.data import count_targets, to_device
from am_recipes.run import seed_everything


@torch.no_grad()
def evaluate(
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
                inputs, targets = am_models.split_batch(model, to_device(batch, device))
                labels = {"shift_labels": targets["shift_labels"]}
                total += am_models.forward_with_loss(model, am_loss.linear_cross_entropy, inputs, labels)
            count += count_targets(micro_batches)
        losses[name] = am_mesh.sum_over(dims.loss_ranks, total).item() / am_mesh.sum_over(dims.row_ranks, count)
    return losses


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[tuple[str, str]]:
    """(prompt, answer) pairs, decoded greedily with the tokenizer's chat template. Every rank calls it."""
    model.eval()
    answers = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append((prompt, tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    return answers


@torch.no_grad()
def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs, each sampled from the 20 likeliest tokens with `seed`. Every rank calls it."""
    model.eval()
    answers: list[tuple[str, str]] = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        seed_everything(seed, len(answers))
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, top_k=20, temperature=0.8)
        answers.append((prompt, tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    return answers
