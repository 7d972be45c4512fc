"""Put LoRA into a model, take it out again by merging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch
import xxhash
from torch import nn

from am_peft._config import check_config, select
from am_peft._layer import AppliedLora, LoraFactor, LoraLinear, LoraOptions, Wrapper
from am_peft._names import clean_name

if TYPE_CHECKING:
    from peft import LoraConfig


# Base class to adapter class. A user's rows come before these.
WRAPPERS: Mapping[type[nn.Module], type[Wrapper]] = MappingProxyType({nn.Linear: LoraLinear})


def apply_lora(
    model: nn.Module,
    config: LoraConfig,
    *,
    adapter_dtype: torch.dtype | None = None,
    strict: bool = True,
    wrappers: Mapping[type[nn.Module], type[Wrapper]] | None = None,
) -> nn.Module:
    """Replace the targeted linear layers of `model` in place by their adapter layers; return `model`.

    Everything is frozen but the adapters and `config.modules_to_save`, which are trained whole. Call it before the
    model is sharded; the meta device is fine (fill the values afterwards: `initialise_lora`, or a loader that calls
    `reset_parameters` of the modules that hold missing parameters).

    Args:
        config: PEFT's, by PEFT's rules: `target_modules` as suffixes, a regex or `"all-linear"`, `exclude_modules`,
            `layers_to_transform`, `layers_pattern`, `rank_pattern`, `alpha_pattern`, `use_rslora`, `lora_dropout`,
            `modules_to_save`, `init_lora_weights` (`True`, `False` or `"gaussian"`). List entries may contain `*` and
            then match full names as `fnmatch` does. It is not changed.
        adapter_dtype: dtype of the factors. Default as PEFT's: float64 for float64 weights, else float32.
        strict: an entry or pattern that matches nothing is an error.
        wrappers: adapter class of a base class, before the row `nn.Linear: LoraLinear`. The exact class of a target is
            looked up: a subclass computes something else in its forward, which another row's layer would drop.

    Raises:
        ValueError: an option that is not honoured (by name), an entry without a match (with the nearest names), or tied
            weights under `modules_to_save`.
        TypeError: a target whose class has no row, or a row whose class makes no `Wrapper`.
    """
    check_config(config)
    if next(lora_layers(model), None) is not None:
        raise ValueError("the model has LoRA already; merge_lora(model) first, or build it anew")
    selection = select(model, config, strict=strict)
    modules = {clean_name(name): module for name, module in model.named_modules()}
    table = MappingProxyType({**WRAPPERS, **(wrappers or {})})
    applied = AppliedLora(config, tuple(selection.targets), tuple(selection.modules_to_save), table)
    for name in selection.targets:
        _check_has_row(name, type(modules[name]), table)
    _check_not_shared(model, modules, list(selection.targets))
    _check_not_tied(model, modules, selection.modules_to_save)
    layers = {
        name: _adapter_layer(modules[name], r, lora_alpha, adapter_dtype, applied)
        for name, (r, lora_alpha) in selection.targets.items()
    }

    # Only once all is known to be right: an error leaves the model as it was.
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(modules[parent] if parent else model, last, layer)
    for name in selection.modules_to_save:
        modules[name].requires_grad_(True)
    return model


def initialise_lora(model: nn.Module, seed: int = 0) -> None:
    """Fill all LoRA factors with their starting values; base weights are left alone.

    The value of a factor depends on `seed` and its name alone: the same on every rank, for every sharding, and whatever
    else the model contains. A generator that is seeded with the upper 63 bits of `xxh3_64("<seed>:<parameter name>")`
    draws it, so a loader that does the same (am-ckpt's) gives the same values. Call it on all ranks once parameters
    exist (nothing is communicated).
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraFactor):
            number = xxhash.xxh3_64_intdigest(f"{seed}:{clean_name(name)}.weight".encode()) >> 1
            module.reset_parameters(torch.Generator().manual_seed(number))


def merge_lora(model: nn.Module) -> nn.Module:
    """Turn every adapter layer back into one of its base class with weight `W + scaling * B A`, in place.

    Summed in float32 and rounded to the weight's dtype. A sharded weight is merged shard by shard; then all its ranks
    must call. `requires_grad` stays as it is. Raises `ValueError` without LoRA and where `cannot_merge` says why; then
    nothing is merged.
    """
    reason = cannot_merge(model)
    if reason is not None:
        raise ValueError(reason)
    for layer in dict(lora_layers(model)).values():
        layer.merge_()
    return model


def cannot_merge(model: nn.Module) -> str | None:
    """Why `merge_lora` would refuse: layer, reason and fix; None where it would not. It needs no values: ask early.

    A layer that says it cannot be merged, and a weight that is shared with another module, which the merge would change
    too.
    """
    layers = dict(lora_layers(model))
    if not layers:
        return "the model has no LoRA to merge; apply_lora or load_adapter comes first"
    for names in _owners(model).values():
        held = [name for name in names if name.rpartition(".")[0] in layers]
        if held and len(names) > 1:
            return (
                f"cannot merge {held[0].rpartition('.')[0]!r}: its weight is shared as {', '.join(names)}; untie it "
                "first (tie_word_embeddings=False, with a copied weight), do not target it, or keep the adapter apart"
            )
    for name, layer in layers.items():
        if type(layer) not in layer.applied.wrappers.values():
            return f"cannot merge {name!r}: it was wrapped as {type(layer).__name__}; shard its parent instead"
        reason = layer.cannot_merge()
        if reason is not None:
            return f"cannot merge {name!r}: {reason}"
    return None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """`(full name, layer)` of every adapter layer, in module order."""
    for name, module in model.named_modules():
        # The factors first: a wrapper of torch.compile's answers for the methods of what it holds.
        if any(isinstance(child, LoraFactor) for child in module.children()) and isinstance(module, Wrapper):
            yield clean_name(name), module


def applied_lora(model: nn.Module) -> AppliedLora:
    """The record of the call that put LoRA into `model`; `ValueError` if there was none."""
    for _, layer in lora_layers(model):
        return layer.applied
    raise ValueError("the model has no LoRA; call apply_lora(model, config) or load_adapter(model, folder) first")


def _adapter_layer(
    base: nn.Module, r: int, lora_alpha: float, adapter_dtype: torch.dtype | None, applied: AppliedLora
) -> Wrapper:
    """The layer that takes the place of `base`, with starting values."""
    config = applied.config
    options = LoraOptions(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights="gaussian" if config.init_lora_weights == "gaussian" else bool(config.init_lora_weights),
        adapter_dtype=adapter_dtype,
        applied=applied,
    )
    wrapper = applied.wrappers[type(base)]
    # A row says which base class its wrapper takes; for a class of one's own that need not be an nn.Linear.
    layer = wrapper(cast(nn.Linear, base), options)
    kind = type(layer).__name__
    if not isinstance(layer, nn.Module) or not isinstance(layer, Wrapper):
        raise TypeError(
            f"wrappers[{type(base).__name__}] made a {kind}, which is no am_peft.Wrapper; see its docstring"
        )
    children = dict(layer.named_children())
    for name in ("lora_A", "lora_B"):
        factor = children.get(name)
        if not isinstance(factor, LoraFactor):
            raise TypeError(f"wrappers[{type(base).__name__}] made a {kind} without the LoraFactor {name!r}; add it")
        factor.reset_parameters()
    return layer


def _check_has_row(name: str, kind: type[nn.Module], table: Mapping[type[nn.Module], type[Wrapper]]) -> None:
    if kind not in table:
        known = ", ".join(base.__name__ for base in table)
        raise TypeError(
            f"target {name!r} is a {kind.__name__}, and wrappers has rows for {known} alone; take it out with "
            f"exclude_modules, or pass wrappers={{{kind.__name__}: ...}} with an am_peft.Wrapper for it"
        )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter, by its id."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(clean_name(name))
    return owners


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
    owners = _owners(model)
    for name in saved:
        for parameter in modules[name].parameters():
            outside = [owner for owner in owners[id(parameter)] if not owner.startswith(f"{name}.")]
            if outside:
                raise ValueError(
                    f"modules_to_save={name!r} shares a weight with {', '.join(outside)}; untie them "
                    "(tie_word_embeddings=False, with a copied weight) or take it out of modules_to_save"
                )
