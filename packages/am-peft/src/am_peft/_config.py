"""PEFT's `LoraConfig`: which options are honoured, what it selects, and its JSON file."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import json
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from am_peft._names import clean_name, nearest

if TYPE_CHECKING:
    from peft import LoraConfig

_HONOURED = frozenset(
    {
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    }
)
# Facts about the adapter rather than choices about its layers.
_DESCRIPTIVE = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
    }
)
# Heads that PEFT trains for these tasks without being asked.
_TASK_HEADS = ("classifier", "score")
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Full names of the modules that get LoRA with `(r, lora_alpha)` of each, and of those trained whole."""

    targets: dict[str, tuple[int, float]]
    modules_to_save: list[str]


def check_config(config: LoraConfig) -> None:
    """Raise for every option that is set and not honoured: `TypeError` for another class, else `ValueError`."""
    import peft

    if type(config) is not peft.LoraConfig:
        raise TypeError(f"config is a {type(config).__name__}; pass a peft.LoraConfig")
    defaults = peft.LoraConfig()
    values, default_values = vars(config), vars(defaults)
    refused = [
        f"{field.name}={values[field.name]!r}"
        for field in dataclasses.fields(config)
        if field.name not in _HONOURED | _DESCRIPTIVE and values[field.name] != default_values[field.name]
    ]
    if refused:
        raise ValueError(f"am-peft does not honour {', '.join(refused)}; leave at the default, or use peft itself")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(f"init_lora_weights={config.init_lora_weights!r} must be True, False or 'gaussian'")
    if not 0.0 <= config.lora_dropout < 1.0:
        raise ValueError(f"lora_dropout={config.lora_dropout} must be in [0, 1)")
    for name, r in {
        "r": config.r,
        **{f"rank_pattern[{key!r}]": r for key, r in (config.rank_pattern or {}).items()},
    }.items():
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"{name}={r!r} must be a positive integer")
    for name, alpha in {
        "lora_alpha": config.lora_alpha,
        **{f"alpha_pattern[{key!r}]": alpha for key, alpha in (config.alpha_pattern or {}).items()},
    }.items():
        if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise ValueError(f"{name}={alpha!r} must be a positive number: the update is scaled by it over r")
    if not config.target_modules:
        raise ValueError(f"target_modules={config.target_modules!r} selects nothing; name modules or use 'all-linear'")


def select(model: nn.Module, config: LoraConfig, *, strict: bool) -> Selection:
    """Apply PEFT's rules, plus `*` wildcards in list entries, to the modules of `model`.

    `strict`: every entry and pattern must match something, else `ValueError` with the nearest names.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    names = [clean_name(name) for name, _ in model.named_modules() if name]
    all_names = [clean_name(name) for name, _ in model.named_modules(remove_duplicate=False) if name]
    saved = _modules_to_save(config, all_names, strict)
    rules, wildcards = _plain_rules(model, config, names, saved)

    def is_target(name: str) -> bool:
        if check_target_module_exists(rules, name):
            return True
        if not any(fnmatch.fnmatchcase(name, wildcard) for wildcard in wildcards):
            return False
        # The last part alone, so that PEFT's layer and exclusion rules still apply to a wildcard's matches.
        alone = copy.copy(rules)
        alone.target_modules = [name.rpartition(".")[2]]
        return bool(check_target_module_exists(alone, name))

    chosen = [name for name in names if is_target(name)]
    if strict:
        _check_entries(config, names)
        _check_layers(config, chosen)
    if not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} selects no module (exclude_modules={config.exclude_modules!r}, "
            f"layers_to_transform={config.layers_to_transform!r}); "
            f"nearest: {nearest(str(config.target_modules), names)}"
        )
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    if strict:
        _check_patterns("rank_pattern", ranks, chosen)
        _check_patterns("alpha_pattern", alphas, chosen)
    targets = {
        name: (
            ranks.get(get_pattern_key(list(ranks), name), config.r),
            alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha),
        )
        for name in chosen
    }
    return Selection(targets, saved)


def _plain_rules(
    model: nn.Module, config: LoraConfig, names: list[str], saved: list[str]
) -> tuple[LoraConfig, list[str]]:
    """A copy of `config` without wildcards for PEFT's own matching, and the wildcards among its targets."""
    from peft import LoraConfig

    # PEFT's expansion of "all-linear" knows the output heads of transformers' models.
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    rules = copy.copy(config)
    rules.modules_to_save = [re.escape(name) for name in saved] or None
    if not isinstance(config.exclude_modules, str):
        rules.exclude_modules = _without_wildcards(config.exclude_modules or [], names)
    if isinstance(config.target_modules, str):
        expanded = _maybe_include_all_linear_layers(rules, model)
        assert isinstance(expanded, LoraConfig)
        if not isinstance(expanded.target_modules, str):
            expanded.target_modules = [clean_name(name) for name in expanded.target_modules or ()]
        return expanded, []
    targets = config.target_modules or []
    rules.target_modules = [entry for entry in targets if "*" not in entry]
    return rules, [entry for entry in targets if "*" in entry]


def _without_wildcards(entries: Iterable[str], names: list[str]) -> list[str]:
    """`entries` with each wildcard replaced by the `names` that it matches."""
    written = [
        [name for name in names if fnmatch.fnmatchcase(name, entry)] if "*" in entry else [entry] for entry in entries
    ]
    return [name for group in written for name in group]


def _modules_to_save(config: LoraConfig, names: list[str], strict: bool) -> list[str]:
    """Full names of the modules that `modules_to_save` names (PEFT: those whose name ends with an entry)."""
    chosen: dict[str, None] = {}
    entries = config.modules_to_save or []
    if strict and config.task_type in _HEAD_TASKS:
        heads = [name for name in names if name in _TASK_HEADS and name not in entries]
        if heads:
            raise ValueError(
                f"task_type={config.task_type} lets PEFT train {heads[0]!r} as well; say so: "
                f"modules_to_save={[*entries, heads[0]]}"
            )
    for entry in entries:
        if "*" in entry:
            found = [name for name in names if fnmatch.fnmatchcase(name, entry)]
        else:
            # PEFT compares without a dot here, so "norm" means "input_layernorm" too.
            found = [name for name in names if name.endswith(entry)]
        if not found and strict and not (config.task_type in _HEAD_TASKS and entry in _TASK_HEADS):
            raise ValueError(f"modules_to_save entry {entry!r} matches no module; nearest: {nearest(entry, names)}")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def _check_entries(config: LoraConfig, names: list[str]) -> None:
    for option, entries in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        if isinstance(entries, str):
            if entries.lower() != "all-linear" and not any(re.fullmatch(entries, name) for name in names):
                raise ValueError(
                    f"{option}={entries!r} (a regex) matches no module; nearest: {nearest(entries, names)}"
                )
            continue
        for entry in sorted(entries or ()):
            if not any(
                fnmatch.fnmatchcase(name, entry) if "*" in entry else name == entry or name.endswith(f".{entry}")
                for name in names
            ):
                raise ValueError(f"{option} entry {entry!r} matches no module; nearest: {nearest(entry, names)}")


def _check_layers(config: LoraConfig, chosen: list[str]) -> None:
    layers = config.layers_to_transform
    wanted = [layers] if isinstance(layers, int) else list(layers or [])
    missing = [layer for layer in wanted if not any(f".{layer}." in name for name in chosen)]
    if missing:
        raise ValueError(
            f"layers_to_transform={layers!r} with layers_pattern={config.layers_pattern!r} selects no module in layer "
            f"{missing[0]}; check the layer numbers"
        )


def _check_patterns(option: str, patterns: Iterable[str], chosen: list[str]) -> None:
    for pattern in patterns:
        # The match of peft.utils.other.get_pattern_key.
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in chosen):
            raise ValueError(
                f"{option} key {pattern!r} matches no targeted module; nearest: {nearest(pattern, chosen)}"
            )


def config_json(
    config: LoraConfig, model: nn.Module, targets: list[str], saved: list[str], base_model_name_or_path: str | None
) -> str:
    """The text of `adapter_config.json` such that stock PEFT selects the same modules."""
    written = config.to_dict()
    entries = [config.target_modules, config.exclude_modules, config.modules_to_save]
    extended = any(not isinstance(entry, str) and any("*" in name for name in entry or ()) for entry in entries)
    if extended or (isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"):
        # PEFT knows no wildcards, and readers other than PEFT no "all-linear": write what they selected.
        written["target_modules"] = _condense(targets, [clean_name(name) for name, _ in model.named_modules()])
        written["exclude_modules"] = written["layers_to_transform"] = written["layers_pattern"] = None
    if extended:
        written["modules_to_save"] = saved or None
    if base_model_name_or_path is not None:
        written["base_model_name_or_path"] = base_model_name_or_path
    # What peft's save_pretrained writes: a saved adapter loads for inference unless told otherwise.
    written["inference_mode"] = True
    lists = {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}
    return json.dumps(lists, indent=2, sort_keys=True) + "\n"


def _condense(targets: list[str], names: list[str]) -> list[str]:
    """Last parts of the names if they select the same modules, else the full names."""
    last = {name.rpartition(".")[2] for name in targets}
    if {name for name in names if name.rpartition(".")[2] in last} == set(targets):
        return sorted(last)
    return sorted(targets)


def read_config(text: str, source: str) -> LoraConfig:
    """The `LoraConfig` of an `adapter_config.json`; `ValueError` for another method or an unknown option."""
    import peft

    values = json.loads(text)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{source} has peft_type={values.get('peft_type')!r}; only LORA adapters can be loaded")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    unknown = sorted(key for key, value in values.items() if key not in known and value)
    if unknown:
        raise ValueError(
            f"{source} sets {', '.join(unknown)}, which peft {peft.__version__} does not know; upgrade peft"
        )
    # PEFT stores every adapter as one for inference; loaded here, it trains on.
    values["inference_mode"] = False
    return peft.LoraConfig(**{key: value for key, value in values.items() if key in known})
