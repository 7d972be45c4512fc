"""Folders as training frameworks lay them out: merged, or refused with a sentence that says what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

import am_ckpt
from am_ckpt._cli import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(6, 4) for name in ("model.embed_tokens.weight", "model.layers.0.up.weight")}


def shards(folder: Path) -> None:
    """What torch's Hugging Face writer writes on two ranks."""
    folder.mkdir(parents=True)
    for rank in range(2):
        part = {name: tensor.chunk(2)[rank].contiguous() for name, tensor in tensors().items()}
        info = json.dumps({name: {"saved_offsets": [3 * rank, 0]} for name in part})
        name = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file(part, folder / name, metadata={"DCP_SHARDING_INFO": info, "DCP_VERSION": "1.0"})


def merged(source: Path, **options: Any) -> tuple[am_ckpt.MergeReport, dict[str, torch.Tensor]]:
    target = source.with_name("merged")
    report = am_ckpt.merge(source, target, **options)
    return report, load_file(target / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


def test_nemo_automodel_sharded(tmp_path: Path) -> None:
    folder = tmp_path / "epoch_0_step_99"
    shards(folder / "model")
    dcp.save({"optim": {"state": {"x": torch.ones(2)}}}, checkpoint_id=folder / "optim")
    (folder / "config.yaml").write_text("{}")
    beside = folder / "model" / ".hf_metadata"
    beside.mkdir()
    (beside / "config.json").write_text('{"model_type": "llama"}')
    (beside / "tokenizer.json").write_text("{}")
    (beside / "fqn_to_file_index_mapping.json").write_text("{}")
    report, found = merged(folder, assume_complete=True)
    assert_same(found)
    assert report.files == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "the model is in the folder 'model'" in report.notes


def test_nemo_automodel_consolidated_and_adapters(tmp_path: Path) -> None:
    whole = tmp_path / "epoch_0_step_9" / "model" / "consolidated"
    whole.mkdir(parents=True)
    save_file(tensors(), whole / "model.safetensors")
    assert_same(merged(tmp_path / "epoch_0_step_9")[1])
    adapter = tmp_path / "epoch_1_step_19" / "model"
    adapter.mkdir(parents=True)
    save_file({"a.lora_A.weight": torch.ones(2, 3)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    am_ckpt.merge(adapter.parent, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_torchtitan(tmp_path: Path, capsys: Any) -> None:
    # The model's own state is at the top level, everything else below a name.
    queries = torch.arange(16.0).view(4, 4)
    model = {
        "tok_embeddings.weight": torch.ones(6, 4),
        "layers.0.attention_norm.weight": torch.ones(4),
        "layers.0.attention.wq.weight": queries,
        "output.weight": torch.ones(6, 4),
    }
    rest = {"optimizer": {"state.tok_embeddings.weight.exp_avg": torch.ones(6, 4)}, "train_state": {"step": 3}}
    folder = tmp_path / "checkpoint" / "step-3"
    dcp.save({**model, **rest}, checkpoint_id=folder)
    inventory = am_ckpt.inspect(folder)
    assert inventory.tensors.keys() == model.keys()
    assert any("torchtitan's own" in note for note in inventory.notes)
    am_ckpt.merge(folder, tmp_path / "merged")
    config = '{"model_type": "llama", "hidden_size": 4, "num_attention_heads": 1}'
    (folder / "config.json").write_text(config)
    am_ckpt.merge(folder, tmp_path / "again")
    # Names as they were before release 0.3; pairs of rows become two halves.
    published = load_file(tmp_path / "again" / "model.safetensors")
    assert {"model.embed_tokens.weight", "lm_head.weight"} < published.keys()
    assert torch.equal(published["model.layers.0.self_attn.q_proj.weight"], queries[[0, 2, 1, 3]])
    assert main(["inspect", str(tmp_path / "checkpoint")]) == 1
    assert f"several checkpoints; give one of them, such as {folder}" in capsys.readouterr().err
    shards(tmp_path / "step-4" / "sharded")
    assert_same(merged(tmp_path / "step-4" / "sharded", assume_complete=True)[1])


def test_accelerate(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "checkpoint_0"
    dcp.save({"model": tensors()}, checkpoint_id=folder / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": {"state": {"x": torch.ones(2)}}}, checkpoint_id=folder / "optimizer_0")
    (folder / "random_states_0.pkl").touch()
    assert_same(merged(folder)[1])
    dcp.save({"model": tensors()}, checkpoint_id=folder / "pytorch_model_fsdp_1")
    assert main(["inspect", str(folder)]) == 1
    assert "several models of accelerate" in capsys.readouterr().err


def test_names_of_wrappers_are_taken_off(tmp_path: Path, capsys: Any) -> None:
    compiled = nn.Module()
    compiled._orig_mod = nn.Linear(3, 2)
    wrapped = {f"module.{name}": value for name, value in compiled.state_dict().items()}
    dcp.save({"model": wrapped}, checkpoint_id=tmp_path / "shards")
    report, found = merged(tmp_path / "shards")
    assert found.keys() == {"weight", "bias"}
    assert any("names of 2 tensors are without those of wrappers" in note for note in report.notes)
    dcp.save({"model": {**wrapped, "module.weight": torch.ones(1)}}, checkpoint_id=tmp_path / "twice")
    assert main(["inspect", str(tmp_path / "twice")]) == 2
    assert "are both 'module.weight' without the names of wrappers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "code", "expected"),
    [
        (["zero_pp_rank_0_mp_rank_00_model_states.pt"], 4, "DeepSpeed ZeRO"),
        (["pytorch_model_fsdp_rank0.bin"], 4, "SHARDED_STATE_DICT"),
        (["pytorch_model_fsdp.bin"], 2, "pytorch_model_fsdp.bin is damaged: File is not a zip file"),
        (["pytorch_model.bin"], 2, "pytorch_model.bin is damaged: File is not a zip file"),
        (["model.pt"], 4, "pickles of unknown content"),
        (["iter_0000100/x", "latest_checkpointed_iteration.txt"], 1, "several checkpoints; give one of them"),
        (["epoch=0-step=10.ckpt/x"], 1, "several checkpoints; give one of them"),
    ],
)
def test_what_is_refused_is_named(files: list[str], code: int, expected: str, tmp_path: Path, capsys: Any) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert main(["merge", str(tmp_path), str(tmp_path.with_name("merged"))]) == code
    assert expected in capsys.readouterr().err


def test_megatron_core_is_refused_and_megatron_fsdp_merged(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "iter_0000100"
    dcp.save({"model": {f"module.{name}": value for name, value in tensors().items()}}, checkpoint_id=folder)
    assert_same(merged(folder)[1])
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    assert main(["inspect", str(folder)]) == 1
    assert "Megatron-Core's dist_checkpointing ('torch_dist')" in capsys.readouterr().err


def test_a_model_of_other_names_than_like(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    like = tmp_path / "like"
    like.mkdir()
    save_file({"transformer.wte.weight": torch.ones(6, 4)}, like / "model.safetensors")
    (like / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' here, 'transformer\.wte\.weight' there"):
        am_ckpt.merge(tmp_path / "shards", tmp_path / "merged", like=like)
