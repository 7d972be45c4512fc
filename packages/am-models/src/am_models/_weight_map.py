"""Where the tensors of a family's published files lie inside the parameters of its modules.

transformers converts while it loads (per-expert files become fused parameters) and reverts while it saves. The records
here are read off its own revert: it runs on views of unallocated tensors, and every tensor it would write is located
in the parameter it came from by offset and strides. No list of families, no arithmetic and no memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _View(torch.Tensor):
    """A meta tensor whose `contiguous` keeps the strides, so that a chunk still tells where it lies."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def weight_map(model: PreTrainedModel, folder: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """Records of the tensors in the family's files that are not simply a parameter under its own name.

    Each is `{"file": str, "parameter": str, "slice": [[start, stop] or None, ...], "transpose": bool}`: the tensor
    `file` is `parameter[slice]` (one entry per dim of the parameter, None = whole), with its last two dims swapped if
    `transpose`, reshaped to drop the dims of size one that the slice leaves. A parameter without a record is stored
    whole under its own name; `[]` means that files and modules agree. Plain data, JSON-able, independent of the model.

    folder: the safetensors files to be read. transformers renames what older versions of it wrote (the tower of LLaVA's
    published files is `vision_tower.vision_model.`, since 5 it is written without the last part): the records then have
    the spelling found there. None: the names that `save_pretrained` would write.

    Runs on meta-device and sharded models alike (global shapes are used) and reads no weights.
    Raises ValueError, naming the family, where a file tensor is not a slice of one parameter (values are computed, or
    several parameters share a file tensor).
    """
    from transformers.core_model_loading import revert_weight_conversion

    family = model.config.model_type
    parameters = dict(model.named_parameters())
    views: dict[str, torch.Tensor] = {
        name: torch.empty(tensor.shape, device="meta").as_subclass(_View) for name, tensor in parameters.items()
    }
    owners = {view.untyped_storage()._cdata: name for name, view in views.items()}
    records = []
    for file_name, view in revert_weight_conversion(model, views).items():
        owner = owners.get(view.untyped_storage()._cdata)
        if owner is None:
            raise ValueError(
                f"{family}: transformers computes the file tensor {file_name!r} from the parameters instead of slicing "
                "one; weight_map describes slices and transposes only. Save this family with its own save_pretrained"
            )
        box, transpose = _locate(view, views[owner], family, file_name)
        if file_name != owner or transpose or any(box):
            records.append({"file": file_name, "parameter": owner, "slice": box, "transpose": transpose})
    return records if folder is None else _spelt_as_in(Path(folder), model, records)


def _spelt_as_in(folder: Path, model: PreTrainedModel, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, those of whole parameters under the names that transformers' own loading finds in `folder`."""
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    parameters = dict(model.named_parameters())
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
        for name in names:
            prefix = model.base_model_prefix
            parameter, converter = rename_source_key(name, renamings, converters, prefix, parameters)
            if converter is None and parameter in parameters:
                found[parameter] = name
    whole = [
        {"file": name, "parameter": parameter, "slice": [None] * parameters[parameter].dim(), "transpose": False}
        for parameter, name in sorted(found.items())
        if name != parameter
    ]
    return [*(record for record in records if record["parameter"] not in found), *whole]


def _locate(
    view: torch.Tensor, parameter: torch.Tensor, family: str, file_name: str
) -> tuple[list[list[int] | None], bool]:
    """The slice of `parameter` that `view` shows, and whether its last two dims are swapped."""
    dims = []
    for size, stride in zip(view.shape, view.stride()):
        candidates = [
            dim
            for dim, (whole, step) in enumerate(zip(parameter.shape, parameter.stride()))
            if step == stride and size <= whole and dim not in dims
        ]
        if not candidates:
            raise ValueError(
                f"{family}: the file tensor {file_name!r} of shape {tuple(view.shape)} rearranges its parameter of "
                f"shape {tuple(parameter.shape)}; weight_map describes slices and transposes only"
            )
        # Dims of size one share their neighbour's stride: prefer the dim of the same size, then the first.
        dims.append(next((dim for dim in candidates if parameter.shape[dim] == size), candidates[0]))
    if dims[-2:] != sorted(dims[-2:]) and dims[:-2] == sorted(dims[:-2]):
        transpose = True
    elif dims == sorted(dims):
        transpose = False
    else:
        raise ValueError(f"{family}: the file tensor {file_name!r} permutes the dims of its parameter to {dims}")
    sizes = dict(zip(dims, view.shape))
    box: list[list[int] | None] = []
    for dim, (whole, step) in enumerate(zip(parameter.shape, parameter.stride())):
        size = sizes.get(dim, 1)
        start = int(view.storage_offset()) // step % whole
        box.append(None if size == whole else [start, start + size])
    return box, transpose
