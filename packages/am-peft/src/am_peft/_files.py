"""Adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from am_peft._apply import applied_lora, apply_lora
from am_peft._config import config_json, read_config
from am_peft._layer import Wrapper, copy_full, full_tensor
from am_peft._names import FACTORS, clean_name, named_parameters

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def _adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in PEFT's file, parameter or persistent buffer) of the factors and of `modules_to_save`."""
    saved = tuple(f"{name}." for name in applied_lora(model).modules_to_save)
    for name, parameter in named_parameters(model):
        if name.endswith(FACTORS) or name.startswith(saved):
            yield _PREFIX + name, parameter
    persistent = {clean_name(name) for name in model.state_dict()} if saved else set()
    for name, buffer in model.named_buffers():
        if clean_name(name).startswith(saved) and clean_name(name) in persistent:
            yield _PREFIX + clean_name(name), buffer


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter as full tensors, under the names of PEFT's files (`base_model.model.<fqn>.lora_A.weight`).

    Holds the LoRA factors and all of `modules_to_save`. Sharded parameters are gathered one after another, so all
    ranks of their meshes must call; every rank gets the result. The tensors are detached; plain ones share memory with
    the model. Raises `ValueError` if the model has no LoRA.
    """
    return {name: full_tensor(tensor) for name, tensor in _adapter_tensors(model)}


def adapter_files(model: nn.Module, *, base_model_name_or_path: str | None = None) -> dict[str, str]:
    """`{"adapter_config.json": text}`: what must stand beside the weights for PEFT to load them. Needs one rank."""
    applied = applied_lora(model)
    text = config_json(
        applied.config, model, list(applied.target_modules), list(applied.modules_to_save), base_model_name_or_path
    )
    return {CONFIG_FILE: text}


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, base_model_name_or_path: str | None = None
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    All ranks call; rank 0 writes (`folder` is created; files of an earlier adapter are replaced).
    `base_model_name_or_path` is written into the configuration, where PEFT and servers look for the base model.
    """
    from safetensors.torch import save

    tensors = adapter_state_dict(model)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    contents = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    # `save_file` would make a file that its owner alone can read.
    (path / WEIGHTS_FILE).write_bytes(save(contents, metadata={"format": "pt"}))
    for name, text in adapter_files(model, base_model_name_or_path=base_model_name_or_path).items():
        (path / name).write_text(text)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter_dtype: torch.dtype | None = None,
    wrappers: Mapping[type[nn.Module], type[Wrapper]] | None = None,
) -> nn.Module:
    """Apply the configuration in `folder` to `model`, in place, and load its weights; return `model`.

    `model` is a plain model whose parameters exist. Every tensor of the file must have its place and every adapter
    tensor its value.

    Args:
        folder: one of `save_adapter` or of PEFT's `save_pretrained`.
        adapter_dtype: as in `apply_lora`, and so are `wrappers`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: another method than LoRA, options that are not honoured, or names and shapes that do not fit.
    """
    from safetensors.torch import load_file

    path = pathlib.Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} does not exist; a PEFT adapter folder holds {name}")
    config = read_config((path / CONFIG_FILE).read_text(), str(path / CONFIG_FILE))
    # PEFT writes entries that matched nothing; the weights decide whether the selection is the right one.
    apply_lora(model, config, adapter_dtype=adapter_dtype, strict=False, wrappers=wrappers)
    _load(model, load_file(path / WEIGHTS_FILE))
    return model


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = dict(_adapter_tensors(model))
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"the adapter's tensors do not fit the model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}; load it into the base model it was trained on"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)} in the adapter and {tuple(tensor.shape)} in the model; "
                "load it into the base model it was trained on"
            )
    for name, tensor in own.items():
        copy_full(tensor, tensors[name])


class Adapter:
    """The adapter of a model as a thing with a state: what a checkpoint stores instead of the whole model."""

    def __init__(self, model: nn.Module) -> None:
        """`model` has LoRA (`ValueError` if not); it may be sharded before or after."""
        applied_lora(model)
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """`adapter_state_dict` of the model: full tensors, collective where parameters are sharded."""
        return adapter_state_dict(self.model)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Write full tensors into the model, each rank its shards; every rank passes all. Strict: `ValueError`."""
        _load(self.model, state_dict)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`(name in PEFT's files, parameter)` of everything the adapter trains, as the model holds it."""
        for name, tensor in _adapter_tensors(self.model):
            if isinstance(tensor, nn.Parameter):
                yield name, tensor
