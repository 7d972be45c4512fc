"""Parameter groups, an optimizer over them, and its learning-rate schedule. Usable without a recipe.

Weight decay follows common practice: weights of two or more dims decay (embeddings too, as in nanoGPT and the
transformers Trainer); norms and biases do not. Groups depend on names and rates only, never on the parallel layout, so
that an optimizer state of one layout loads into another.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from am_recipes.muon import MuonWithAdamW
from am_recipes.schedules import DecayType, Style, multiplier, require_rate

# One fused call costs 0.2 ms for 30 small tensors on one CPU core and 2 ms for 300; foreach 0.6 and 8, the loop 0.9
# and 10 (torch 2.15, AdamW). On CUDA, fused is one or two kernels.
FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)
# Those whose fused operation torch also knows on DTensors.
FUSED_ON_SHARDS = (torch.optim.AdamW, torch.optim.Adam)


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    overrides: Sequence[Mapping[str, Any]] = (),
    adamw: Mapping[str, Any] | None = None,
    adamw_modules: Iterable[nn.Module] | None = None,
    **hyperparameters: Any,
) -> torch.optim.Optimizer:
    """Build `optimizer` over the parameters of `model` that require a gradient. Every rank calls it.

    `optimizer=torch.optim.Muon` gives a `MuonWithAdamW`: Muon for hidden matrices, which are the parameters of two
    dims that are no bias and belong neither to an `nn.Embedding`, nor to the output layer, nor to `adamw_modules`;
    AdamW for these and for all else, the experts that transformers fuses into three dims included (`describe` tells).

    Args:
        model: its parameters may be DTensors. Call after sharding: the optimizer holds these very parameters.
        weight_decay: for the weights that decay (see `decays`); None leaves the class its own default.
        optimizer: a class or factory taking `(params, lr=..., [weight_decay=...], **hyperparameters)`. For torch's
            Adam, AdamW, SGD and Adagrad the fused implementation is chosen where it works; say `fused=` or
            `foreach=` to choose yourself.
        overrides: `{"pattern": ..., "lr_mult": 1.0, "wd_mult": 1.0}` each. `pattern` is a regular expression that
            must match somewhere in the parameter's name (`re.search`); the first that matches decides.
        adamw: with Muon only: the keyword arguments of its AdamW part. `weight_decay` is by default the one above;
            `lr` may be left out with `adjust_lr_fn="match_rms_adamw"` alone, which is there to share one rate.
        adamw_modules: with Muon only: modules whose matrices AdamW trains too. A transformers model names its output
            layer itself (`get_output_embeddings`); else say which modules turn hidden states into answers, or `()`.
        hyperparameters: passed on as they are, such as `betas` and `eps`; with Muon, to `torch.optim.Muon`.

    Raises:
        ValueError: nothing requires a gradient; a pattern matches no trainable parameter; a rate is negative; Muon has
            no rate for its AdamW part, no matrix to train, an unknown output layer, or LoRA factors.
        TypeError: an override has another key; `adamw` or `adamw_modules` with an optimizer that has no such part.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            f"none of the {len(list(model.parameters()))} parameters of {type(model).__name__} requires a gradient, so "
            "there is nothing to train; check the peft target modules and the freeze patterns"
        )
    require_rate("lr", lr)
    require_rate("weight_decay", weight_decay or 0.0)
    if weight_decay is not None:
        hyperparameters["weight_decay"] = weight_decay
    checked = _check_overrides(overrides, trainable, weight_decay)
    if optimizer is torch.optim.Muon:
        matrices = _hidden_matrices(model, trainable, adamw_modules)
        muon = optimizer(_parameter_groups(matrices, lr, weight_decay, checked), lr=lr, **hyperparameters)
        options = _adamw_options(adamw, lr, weight_decay, hyperparameters)
        others = {name: parameter for name, parameter in trainable.items() if name not in matrices}
        return MuonWithAdamW(muon, _adamw(others, options, checked) if others else None)
    if adamw is not None or adamw_modules is not None:
        raise TypeError(
            f"adamw={adamw!r}, adamw_modules={adamw_modules!r} is for optimizer=torch.optim.Muon alone; drop it"
        )
    if optimizer in FUSED and not hyperparameters.keys() & {"fused", "foreach"}:
        hyperparameters |= _implementation(optimizer, trainable.values())
    return optimizer(_parameter_groups(trainable, lr, weight_decay, checked), lr=lr, **hyperparameters)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: two or more dims and not a bias (expert biases are matrices, yet biases)."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def describe(optimizer: torch.optim.Optimizer) -> str:
    """One line per parameter group: its tensors, values (over all ranks), learning rate and weight decay.

    Of `MuonWithAdamW` also which algorithm trains the group, and how many tensors of more than two dims AdamW has.
    """
    both = isinstance(optimizer, MuonWithAdamW)
    fused = optimizer.param_groups[-1].get("fused") if both else optimizer.defaults.get("fused")
    lines = [type(optimizer).__name__ + (" (fused)" if fused else "")]
    for group in optimizer.param_groups:
        values = sum(parameter.numel() for parameter in group["params"])
        decay = group.get("weight_decay", 0.0)
        base = group.get("initial_lr", group["lr"])
        kind = f"{group['algorithm']}, " if both else ""
        stacked = sum(parameter.ndim > 2 for parameter in group["params"])
        note = f"; {stacked} of more than two dims (fused experts, convolutions)" if both and stacked else ""
        lines.append(
            f"  {kind}{len(group['params'])} tensors, {values:,} values: lr {base:g}, weight decay {decay:g}{note}"
        )
    return "\n".join(lines)


def schedule(
    optimizer: torch.optim.Optimizer,
    *,
    style: Style = "constant",
    warmup_steps: int = 0,
    total_steps: int | None = None,
    min_lr: float = 0.0,
    decay_steps: int | None = None,
    init_lr: float | None = None,
    decay_type: DecayType | None = None,
) -> LambdaLR:
    """Linear warm-up, then `style`. Call `.step()` once after each optimizer step.

    Counting optimizer steps from 1: the first takes `init_lr`, by default `lr / warmup_steps` (the full rate without
    warm-up), step `warmup_steps` the full rate, those between lie on a line. After it step s takes
    `min_lr + (lr - min_lr) * f`, with w = max(warmup_steps, 1):

    - `constant`: f = 1, whatever `min_lr` is.
    - `linear` and `cosine`: f = 1 - p and (1 + cos(pi p)) / 2 with p = (s - w) / (total_steps - w).
    - `wsd` (warm-up, stable, decay: MiniCPM, arXiv:2404.06395; its decays as in arXiv:2405.18392): f = 1 up to step
      `total_steps - decay_steps`, and with p = (s - (total_steps - decay_steps)) / decay_steps after it `decay_type`:
      `linear` (the default) 1 - p, `cosine` (1 + cos(pi p)) / 2, `1-sqrt` 1 - sqrt(p). `decay_steps` is by default a
      tenth of the run, at least one step and at most what the warm-up leaves.
    - `inverse_sqrt` (Vaswani et al. 2017, section 5.3): `lr * sqrt(w / s)`, never below `min_lr`, without an end.

    The styles of `am_recipes.schedules.NEEDS_TOTAL_STEPS` take `min_lr` at step `total_steps` and any after it; the
    others may leave `total_steps` out. `lr` is the rate that the optimizer was built with; groups with another rate (an
    `lr_mult`, the AdamW part of Muon) keep their proportion to it throughout, down to that proportion of `min_lr`.

    Raises ValueError on an unknown style or decay, a negative number, `min_lr` or `init_lr` above the rate, a warm-up
    longer than the run or too short for an `init_lr`, a decay that does not fit behind it or is given to another style.
    """
    factor = multiplier(
        style,
        lr=float(optimizer.defaults["lr"]),
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        min_lr=min_lr,
        decay_steps=decay_steps,
        init_lr=init_lr,
        decay_type=decay_type,
    )
    return LambdaLR(optimizer, factor)


def _hidden_matrices(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], adamw_modules: Iterable[nn.Module] | None
) -> dict[str, nn.Parameter]:
    """What Muon trains, by name."""
    # Here, as nothing else of this module needs them.
    from transformers import PreTrainedModel

    from am_peft import LoraFactor

    factors = [module.weight for module in model.modules() if isinstance(module, LoraFactor)]
    if any(factor.requires_grad for factor in factors):
        raise ValueError(
            "torch.optim.Muon orthogonalises the update of a weight matrix, LoRA trains two factors instead of one "
            f"matrix ({len(factors)} factors here); use torch.optim.AdamW with LoRA, or Muon without peft"
        )
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if output is None and adamw_modules is None:
        raise ValueError(
            f"{type(model).__name__} does not say which module is its output layer, which Muon must not train; give "
            "adamw_modules=(model.<output layer>,), or adamw_modules=() if it has none"
        )
    kept: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    kept += [*(adamw_modules or ()), *([] if output is None else [output])]
    # By identity: a tied output layer is the embedding, under the name of the embedding.
    identities = {id(parameter) for module in kept for parameter in module.parameters()}
    matrices = {
        name: parameter
        for name, parameter in trainable.items()
        if parameter.ndim == 2 and decays(name, parameter) and id(parameter) not in identities
    }
    if not matrices:
        raise ValueError(
            f"torch.optim.Muon trains hidden matrices, and none of the {len(trainable)} trainable parameters of "
            f"{type(model).__name__} is one; use torch.optim.AdamW"
        )
    return matrices


def _adamw_options(
    adamw: Mapping[str, Any] | None, lr: float, weight_decay: float | None, muon: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of Muon's AdamW part, with `lr`."""
    options = {} if weight_decay is None else {"weight_decay": weight_decay}
    options |= adamw or {}
    if "lr" not in options:
        if muon.get("adjust_lr_fn") != "match_rms_adamw":
            raise ValueError(
                f"lr={lr} is Muon's rate and fits AdamW only with adjust_lr_fn='match_rms_adamw'; give "
                "adamw={'lr': ...} for embeddings, output layer, norms and biases, or that adjust_lr_fn"
            )
        options["lr"] = lr
    require_rate("lr of adamw", options["lr"])
    return options


def _adamw(
    parameters: Mapping[str, nn.Parameter],
    options: dict[str, Any],
    overrides: Sequence[tuple[re.Pattern[str], float, float]],
) -> torch.optim.AdamW:
    if not options.keys() & {"fused", "foreach"}:
        options |= _implementation(torch.optim.AdamW, parameters.values())
    groups = _parameter_groups(parameters, options["lr"], options.get("weight_decay"), overrides)
    return torch.optim.AdamW(groups, **options)


def _implementation(
    optimizer: Callable[..., torch.optim.Optimizer], parameters: Iterable[torch.Tensor]
) -> dict[str, bool]:
    """Fused where it works: not on meta tensors, nor on plain tensors mixed with DTensors (one call takes one kind)."""
    kinds = {(isinstance(parameter, DTensor), parameter.device.type in ("cpu", "cuda")) for parameter in parameters}
    if kinds == {(False, True)} or (kinds == {(True, True)} and optimizer in FUSED_ON_SHARDS):
        return {"fused": True}
    return {"foreach": False}


def _parameter_groups(
    trainable: Mapping[str, nn.Parameter],
    lr: float,
    weight_decay: float | None,
    overrides: Sequence[tuple[re.Pattern[str], float, float]],
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float | None], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        lr_mult, wd_mult = next(((lr, wd) for pattern, lr, wd in overrides if pattern.search(name)), (1.0, 1.0))
        decay = weight_decay if decays(name, parameter) else 0.0
        key = (lr * lr_mult, None if decay is None else decay * wd_mult)
        if key not in groups:
            groups[key] = {"params": [], "lr": key[0]} | ({} if key[1] is None else {"weight_decay": key[1]})
        groups[key]["params"].append(parameter)
    return list(groups.values())


def _check_overrides(
    overrides: Sequence[Mapping[str, Any]], names: Iterable[str], weight_decay: float | None
) -> list[tuple[re.Pattern[str], float, float]]:
    names = list(names)
    checked = []
    for override in overrides:
        unknown = override.keys() - {"pattern", "lr_mult", "wd_mult"}
        if unknown or "pattern" not in override:
            raise TypeError(f"override {dict(override)} must have the key pattern, and may have lr_mult and wd_mult")
        pattern, lr_mult, wd_mult = override["pattern"], override.get("lr_mult", 1.0), override.get("wd_mult", 1.0)
        require_rate(f"lr_mult of pattern {pattern!r}", lr_mult)
        require_rate(f"wd_mult of pattern {pattern!r}", wd_mult)
        if wd_mult != 1.0 and weight_decay is None:
            raise ValueError(
                f"wd_mult={wd_mult} of pattern {pattern!r} multiplies weight_decay, which is not set; set it"
            )
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"pattern {pattern!r} is not a regular expression ({error}); write .* for anything"
            ) from error
        if not any(expression.search(name) for name in names):
            nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(f"pattern {pattern!r} matches no trainable parameter; nearest names: {', '.join(nearest)}")
        checked.append((expression, float(lr_mult), float(wd_mult)))
    return checked
