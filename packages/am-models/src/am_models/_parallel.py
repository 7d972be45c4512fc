"""What a layout has to know of a model before it splits it, read from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from am_models._rows import rows_of, table_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_HEADS = ("num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class ParallelFacts:
    """Facts of one model for tensor and context parallelism.

    must_divide: sizes by the name that the configuration has for them, all of which the tensor-parallel ranks must
        divide: attention heads and key-value heads. Empty where the model's own plan leaves its attention whole.
    no_tensor_plan: why tensor parallelism needs a plan of the caller's; None where the model has one of its own.
    no_context: why context parallelism cannot cut its sequences; None where nothing is known against it.
    """

    must_divide: dict[str, int]
    no_tensor_plan: str | None
    no_context: str | None


def parallel_facts(model: PreTrainedModel | PreTrainedConfig) -> ParallelFacts:
    """The facts of a model, or of what a configuration describes (a family of your own only with the model).

    Of a model of images and text those of its language model: its vision tower is whole on every rank.
    """
    from transformers import PreTrainedConfig

    config = model if isinstance(model, PreTrainedConfig) else model.config
    rows = table_rows(config) if isinstance(model, PreTrainedConfig) else rows_of(model)
    text = config.get_text_config()
    plan: dict[str, str] | None = text.base_model_tp_plan
    no_context = None
    if text is not config:
        no_context = f"{config.model_type} is a model of images and text, whose images would be cut"
    elif rows.language is None:
        no_context = f"the attention of {config.model_type} is not declared, so none that knows of other ranks can run"
    return ParallelFacts(
        must_divide=_heads(text) if not plan or _splits_attention(plan) else {},
        no_tensor_plan=None if plan else f"transformers has no tensor-parallel plan for {text.model_type}",
        no_context=no_context,
    )


def _heads(config: PreTrainedConfig) -> dict[str, int]:
    values = config.to_dict()
    named = {config.attribute_map.get(name, name): name for name in _HEADS}
    return {key: values[key] for key in named if isinstance(values.get(key), int)}


def _splits_attention(plan: dict[str, str]) -> bool:
    """A plan that gathers what its projections give, or has none of attention, leaves the heads whole."""
    return any(style == "colwise" and ("attn" in pattern or "attention" in pattern) for pattern, style in plan.items())
