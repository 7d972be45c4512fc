"""First values: those of transformers in distribution, and of nothing but the seed and the name."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from all_families import FAMILIES, config_of
from torch import nn

import am_models
from am_testing import run_distributed

# Where modules set the values of others, rows are zeros, heads are tied, and models are inside of models.
CHOSEN = (
    "afmoe apertus bert cohere2 deepseek_v3 falcon_mamba gemma gemma2 gemma3_text gpt2 gpt_bigcode gpt_oss "
    "granite jamba llama mamba mamba2 mistral mixtral modernbert-decoder nanochat nemotron_h opt qwen2 "
    "qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma roberta rwkv smollm3 xlm-roberta"
)
# What their constructors alone set, so that nothing can set it again.
REFUSED = {
    "apertus": "alpha_p",
    "data2vec-text": "lm_head.bias",
    "openai-gpt": "c_attn.weight",
    "reformer": "lm_head.bias",
}


def on_meta(family: str) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config_of(family))


def stock(family: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config_of(family)).state_dict()


def names(model: nn.Module) -> list[str]:
    """Of every parameter and stored buffer, the first where they are tied."""
    found: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), name)
    return list(found.values())


def drawn(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    values = {}
    for number, name in enumerate(names(model)):
        torch.manual_seed(1000 * seed + number)
        values[name] = am_models.initial_value(model, name)
    return values


# Modelling files of some families, in older transformers, decorate with it when they are imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in CHOSEN.split() else pytest.mark.slow) for name in FAMILIES]
)
def test_distributions_equal_stock(family):
    model = on_meta(family)
    if family in REFUSED:
        with pytest.raises(ValueError, match=rf"nothing sets the first value of '.*{REFUSED[family]}': neither"):
            drawn(model, 1)
        return
    references, ours = [stock(family, 1), stock(family, 2)], [drawn(model, 1), drawn(model, 2)]
    for name, value in ours[0].items():
        first, second = references[0][name], references[1][name]
        assert value.dtype == first.dtype
        fixed = first == second
        assert torch.equal(fixed, value == ours[1][name]), f"{name}: other elements vary"
        assert torch.equal(value[fixed], first[fixed]), f"{name}: other constants"
        expected, actual = first[~fixed].double(), value[~fixed].double()
        if len(expected) > 16:
            spread, error = expected.std(), len(expected) ** -0.5
            assert abs(actual.mean() - expected.mean()) <= 7 * spread * error, f"{name}: mean {actual.mean():.3g}"
            assert abs(actual.std() / spread - 1) <= 7 * error, f"{name}: std {actual.std():.3g}, stock {spread:.3g}"


def test_weights_of_residual_paths_and_steps_of_time_start_as_published():
    config = transformers.GPT2Config(n_embd=64, n_layer=8, n_head=4, vocab_size=64, n_positions=16)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert am_models.initial_value(model, "transformer.h.3.attn.c_attn.weight").std() == pytest.approx(0.02, rel=0.05)
    assert am_models.initial_value(model, "transformer.h.3.mlp.c_proj.weight").std() == pytest.approx(0.005, rel=0.05)
    bias = am_models.initial_value(on_meta("mamba"), "backbone.layers.0.mixer.dt_proj.bias")
    assert -7.0 < bias.mean() < -3.0


def _drawn_on_shards(family: str) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = on_meta(family)
    whole = drawn(model, 1)
    am_models.optimize(model)
    for module in next(each for each in model.modules() if type(each) is nn.ModuleList):
        fully_shard(module)
    fully_shard(model)
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    values = drawn(model, 1)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert all(torch.equal(value, whole[name]) for name, value in values.items())
    return values


def test_values_do_not_depend_on_the_layout():
    for family in ("llama", "gpt2", "mamba", "mixtral", "roberta"):
        expected = drawn(on_meta(family), 1)
        for size in (1, 2, 4):
            for values in run_distributed(_drawn_on_shards, size, family):
                assert values.keys() == expected.keys()
                assert all(torch.equal(value, expected[name]) for name, value in values.items())


class Adapter(nn.Module):
    """An adapter of another package than the model's; a name that GPT-2's own rule would match."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 4))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 7.0)


def test_an_adapter_starts_as_it_says():
    model = on_meta("gpt2")
    model.transformer.h[0].attn.c_proj.adapter = Adapter()
    value = am_models.initial_value(model, "transformer.h.0.attn.c_proj.adapter.weight")
    assert torch.equal(value, torch.full((5, 4), 7.0))


def test_nothing_of_a_loaded_model_changes():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of("mamba2"))
    before, kept = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    drawn(model, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
