from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import nn

from am_peft import LoraFactor, LoraLayer, adapter_state_dict, apply_lora, load_adapter, merge_lora, save_adapter

# peft 0.21 asks transformers 5.23 under a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Int8Linear(nn.Linear):
    """A frozen weight in 8 bits and a scale per row, as libraries for quantisation make of an nn.Linear."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def dequantised(self):
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return F.linear(x, self.dequantised(), self.bias)


# Ten lines that a user writes.
class LoraInt8(LoraLayer, Int8Linear):
    def forward(self, x):
        return self.add_update(Int8Linear.forward(self, x), x)

    def cannot_merge(self):
        return "8 bits would round the update away; keep the adapter apart"

    def merge_(self):
        raise AssertionError("it said that it cannot")


class MergingLoraInt8(LoraInt8):
    def cannot_merge(self):
        return None

    def merge_(self):
        a, b = self.update_of_shard(self.weight)
        merged = self.dequantised() + self.scaling * b @ a
        scale = merged.abs().amax(1, keepdim=True) / 127
        self.weight.copy_((merged / scale).round())
        self.scale.copy_(scale)
        self.take_out_()


ROWS = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(0))
CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": ["0", "2"], "modules_to_save": ["4"]}


def build():
    """Two layers of 8 bits, one plain target, one that is trained whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    model[0] = Int8Linear(model[0])
    return model


def adapted(wrapper=LoraInt8):
    return apply_lora(build(), LoraConfig(**CONFIG), wrappers={Int8Linear: wrapper})


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        loss = (model(ROWS) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_users_wrapper_computes_the_formula_and_trains():
    base = build()
    expected = base(ROWS)
    model = adapted()
    assert isinstance(model[0], Int8Linear)
    assert torch.equal(model(ROWS), expected)
    before = {name: value.clone() for name, value in build().state_dict().items()}
    losses = train(model)
    assert losses[2] < losses[1] < losses[0]
    state = model.state_dict()
    assert before.keys() <= state.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items() if not name.startswith("4."))
    layer = model[0]
    weight = layer.dequantised() + 3.0 * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer(ROWS), F.linear(ROWS, weight, layer.bias), rtol=1e-5, atol=1e-6)
    assert layer.lora_A.weight.dtype == torch.float32
    grads = torch.autograd.grad(layer(ROWS).square().sum(), (layer.lora_A.weight, layer.lora_B.weight))
    a, b = (factor.weight.detach().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    reference = F.linear(ROWS, layer.dequantised() + 3.0 * b @ a, layer.bias).square().sum()
    for grad, exact in zip(grads, torch.autograd.grad(reference, (a, b))):
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-5)


def test_its_files_are_those_of_peft(tmp_path):
    model = adapted()
    train(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(build(), tmp_path, wrappers={Int8Linear: LoraInt8})
    assert torch.equal(loaded(ROWS), model(ROWS))
    assert "base_model.model.0.lora_A.weight" in adapter_state_dict(loaded)
    stock = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(stock(ROWS), model(ROWS), rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="target '0' is a Int8Linear"):
        load_adapter(build(), tmp_path)


def test_merging_is_the_wrappers_to_allow():
    model = adapted()
    train(model)
    expected = model(ROWS)
    with pytest.raises(ValueError, match="cannot merge '0': 8 bits would round the update away"):
        merge_lora(model)
    # Nothing was merged, the plain layer neither.
    assert torch.equal(model(ROWS), expected)
    assert len(adapter_state_dict(model)) == 6
    model = adapted(MergingLoraInt8)
    train(model)
    expected = model(ROWS)
    with torch.no_grad():
        merge_lora(model)
    assert type(model[0]) is Int8Linear
    assert type(model[2]) is nn.Linear
    assert model.state_dict().keys() == build().state_dict().keys()
    assert (model(ROWS) - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_class_without_a_row_is_refused_by_name_with_the_fix():
    model = build()
    with pytest.raises(
        TypeError, match=r"target '0' is a Int8Linear, and wrappers has rows for Linear alone;.*wrappers={Int8Linear: "
    ):
        apply_lora(model, LoraConfig(**CONFIG))
    # A row counts for its very class.
    with pytest.raises(
        TypeError, match=r"'0' is a Int8Linear, and wrappers has rows for Linear, MergingLoraInt8 alone"
    ):
        apply_lora(model, LoraConfig(**CONFIG), wrappers={MergingLoraInt8: LoraInt8})


def test_a_users_row_comes_before_the_table():
    class Doubled(LoraLayer, nn.Linear):
        def forward(self, x):
            return self.add_update(2 * nn.Linear.forward(self, x), x)

        def cannot_merge(self):
            return "it doubles"

        def merge_(self):
            raise AssertionError

    model = apply_lora(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"]), wrappers={nn.Linear: Doubled})
    assert type(model[0]) is Doubled


def test_a_row_that_makes_no_wrapper_is_refused_and_the_model_stays():
    class NoMerge(LoraLayer, Int8Linear):
        pass

    class NoFactor(MergingLoraInt8):
        def __init__(self, base, options):
            super().__init__(base, options)
            self.lora_B = nn.Linear(2, 7)

    model = build()
    with pytest.raises(TypeError, match=r"wrappers\[Int8Linear\] made a NoMerge, which is no am_peft.Wrapper"):
        apply_lora(model, LoraConfig(**CONFIG), wrappers={Int8Linear: NoMerge})
    with pytest.raises(TypeError, match=r"wrappers\[Int8Linear\] made a NoFactor without the LoraFactor 'lora_B'"):
        apply_lora(model, LoraConfig(**CONFIG), wrappers={Int8Linear: NoFactor})
    assert type(model[0]) is Int8Linear
    assert type(model[2]) is nn.Linear
    assert not [module for module in model.modules() if isinstance(module, LoraFactor)]
    assert model[2].weight.requires_grad
