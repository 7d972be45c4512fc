"""What config.json says about the weights, held against the tensors that are there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from am_ckpt._format import parse_json
from am_ckpt._layout import read_file
from am_ckpt._sources import Source

_MAX_CONFIG_BYTES = 64 * 2**20
_LAYER = re.compile(r"(.*\.|)(?:layers|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight")
_EXPERT = re.compile(r".*\.experts\.(\d+)\.")
HEAD = "lm_head.weight"


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dict; links are followed, as in the folders of the Hugging Face cache."""
    config = parse_json(read_file(path.resolve(), _MAX_CONFIG_BYTES), str(path))
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not an object")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part about the language model, which models of several towers keep apart."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def config_problems(config: Mapping[str, Any], tensors: Mapping[str, Source]) -> list[str]:
    """Where the tensors fall short of config.json: layers, vocabulary, hidden size, experts. Empty where they fit.

    What a family names in its own way is not looked at; more than the config says (an extra prediction layer, a padded
    vocabulary) is no problem.
    """
    text = text_config(config)
    problems = []
    layers = text.get("num_hidden_layers")
    if type(layers) is int and layers <= 2**20:
        found: dict[str, set[int]] = {}
        for name in tensors:
            match = _LAYER.match(name)
            if match:
                found.setdefault(match[1], set()).add(int(match[2]))
        missing = {prefix: sorted(set(range(layers)) - have) for prefix, have in found.items()}
        if missing and all(missing.values()):
            prefix, absent = min(missing.items(), key=lambda item: len(item[1]))
            problems.append(
                f"num_hidden_layers={layers}, but layer {absent[0]} of {prefix + 'layers'} has no tensor "
                f"({len(absent)} layers missing)"
            )
    vocabulary, hidden = text.get("vocab_size"), text.get("hidden_size")
    for name, source in tensors.items():
        if not _EMBEDDING.fullmatch(name) or len(source.shape) != 2:
            continue
        if type(vocabulary) is int and source.shape[0] < vocabulary:
            problems.append(f"vocab_size={vocabulary}, but {name!r} has {source.shape[0]} rows")
        if type(hidden) is int and name.endswith("embed_tokens.weight") and source.shape[1] < hidden:
            problems.append(f"hidden_size={hidden}, but {name!r} has {source.shape[1]} columns")
    experts = next((text[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in text), None)
    if type(experts) is int and experts <= 2**16:
        by_layer: dict[str, set[int]] = {}
        for name in tensors:
            match = _EXPERT.match(name)
            if match:
                by_layer.setdefault(name[: match.start(1)], set()).add(int(match[1]))
        for prefix, have in by_layer.items():
            if not set(range(experts)) <= have:
                first = min(set(range(experts)) - have)
                problems.append(f"{experts} experts, but {prefix}{first} has no tensor ({len(have)} are there)")
                break
    return problems


def tied_embedding(config: Mapping[str, Any], tensors: Mapping[str, Source]) -> str | None:
    """The embedding that config.json ties ``lm_head.weight`` to, where both are there in equal shape and dtype."""
    tied = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    if tied is not True or HEAD not in tensors:
        return None
    head = tensors[HEAD]
    same = [
        name
        for name, source in tensors.items()
        if _EMBEDDING.fullmatch(name) and (source.dtype, source.shape) == (head.dtype, head.shape)
    ]
    return same[0] if len(same) == 1 else None
