"""The table of what every recipe can do: a capability works in all of them, or is refused by name with the reason.

A new capability is a new row; a new recipe is a new column, and has to answer every row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from am_recipes.configs import RECIPES
from integration_tests import runs

SHORT = {
    "step_scheduler": {"max_steps": 2, "ckpt_every_steps": 2, "val_every_steps": None, "max_tokens": None},
    "lr_scheduler": None,
    "validation_dataset": None,
    "generate": None,
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 1024,
    **SMALL,
}
MAMBA = {"model_type": "mamba", "vocab_size": 4096, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
BERT = {"model_type": "bert", "vocab_size": 4096, "max_position_embeddings": 1024, **SMALL}
HUGE = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 20, "num_attention_heads": 64}
PACKED = {"packed_sequence": {"packed_sequence_size": 1024}}
DOCUMENTS = {"dataset": {"split_documents": True}}
LORA = {"peft": {"r": 2, "target_modules": ["q_proj"]}, "export": {"merge_adapter": True}}


def replaced(config: Mapping[str, Any]) -> dict[str, Any]:
    """A change that gives the model another config, whatever stood there."""
    return {"model": {"config": None}, "+model": {"config": config}}


def adapter_alone_is_saved(run_dir: Path) -> None:
    names = runs.tensors(run_dir / "checkpoints" / "latest" / "model")
    assert names
    assert all("lora_" in name for name in names)


def embeddings_have_no_optimizer_state(run_dir: Path) -> None:
    names = list(runs.tensors(run_dir / "checkpoints" / "latest" / "optim"))
    assert any("q_proj" in name for name in names)
    assert not any("embed_tokens" in name for name in names)


def loads_are_logged(run_dir: Path) -> None:
    rows = [row for row in runs.metrics(run_dir) if "loss" in row]
    assert len(rows) == 2
    assert all(0 <= row["max_violation"] <= 1 and 0 <= row["entropy"] <= 1 for row in rows)


def two_steps(run_dir: Path) -> None:
    assert [row["step"] for row in runs.metrics(run_dir)] == [1, 2]


def three_steps(run_dir: Path) -> None:
    assert [row["step"] for row in runs.metrics(run_dir)] == [1, 2, 3]


def tokens_of_three_steps(recipe: str, folder: Path) -> dict[str, Any]:
    """A length in tokens that the third step reaches."""
    run_dir = trained(folder, recipe, SHORT, {"step_scheduler": {"max_steps": 3}})
    tokens = [row["tokens"] for row in runs.metrics(run_dir)]
    return {"step_scheduler": {"max_steps": None, "max_tokens": sum(tokens[:2]) + 1}}


def trained_in_float32(run_dir: Path) -> None:
    """What trains has float32 weights and optimizer state in the checkpoint; the export has the model's own dtype."""
    state = runs.tensors(run_dir / "checkpoints" / "latest" / "optim")
    moments = {name.removeprefix("optim/exp_avg/"): value for name, value in state.items() if "/exp_avg/" in name}
    assert moments
    assert {value.dtype for value in moments.values()} == {torch.float32}
    weights = runs.tensors(run_dir / "checkpoints" / "latest" / "model")
    assert {weights[f"model/{name}"].dtype for name in moments} == {torch.float32}
    assert {value.dtype for value in runs.tensors(run_dir / "export").values()} == {torch.bfloat16}
    assert json.loads((run_dir / "export" / "config.json").read_text())["dtype"] == "bfloat16"


Works = Callable[[Path], None]
# By capability and recipe: what is changed in the tiny config, and what shows that it works or the refusal.
ALL = tuple(RECIPES)
TABLE: dict[tuple[str, str], tuple[Any, Works | str]] = {
    **{("LoRA", recipe): (LORA, adapter_alone_is_saved) for recipe in ALL},
    **{
        ("freeze rules", recipe): ({"freeze": [{"freeze": "*embed_tokens*"}]}, embeddings_have_no_optimizer_state)
        for recipe in ALL
    },
    **{
        ("freeze rules beside an adapter", recipe): (
            LORA | {"freeze": [{"unfreeze": "*norm*"}]},
            r"\d+ parameters would train beside the adapter, such as model\..*; name their modules in peft\.",
        )
        for recipe in ALL
    },
    ("documents kept apart", "sft"): (replaced(MAMBA) | PACKED, r"mamba: the logits of document 2 move"),
    ("documents kept apart", "kd"): (
        replaced(MAMBA) | PACKED | {"kd_ratio": 0.0},
        r"mamba: the logits of document 2 move",
    ),
    ("documents kept apart", "pretrain"): (replaced(MAMBA) | DOCUMENTS, r"mamba: the logits of document 2 move"),
    ("documents kept apart", "vlm"): (PACKED, r"packed_sequence: not in recipe vlm: rows with images are padded"),
    **{
        ("a model that sees the future", recipe): (
            replaced(BERT) | change,
            r"bert: the logits of earlier tokens move by .* set is_decoder to true",
        )
        # Rows are padded, and nothing but the model itself hides a token's successor.
        for recipe, change in {"sft": {"packed_sequence": None}, "pretrain": {}, "kd": {"kd_ratio": 0.0}}.items()
    },
    ("a model that sees the future", "vlm"): (
        {"model": {"config": {"text_config": None}}, "+model": {"config": {"text_config": BERT | {"vocab_size": 384}}}},
        r"idefics3: the logits of earlier tokens move by",
    ),
    **{
        ("router losses and loads", recipe): (
            replaced(EXPERTS) | {"moe": {"balance_loss": 0.01, "z_loss": 0.001}},
            loads_are_logged,
        )
        for recipe in ("sft", "pretrain", "kd")
    },
    ("router losses and loads", "vlm"): (
        {"model": {"config": {"text_config": EXPERTS | {"vocab_size": 384}}}, "moe": {"balance_loss": 0.01}},
        r"moe: .*are for models with experts, and am-models declares no router of idefics3",
    ),
    **{
        ("an auxiliary loss that the model's config asks for", recipe): (
            replaced(EXPERTS | {"output_router_logits": True}),
            r"moe.balance_loss: is required: the model's config has output_router_logits=true",
        )
        for recipe in ("sft", "pretrain", "kd")
    },
    # transformers adds none where a vision model surrounds the language model.
    ("an auxiliary loss that the model's config asks for", "vlm"): (
        {"model": {"config": {"text_config": EXPERTS | {"vocab_size": 384, "output_router_logits": True}}}},
        two_steps,
    ),
    **{
        ("memory check", recipe): (
            {"model": {"config": HUGE | {"num_key_value_heads": 64}}},
            r"model needs \d{4}\.\d GiB",
        )
        for recipe in ("sft", "pretrain", "kd")
    },
    ("memory check", "vlm"): (
        {"model": {"config": {"text_config": HUGE | {"num_key_value_heads": 64}}}},
        r"model needs \d{4}\.\d GiB",
    ),
    **{
        ("a model in half precision", recipe): (
            {"model": {"dtype": None, "config": {"dtype": "bfloat16"}}},
            trained_in_float32,
        )
        for recipe in ALL
    },
    **{
        ("deterministic operations alone", recipe): (
            {"deterministic": True, loss: {"_target_": f"integration_tests.user_code.unordered_{kind}"}},
            r"\.yaml:\d+: deterministic: true, and put_ has no deterministic form in torch .* set deterministic: false",
        )
        for recipe, loss, kind in (
            *((recipe, "loss_fn", "cross_entropy") for recipe in ("sft", "pretrain", "vlm")),
            ("kd", "kd_loss_fn", "distillation"),
        )
    },
    **{("length in tokens", recipe): (tokens_of_three_steps, three_steps) for recipe in ALL},
    **{
        ("a loss that is no sum", recipe): (
            {"loss_fn": {"_target_": "integration_tests.user_code.mean_cross_entropy"}},
            r"a loss is the SUM",
        )
        for recipe in ("sft", "pretrain", "vlm")
    },
    ("a loss that is no sum", "kd"): (
        {"kd_loss_fn": {"_target_": "integration_tests.user_code.mean_distillation"}},
        r"kd_loss_fn gave .* a loss is the SUM",
    ),
}


def outcome(folder: Path, recipe: str, *changes: Mapping[str, Any]) -> tuple[tuple[int, str], Path]:
    """The command on the tiny config of a recipe with `changes` merged in order; its run directory."""
    config = runs.shipped(runs.TINY[recipe])
    for change in changes:
        for key, value in change.items():
            runs.merge(config, {key.removeprefix("+"): value})
    number = len(list(folder.glob("*.yaml")))
    file = folder / f"{number}.yaml"
    file.write_text(yaml.safe_dump(config))
    return runs.command(str(file), "--run_dir", str(folder / f"run-{number}")), folder / f"run-{number}"


def trained(folder: Path, recipe: str, *changes: Mapping[str, Any]) -> Path:
    (status, text), run_dir = outcome(folder, recipe, *changes)
    assert status == 0, text
    return run_dir


def test_every_recipe_answers_every_capability() -> None:
    capabilities = {capability for capability, _ in TABLE}
    assert {(capability, recipe) for capability in capabilities for recipe in RECIPES} == set(TABLE)
    assert runs.TINY.keys() == RECIPES.keys()


@pytest.mark.parametrize(("capability", "recipe"), list(TABLE), ids=lambda value: value.replace(" ", "-"))
def test_it_works_or_is_refused_by_name(capability: str, recipe: str, tmp_path: Path) -> None:
    change, expected = TABLE[capability, recipe]
    change = change(recipe, tmp_path) if callable(change) else change
    if isinstance(expected, str):
        (status, text), run_dir = outcome(tmp_path, recipe, SHORT, change)
        assert status in (1, 2), text
        assert re.search(expected, text), text
        assert not (run_dir / "metrics.jsonl").exists()
    else:
        expected(trained(tmp_path, recipe, SHORT, change))
