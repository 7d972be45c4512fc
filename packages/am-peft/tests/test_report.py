from __future__ import annotations

import torch
from peft import LoraConfig
from torch import nn

from am_peft import apply_lora, freeze, trainable_report


def block(width, **more):
    return nn.ModuleDict(
        {
            "norm1": nn.LayerNorm(width),
            "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}),
            "mlp": nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)}),
            **more,
        }
    )


def experts(width):
    return nn.ModuleDict(
        {
            "gate": nn.Linear(width, 3, bias=False),
            "experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(width, 5, bias=False)}) for _ in range(3)),
        }
    )


def language_model(**more):
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "layers": nn.ModuleList([block(4), block(4, mlp=experts(4))]),
            "norm": nn.LayerNorm(4, bias=False),
            **more,
        }
    )


def vision_language_model():
    visual = {
        "patch_embed": nn.Linear(3, 2),
        "blocks": nn.ModuleList([block(2)]),
        "merger": nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 4)),
    }
    parts = {"visual": nn.ModuleDict(visual), "language_model": language_model()}
    return nn.ModuleDict({"model": nn.ModuleDict(parts), "lm_head": nn.Linear(4, 7)})


def counts(report):
    return {row.name: (row.num_tensors, row.trainable, row.frozen) for row in report.components}


def test_components_of_a_language_model():
    report = trainable_report(language_model(lm_head=nn.Linear(4, 7, bias=False)))
    assert counts(report) == {
        "embed": (1, 28, 0),
        "norm1": (4, 16, 0),
        "attn": (8, 2 * (60 + 20), 0),
        # Of the first layer; the second has experts.
        "mlp": (4, 40 + 36, 0),
        "gate": (1, 12, 0),
        "experts": (3, 60, 0),
        "norm": (1, 4, 0),
        "lm_head": (1, 28, 0),
    }
    assert sum(row.trainable for row in report.components) == report.trainable


def test_other_parts_of_the_model_are_named_and_their_blocks_are_one_component():
    model = vision_language_model()
    report = freeze(model, [{"freeze": "model.visual"}, {"unfreeze": "*.merger.*"}])
    rows = counts(report)
    assert rows["visual: patch_embed"] == (2, 0, 8)
    assert rows["visual: blocks"] == (10, 0, 4 + 18 + 6 + 12 + 10)
    assert rows["visual: merger"] == (4, 12 + 20, 0)
    assert rows["attn"] == (8, 160, 0)
    # The two with the smallest share.
    assert list(rows)[-1] == "other (2 components)"
    assert len(rows) == 10
    assert rows["other (2 components)"] == (2, 4 + 12, 0)


def test_adapters_are_components_of_their_own():
    model = apply_lora(language_model(), LoraConfig(r=2, target_modules=["qkv", "up"]))
    rows = counts(trainable_report(model))
    assert rows["attn"] == (8, 0, 160)
    assert rows["attn (lora)"] == (4, 2 * 2 * (4 + 12), 0)
    assert rows["mlp (lora)"] == (2, 2 * (4 + 8), 0)
    assert rows["experts (lora)"] == (6, 3 * 2 * (4 + 5), 0)


def test_the_table_fits_a_screen_and_the_full_one_has_every_parameter():
    model = nn.ModuleDict(
        {
            f"a_rather_long_name_of_a_part_number_{letter}": nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 3)})
            for letter in "abcdefghijklmn"
        }
    )
    with torch.device("meta"):
        model["large"] = nn.Linear(2**20, 2**20)
    report = freeze(model, [{"freeze": "*"}, {"unfreeze": "*_n.x.bias"}])
    lines = str(report).splitlines()
    assert len(lines) == 4
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == ["component", "tensors", "trainable", "frozen"]
    assert report.components[-1].name == "other (6 components)"
    assert lines[-2].split() == ["9", "frozen", "components", "54", "0", "1,099,512,676,547"]
    assert lines[-1] == "2 of 1,099,512,676,562 parameters train (0.00 %)"
    # All that trains, however small.
    assert any(line.startswith("a_rather_long_n...a_part_number_n") for line in lines)
    assert len(report.full().splitlines()) == 4 * 14 + 2 + 2
    assert "a_rather_long_name_of_a_part_number_f.y.bias " in report.full()


def test_what_trains_as_a_whole_is_one_line():
    assert str(trainable_report(nn.Sequential(nn.Linear(2, 2)))) == "6 of 6 parameters train (100.00 %)"


def test_equal_names_are_told_apart():
    model = nn.ModuleDict(
        {name: nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))}) for name in ("actor", "critic")}
    )
    assert list(counts(trainable_report(model))) == ["actor.mlp", "critic.mlp"]
    assert list(counts(trainable_report(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))) == ["(model)"]
    assert str(trainable_report(nn.Identity())).splitlines()[-1] == "0 of 0 parameters train (0.00 %)"
