"""Put LoRA into a model, take it out again by merging."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from am_peft._config import check_config, select
from am_peft._layer import AppliedLora, LoraLinear
from am_peft._names import clean_name

if TYPE_CHECKING:
    from peft import LoraConfig


def apply_lora(
    model: nn.Module, config: LoraConfig, *, adapter_dtype: torch.dtype | None = None, strict: bool = True
) -> nn.Module:
    """Replace the targeted ``nn.Linear`` modules of ``model`` in place by :class:`LoraLinear`; return ``model``.

    Everything is frozen but the adapters and ``config.modules_to_save``, which are trained whole. Call it before the
    model is sharded; the meta device is fine (fill the values afterwards: :func:`initialise_lora`, or a loader that
    calls ``reset_parameters`` of the modules that hold missing parameters).

    - ``config``: PEFT's, by PEFT's rules: ``target_modules`` as suffixes, a regex or ``"all-linear"``,
      ``exclude_modules``, ``layers_to_transform``, ``layers_pattern``, ``rank_pattern``, ``alpha_pattern``,
      ``use_rslora``, ``lora_dropout``, ``modules_to_save``, ``init_lora_weights`` (``True``, ``False`` or
      ``"gaussian"``). List entries may contain ``*`` and then match full names as ``fnmatch`` does. It is not changed.
    - ``adapter_dtype``: dtype of the factors. Default as PEFT's: float32 for 16-bit weights, else the weight's dtype.
    - ``strict``: an entry or pattern that matches nothing is an error.

    Raises ``ValueError`` for an option that is not honoured (by name), an entry without a match (with the nearest
    names) or tied weights under ``modules_to_save``; ``TypeError`` for a target that is not an ``nn.Linear``.
    """
    check_config(config)
    if next(lora_layers(model), None) is not None:
        raise ValueError("the model has LoRA already; merge_lora(model) first, or build it anew")
    selection = select(model, config, strict=strict)
    modules = {clean_name(name): module for name, module in model.named_modules()}
    applied = AppliedLora(config, tuple(selection.targets), tuple(selection.modules_to_save))
    for name in selection.targets:
        # Subclasses compute something else in their forward, which the replacement would drop.
        if type(modules[name]) is not nn.Linear:
            kind = type(modules[name]).__name__
            raise TypeError(f"target {name!r} is a {kind}, not an nn.Linear; take it out with exclude_modules")
    _check_not_shared(model, modules, list(selection.targets))
    _check_not_tied(model, modules, selection.modules_to_save)

    model.requires_grad_(False)
    for name, (r, lora_alpha) in selection.targets.items():
        parent, _, last = name.rpartition(".")
        base = modules[name]
        assert isinstance(base, nn.Linear)
        layer = LoraLinear(
            base,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            init_lora_weights=config.init_lora_weights,
            adapter_dtype=adapter_dtype or _default_adapter_dtype(base.weight.dtype),
            applied=applied,
        )
        layer.reset_lora_parameters()
        setattr(modules[parent] if parent else model, last, layer)
    for name in selection.modules_to_save:
        modules[name].requires_grad_(True)
    return model


def initialise_lora(model: nn.Module, seed: int = 0) -> None:
    """Fill all LoRA factors with their starting values; base weights are left alone.

    The value of a factor depends on ``seed`` and its name alone: the same on every rank, for every sharding, and
    whatever else the model contains. Call it on all ranks once parameters exist (nothing is communicated).
    """
    for name, layer in lora_layers(model):
        for factor, module in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            digest = hashlib.sha256(f"{seed}:{name}.{factor}.weight".encode()).digest()
            module.reset_parameters(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True)))


def merge_lora(model: nn.Module) -> nn.Module:
    """Turn every :class:`LoraLinear` back into ``nn.Linear`` with weight ``W + scaling * B A``, in place.

    Summed in float32 and rounded to the weight's dtype. A sharded weight is merged shard by shard; then all its ranks
    must call. ``requires_grad`` stays as it is. Raises ``ValueError`` without LoRA, or where a weight is shared with
    another module, which the merge would change too.
    """
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA to merge; apply_lora or load_adapter comes first")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(clean_name(name))
    for name, layer in layers:
        names = owners[id(layer.weight)]
        if len(names) > 1:
            raise ValueError(f"cannot merge {name!r}: its weight is shared as {', '.join(names)}; untie it first")
        if type(layer) is not LoraLinear:
            raise ValueError(
                f"cannot merge {name!r}: it was wrapped as {type(layer).__name__}; shard its parent instead"
            )
    for _, layer in layers:
        layer.merge_()
    return model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """``(full name, layer)`` of every LoRA layer, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield clean_name(name), module


def applied_lora(model: nn.Module) -> AppliedLora:
    """The record of the call that put LoRA into ``model``; ``ValueError`` if there was none."""
    for _, layer in lora_layers(model):
        return layer.applied
    raise ValueError("the model has no LoRA; call apply_lora(model, config) or load_adapter(model, folder) first")


def _default_adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _check_not_shared(model: nn.Module, modules: dict[str, nn.Module], targets: list[str]) -> None:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(clean_name(name))
    for target in targets:
        if len(names[id(modules[target])]) > 1:
            places = ", ".join(names[id(modules[target])])
            raise ValueError(f"target {target!r} is one module used as {places}; exclude it with exclude_modules")


def _check_not_tied(model: nn.Module, modules: dict[str, nn.Module], saved: list[str]) -> None:
    """Training a copy of a tied weight would untie it in the file, training both would hide it: refuse."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(clean_name(name))
    for name in saved:
        for parameter in modules[name].parameters():
            outside = [owner for owner in owners[id(parameter)] if not owner.startswith(f"{name}.")]
            if outside:
                raise ValueError(
                    f"modules_to_save={name!r} shares a weight with {', '.join(outside)}; untie them "
                    "(tie_word_embeddings=False, with a copied weight) or take it out of modules_to_save"
                )
