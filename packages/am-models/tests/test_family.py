"""Rows of the caller's own: a model of no table, defined here, on our kernels and with its loss from hidden states."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from tiny_models import SMALL, assert_close, config_of, documents, image_rows, joined, linear_cross_entropy, stock
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import am_models


class MineConfig(transformers.LlamaConfig):
    model_type = "mine"
    head_multiplier: float = 0.5
    head_cap: float = 3.0


class MineNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-5

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


class MineMLP(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, 40), nn.Linear(size, 40)
        self.down_proj = nn.Linear(40, size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MineAttention(nn.Module):
    is_causal = True

    def __init__(self, config: MineConfig):
        super().__init__()
        self.config, self.num_key_value_groups, self.training = config, 1, True
        self.qkv_proj, self.o_proj = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv_proj(hidden_states).chunk(3, dim=-1))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, q, k, v, attention_mask, scaling=0.3, **kwargs)
        return self.o_proj(out.flatten(2)), None


class MineForCausalLM(transformers.LlamaForCausalLM):
    config_class = MineConfig

    def __init__(self, config: MineConfig):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn, layer.mlp = MineAttention(config), MineMLP(32)
            layer.input_layernorm, layer.post_attention_layernorm = MineNorm(32), MineNorm(32)

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        cap = self.config.head_cap
        outputs.logits = torch.tanh(outputs.logits * self.config.head_multiplier / cap) * cap
        return outputs


MINE = am_models.Family(
    module=__name__,
    attention="MineAttention",
    rotary=True,
    norm="MineNorm",
    gated_mlp="MineMLP",
    activation=None,
    softcap="head_cap",
    scale="head_multiplier",
)


def mine() -> MineForCausalLM:
    torch.manual_seed(0)
    model = MineForCausalLM(MineConfig(**{**SMALL, "num_key_value_heads": 4})).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def stock_loss(reference: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each document alone through the model's own forward."""
    loss = torch.zeros(())
    for document in range(1, int(batch["document_ids"].max()) + 1):
        here = batch["document_ids"][0] == document
        logits = reference(batch["input_ids"][:, here]).logits[0]
        labels = batch["shift_labels"][0, here]
        loss = loss + nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss


def test_a_users_row_puts_a_users_model_on_our_kernels():
    reference = mine()
    model = copy.deepcopy(reference)
    report = am_models.optimize(model, family=MINE)
    # The last norm is Llama's own class, which this row does not name.
    assert report.parts["norm"] == report.parts["activation"].replace("2 mod", "4 mod") == "am_kernels (4 modules)"
    assert report.parts["rope"] == "am_kernels (2 modules)"
    assert report.parts["attention"].startswith("am_kernels")
    assert report.loss == "hidden states"
    am_models.require_no_leak(model, packed=True)
    batch = documents([7, 1, 5], padding=3)
    expected = stock_loss(reference, batch)
    loss = am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch))
    assert_close(loss, expected, "loss")
    loss.backward()
    expected.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name].grad, f"gradient of {name}")
    # The row matters: another head is another loss.
    twin = copy.deepcopy(reference)
    am_models.optimize(twin, family=dataclasses.replace(MINE, softcap=None))
    other = am_models.forward_with_loss(twin, linear_cross_entropy, *am_models.split_batch(twin, batch))
    assert (other - expected).abs() > 0.1


def test_a_row_is_kept_on_the_instance_and_nowhere_else():
    before = dict(am_models.FAMILIES)
    model, other = mine(), mine()
    first = am_models.optimize(model, family=MINE)
    assert str(am_models.optimize(model)) == str(first)
    assert str(am_models.optimize(copy.deepcopy(model))) == str(first)
    assert am_models.optimize(other).loss == "logits: what mine does after its head is not declared"
    assert before == am_models.FAMILIES


def test_a_users_row_wins_over_the_table():
    row = dataclasses.replace(am_models.FAMILIES["llama"], norm=None, softcap="rms_norm_eps")
    model = am_models.AutoModelForCausalLM.from_config(config_of("llama"), family=row)
    assert am_models.optimize(model).parts["norm"].startswith("stock: no norm of llama")
    inputs, targets = am_models.split_batch(model, documents([5]))

    def caps(hidden, weight, labels, *, bias, softcap, scale):
        return torch.tensor(softcap)

    assert am_models.forward_with_loss(model, caps, inputs, targets) == model.config.rms_norm_eps
    with pytest.raises(ValueError, match=r"kernels=\{\"norm\": True\} cannot be honoured: no norm of llama"):
        am_models.optimize(model, kernels={"norm": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "MineNrom"}, r"test_family has no module class 'MineNrom'; the nearest names there are MineNorm"),
        ({"attention": "MineConfig"}, r"has no module class 'MineConfig'"),
        ({"router": "MineRouter"}, r"has no module class 'MineRouter'"),
        ({"module": "no_such.modeling_mine"}, r"no module 'no_such.modeling_mine' can be imported"),
        ({"module": "llamma"}, r"no module 'llamma' can be imported; give a family of transformers or"),
        (
            {"scale": "head_multplier"},
            r"Family\(scale='head_multplier'\): .* of mine has no .*nearest.* head_multiplier",
        ),
        ({"softcap": "head_capp"}, r"Family\(softcap='head_capp'\)"),
        ({"activation": "hidden_acts"}, r"Family\(activation='hidden_acts'\).*hidden_act"),
        ({"router": "MineMLP"}, r"Family\(experts_per_token='num_experts_per_tok'\): .* mine has no key 'num_experts_"),
        (
            {"router": "MineMLP", "experts_per_token": "num_hidden_layers"},
            r"Family\(router='MineMLP'\): the configuration of mine has no key 'output_router_logits'",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(changes, message):
    model = mine()
    with pytest.raises(ValueError, match=message):
        am_models.optimize(model, family=dataclasses.replace(MINE, **changes))
    assert not any("forward" in vars(module) for module in model.modules())
    assert am_models.optimize(model).loss.startswith("logits")


def test_a_users_row_says_how_many_experts_a_token_uses():
    row = dataclasses.replace(am_models.FAMILIES["qwen3_moe"], experts_per_token="num_key_value_heads")
    changes = {"num_experts_per_tok": 3, "num_key_value_heads": 1}
    assert am_models.optimize(stock("qwen3_moe", **changes)).num_experts_per_token == 3
    assert am_models.optimize(stock("qwen3_moe", **changes), family=row).num_experts_per_token == 1
    row = dataclasses.replace(row, experts_per_token="hidden_act")
    with pytest.raises(ValueError, match=r"experts_per_token='hidden_act'\): 'silu' in .* is no number of experts"):
        am_models.optimize(stock("qwen3_moe"), family=row)


class MineVisionConfig(transformers.LlavaConfig):
    model_type = "mine_vl"


def test_a_users_vision_row_equals_the_declared_one():
    declared = stock("llava")
    facts = declared.config.to_dict()
    del facts["model_type"]
    model = transformers.LlavaForConditionalGeneration(MineVisionConfig(**facts))
    model.load_state_dict(declared.state_dict())
    row = am_models.VISION_FAMILIES["llava"]
    with pytest.raises(ValueError, match="mine_vl is no declared family with images"):
        am_models.vision_parts(model)
    with pytest.raises(ValueError, match="what surrounds the language model of mine_vl is not declared"):
        am_models.optimize(model, family=am_models.FAMILIES["qwen2"])
    with pytest.raises(ValueError, match=r"tower='vision_towr'.*no such part; the nearest.* vision_tower"):
        am_models.optimize(model, vision_family=dataclasses.replace(row, tower="vision_towr"))
    assert am_models.optimize(model, vision_family=row).loss == "hidden states"
    am_models.optimize(declared)
    assert am_models.vision_parts(model) == am_models.vision_parts(declared)
    assert am_models.num_position_axes(model.config, vision_family=dataclasses.replace(row, axes=3)) == 3
    for numbers in ([2, 0], [0]):
        batch = joined("llava", image_rows("llava", numbers))
        inputs, targets = am_models.split_batch(model, batch)
        assert set(targets) == {"shift_labels"}
        loss = am_models.forward_with_loss(model, linear_cross_entropy, inputs, targets)
        assert torch.equal(loss, am_models.forward_with_loss(declared, linear_cross_entropy, inputs, targets))


def test_a_text_model_takes_no_vision_row():
    with pytest.raises(ValueError, match="vision_family given, but llama has no vision tower"):
        am_models.optimize(stock("llama"), vision_family=am_models.VISION_FAMILIES["llava"])


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"llama: hidden_act='sillu' is no activation .* choose among silu"):
        am_models.AutoModelForCausalLM.from_config(config_of("llama", hidden_act="sillu"))


def test_a_model_that_was_not_optimised_is_named():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no method forward_with_loss yet; call am_models.opt"):
        am_models.forward_with_loss(stock("llama"), linear_cross_entropy, {}, {})
