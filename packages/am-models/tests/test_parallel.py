"""What a configuration says to a layout, and the losses of models whose head is cut along the vocabulary."""

from __future__ import annotations

import pytest
import transformers

import am_models


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"num_attention_heads": 32, "num_key_value_heads": 32}),
        ("gemma2", {"num_attention_heads": 8, "num_key_value_heads": 4}),
        # The plan of phi3 gathers what its one projection gives, that of deepseek_v3 has no attention.
        ("phi3", {}),
        ("deepseek_v3", {}),
        ("gpt2", {"n_head": 12}),
        ("mamba", {}),
    ],
)
def test_sizes_that_tensor_parallel_ranks_must_divide(family, sizes):
    assert am_models.parallel_facts(transformers.CONFIG_MAPPING[family]()).must_divide == sizes


def test_what_a_layout_cannot_do_has_a_reason():
    facts = {name: am_models.parallel_facts(transformers.CONFIG_MAPPING[name]()) for name in ("qwen3", "gpt2", "llava")}
    assert (facts["qwen3"].no_tensor_plan, facts["qwen3"].no_context) == (None, None)
    assert facts["gpt2"].no_tensor_plan == "transformers has no tensor-parallel plan for gpt2"
    assert facts["gpt2"].no_context.startswith("the attention of gpt2 is not declared")
    assert facts["llava"].no_context.startswith("llava is a model of images and text")
    assert facts["llava"].must_divide == {"num_attention_heads": 32, "num_key_value_heads": 32}
