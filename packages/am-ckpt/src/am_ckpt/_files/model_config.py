"""What config.json says about the weights, held against the tensors that are there."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from am_ckpt._dtypes import CAST_TO, ITEM_BYTES
from am_ckpt._files.safetensors import element_count
from am_ckpt._files.step import read_file
from am_ckpt._sources import Source
from am_ckpt.errors import IncompleteError

_MAX_CONFIG_BYTES = 64 * 2**20
_LAYER = re.compile(r"(.*\.|)(?:layers|h|blocks|block)\.(\d+)\.")
# Stacks of layers that num_hidden_layers does not count.
_OTHER_TOWER = re.compile(r"(?:^|\.)(?:visual|vision|audio|image)")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight")
_EXPERT = re.compile(r".*\.experts\.(\d+)\.")
_FUSED_EXPERTS = re.compile(r".*\.experts\.(?:gate_up_proj|gate_proj|up_proj|down_proj)(?:_bias|_blocks|_scales)?")
# Of all experts together, whatever a family calls it.
_JOINED_EXPERTS = re.compile(r"(?:.*\.)?experts\.(?!\d+\.)")
_HEADS = re.compile(r".*(?:head|embed_out|output|score|classifier).*")
HEAD = "lm_head.weight"


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dict; links of the Hugging Face cache are followed.

    As lenient as transformers, which writes and reads `Infinity` and `NaN`.
    """
    try:
        config = json.loads(read_file(path, _MAX_CONFIG_BYTES, follow_symlinks=True).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error or 'nested too deeply'}") from error
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
    if type(layers) is int:
        found: dict[str, set[int]] = {}
        for name in tensors:
            match = _LAYER.match(name)
            if match and int(match[2]) < layers and not _OTHER_TOWER.search(match[1]):
                found.setdefault(match[1], set()).add(int(match[2]))
        if found:
            # A model can have several stacks; one of them is the one that config.json speaks of.
            prefix, have = max(found.items(), key=lambda item: len(item[1]))
            if len(have) < layers:
                problems.append(
                    f"num_hidden_layers={layers}, but layer {_first_gap(have)} of {prefix + 'layers'} has no tensor "
                    f"({layers - len(have)} layers missing)"
                )
    vocabulary, hidden = text.get("vocab_size"), text.get("hidden_size")
    for name, source in tensors.items():
        if not _EMBEDDING.fullmatch(name) or len(source.shape) != 2:
            continue
        if type(vocabulary) is int and source.shape[0] < vocabulary:
            problems.append(f"vocab_size={vocabulary}, but {name!r} has {source.shape[0]} rows")
        if type(hidden) is int and name.endswith("embed_tokens.weight") and source.shape[1] < hidden:
            problems.append(f"hidden_size={hidden}, but {name!r} has {source.shape[1]} columns")
    experts = _num_experts(text)
    if experts is not None:
        for name, source in tensors.items():
            if _FUSED_EXPERTS.fullmatch(name) and len(source.shape) > 1 and source.shape[0] < experts:
                problems.append(f"{experts} experts, but {name!r} has {source.shape[0]}")
                break
        by_layer: dict[str, set[int]] = {}
        for name in tensors:
            match = _EXPERT.match(name)
            if match and int(match[1]) < experts:
                by_layer.setdefault(name[: match.start(1)], set()).add(int(match[1]))
        for prefix, have in by_layer.items():
            if len(have) < experts:
                problems.append(
                    f"{experts} experts, but {prefix}{_first_gap(have)} has no tensor ({len(have)} are there)"
                )
                break
    return problems


def shows_shapes(config: Mapping[str, Any], tensors: Mapping[str, Source]) -> bool:
    """Whether config.json shows of shards along one dim that no last rank is missing, which the files do not say.

    It does where the embedding is as large as it says, one more rank would have cut the embedding otherwise, and all
    that is cut is cut as by the embedding's ranks: then whoever had a part of any tensor had one of the embedding.
    Experts may be cut over more ranks than the embedding, and look the same where the last of them are missing: there
    must be as many as it says.
    """
    text = text_config(config)
    experts = _num_experts(text)
    joined = [source for name, source in tensors.items() if _JOINED_EXPERTS.match(name)]
    if any(not source.shape or source.shape[0] != experts for source in joined):
        return False
    if any(_EXPERT.match(name) for name in tensors) and (experts is None or config_problems(config, tensors)):
        return False
    ranks = {
        len(source.chunks)
        for name, source in tensors.items()
        if _EMBEDDING.fullmatch(name) and source.shape == (text.get("vocab_size"), text.get("hidden_size"))
        for size, step in zip(source.shape, _steps(source), strict=True)
        if step and len(source.chunks) == -(-size // step) > 1 and -(-size // (len(source.chunks) + 1)) < step
    }
    cut = [source for source in tensors.values() if len(source.chunks) > 1]
    return len(ranks) == 1 and all(_is_cut_by(number, source) for number in ranks for source in cut)


def _is_cut_by(num_ranks: int, source: Source) -> bool:
    """Whether so many ranks cut the tensor along one dim, as evenly as can be."""
    return any(
        step == -(-size // num_ranks) and len(source.chunks) == -(-size // step)
        for size, step in zip(source.shape, _steps(source), strict=True)
        if step
    )


def _steps(source: Source) -> list[int]:
    """The size of the largest chunk on each dim."""
    rows = source.rows
    if not len(rows):
        return [0] * len(source.shape)
    steps: list[int] = rows.table.size[rows.first : rows.last].max(axis=0).tolist()
    return steps


def _num_experts(text: Mapping[str, Any]) -> int | None:
    number = next((text[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in text), None)
    return number if type(number) is int else None


def _first_gap(numbers: set[int]) -> int:
    return next(number for number in range(len(numbers) + 1) if number not in numbers)


def uneven_layers(config: Mapping[str, Any], tensors: Mapping[str, Source]) -> list[tuple[str, bool]]:
    """What one layer lacks or has in another dtype and all others of its kind agree on; True where that is no design.

    Layers are of one kind where all lists of the config that have an entry a layer agree (`layer_types` and the
    like). The first and the last layer may differ by design, and so may those of quantised models.
    """
    by_prefix: dict[str, dict[int, dict[str, str]]] = {}
    for name, source in tensors.items():
        match = _LAYER.match(name)
        if match and not _EXPERT.match(name):
            layers = by_prefix.setdefault(name[: match.start(2)], {})
            layers.setdefault(int(match[2]), {})[name[match.end() :]] = source.dtype
    values = text_config(config).items()
    found = []
    for prefix, layers in by_prefix.items():
        each = [v for k, v in values if (isinstance(v, list) or "pattern" in k) and _length(v) == max(layers) + 1]
        kinds: dict[str, list[int]] = {}
        for layer in layers:
            kinds.setdefault(repr([value[layer] for value in each]), []).append(layer)
        for members in kinds.values():
            if len(members) < 3:
                continue
            dtypes: dict[str, Counter[str]] = {}
            for layer in members:
                for inner, dtype in layers[layer].items():
                    dtypes.setdefault(inner, Counter())[dtype] += 1
            nearly = sorted(inner for inner, counts in dtypes.items() if counts.total() == len(members) - 1)
            for layer in members:
                absent = [inner for inner in nearly if inner not in layers[layer]]
                # A layer with tensors of its own is of another kind, whatever the config says.
                if absent and not any(dtypes[inner].total() == 1 for inner in layers[layer]):
                    sure = min(layers) < layer < max(layers) and "quantization_config" not in config
                    more = f" ({len(absent)} such tensors)" if len(absent) > 1 else ""
                    found.append(
                        (f"{prefix}{layer}.{absent[0]}, which all other such layers have, is missing{more}", sure)
                    )
                for inner, dtype in layers[layer].items():
                    counts = dtypes[inner]
                    if len(counts) == 2 and counts[dtype] == 1 and counts.total() > 2:
                        most = counts.most_common(1)[0][0]
                        found.append((f"{prefix}{layer}.{inner} is {dtype}, in all other such layers {most}", False))
    return found


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list | str) else None


def config_doubts(config: Mapping[str, Any], tensors: Mapping[str, Source]) -> list[str]:
    """Where the tensors are not as config.json says in ways that may be meant: dtypes, extra prediction layers."""
    text = text_config(config)
    doubts = []
    said = config.get("dtype", config.get("torch_dtype", text.get("dtype", text.get("torch_dtype"))))
    sizes: Counter[str] = Counter()
    for source in tensors.values():
        if source.dtype in CAST_TO.values():
            sizes[source.dtype] += element_count(source.shape) * ITEM_BYTES[source.dtype]
    if sizes and isinstance(said, str) and said in CAST_TO and "quantization_config" not in config:
        most = sizes.most_common(1)[0][0]
        if most != CAST_TO[said]:
            doubts.append(f"config.json says {said}, most of the weights are {most}")
    layers = text.get("num_hidden_layers")
    for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        wanted = text.get(key)
        if type(wanted) is int and wanted > 0 and type(layers) is int:
            extra = [name for name in tensors if name.startswith(("mtp.", "model.mtp.", f"model.layers.{layers}."))]
            if not extra:
                doubts.append(f"config.json says {key}={wanted}, no such layer is there: speculative decoding needs it")
    return doubts


def head_problem(config: Mapping[str, Any], tensors: Mapping[str, Source]) -> ValueError | None:
    """Why the head of a language model is not what config.json says about ties; values are not compared."""
    tied = _is_tied(config)
    embeddings = [(name, source) for name, source in tensors.items() if _EMBEDDING.fullmatch(name)]
    if len(embeddings) != 1:
        return None
    name, source = embeddings[0]
    if tied is True and HEAD in tensors and tensors[HEAD].shape != source.shape:
        shapes = f"{HEAD} is {list(tensors[HEAD].shape)} and {name} {list(source.shape)}"
        return ValueError(f"tie_word_embeddings=true, but {shapes}")
    causal = "ForCausalLM" in str(config.get("architectures"))
    if tied is False and causal and not any(_HEADS.fullmatch(other) for other in tensors):
        return IncompleteError(f"tie_word_embeddings=false, but there is no {HEAD}: it would start from random values")
    return None


def implied_head(config: Mapping[str, Any], tensors: Mapping[str, Source]) -> str | None:
    """The embedding that stands for `lm_head.weight` too, where config.json ties them and it is stored once."""
    embeddings = [name for name in tensors if _EMBEDDING.fullmatch(name)]
    return embeddings[0] if _is_tied(config) is True and HEAD not in tensors and len(embeddings) == 1 else None


def _is_tied(config: Mapping[str, Any]) -> Any:
    return config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))


def tied_embedding(config: Mapping[str, Any], tensors: Mapping[str, Source]) -> str | None:
    """The embedding that config.json ties `lm_head.weight` to, where both are there in equal shape and dtype."""
    if _is_tied(config) is not True or HEAD not in tensors:
        return None
    head = tensors[HEAD]
    same = [
        name
        for name, source in tensors.items()
        if _EMBEDDING.fullmatch(name) and (source.dtype, source.shape) == (head.dtype, head.shape)
    ]
    return same[0] if len(same) == 1 else None
