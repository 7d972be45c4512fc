from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn

from am_peft import apply_lora, freeze, trainable_report


def model():
    return nn.ModuleDict(
        {
            "vision": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)),
            "text": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(4)])}),
            "head": nn.Linear(3, 5),
        }
    )


def trainable(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_rules_apply_in_order():
    net = model()
    freeze(net, [{"freeze": "*"}, {"unfreeze": "text"}, {"freeze": "text.layers.[01].*"}, {"unfreeze": "head.bias"}])
    assert trainable(net) == {"text.layers.2.weight", "text.layers.3.weight", "head.bias"}


def test_a_frozen_tower_keeps_its_adapters_unless_they_are_named():
    net = apply_lora(model(), LoraConfig(target_modules=["*vision.0", "*layers.1"]))
    lora = {f"{name}.lora_{factor}.weight" for name in ("vision.0", "text.layers.1") for factor in "AB"}
    freeze(net, [{"freeze": "vision"}])
    assert trainable(net) == lora
    freeze(net, [{"freeze": "vision.*lora_*"}])
    assert trainable(net) == {name for name in lora if name.startswith("text")}


def test_report_folds_layers_and_counts_elements():
    net = model()
    report = freeze(net, [{"freeze": "vision"}])
    rows = {row.name: (row.num_tensors, row.trainable, row.frozen) for row in report.rows}
    assert rows["text.layers.*.weight"] == (4, 36, 0)
    assert rows["vision.*.weight"] == (2, 0, 15)
    assert (report.trainable, report.frozen) == (36 + 20, 21)
    assert report == trainable_report(net)
    assert str(report).splitlines()[-1] == "56 of 77 parameters train (72.73 %)"


def test_wrong_rules_change_nothing():
    net = model()
    before = trainable(net)
    with pytest.raises(ValueError, match=r"freeze pattern 'visoin' matches no parameter; nearest: .*vision"):
        freeze(net, [{"freeze": "*"}, {"freeze": "visoin"}])
    with pytest.raises(ValueError, match=r"rule {'thaw': '\*'}"):
        freeze(net, [{"freeze": "*"}, {"thaw": "*"}])
    assert trainable(net) == before


def test_frozen_parameters_get_no_gradient():
    net = model()
    freeze(net, [{"freeze": "head.weight"}])
    net["head"](torch.randn(2, 3)).sum().backward()
    assert net["head"].weight.grad is None
    assert net["head"].bias.grad is not None
