"""What a recipe needs around pictures: the processor, what trains, and answers about held-out rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoProcessor

import am_data
import am_models
import am_peft

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin


def load_processor(name_or_path: str | Path | None, chat_template: str | None) -> ProcessorMixin:
    """The processor of a folder or Hub id; ``chat_template`` (Jinja) replaces its own. Raises ValueError."""
    try:
        # Code that comes with a processor is never run; left to itself, transformers would ask on the terminal.
        processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(name_or_path)!r} has no processor that can be loaded ({str(error).splitlines()[0]}); set "
            "processor.name_or_path to a folder with processor_config.json, or to a Hub id"
        ) from error
    if chat_template is not None:
        processor.chat_template = chat_template
    return processor


def require_processor(config: PretrainedConfig, adapter: am_data.VisionProcessor) -> None:
    """Refuse a processor that marks pictures with another token than the model looks for: ValueError."""
    wanted = config.to_dict().get("image_token_id")
    if adapter.image_token_id != wanted:
        raise ValueError(
            f"{type(adapter.processor).__name__} marks pictures with token {adapter.image_token_id} "
            f"({adapter.image_token!r}), but the {config.model_type} model looks for {wanted}; set "
            "processor.name_or_path to the model's own processor"
        )


@torch.no_grad()
def require_features(
    model: Any, loss_fn: Callable[..., torch.Tensor], dataset: am_data.VisionChatDataset, device: torch.device
) -> None:
    """Run ``model`` on the first row with pictures: ValueError where it cannot take them as the processor made them.

    How many features a tower makes is known to the tower alone. Every rank calls it, and runs the same row.
    """
    adapter = dataset.processor_adapter
    examples = (dataset[index] for index in range(len(dataset)))
    row = next((example for example in examples if adapter.tensor_names[0] in example), None)
    if row is None:
        return
    batch = am_data.collate([row], layout="padded", join=adapter.join, position_ids=position_ids(model.config))
    model.eval()
    try:
        am_models.forward_with_loss(model, loss_fn, **{name: tensor.to(device) for name, tensor in batch.items()})
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {list(row[name].shape)}" for name in adapter.tensor_names)
        num_tokens = int((row["input_ids"] == adapter.image_token_id).sum())
        raise ValueError(
            f"{type(adapter.processor).__name__} writes the pictures of a row as {num_tokens} tokens with {shapes}, "
            f"which do not fit the {model.config.model_type} model: {error}; set processor.name_or_path to the model's "
            "own processor"
        ) from error


def position_ids(config: PretrainedConfig) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None:
    """What builds the position ids of a batch for a model whose rotary embedding has several axes; None for one."""
    if am_models.num_position_axes(config) == 1:
        return None

    def build(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return am_models.multi_axis_positions(config, batch["input_ids"], image_grid_thw=batch.get("image_grid_thw"))

    return build


def freeze(model: Any, rules: Sequence[Mapping[str, Any]] | None, *, has_adapter: bool) -> None:
    """Apply the rules, in order; None freezes the vision tower and trains the projector.

    With an adapter, only what PEFT's files hold may train: its factors and ``modules_to_save``. Raises ValueError where
    something else would, since no checkpoint or export would have it.
    """
    if rules is None:
        parts = am_models.vision_parts(model)
        rules = [] if has_adapter else [{"freeze": parts.tower}, *({"unfreeze": name} for name in parts.projector)]
    am_peft.freeze(model, rules)
    if has_adapter:
        kept = {id(parameter) for _, parameter in am_peft.Adapter(model).named_parameters()}
        lost = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in kept]
        if lost:
            raise ValueError(
                f"{len(lost)} parameters would train beside the adapter, such as {lost[0]}, and its files would not "
                "hold them; name their modules in peft.modules_to_save instead of unfreezing them"
            )


@dataclass(frozen=True)
class Answers:
    """What a model said about pictures.

    rows: pictures as PNG bytes, prompt, answer, expected answer. shuffled: answer and expected answer where another
    row's pictures of the same shape took their place: what the pictures do not explain.
    """

    rows: list[tuple[list[bytes], str, str, str]]
    shuffled: list[tuple[str, str]]

    def __str__(self) -> str:
        expected = {wanted for *_, wanted in self.rows}
        right = _share([(answer, wanted) for *_, answer, wanted in self.rows])
        return (
            f"exactly the expected answer: {right} of the held-out pictures, {_share(self.shuffled)} where the "
            f"pictures were shuffled; there are {len(expected)} expected answers, so chance is {1 / len(expected):.1%}"
        )


@torch.no_grad()
def answer_rows(
    model: Any, processor: ProcessorMixin, dataset: am_data.VisionChatDataset, num_rows: int, max_new_tokens: int
) -> Answers:
    """Answers to the first turn of the first ``num_rows`` rows, decoded greedily. Every rank calls it."""
    model.eval()
    tokenizer: Any = processor.tokenizer
    adapter = dataset.processor_adapter
    examples = [dataset[index] for index in range(min(num_rows, len(dataset)))]

    def decode(ids: Any) -> str:
        return str(
            tokenizer.decode([token for token in ids if token != adapter.image_token_id], skip_special_tokens=True)
        )

    rows: list[tuple[list[bytes], str, str, str]] = []
    shuffled: list[tuple[str, str]] = []
    for index, example in enumerate(examples):
        ids, supervised = example["input_ids"], example["labels"] != -100
        begin = int(supervised.argmax())
        end = begin + int((~supervised[begin:]).argmax() or len(ids) - begin)
        expected = decode(ids[begin:end])

        def ask(pictures: Mapping[str, Any], prompt: Any = ids[:begin]) -> str:
            input_ids = torch.from_numpy(prompt)[None].to(model.device)
            tensors = {name: value.to(model.device) for name, value in adapter.join([pictures]).items()}
            inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **tensors}
            if am_models.num_position_axes(model.config) > 1:
                # Where generate finds the pictures, whose positions have rows and columns.
                inputs["mm_token_type_ids"] = (input_ids == adapter.image_token_id).int()
            if isinstance(model, FSDPModule):
                # generate runs the vision tower on its own, outside the forward that gathers its first weights.
                model.unshard()
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            return decode(output[0, len(prompt) :].tolist())

        images = [_png(picture) for picture in dataset.pictures(index)]
        rows.append((images, decode(ids[:begin]).strip(), ask(example), expected))
        # Far away: neighbours in a table are often alike.
        other = examples[(index + len(examples) // 2) % len(examples)]
        if _shapes(other, adapter) == _shapes(example, adapter):
            shuffled.append((ask(other), expected))
    return Answers(rows, shuffled)


def _share(pairs: Sequence[tuple[str, str]]) -> str:
    right = sum(answer.strip() == wanted.strip() for answer, wanted in pairs)
    return f"{right} of {len(pairs)} ({right / max(len(pairs), 1):.1%})"


def _shapes(example: Mapping[str, Any], adapter: am_data.VisionProcessor) -> list[Any]:
    return [example[name].shape if name in example else None for name in adapter.tensor_names]


def _png(picture: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()
