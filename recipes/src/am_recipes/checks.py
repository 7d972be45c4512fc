"""What a recipe refuses before it trains on: each ``require_...`` raises with the value, the constraint and the fix."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

import am_models
from am_recipes.configs import DEFAULT_LOSS, Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_run_dir(run_dir: Path) -> None:
    """Find out before anything is loaded, not at the first save, that a run cannot write where it should.

    Every rank calls this. Raises NotADirectoryError or PermissionError; creates nothing.
    """
    for folder in (run_dir / "checkpoints", run_dir / "export"):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(
                f"run_dir={run_dir} needs the folder {folder}, but {existing} is a file; remove it or choose another "
                "run_dir"
            )
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(
                f"run_dir={run_dir} needs the folder {folder}, and {existing} cannot be written by this user or is "
                "read-only; choose another run_dir"
            )


def require_loss_function(kernels: am_models.OptimizeReport, target: Target, key: str = "loss_fn") -> None:
    """Refuse a loss function or options of it for a family whose loss am-models computes from materialised logits."""
    if kernels.loss.startswith("logits") and (target.path != DEFAULT_LOSS or target.arguments):
        given = ", ".join([target.path, *(f"{name}={value!r}" for name, value in target.arguments.items())])
        raise ValueError(
            f"{key} ({given}) would not be called: family {kernels.family} has its loss computed from {kernels.loss}; "
            "leave it out to train with cross-entropy, or choose a model whose head am-models declares"
        )


def require_positions(model: Any, datasets: Iterable[Any]) -> None:
    """Refuse rows longer than a model's table of positions: ValueError. Rotary positions have no such end."""
    config = model.config.get_text_config()
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    settings = config.to_dict()
    positions = settings.get(name)
    longest = max(int(data.lengths.max()) for data in datasets)
    if "rope_parameters" not in settings and positions is not None and longest > positions:
        raise ValueError(
            f"the data has rows of {longest} tokens, but the {model.config.model_type} model has a table of "
            f"{name}={positions} positions; lower the dataset's max_length or sequence_length"
        )


def require_finite(step: int, **values: float) -> None:
    """Refuse to go on from a loss or gradient norm of ``step`` that is NaN or infinite: FloatingPointError.

    Call it before such a step changes the weights and before they are saved. Equal on every rank, so all of them raise.
    """
    broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(
            f"step {step}: {', '.join(broken)}; finite numbers are needed to go on. Nothing was saved, earlier "
            "checkpoints are as they were. Lower optimizer.lr, set lr_scheduler.warmup_steps or "
            "clip_grad_norm.max_norm, look for broken rows, and train in another run_dir"
        )


def require_embeddings(
    model: Any, tokenizer: PreTrainedTokenizerBase, datasets: Iterable[Any], name: str = "the model"
) -> None:
    """Refuse data with token ids that ``model`` has no embedding for: ValueError, where a GPU would abort.

    A tokenizer may know more tokens than the model, as long as the data does not use them; only then is it read.
    """
    rows = model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) < rows:
        return
    largest = max(int(data[index]["input_ids"].max()) for data in datasets for index in range(len(data)))
    if largest >= rows:
        raise ValueError(
            f"the data has token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but {name} embeds "
            f"ids 0..{rows - 1} (vocab_size={rows}); use {name}'s own tokenizer, or a model with a larger vocab_size"
        )


def require_same_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, key: str) -> None:
    """Refuse a model, the one at ``key`` of the config, that reads other tokens in the same ids: ValueError.

    Sizes say nothing: vocabularies are padded. Compared are the tokens of all ids and how text is split into them.
    """
    vocabulary, other = ours.get_vocab(), theirs.get_vocab()
    names = {index: token for token, index in other.items()}
    wrong = sorted(index for token, index in vocabulary.items() if names.get(index) != token)
    if wrong:
        token = ours.convert_ids_to_tokens(wrong[0])
        raise ValueError(
            f"the tokenizer of {key} is another one: {len(wrong)} of {len(vocabulary)} ids differ, the first is "
            f"{wrong[0]}, {token!r} here and {names.get(wrong[0])!r} there; its distributions would be over other "
            "tokens. Choose models of one tokenizer"
        )
    if not (ours.is_fast and theirs.is_fast):
        raise ValueError(
            f"how the tokenizers of this run and of {key} split text can be compared only where both are fast ones "
            "(tokenizer.json); convert them, or choose other models"
        )
    for rule in ("normalizer", "pre_tokenizer", "model"):
        if _tokenizer_rule(ours, rule) != _tokenizer_rule(theirs, rule):
            raise ValueError(
                f"the tokenizer of {key} has the same tokens but another {rule}: it splits text differently, so that "
                "model never saw text split like this. Choose models of one tokenizer"
            )


def _tokenizer_rule(tokenizer: PreTrainedTokenizerBase, rule: str) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())[rule]


def require_memory(model: torch.nn.Module, device: torch.device, key: str) -> None:
    """Refuse a model, the one at ``key`` of the config, whose weights on this rank exceed the free memory: ValueError.

    Call it between layout and weights. Every rank calls it; processes of one machine share its main memory.
    """
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in model.parameters()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in local)
    if device.type == "cuda":
        free, sharing = torch.cuda.mem_get_info(device)[0], 1
    else:
        free, sharing = _available_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed * sharing > free:
        raise ValueError(
            f"{key} needs {needed / 2**30:.1f} GiB on each of {sharing} processes of this machine, and "
            f"{free / 2**30:.1f} GiB are free; shard it over more ranks, give it dtype bfloat16, or take a smaller one"
        )


def _available_memory() -> int:
    """Bytes that processes can still take; all of the machine's where the system does not say."""
    linux = Path("/proc/meminfo")
    for line in linux.read_text().splitlines() if linux.exists() else []:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
