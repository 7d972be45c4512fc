"""What of a model the ranks that split it have to divide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Each rank computes some heads, with their keys and values.
_SIZES = ("num_attention_heads", "num_key_value_heads")


def parallel_facts(model: PreTrainedModel | PreTrainedConfig) -> Mapping[str, int]:
    """The sizes, by their names in the config, that ranks which split each matrix must divide: heads of the language
    model. A shape that a split cannot cut is found when it is cut.
    """
    from transformers import PreTrainedConfig

    config = (model if isinstance(model, PreTrainedConfig) else model.config).get_text_config()
    values = config.to_dict()
    names = {name: config.attribute_map.get(name, name) for name in _SIZES}
    return {own: values[own] for own in names.values() if isinstance(values.get(own), int)}
