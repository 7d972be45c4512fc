"""What is known of each family of processors: how an image becomes tokens and tensors, and how tensors are joined.

Nothing is found out by probing. A family that is not in the table is declared by its user as a `VisionProcessor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from am_data._messages import RowRefusedError

if TYPE_CHECKING:
    from PIL import Image
    from transformers import (
        Idefics3Processor,
        LlavaProcessor,
        ProcessorMixin,
        Qwen2_5_VLProcessor,
        Qwen2VLProcessor,
        Qwen3VLProcessor,
        SmolVLMProcessor,
    )

ImageTensors: TypeAlias = dict[str, torch.Tensor]
_TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


@dataclass(frozen=True)
class VisionProcessor:
    """A transformers processor with the facts about its family that a batch of images needs.

    `image_token`, `image_token_id`: the placeholder, which the chat template writes once per image and the processor
    repeats once a feature. `tensor_names`: what the processor returns beside the text. `joined` says how these tensors
    become those of a batch: "concatenate" along their first axis, whatever row an image is in (LLaVA `[N, C, H, W]`,
    Qwen-VL `[patches, dim]` with a grid `[N, 3]` of them); or "pad_images", where the processor gives `[1, N, ...]` and
    rows are filled up with zeros to `[B, N, ...]` (Idefics3, SmolVLM). `num_features`: the features that a vision tower
    makes of a row's tensors, which must be the number of its image tokens.
    """

    processor: ProcessorMixin
    image_token: str
    image_token_id: int
    tensor_names: tuple[str, ...]
    joined: Literal["concatenate", "pad_images"]
    num_features: Callable[[Mapping[str, torch.Tensor]], int]

    def process(self, images: Sequence[Image.Image]) -> tuple[NDArray[np.int64], ImageTensors]:
        """Tokens int64 `[S]` and tensors of the images of one row, from the processor's own output.

        Raises ValueError where the processor refuses an image, returns other tensors than declared, or writes
        another number of image tokens than the tensors give features.
        """
        try:
            output = self.processor(
                text=[self.image_token * len(images)],
                images=list(images),
                add_special_tokens=False,
                return_tensors="pt",
            )
        except ValueError as error:
            sizes = [image.size for image in images]
            raise RowRefusedError("the processor refuses an image", f"of {sizes} pixels: {error}") from error
        returned = set(output) - _TEXT_KEYS
        if returned != set(self.tensor_names):
            raise ValueError(
                f"{type(self.processor).__name__} returns {sorted(returned)} for images, its adapter declares "
                f"{sorted(self.tensor_names)}; configure the processor so, or pass a VisionProcessor that declares them"
            )
        ids = output["input_ids"][0].numpy()
        tensors = {name: output[name] for name in self.tensor_names}
        if self.joined == "pad_images":
            tensors = {name: tensor[0] for name, tensor in tensors.items()}
        num_tokens, num_features = int((ids == self.image_token_id).sum()), self.num_features(tensors)
        if num_tokens != num_features:
            raise RowRefusedError(
                "image tokens and image features differ",
                f"{len(images)} images are {num_tokens} tokens {self.image_token!r} and {num_features} features; "
                "do the processor's image_seq_len or patch_size belong to its image size?",
            )
        return ids, tensors

    def join(self, examples: Sequence[Mapping[str, Any]]) -> ImageTensors:
        """The image tensors of the rows of a batch, without any key where no row has an image."""
        if not any(self.tensor_names[0] in example for example in examples):
            return {}
        joined = {}
        for name in self.tensor_names:
            rows = {place: example[name] for place, example in enumerate(examples) if name in example}
            tensors = list(rows.values())
            if self.joined == "concatenate":
                joined[name] = torch.cat(tensors)
                continue
            largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors))]
            joined[name] = tensors[0].new_zeros(len(examples), *largest)
            for place, tensor in rows.items():
                joined[name][place][tuple(slice(size) for size in tensor.shape)] = tensor
        return joined


def vision_processor(processor: ProcessorMixin) -> VisionProcessor:
    """The declared adapter of a transformers processor, found by its class or a base of it.

    ValueError with the known classes where there is none: declare a `VisionProcessor` then.
    """
    for base in type(processor).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__](processor)
    raise ValueError(
        f"{type(processor).__name__} has no declared adapter; choose one of {', '.join(_FAMILIES)}, "
        "or pass a VisionProcessor that declares this class's tokens and tensors"
    )


def _idefics3(processor: Idefics3Processor | SmolVLMProcessor) -> VisionProcessor:
    settings = processor.image_processor
    if not settings.do_normalize or 0 in np.atleast_1d(settings.image_mean):
        raise ValueError(
            f"do_normalize={settings.do_normalize} with image_mean={settings.image_mean} makes a black crop all zeros, "
            "which the model takes for padding; choose do_normalize=True and an image_mean above 0"
        )

    def num_features(tensors: Mapping[str, torch.Tensor]) -> int:
        return len(tensors["pixel_values"]) * int(processor.image_seq_len)

    names = ("pixel_values", "pixel_attention_mask")
    return VisionProcessor(
        processor, processor.image_token, processor.image_token_id, names, "pad_images", num_features
    )


def _llava(processor: LlavaProcessor) -> VisionProcessor:
    def num_features(tensors: Mapping[str, torch.Tensor]) -> int:
        images, _, height, width = tensors["pixel_values"].shape
        patches = (height // processor.patch_size) * (width // processor.patch_size)
        # "default" leaves out the tower's class token, "full" keeps it.
        dropped = processor.vision_feature_select_strategy == "default"
        return int(images * (patches + processor.num_additional_image_tokens - dropped))

    return VisionProcessor(
        processor, processor.image_token, processor.image_token_id, ("pixel_values",), "concatenate", num_features
    )


def _qwen_vl(processor: Qwen2VLProcessor | Qwen2_5_VLProcessor | Qwen3VLProcessor) -> VisionProcessor:
    def num_features(tensors: Mapping[str, torch.Tensor]) -> int:
        patches = tensors["image_grid_thw"].prod(-1).sum()
        return int(patches) // int(processor.image_processor.merge_size) ** 2

    names = ("pixel_values", "image_grid_thw")
    return VisionProcessor(
        processor, processor.image_token, processor.image_token_id, names, "concatenate", num_features
    )


# Any: each takes a processor of the class that it stands under.
_FAMILIES: dict[str, Callable[[Any], VisionProcessor]] = {
    "Idefics3Processor": _idefics3,
    "SmolVLMProcessor": _idefics3,
    "LlavaProcessor": _llava,
    "Qwen2VLProcessor": _qwen_vl,
    "Qwen2_5_VLProcessor": _qwen_vl,
    "Qwen3VLProcessor": _qwen_vl,
}
