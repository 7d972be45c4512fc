"""Folders written by NeMo AutoModel's and torchtitan's own code (see data/README.md), merged by one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file

import am_ckpt

DATA = Path(__file__).parent / "data"
NEMO, TITAN = DATA / "nemo_automodel", DATA / "torchtitan"


def opened(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of the model that transformers makes of ``folder``."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("source", "like"),
    [
        (NEMO / "safetensors/epoch_0_step_1", None),
        (NEMO / "torch_save/epoch_0_step_1", NEMO / "model"),
        (TITAN / "hugging_face/step-1", TITAN / "model"),
        (TITAN / "native/step-1", TITAN / "model"),
    ],
    ids=["NeMo safetensors", "NeMo torch_save", "torchtitan last_save_in_hf", "torchtitan"],
)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_merged_and_opened_by_transformers(source: Path, like: Path | None, dtype: str | None, tmp_path: Path) -> None:
    am_ckpt.merge(source, tmp_path / "merged", like=like, dtype=dtype)
    root = NEMO if NEMO in source.parents else TITAN
    expected = load_file(root / "expected.safetensors")
    found = opened(tmp_path / "merged")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.float() if dtype else tensor, rtol=0, atol=0, msg=name)


def test_torchtitan_needs_the_config_of_a_model_that_is_known(tmp_path: Path) -> None:
    shutil.copytree(TITAN / "model", tmp_path / "like")
    config = json.loads((tmp_path / "like/config.json").read_text())
    for change, message in (
        ({"model_type": "mistral"}, "convert_to_hf.py"),
        ({"num_attention_heads": 16}, "16 heads"),
        ({"num_hidden_layers": 2}, "does not fit"),
    ):
        (tmp_path / "like/config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            am_ckpt.merge(TITAN / "native/step-1", tmp_path / "merged", like=tmp_path / "like")
        assert not (tmp_path / "merged").exists()
    # Without a config, what is written has the names that were saved, and says so.
    report = am_ckpt.merge(TITAN / "native/step-1", tmp_path / "plain")
    assert "tok_embeddings.weight" in load_file(tmp_path / "plain/model.safetensors")
    assert any("torchtitan's own" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning:torch")
def test_experts_of_torchtitan_are_published_one_by_one(tmp_path: Path) -> None:
    """Names and layout of torchtitan's Qwen3 MoE, of which only the layer's tensors matter here."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        moe_intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        architectures=["Qwen3MoeForCausalLM"],
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "stock")
    stock = load_file(tmp_path / "stock/model.safetensors")
    layer, theirs = "model.layers.0.", "layers.0."
    names = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "lm_head.weight",
        f"{layer}self_attn.q_norm.weight": f"{theirs}attention.q_norm.weight",
        f"{layer}self_attn.k_norm.weight": f"{theirs}attention.k_norm.weight",
        f"{layer}self_attn.o_proj.weight": f"{theirs}attention.wo.weight",
        f"{layer}input_layernorm.weight": f"{theirs}attention_norm.weight",
        f"{layer}post_attention_layernorm.weight": f"{theirs}ffn_norm.weight",
        f"{layer}mlp.gate.weight": f"{theirs}moe.router.gate.weight",
        **{f"{layer}self_attn.{x}_proj.weight": f"{theirs}attention.qkv_linear.w{x}.weight" for x in "qkv"},
    }
    state = {name: stock[published].clone() for published, name in names.items()}
    for published, name in (("gate_proj", "w1_EFD"), ("down_proj", "w2_EDF"), ("up_proj", "w3_EFD")):
        experts = [stock[f"{layer}mlp.experts.{index}.{published}.weight"] for index in range(3)]
        state[f"{theirs}moe.routed_experts.inner_experts.{name}"] = torch.stack(experts)
    state[f"{theirs}moe.tokens_per_expert_E"] = torch.zeros(3)
    dcp.save(state, checkpoint_id=tmp_path / "titan")
    am_ckpt.merge(tmp_path / "titan", tmp_path / "merged", like=tmp_path / "stock")
    assert opened(tmp_path / "merged").keys() == model.state_dict().keys()
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == stock.keys()
    for name, tensor in stock.items():
        assert torch.equal(merged[name], tensor), name
