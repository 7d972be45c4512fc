"""Folders written by NeMo AutoModel's and torchtitan's own code (see data/README.md), merged by one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch import nn

import am_ckpt

DATA = Path(__file__).parent / "data"
NEMO, TITAN = DATA / "nemo_automodel", DATA / "torchtitan"


def opened(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of the model that transformers makes of `folder`."""
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


def like(folder: Path, **changes: Any) -> Path:
    """The model's folder, with another config; None leaves a value out."""
    folder.mkdir(exist_ok=True)
    config = json.loads((TITAN / "model/config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "convert_to_hf.py"),
        ({"num_hidden_layers": 2}, "does not fit"),
        # A key of each query, as transformers reads it: 16 rows.
        ({"num_key_value_heads": None}, r"wk.weight' is \[8, 16\], but .*config.json says 4 heads of 4 rows"),
        ({"num_key_value_heads": 4}, r"wk.weight' is \[8, 16\], but .* 4 heads of 4 rows .*num_key_value_heads=4"),
        ({"num_key_value_heads": 1}, r"wk.weight' is \[8, 16\], but .* 1 heads of 4 rows"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0, which must be a positive integer"),
        ({"num_attention_heads": 8}, r"wq.weight' is \[16, 16\], but .* 8 heads of 4 rows"),
        ({"num_attention_heads": 2, "head_dim": None}, r"wk.weight' is \[8, 16\], but .* 2 heads of 8 rows"),
        ({"num_attention_heads": 16, "head_dim": None}, "16 heads of 1 rows .*no pairs"),
        ({"num_attention_heads": 32, "head_dim": None}, "32 heads of 0 rows .*no pairs"),
        ({"num_attention_heads": None}, "num_attention_heads=None, which must be a positive integer"),
        ({"num_attention_heads": "4"}, "num_attention_heads='4', which must be a positive integer"),
        ({"num_attention_heads": True}, "num_attention_heads=True, which must be a positive integer"),
        ({"hidden_size": None}, "hidden_size=None, which must be a positive integer"),
        ({"head_dim": 8}, "4 heads of 8 rows"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
    ],
    ids=str,
)
def test_torchtitan_needs_the_config_of_its_model(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        am_ckpt.merge(TITAN / "native/step-1", tmp_path / "merged", like=like(tmp_path / "like", **changes))
    assert not (tmp_path / "merged").exists()


def test_what_a_config_leaves_out_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "partial_rotary_factor": 1.0}
    folder = like(tmp_path / "like", head_dim=None, rope_parameters=rope)
    am_ckpt.merge(TITAN / "native/step-1", tmp_path / "merged", like=folder)
    expected, found = (
        load_file(path) for path in (TITAN / "expected.safetensors", tmp_path / "merged/model.safetensors")
    )
    assert found.keys() == expected.keys()
    assert all(found[name].equal(value) for name, value in expected.items())


def test_names_of_torchtitan_are_kept_without_a_config(tmp_path: Path) -> None:
    report = am_ckpt.merge(TITAN / "native/step-1", tmp_path / "plain")
    assert "tok_embeddings.weight" in load_file(tmp_path / "plain/model.safetensors")
    assert any("torchtitan's own" in note for note in report.notes)
    report = am_ckpt.merge(TITAN / "native/step-1", tmp_path / "merged", like=TITAN / "model")
    assert not any("torchtitan's own" in note for note in report.notes)
    assert any("became those of transformers" in note for note in report.notes)


def llama(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A state dict of the model of TITAN in torchtitan's names, with biases."""
    torch.manual_seed(0)
    layer = "layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (32, 16),
        "norm.weight": (16,),
        "lm_head.weight": (32, 16),
        **{f"{layer}attention.w{x}.weight": (rows, 16) for x, rows in (("q", 16), ("k", 8), ("v", 8), ("o", 16))},
        **{f"{layer}attention.w{x}.bias": (rows,) for x, rows in (("q", 16), ("k", 8), ("v", 8))},
        f"{layer}attention_norm.weight": (16,),
        f"{layer}ffn_norm.weight": (16,),
        **{f"{layer}feed_forward.w{x}.weight": shape for x, shape in ((1, (24, 16)), (2, (16, 24)), (3, (24, 16)))},
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()} | more


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_biases_are_put_in_order_as_the_rows_that_they_belong_to(tmp_path: Path) -> None:
    state = llama()
    dcp.save(state, checkpoint_id=tmp_path / "titan")
    am_ckpt.merge(tmp_path / "titan", tmp_path / "merged", like=TITAN / "model")
    found = load_file(tmp_path / "merged/model.safetensors")
    for x, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias"):
            value = state[f"layers.0.attention.w{x}.{kind}"]
            # As torchtitan's Llama3StateDictAdapter does.
            expected = value.view(heads, 2, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
            assert torch.equal(found[f"model.layers.0.self_attn.{x}_proj.{kind}"], expected)
    assert torch.equal(found["model.layers.0.self_attn.v_proj.bias"], state["layers.0.attention.wv.bias"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("name", "shape"), [("output.weight", (32, 16)), ("layers.0.attention.qkv_linear.wq.weight", (16, 16))]
)
def test_two_tensors_of_one_name_are_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    dcp.save(llama(**{name: torch.zeros(shape)}), checkpoint_id=tmp_path / "titan")
    with pytest.raises(ValueError, match="in transformers' names: the checkpoint is of two models") as refused:
        am_ckpt.merge(tmp_path / "titan", tmp_path / "merged", like=TITAN / "model")
    assert repr(name) in str(refused.value)


class TiedTitan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4, bias=False)
        self.output = nn.Linear(4, 8, bias=False)
        self.output.weight = self.tok_embeddings.weight
        layer = nn.Module()
        layer.attention_norm = nn.LayerNorm(4, bias=False)
        self.layers = nn.ModuleDict({"0": layer})


def test_a_tied_head_under_torchtitans_name_is_not_lost(tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path / "run").save(1, {"model": TiedTitan()})
    step = tmp_path / "run/step_000001"
    sizes = {"model_type": "qwen3", "vocab_size": 8, "hidden_size": 4}
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to model.embed_tokens.weight .* it would be lost"):
        am_ckpt.merge(step, tmp_path / "merged", like=like(tmp_path / "like", **sizes))
    am_ckpt.merge(step, tmp_path / "merged", like=like(tmp_path / "like", **sizes, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "merged/model.safetensors")
    report = am_ckpt.diff(step, tmp_path / "merged")
    assert (report.num_equal, report.differences) == (3, [])


def test_diff_of_torchtitan_and_what_it_was_merged_to(tmp_path: Path) -> None:
    titan, merged = TITAN / "native/step-1", tmp_path / "merged"
    am_ckpt.merge(titan, merged, like=TITAN / "model")
    for pair in ((titan, merged), (merged, titan)):
        report = am_ckpt.diff(*pair)
        assert (report.num_equal, report.differences, report.notes) == (
            len(load_file(merged / "model.safetensors")),
            [],
            [],
        )
    # Names are the same on both sides.
    assert am_ckpt.diff(titan, titan).num_equal == report.num_equal
    like(merged, num_attention_heads=8)
    for change, why in ((lambda: None, "8 heads of 4 rows"), ((merged / "config.json").unlink, "is in neither")):
        change()
        report = am_ckpt.diff(titan, merged)
        # lm_head.weight has the same name in both.
        assert report.num_equal == 1
        assert report.exit_code == 7
        assert "compared as they are" in report.notes[0]
        assert why in report.notes[0]


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
