"""Models under torchtitan's names, as transformers publishes them: other names, experts one by one, rows in pairs.

Sources: the state dict adapters of torchtitan's Llama 3 and Qwen 3. What changes is where bytes are found: no value is
computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from am_ckpt._boxes import Box, row_major
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._sources import Chunk, Source

_LAYER = r"layers\.(\d+)\."
# Before release 0.3, queries, keys and values had no module of their own, and the head was called output.
_NAMES = [
    (r"tok_embeddings\.weight", "model.embed_tokens.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"(?:lm_head|output)\.weight", "lm_head.weight"),
    (_LAYER + r"attention\.(?:qkv_linear\.)?w([qkv])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (_LAYER + r"attention\.([qk])_norm\.weight", r"model.layers.\1.self_attn.\2_norm.weight"),
    (_LAYER + r"attention\.wo\.weight", r"model.layers.\1.self_attn.o_proj.weight"),
    (_LAYER + r"attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (_LAYER + r"ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (_LAYER + r"feed_forward\.w1\.weight", r"model.layers.\1.mlp.gate_proj.weight"),
    (_LAYER + r"feed_forward\.w2\.weight", r"model.layers.\1.mlp.down_proj.weight"),
    (_LAYER + r"feed_forward\.w3\.weight", r"model.layers.\1.mlp.up_proj.weight"),
    (_LAYER + r"moe\.router\.gate\.weight", r"model.layers.\1.mlp.gate.weight"),
    (_LAYER + r"moe\.routed_experts\.inner_experts\.w1_EFD", r"model.layers.\1.mlp.experts.{}.gate_proj.weight"),
    (_LAYER + r"moe\.routed_experts\.inner_experts\.w2_EDF", r"model.layers.\1.mlp.experts.{}.down_proj.weight"),
    (_LAYER + r"moe\.routed_experts\.inner_experts\.w3_EFD", r"model.layers.\1.mlp.experts.{}.up_proj.weight"),
]
# Counters of the router's balancing, which transformers' models lack.
_LEFT_OUT = re.compile(_LAYER + r"moe\.(?:.*\.)?(?:expert_bias|tokens_per_expert|expert_bias_E|tokens_per_expert_E)")
# In what inspect() says of such a folder.
OWN_NAMES = (
    "the names are torchtitan's own: merge writes those of transformers where it is given the model's config, with "
    "--like"
)
# Llama's first dims of a head are pairs (real, imaginary) in torchtitan, and two halves in transformers.
_PAIRED = ("llama",)
_HEAD_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
_MODEL_TYPES = (*_PAIRED, "qwen3", "qwen3_moe")


def is_torchtitan(names: Collection[str]) -> bool:
    """Whether these are the names of torchtitan's decoders."""
    return "tok_embeddings.weight" in names and any(re.fullmatch(_LAYER + r"attention_norm\.weight", n) for n in names)


def published_aliases(aliases: Mapping[str, str]) -> dict[str, str]:
    """Tied names and what they stand for, in transformers' names."""
    return {_published(alias) or alias: _published(name) or name for alias, name in aliases.items()}


def _published(name: str) -> str | None:
    """What transformers calls a tensor, with `{}` for an expert's number; None of names that are not torchtitan's."""
    return next((re.sub(old, new, name) for old, new in _NAMES if re.fullmatch(old, name)), None)


def as_published(
    tensors: Mapping[str, Source], config: Mapping[str, Any], where: Path, locate: Callable[[str, Source], Source]
) -> dict[str, Source]:
    """The tensors of torchtitan's model as those of the transformers model that `config` describes.

    `where`: of the config, for errors. `locate`: gives a source whose chunks are values, not archives of them.

    Which rows of Llama's queries and keys belong together follows from the config's numbers of heads. They are held
    against the rows, so the config of another model is refused, but for one whose numbers are all wrong by the same
    factor: 2 heads of 32 rows are as many rows as 4 of 16.
    """
    model_type = config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ValueError(
            f"the tensors have torchtitan's names, and {where} is of a {model_type!r}: only those of "
            f"{', '.join(_MODEL_TYPES)} are known; use torchtitan's convert_to_hf.py, or save with last_save_in_hf"
        )
    paired = _llama_heads(config, where) if model_type in _PAIRED else None
    published: dict[str, Source] = {}
    names: dict[str, str] = {}
    for name, source in tensors.items():
        if _LEFT_OUT.fullmatch(name):
            continue
        new = _published(name)
        if new is None:
            raise ValueError(f"{name!r} is no tensor of torchtitan's {model_type}: use torchtitan's convert_to_hf.py")
        if new in names:
            raise ValueError(
                f"{names[new]!r} and {name!r} are both {new!r} in transformers' names: the checkpoint is of two models "
                "or releases of torchtitan; save it again without one of them"
            )
        names[new] = name
        if "{}" in new:
            if len(source.shape) != 3:
                raise ValueError(f"{name!r} is {list(source.shape)}, not a stack of experts' matrices")
            located = locate(name, source)
            published |= {new.format(expert): _expert(located, expert) for expert in range(source.shape[0])}
        elif paired is not None and (match := re.search(r"self_attn\.([qk]_proj)", new)):
            counts, head_dim = paired
            heads = counts[match[1]]
            if source.shape[:1] != (heads * head_dim,):
                raise ValueError(
                    f"{name!r} is {list(source.shape)}, but {where} says {heads} heads of {head_dim} rows "
                    f"({', '.join(f'{key}={config.get(key)}' for key in _HEAD_KEYS)}): it is of another model; give "
                    "the config of this one with --like"
                )
            published[new] = _halves(locate(name, source), heads)
        else:
            published[new] = source
    return published


def _llama_heads(config: Mapping[str, Any], where: Path) -> tuple[dict[str, int], int]:
    """Heads of queries and keys (`q_proj`, `k_proj`) and the rows of a head, as transformers reads the config."""
    heads = _count(config, "num_attention_heads", None, where)
    counts = {"q_proj": heads, "k_proj": _count(config, "num_key_value_heads", heads, where)}
    hidden = _count(config, "hidden_size", None, where)
    head_dim = _count(config, "head_dim", hidden // heads, where)
    if head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"{where} says {heads} heads of {head_dim} rows (hidden_size={hidden}), which are no pairs: it is not of a "
            "Llama of torchtitan; give the config of this model with --like"
        )
    for place in (config, config.get("rope_scaling"), config.get("rope_parameters")):
        rotated = place.get("partial_rotary_factor") if isinstance(place, Mapping) else None
        if rotated not in (None, 1):
            raise ValueError(
                f"{where} has partial_rotary_factor={rotated!r}: torchtitan's Llama rotates all dims of a head, so its "
                "rows cannot be put in that order; give the config of this model with --like"
            )
    return counts, head_dim


def _count(config: Mapping[str, Any], key: str, default: int | None, where: Path) -> int:
    count = config.get(key)
    if count is None and default is not None:
        return default
    if type(count) is not int or count < 1:
        raise ValueError(
            f"{where} has {key}={count!r}, which must be a positive integer: queries and keys are cut into heads by "
            "it; give the config of this model with --like"
        )
    return count


def _strides(chunk: Chunk) -> tuple[int, ...]:
    return row_major(chunk.box.size, 1) if chunk.strides is None else chunk.strides


def _expert(source: Source, expert: int) -> Source:
    """One index of the first dim."""
    item = ITEM_BYTES[source.dtype]
    chunks = []
    for chunk in source.chunks:
        first, *offset = chunk.box.offset
        if first <= expert < first + chunk.box.size[0]:
            outer, *strides = _strides(chunk)
            box = Box(tuple(offset), chunk.box.size[1:])
            chunks.append(Chunk(chunk.path, chunk.begin + (expert - first) * outer * item, box, tuple(strides)))
    return Source(source.dtype, source.shape[1:], chunks)


def _halves(source: Source, heads: int) -> Source:
    """Of every head, the even rows and then the odd ones."""
    return Source(source.dtype, source.shape, [new for chunk in source.chunks for new in _halved(source, chunk, heads)])


def _halved(source: Source, chunk: Chunk, heads: int) -> Iterator[Chunk]:
    item = ITEM_BYTES[source.dtype]
    half = source.shape[0] // heads // 2
    outer, *strides = _strides(chunk)
    first, end = chunk.box.offset[0], chunk.box.offset[0] + chunk.box.size[0]
    for head in range(first // (2 * half), -(-end // (2 * half))):
        for odd in (0, 1):
            # Row start + 2 * j of the head goes to row odd * half + j of it.
            start = head * 2 * half + odd
            begin, stop = max(0, -(-(first - start) // 2)), min(half, -(-(end - start) // 2))
            if begin < stop:
                offset = head * 2 * half + odd * half + begin
                box = Box((offset, *chunk.box.offset[1:]), (stop - begin, *chunk.box.size[1:]))
                place = chunk.begin + (start + 2 * begin - first) * outer * item
                yield Chunk(chunk.path, place, box, (2 * outer, *strides))
