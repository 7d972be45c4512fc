"""What a recipe refuses before it trains on: each `require_...` raises with the value, the constraint and the fix.

An `ArgumentError` also has the key of the config that is responsible: `RunConfig.at` adds file and line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import am_ckpt
import am_data
import am_loss
import am_models
import am_peft
from am_recipes.configs import DEFAULT_LOSS, RunConfig
from am_recipes.settings import ArgumentError, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = am_data.Dataset | am_data.Stream
# Of the made-up hidden states that a loss is asked about.
_WIDTH = 4


def require_loss_function(kernels: am_models.OptimizeReport, target: Target, key: str = "loss_fn") -> None:
    """Refuse a loss function or options of it for a family whose loss am-models computes from materialised logits."""
    if kernels.loss.startswith("logits") and (target.path != DEFAULT_LOSS or target.arguments):
        given = ", ".join([target.path, *(f"{name}={value!r}" for name, value in target.arguments.items())])
        raise ArgumentError(
            key,
            f"{key} ({given}) would not be called: family {kernels.family} has its loss computed from {kernels.loss}; "
            "leave it out to train with cross-entropy, or choose a model whose head am-models declares",
        )


def require_loss(loss_fn: am_models.Loss[torch.Tensor], model: PreTrainedModel, device: torch.device) -> None:
    """Refuse a `loss_fn` that is no sum over target tokens, as `am_models.Loss` says; see `require_sum`."""
    num_tokens = num_embeddings(model)
    weight = torch.randn(num_tokens, _WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    names = am_models.further_targets(loss_fn)

    def ask(hidden: torch.Tensor, labels: torch.Tensor) -> object:
        further = {name: torch.ones(labels.shape, device=device) for name in names}
        return loss_fn(hidden, weight, labels, bias=None, softcap=None, scale=None, **further)

    require_sum(ask, num_tokens, device, "loss_fn")


def require_distillation_loss(
    kd_loss_fn: Callable[..., am_loss.DistillationLoss], num_tokens: int, device: torch.device
) -> None:
    """The same of a `kd_loss_fn`, which also gets a teacher's head; it refuses options that it cannot honour."""
    generator = torch.Generator().manual_seed(1)
    weight, teacher_weight = torch.randn(2, num_tokens, _WIDTH, generator=generator).to(device)
    head = {"bias": None, "softcap": None, "scale": None}
    teacher_head = {f"teacher_{name}": value for name, value in head.items()} | {"teacher_weight": teacher_weight}
    names = [name for name in am_models.further_targets(kd_loss_fn) if not name.startswith("teacher_")]

    def ask(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        others = {name: torch.ones(labels.shape, device=device) for name in names}
        theirs = hidden.detach().flip(-1)
        losses = kd_loss_fn(hidden, weight, labels, **head, **teacher_head, teacher_hidden=theirs, **others)
        if not isinstance(losses, am_loss.DistillationLoss):
            raise ArgumentError(
                "kd_loss_fn",
                f"kd_loss_fn gave a {type(losses).__name__}; give an am_loss.DistillationLoss of three sums: the loss "
                "that trains, the cross-entropy and the divergence in it",
            )
        return losses.loss

    require_sum(ask, num_tokens, device, "kd_loss_fn")


def require_sum(
    ask: Callable[[torch.Tensor, torch.Tensor], object], num_tokens: int, device: torch.device, key: str
) -> None:
    """Refuse a loss, the one at `key` of the config, that is no sum over target tokens: ValueError.

    `ask(hidden [B, S, 4], labels [B, S])` calls it with made-up rows over `num_tokens` token ids: it must give a scalar
    tensor with a graph, twice as much for twice the rows, and 0 for rows without targets.
    """
    hidden = torch.randn(1, 3, _WIDTH, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    labels = torch.tensor([[0, -100, num_tokens - 1]], device=device)

    def value(hidden: torch.Tensor, labels: torch.Tensor) -> float:
        loss = ask(hidden, labels)
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0 or not loss.requires_grad:
            shape = f" of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
            raise ArgumentError(
                key,
                f"{key} gave a {type(loss).__name__}{shape} or one without a graph; a loss is one scalar tensor with a "
                "graph, the sum over target tokens, also where there is no target (am_models.Loss)",
            )
        return loss.item()

    once, nothing = value(hidden, labels), value(hidden, torch.full_like(labels, -100))
    longer = value(hidden.repeat(1, 2, 1), labels.repeat(1, 2))
    more = value(hidden.repeat(2, 1, 1), labels.repeat(2, 1))
    if max(abs(twice - 2 * once) for twice in (longer, more)) > 1e-3 * abs(once) or nothing != 0:
        raise ArgumentError(
            key,
            f"{key} gave {once:.4g} for two targets in a row, {longer:.4g} and {more:.4g} for the same twice, in one "
            f"row and in two, and {nothing:.4g} for a row without targets; a loss is the SUM over target tokens, which "
            "the recipe divides once by the targets of the whole step: sum where it takes a mean "
            '(reduction="sum"), and leave out what is -100',
        )


def require_positions(model: PreTrainedModel, datasets: Iterable[Rows]) -> None:
    """Refuse rows longer than a model's table of positions: ValueError. Rotary positions have no such end."""
    config = model.config.get_text_config()
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    settings = config.to_dict()
    positions = settings.get(name)
    # How long the rows of a stream are, nobody knows before they come.
    longest = max((int(data.lengths.max()) for data in datasets if isinstance(data, am_data.Dataset)), default=0)
    if "rope_parameters" not in settings and positions is not None and longest > positions:
        raise ArgumentError(
            "dataset",
            f"the data has rows of {longest} tokens, but the {model.config.model_type} model has a table of "
            f"{name}={positions} positions; lower the dataset's max_length or sequence_length",
        )


def require_finite(step: int, **values: float) -> None:
    """Refuse to go on from a loss or gradient norm of `step` that is NaN or infinite: FloatingPointError.

    Call it before such a step changes the weights and before they are saved. Equal on every rank, so all of them raise.
    """
    broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(
            f"step {step}: {', '.join(broken)}; finite numbers are needed to go on. Nothing was saved, earlier "
            "checkpoints are as they were. Lower optimizer.lr, set lr_scheduler.warmup_steps or "
            "clip_grad_norm.max_norm, look for broken rows, and train in another run_dir"
        )


def embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    """The embeddings of `model`'s token ids `[V, D]`."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.weight


def num_embeddings(model: PreTrainedModel) -> int:
    """How many token ids `model` embeds."""
    return len(embedding_weight(model))


def require_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, datasets: Iterable[Rows], name: str = "the model"
) -> None:
    """Refuse data with token ids that `model` has no embedding for: ValueError, where a GPU would abort.

    A tokenizer may know more tokens than the model, as long as the data does not use them; only then is it read. A
    stream cannot be read beforehand.
    """
    rows, known = num_embeddings(model), max(tokenizer.get_vocab().values())
    if known < rows:
        return
    largest = -1
    for data in datasets:
        if not isinstance(data, am_data.Dataset):
            raise ArgumentError(
                "dataset",
                f"the tokenizer has ids up to {known}, {name} embeds 0..{rows - 1} (vocab_size={rows}), and which of "
                f"them a stream uses is not known before; use {name}'s own tokenizer, or a larger vocab_size",
            )
        examples = (example for index in range(len(data)) for example in _examples(data[index]))
        largest = max(largest, max(int(example["input_ids"].max()) for example in examples))
    if largest >= rows:
        raise ArgumentError(
            "dataset",
            f"the data has token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but {name} embeds "
            f"ids 0..{rows - 1} (vocab_size={rows}); use {name}'s own tokenizer, or a model with a larger vocab_size",
        )


def _examples(sample: am_data.Sample) -> list[am_data.Example]:
    return [sample] if isinstance(sample, Mapping) else list(sample)


def require_same_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, key: str) -> None:
    """Refuse a model, the one at `key` of the config, that reads other tokens in the same ids: ValueError.

    Sizes say nothing: vocabularies are padded. Compared are the tokens of all ids and how text is split into them.
    """
    vocabulary, other = ours.get_vocab(), theirs.get_vocab()
    names = {index: token for token, index in other.items()}
    wrong = sorted(index for token, index in vocabulary.items() if names.get(index) != token)
    if wrong:
        token = ours.convert_ids_to_tokens(wrong[0])
        raise ArgumentError(
            key,
            f"the tokenizer of {key} is another one: {len(wrong)} of {len(vocabulary)} ids differ, the first is "
            f"{wrong[0]}, {token!r} here and {names.get(wrong[0])!r} there; its distributions would be over other "
            "tokens. Choose models of one tokenizer",
        )
    if not (ours.is_fast and theirs.is_fast):
        raise ArgumentError(
            key,
            f"how the tokenizers of this run and of {key} split text can be compared only where both are fast ones "
            "(tokenizer.json); convert them, or choose other models",
        )
    for rule in ("normalizer", "pre_tokenizer", "model"):
        if _tokenizer_rule(ours, rule) != _tokenizer_rule(theirs, rule):
            raise ArgumentError(
                key,
                f"the tokenizer of {key} has the same tokens but another {rule}: it splits text differently, so that "
                "model never saw text split like this. Choose models of one tokenizer",
            )


def _tokenizer_rule(tokenizer: PreTrainedTokenizerBase, rule: str) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())[rule]


def require_memory(model: nn.Module, device: torch.device, key: str) -> None:
    """Refuse a model, the one at `key` of the config, whose weights on this rank exceed the free memory: ValueError.

    Call it between layout and weights. Every rank calls it; processes of one machine share its main memory.
    """
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in model.parameters()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in local)
    if device.type == "cuda":
        free, sharing = torch.cuda.mem_get_info(device)[0], 1
    else:
        free, sharing = _available_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed * sharing > free:
        raise ArgumentError(
            key,
            f"{key} needs {needed / 2**30:.1f} GiB on each of {sharing} processes of this machine, and "
            f"{free / 2**30:.1f} GiB are free; shard it over more ranks, give it dtype bfloat16, or take a smaller one",
        )


def require_adapter_alone(model: nn.Module) -> None:
    """Refuse to train what no checkpoint or export of an adapter would hold: ValueError."""
    kept = {id(parameter) for _, parameter in am_peft.Adapter(model).named_parameters()}
    lost = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in kept]
    if lost:
        raise ArgumentError(
            "freeze",
            f"{len(lost)} parameters would train beside the adapter, such as {lost[0]}, and its files would not hold "
            "them; name their modules in peft.modules_to_save instead of unfreezing them",
        )


def require_export(config: RunConfig, model: nn.Module) -> None:
    """Refuse what `build.export` would refuse when the run is over: ConfigError, FileExistsError. It writes nothing."""
    whole = config.export.enabled and (config.peft is None or config.export.merge_adapter)
    if whole and config.peft is not None:
        reason = am_peft.cannot_merge(model)
        if reason is not None:
            raise config.error("export.merge_adapter", f"is true, and at the end of the run am_peft {reason}")
    if whole and (config.run_dir / "export").exists():
        am_ckpt.require_replaceable(config.run_dir / "export")


def require_trained(model: nn.Module, parts: Iterable[str], folder: Path) -> None:
    """Refuse to leave `parts` of the model as they are, whose weights in `folder` are random: ValueError."""
    for part in parts:
        if not any(parameter.requires_grad for parameter in model.get_submodule(part).parameters()):
            raise ArgumentError(
                "freeze",
                f"{folder} gives {part} random weights, and nothing of it would train; without an adapter say which "
                "parts do with freeze, for instance `freeze: []` for all, with one name it in peft.modules_to_save",
            )


def _available_memory() -> int:
    """Bytes that processes can still take; all of the machine's where the system does not say."""
    linux = Path("/proc/meminfo")
    for line in linux.read_text().splitlines() if linux.exists() else []:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
