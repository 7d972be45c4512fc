"""Images in a batch: which tensors enter, what stands in for none, and the positions of their tokens.

A batch without images has no feature to merge, and stock transformers then skips the vision tower: ranks would run
different modules and, under FSDP2, wait for each other's collectives for ever. Here such a batch carries zero images,
for which the tower sees a blank one; none of its features is used, so the text is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import nn

from am_models._attention import uses_documents
from am_models._families import VISION_FAMILIES, VisionFamily
from am_models._rows import rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class VisionParts(NamedTuple):
    """Names of modules, as they stand in front of the names of their parameters."""

    tower: str
    projector: tuple[str, ...]
    language_model: str


def vision_parts(model: PreTrainedModel) -> VisionParts:
    """Where `model` keeps its vision tower, its projector (inside the tower in some families) and language model.

    Raises ValueError for a model that takes no images or whose family is not declared.
    """
    vision = rows_of(model).vision
    if vision is None:
        raise ValueError(
            f"{model.config.model_type} is no declared family with images; choose among {', '.join(VISION_FAMILIES)}, "
            "or give vision_family= to optimize"
        )
    prefix = model.base_model_prefix
    projector = tuple(f"{prefix}.{name}" for name in vision.projector)
    return VisionParts(f"{prefix}.{vision.tower}", projector, f"{prefix}.{vision.language_model}")


def num_position_axes(config: PreTrainedConfig, *, vision_family: VisionFamily | None = None) -> int:
    """Axes of the rotary embedding of a model with this configuration: 1, or those of `multi_axis_positions`.

    vision_family: the row given to `optimize`, for a family that is not in `VISION_FAMILIES`.
    """
    vision = vision_family or VISION_FAMILIES.get(config.model_type)
    return 1 if vision is None else vision.axes


def multi_axis_positions(
    config: PreTrainedConfig,
    input_ids: torch.Tensor,
    *,
    image_grid_thw: torch.Tensor | None = None,
    vision_family: VisionFamily | None = None,
) -> torch.Tensor:
    """The `position_ids [3, B, S]` int64 (frame, row, column) of a batch for qwen2_5_vl or qwen3_vl.

    Runs transformers' own `get_rope_index`; reads no weights, so that a collator can call it on any rank or worker.
    Rows start at 0: for documents packed into one row call it for each and concatenate.

    Args:
        config: the model's.
        input_ids: `[B, S]` with the placeholders of its images, padding last in a row.
        image_grid_thw: `[N, 3]`: frames, rows and columns of patches of every image, in the order in which they come
            in the batch.
        vision_family: the row given to `optimize`, for a family that is not in `VISION_FAMILIES`.

    Raises:
        ValueError: the family has one axis; placeholders and grids do not belong together.
    """
    if num_position_axes(config, vision_family=vision_family) == 1:
        raise ValueError(f"{config.model_type} has one position axis or is not declared: give position_ids [B, S]")
    is_image = input_ids == config.image_token_id
    grids = input_ids.new_empty(0, 3) if image_grid_thw is None else image_grid_thw
    tokens = (grids.prod(-1) // config.vision_config.spatial_merge_size**2).tolist()
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    runs = starts.flatten().cumsum(0)[is_image.flatten()].bincount()[1:].tolist()
    if runs != tokens:
        raise ValueError(
            f"image_grid_thw stands for images of {tokens} tokens, but input_ids hold runs of {runs} placeholders "
            f"(token {config.image_token_id}); give ids and grids of the same rows, text between any two images"
        )
    # `get_rope_index` is a method, but reads the configuration alone: an instance without any layer will do.
    shell: Any = object.__new__(_base_class_of(config))
    nn.Module.__init__(shell)
    shell.config = config
    positions, _ = shell.get_rope_index(input_ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids)
    return positions


def _base_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model without its head for this configuration."""
    from transformers import MODEL_MAPPING, PreTrainedModel

    cls = MODEL_MAPPING.get(type(config), None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise ValueError(
            f"transformers knows no model class for {type(config).__name__}; register one with AutoModel.register"
        )
    return cls


def image_keys(vision: VisionFamily | None) -> tuple[str, ...]:
    """The image tensors that a family declares."""
    return () if vision is None else (*vision.keys, *vision.optional_keys)


def check_image_keys(family: str, vision: VisionFamily, inputs: Mapping[str, torch.Tensor]) -> None:
    """All tensors that images need are there, or none; ValueError."""
    images = sorted(name for name in inputs if name in image_keys(vision))
    missing = [key for key in vision.keys if images and key not in images]
    if missing:
        raise ValueError(f"{family}: images also need {missing}, and the inputs have only {images}")
    position_ids = inputs.get("position_ids")
    if images and vision.axes > 1 and (position_ids is None or position_ids.dim() != 3):
        shape = None if position_ids is None else tuple(position_ids.shape)
        raise ValueError(
            f"{family} needs position_ids [{vision.axes}, B, S] for images, not {shape}; build them with "
            "am_models.multi_axis_positions(config, input_ids, image_grid_thw=...)"
        )


def image_inputs(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """What the model gets of checked `inputs`, all but the document ids: something stands in for absent images."""
    vision = rows_of(model).vision
    input_ids = inputs["input_ids"]
    position_ids, document_ids = inputs.get("position_ids"), inputs.get("document_ids")
    images = {name: inputs[name] for name in image_keys(vision) if name in inputs}
    if not images and vision is not None:
        images = {"pixel_values": torch.empty(0, device=input_ids.device)}
    if position_ids is not None and position_ids.dim() == 3 and document_ids is not None and not uses_documents(model):
        # Stock attention tells packed documents by the positions of the text, which it takes as one more axis in front.
        position_ids = torch.cat([_text_positions(document_ids)[None].to(position_ids.device), position_ids])
    return {"input_ids": input_ids, "position_ids": position_ids, **images}


def _text_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Positions [B, S] that restart at 0 with every document of `document_ids [B, S]`."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


class _TakesImages(Protocol):
    get_image_features: Callable[..., Any]


def install_blank_image(base_model: nn.Module, vision: VisionFamily) -> None:
    """Let `get_image_features` of this instance take a tensor without images: no feature, but a graph."""
    # Every base model with a `VisionFamily` has the method: the tables are tested, a caller's row is checked.
    stock = cast(type[_TakesImages], type(base_model)).get_image_features

    # `generate` reads the signature to find the tensors that belong to an image.
    @wraps(stock)
    def get_image_features(self: PreTrainedModel, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if pixel_values.numel():
            # Some families hand the language model's arguments to the tower too; its attention knows no documents.
            kwargs.pop("document_ids", None)
            return stock(self, pixel_values, *args, **kwargs)
        blank = {name: tensor.to(pixel_values.device) for name, tensor in vision.blank(self.config).items()}
        outputs = stock(self, **blank, return_dict=True)
        for field in vision.features:
            setattr(outputs, field, _without_rows(getattr(outputs, field)))
        return outputs

    vars(base_model)["get_image_features"] = MethodType(get_image_features, base_model)


def _without_rows(features: Any) -> Any:
    """Features of the shape they had, but for no token: a tensor, or one per image in lists or tuples."""
    if isinstance(features, torch.Tensor):
        return features[:0]
    return [_without_rows(part) for part in features]
