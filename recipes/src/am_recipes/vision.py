"""What a recipe needs around images: that processor and model fit, what trains, and answers about held-out rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch.distributed.fsdp import FSDPModule

import am_data
import am_loss
import am_models
from am_recipes.configs import VlmConfig
from am_recipes.evaluate import generate
from am_recipes.settings import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin


@runtime_checkable
class VisionRows(am_data.Dataset, Protocol):
    """A dataset of rows with images: what `am_data.VisionChatDataset` is, and what one of a user's has to be."""

    @property
    def processor_adapter(self) -> am_data.VisionProcessor:
        """Joins the tensors of several rows; its tokens stand for images."""

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """One example, with the processor's tensors where the row has images."""

    def images(self, index: int, /) -> Sequence[Image.Image]:
        """The images of row `index`, as the processor gets them."""


def require_images(config: PretrainedConfig, dataset: object) -> VisionRows:
    """The dataset of a run, known to have images; ValueError where it is another one.

    Refused is also a processor that marks images with another token than the model looks for.
    """
    if not isinstance(dataset, VisionRows):
        raise ArgumentError(
            "dataset",
            f"the dataset is a {type(dataset).__name__}, no am_data.Dataset with processor_adapter and images; "
            "recipe vlm needs both (am_recipes.vision.VisionRows): add them, or train text alone with recipe sft",
        )
    adapter = dataset.processor_adapter
    wanted = config.to_dict().get("image_token_id")
    if adapter.image_token_id != wanted:
        raise ArgumentError(
            "processor",
            f"{type(adapter.processor).__name__} marks images with token {adapter.image_token_id} "
            f"({adapter.image_token!r}), but the {config.model_type} model looks for {wanted}; set "
            "processor.name_or_path to the model's own processor",
        )
    return dataset


@torch.no_grad()
def require_features(config: VlmConfig, model: PreTrainedModel, dataset: VisionRows, device: torch.device) -> None:
    """Run `model` on the first row with images: ValueError where it cannot take them as the processor made them.

    How many features a tower makes is known to the tower alone. Every rank calls it, and runs the same row.
    """
    adapter = dataset.processor_adapter
    examples = (dataset[index] for index in range(len(dataset)))
    row = next((example for example in examples if adapter.tensor_names[0] in example), None)
    if row is None or config.dry_run:
        return
    batch = am_data.collate([row], layout="padded", join=adapter.join, position_ids=position_ids(config, model.config))
    inputs, targets = am_models.split_batch(model, batch, device=device)
    model.eval()
    try:
        labels = {"shift_labels": targets["shift_labels"]}
        am_models.forward_with_loss(model, am_loss.linear_cross_entropy, inputs, labels)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {list(row[name].shape)}" for name in adapter.tensor_names)
        num_tokens = int((row["input_ids"] == adapter.image_token_id).sum())
        raise ArgumentError(
            "processor",
            f"{type(adapter.processor).__name__} writes the images of a row as {num_tokens} tokens with {shapes}, "
            f"which do not fit the {model.config.model_type} model: {error}; set processor.name_or_path to the model's "
            "own processor",
        ) from error


def position_ids(
    config: VlmConfig, hf_config: PretrainedConfig
) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None:
    """What builds the position ids of a batch for a model whose rotary embedding has several axes; None for one."""
    family = config.model.families().get("vision_family")
    if am_models.num_position_axes(hf_config, vision_family=family) == 1:
        return None

    def build(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        grid = batch.get("image_grid_thw")
        return am_models.multi_axis_positions(hf_config, batch["input_ids"], image_grid_thw=grid, vision_family=family)

    return build


def freeze_rules(config: VlmConfig, model: PreTrainedModel) -> list[dict[str, str]]:
    """`freeze` of the config; left out, it freezes the vision tower and trains the rest.

    With an adapter, left out, it changes nothing: what trains is what PEFT's files hold, its factors (in the tower too,
    where its targets match there) and `modules_to_save`. Raises ValueError for a family without declared parts.
    """
    rules = config.freeze_rules()
    if rules is not None or config.peft is not None:
        return rules or []
    parts = am_models.vision_parts(model)
    return [{"freeze": parts.tower}, *({"unfreeze": name} for name in parts.projector)]


@dataclass(frozen=True)
class Answers:
    """What a model said about images.

    rows: images as PNG bytes, prompt, answer, expected answer. shuffled: answer and expected answer where images
    of the same shape with another answer took their place: what the images do not explain.
    """

    rows: list[tuple[list[bytes], str, str, str]]
    shuffled: list[tuple[str, str]]

    def __str__(self) -> str:
        num_expected = len({wanted for *_, wanted in self.rows})
        right = _share([(answer, wanted) for *_, answer, wanted in self.rows])
        return (
            f"exactly the expected answer: {right} of the held-out images, {_share(self.shuffled)} with images of "
            f"another answer; there are {num_expected} expected answers, so chance is {1 / max(num_expected, 1):.1%}"
        )


@dataclass(frozen=True)
class _Question:
    """A row of a dataset up to its first answer, with that answer."""

    index: int
    example: Mapping[str, Any]
    prompt: NDArray[np.int64]
    expected: NDArray[np.int64]

    def shapes(self, names: Sequence[str]) -> list[Any]:
        return [self.example[name].shape for name in names]


def answer_rows(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: VisionRows,
    num_rows: int,
    max_new_tokens: int,
) -> Answers:
    """First answers in the first `num_rows` rows, decoded greedily; rows without images before it are left out.

    Every rank calls it.
    """
    model.eval()
    tokenizer: Any = processor.tokenizer
    adapter = dataset.processor_adapter

    def decode(ids: Iterable[int]) -> str:
        text = tokenizer.decode([token for token in ids if token != adapter.image_token_id], skip_special_tokens=True)
        return str(text).strip()

    def ask(question: _Question, images: Mapping[str, Any]) -> str:
        input_ids = torch.from_numpy(question.prompt)[None].to(model.device)
        tensors = {name: value.to(model.device) for name, value in adapter.join([images]).items()}
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **tensors}
        if am_models.num_position_axes(model.config) > 1:
            # Where generate finds the images, whose positions have rows and columns.
            inputs["mm_token_type_ids"] = (input_ids == adapter.image_token_id).int()
        if isinstance(model, FSDPModule):
            # generate runs the vision tower on its own, outside the forward that gathers its first weights.
            model.unshard()
        return decode(generate(model, inputs, max_new_tokens=max_new_tokens, do_sample=False).tolist())

    found = [_question(dataset, index) for index in range(min(num_rows, len(dataset)))]
    questions = [question for question in found if question is not None]
    rows: list[tuple[list[bytes], str, str, str]] = []
    shuffled: list[tuple[str, str]] = []
    for place, question in enumerate(questions):
        expected = decode(question.expected)
        images = [_png(image) for image in dataset.images(question.index)]
        rows.append((images, decode(question.prompt), ask(question, question.example), expected))
        # From far away: neighbours in a table are often alike.
        half = (place + len(questions) // 2) % len(questions)
        for other in (*questions[half:], *questions[:half]):
            names = adapter.tensor_names
            if decode(other.expected) != expected and other.shapes(names) == question.shapes(names):
                shuffled.append((ask(question, other.example), expected))
                break
    return Answers(rows, shuffled)


def _question(dataset: VisionRows, index: int) -> _Question | None:
    example = dataset[index]
    ids, supervised = example["input_ids"], example["labels"] != -100
    begin = int(supervised.argmax())
    end = begin + int((~supervised[begin:]).argmax() or len(ids) - begin)
    is_image = ids == dataset.processor_adapter.image_token_id
    if not is_image.any() or is_image[begin:].any():
        return None
    return _Question(index, example, ids[:begin], ids[begin:end])


def _share(pairs: Sequence[tuple[str, str]]) -> str:
    right = sum(answer.strip() == wanted.strip() for answer, wanted in pairs)
    return f"{right} of {len(pairs)} ({right / max(len(pairs), 1):.1%})"


def _png(image: Any) -> bytes:
    stream = io.BytesIO()
    image.thumbnail((192, 192))
    image.save(stream, format="PNG")
    return stream.getvalue()
