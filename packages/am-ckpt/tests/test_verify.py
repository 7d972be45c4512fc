"""Verify: every flipped bit of a step is found and named, and folders that would not serve are told apart."""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import corruption_sweep
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from commit_seed import commit_seed
from safetensors.torch import load_file, save_file
from torch import nn
from torch_processes import torch_processes

import am_ckpt
from am_ckpt._cli import main
from am_ckpt._copy.values import TensorReader
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.step import seal


@pytest.fixture
def step(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    # More than one block of 16 MiB, cut inside a tensor.
    model.register_parameter("large", nn.Parameter(torch.randn(3, 2**21)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.numel() < 2**20])
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.1
    optimizer.step()
    files = {"config.json": "{}", "tokenizer.json": "{}", "chat_template.jinja": "x"}
    am_ckpt.Checkpointer(tmp_path, files=files).save(3, {"model": model, "optimizer": optimizer})
    return tmp_path / "step_000003"


class Entry:
    """State with one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor = state["tensor"]


def flip(path: Path, byte: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def test_every_flipped_bit_of_a_step_is_found(step: Path) -> None:
    assert am_ckpt.verify(step, full=True).problems == []
    chance = random.Random(0)
    files = sorted(path for path in step.rglob("*") if path.is_file())
    for path in files:
        for _ in range(4):
            place = chance.randrange(path.stat().st_size), chance.randrange(8)
            flip(path, *place)
            if path.name == "manifest.json":
                with pytest.raises(ValueError, match=r"manifest\.json"):
                    am_ckpt.verify(step, full=True)
            else:
                report = am_ckpt.verify(step, full=True)
                assert report.exit_code == 2
                assert all(str(path) in problem for problem in report.problems)
            flip(path, *place)
    assert am_ckpt.verify(step, full=True).problems == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning:torch")
def test_a_sample_of_the_corruption_sweep() -> None:
    seed = commit_seed()
    found = corruption_sweep.flips(60, seed)
    assert [found[kind]["missed"] for kind in ("step", "digested", "distcp", "bin")] == [0, 0, 0, 0]
    assert found["step"]["found"] == 60
    # Data of a folder without digests: nobody can tell.
    assert found["merged"]["found"] < 60
    # It sets limits to its process.
    with ProcessPoolExecutor(1, torch_processes()) as pool:
        result = pool.submit(corruption_sweep.mutations, range(800), seed).result()
    assert (result["mutations"], result["failures"]) == (800, {})


def test_damage_is_named_by_file_tensor_and_range(step: Path, capsys: Any) -> None:
    (chunk,) = am_ckpt.inspect(step).tensors["large"].chunks
    # In the second block of 16 MiB, which holds nothing else.
    flip(chunk.path, chunk.begin + 17 * 2**20, 3)
    assert main(["verify", str(step)]) == 0
    capsys.readouterr()
    assert main(["verify", str(step), "--full"]) == 2
    shown = capsys.readouterr().out
    begin = chunk.begin - chunk.begin % 4096 + 16 * 2**20
    assert f"{chunk.path} is damaged: bytes {begin} to " in shown
    assert "they hold 'large', '" in shown or "they hold 'large':" in shown
    assert "1 problems (all data read)" in shown


def test_what_is_missing_is_3_and_what_is_cut_is_2(step: Path, capsys: Any) -> None:
    file = next((step / "optim").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert main(["verify", str(step), "--json"]) == 2
    assert f"{file} has {len(content) - 1} bytes" in json.loads(capsys.readouterr().out)["problems"][0]
    file.unlink()
    assert main(["verify", str(step)]) == 3
    assert f"{file}, written by rank 0, is missing" in capsys.readouterr().out


def hugging_face(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    return folder


def test_a_whole_folder_is_ok_and_warnings_say_what_is_not_there(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "model", {"layers.0.w": torch.ones(2)}, num_hidden_layers=1)
    report = am_ckpt.verify(folder, full=True)
    assert (report.kind, report.problems, report.warnings, report.exit_code) == ("huggingface", [], [], 0)
    (folder / "chat_template.jinja").unlink()
    save_file({"old": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    first, second = am_ckpt.verify(folder).warnings
    assert "model-00001-of-00002.safetensors" in first
    assert "no chat template" in second
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in am_ckpt.verify(folder).warnings[-1]
    (folder / "config.json").unlink()
    report = am_ckpt.verify(folder)
    assert (report.exit_code, "no config.json" in report.problems[0]) == (3, True)


def test_an_export_of_a_module_of_ones_own_is_whole_without_a_config(tmp_path: Path, capsys: Any) -> None:
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": nn.Linear(4, 3)})
    am_ckpt.merge(tmp_path / "step_000001", tmp_path / "merged", max_shard_size=16)
    am_ckpt.save_hf(nn.Linear(4, 3), tmp_path / "saved")
    for name in ("merged", "saved"):
        report = am_ckpt.verify(tmp_path / name, full=True)
        assert (report.exit_code, report.problems) == (0, [])
        assert "has no config.json; transformers cannot open it: it was exported without one" in report.warnings[0]
    # A file that was exported is missed, a config too.
    am_ckpt.save_hf(nn.Linear(4, 3), tmp_path / "with", files={"config.json": "{}", "tokenizer.json": "{}"})
    for name in ("config.json", "tokenizer.json"):
        assert am_ckpt.verify(tmp_path / "with").exit_code == 0
        content = (tmp_path / "with" / name).read_bytes()
        (tmp_path / "with" / name).unlink()
        assert main(["verify", str(tmp_path / "with")]) == 3
        assert f"lacks {name}, which was exported with the rest" in capsys.readouterr().out
        (tmp_path / "with" / name).write_bytes(content)


def test_without_full_what_a_load_refuses_is_found(tmp_path: Path, capsys: Any) -> None:
    """All of a step but the values of weights: its state, down to the bits of tensors, and its number."""
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    state = {"model": nn.Linear(4, 3), "data": Entry(torch.arange(50))}
    checkpoints.save(2, state)
    step = tmp_path / "step_000002"
    path = step / "state" / "data.safetensors"
    flip(path, path.stat().st_size - 3, 2)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.load(state, step)
    assert main(["verify", str(step)]) == 2
    assert f"{path} is damaged: bytes " in capsys.readouterr().out
    flip(path, path.stat().st_size - 3, 2)
    assert main(["verify", str(step)]) == 0
    assert "ok (headers, sizes and state read; --full reads all tensors)" in capsys.readouterr().out
    step.rename(tmp_path / "step_000050")
    for command in (["verify"], ["verify", "--full"], ["inspect"]):
        assert main([*command, str(tmp_path / "step_000050")]) == 2
        assert "step_000050 holds step 2, not the one that it is named after" in capsys.readouterr().err
    checkpoints.save(3, state)
    with pytest.warns(UserWarning, match="SKIPPED a damaged checkpoint, going back to step_000003: .* holds step 2"):
        assert checkpoints.load(state) == 3
    # Under any other name it is what it was.
    (tmp_path / "step_000050").rename(tmp_path / "kept")
    assert checkpoints.load(state, tmp_path / "kept") == 2
    with pytest.raises(ValueError, match="step_000050 holds step 2"):
        am_ckpt.reshard(tmp_path / "kept", tmp_path / "step_000050", mesh={"dp": 2})


def test_a_step_of_a_newer_release_is_not_called_damaged(step: Path, capsys: Any) -> None:
    manifest = step / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    for command in (["verify"], ["verify", "--full"], ["inspect"]):
        assert main([*command, str(step)]) == 8
        assert "was written by a newer am_ckpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers=3, but layer 1 of model.layers has no tensor (1 layers missing)"),
        ({"vocab_size": 9}, "vocab_size=9, but 'model.embed_tokens.weight' has 8 rows"),
        ({"hidden_size": 5}, "hidden_size=5, but 'model.embed_tokens.weight' has 4 columns"),
        ({"text_config": {"num_experts": 4}}, "4 experts, but model.layers.0.experts.1 has no tensor (3 are there)"),
    ],
)
def test_config_against_tensors(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(8, 4), "model.layers.2.w": torch.ones(1)}
    tensors |= {f"model.layers.0.experts.{index}.w": torch.ones(1) for index in (0, 2, 3)}
    report = am_ckpt.verify(hugging_face(tmp_path / "model", tensors, **config))
    assert report.exit_code == 3
    assert expected in report.problems[0]


FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float8_e5m2]
NAN_ALONE = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, value) for dtype in FLOATS for value in (float("nan"), float("inf"))]
    + [(dtype, float("nan")) for dtype in NAN_ALONE],
)
def test_values_that_are_not_finite(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensor = torch.full((700, 900), 1.0)
    tensor[699, 3] = value
    folder = hugging_face(tmp_path / "model", {"layers.0.w": tensor.to(dtype), "zero": torch.zeros(3).to(dtype)})
    assert am_ckpt.verify(folder).exit_code == 0
    report = am_ckpt.verify(folder, full=True)
    assert (report.exit_code, len(report.problems)) == (2, 1)
    assert "'layers.0.w'" in report.problems[0]
    assert "is NaN or infinite at [699, 3] (model.safetensors" in report.problems[0]
    assert report.warnings == ["nothing but zeros: 'zero' (model.safetensors)"]


def test_the_largest_finite_values_are_fine(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.full((5,), torch.finfo(dtype).min, dtype=dtype) for dtype in (*FLOATS, *NAN_ALONE)}
    tensors["ids"] = torch.full((3,), -1)
    tensors["scale"] = torch.zeros(3).to(torch.float8_e8m0fnu)
    assert am_ckpt.verify(hugging_face(tmp_path / "model", tensors), full=True).problems == []


def test_zeros_of_either_sign_are_named_and_biases_are_not(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.full((3,), -0.0), "a.bias": torch.zeros(3), "flags": torch.zeros(3, dtype=torch.bool)}
    tensors |= {f"b{i}": torch.zeros(2, dtype=torch.complex64) for i in range(6)}
    (warning,) = am_ckpt.verify(hugging_face(tmp_path / "model", tensors), full=True).warnings
    assert warning.startswith("nothing but zeros: 'b0' (model.safetensors), 'b1'")
    # The sixth and a.weight.
    assert warning.endswith("and 2 more")


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
TOWER = {"depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 2, "out_hidden_size": 32}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.AutoModelForCausalLM, lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)),
    "qwen3_moe": (
        transformers.AutoModelForCausalLM,
        lambda: transformers.Qwen3MoeConfig(
            **SMALL, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1]
        ),
    ),
    "qwen2_5_vl": (
        transformers.AutoModelForImageTextToText,
        lambda: transformers.Qwen2_5_VLConfig(
            text_config={**SMALL, "rope_parameters": ROPE}, vision_config={**TOWER, "fullatt_block_indexes": [1]}
        ),
    ),
}


def pretrained(folder: Path, family: str) -> Path:
    """A tiny model as transformers saves it, with what stands for a tokenizer and a template."""
    auto, config = FAMILIES[family]
    torch.manual_seed(0)
    model = auto.from_config(config()).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20kB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_raises_no_alarm(family: str, tmp_path: Path) -> None:
    report = am_ckpt.verify(pretrained(tmp_path / "model", family), full=True)
    assert (report.problems, report.warnings, report.exit_code) == ([], [], 0)


def change(folder: Path, name: str, value: Any) -> None:
    """Give a tensor of a folder another value, or take it away."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    if value is None:
        del tensors[name], index["weight_map"][name]
    else:
        tensors[name] = value(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor)


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1, 2] = torch.nan
    return tensor


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("family", "prefix", "value", "code", "expected"),
    [
        ("llama", UP, None, 3, f"{UP}, which all other such layers have, is missing"),
        ("llama", "lm_head.weight", None, 3, "tie_word_embeddings=false, but there is no lm_head.weight"),
        ("llama", UP, nan, 2, f"'{UP}' BF16 [48, 32] is NaN or infinite at [1, 2]"),
        ("llama", UP, zeros, 0, f"nothing but zeros: '{UP}'"),
        ("llama", UP, torch.Tensor.float, 0, f"{UP} is F32, in all other such layers BF16"),
        ("llama", "model.embed_tokens.weight", lambda x: x[:60].clone(), 3, "vocab_size=64, but"),
        ("qwen3_moe", "model.layers.2.mlp.experts.3.", None, 3, "4 experts, but model.layers.2.mlp.experts.3 has no"),
        ("qwen3_moe", "model.layers.2.self_attn.k_norm.", None, 3, "model.layers.2.self_attn.k_norm.weight, which all"),
        # The vision tower has a layer 3.
        ("qwen2_5_vl", "model.layers.3.", None, 3, "num_hidden_layers=4, but layer 3 of model.layers has no tensor"),
        ("qwen2_5_vl", "visual.blocks.2.attn.qkv.bias", None, 3, "visual.blocks.2.attn.qkv.bias, which all other"),
    ],
)
def test_what_is_wrong_with_a_saved_model_is_found(
    family: str, prefix: str, value: Any, code: int, expected: str, tmp_path: Path
) -> None:
    folder = pretrained(tmp_path / "model", family)
    for name in am_ckpt.inspect(folder).tensors:
        if name.startswith(prefix):
            change(folder, name, value)
    report = am_ckpt.verify(folder, full=True)
    (found,) = report.problems or report.warnings
    assert (report.exit_code, expected in found) == (code, True), found


def test_layers_of_several_kinds_and_ends_are_no_alarm(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.mlp.{name}": torch.ones(1) for i in range(1, 5) for name in ("gate", "up")}
    # The first lacks what all others have, and the config tells apart the second.
    tensors["model.layers.0.mlp.up"] = torch.ones(1)
    tensors["model.layers.2.conv"] = tensors.pop("model.layers.2.mlp.gate")
    kinds = ["a", "a", "b", "a", "a"]
    report = am_ckpt.verify(hugging_face(tmp_path / "model", tensors, num_hidden_layers=5, layer_types=kinds))
    assert (report.exit_code, report.warnings) == (
        0,
        ["model.layers.0.mlp.gate, which all other such layers have, is missing"],
    )


def test_a_head_that_is_tied_and_different(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(8, 4), "lm_head.weight": torch.ones(8, 4)}
    folder = hugging_face(tmp_path / "model", tensors, tie_word_embeddings=True)
    assert am_ckpt.verify(folder, full=True).exit_code == 0
    save_file({**tensors, "lm_head.weight": torch.full((8, 4), 2.0)}, folder / "model.safetensors")
    assert am_ckpt.verify(folder).exit_code == 0
    report = am_ckpt.verify(folder, full=True)
    assert (report.exit_code, "have other values" in report.problems[0]) == (2, True)
    save_file({**tensors, "lm_head.weight": torch.ones(9, 4)}, folder / "model.safetensors")
    assert "lm_head.weight is [9, 4] and model.embed_tokens.weight [8, 4]" in am_ckpt.verify(folder).problems[0]


def test_dtypes_and_extra_layers_that_the_config_speaks_of(tmp_path: Path) -> None:
    folder = hugging_face(
        tmp_path / "model",
        {"layers.0.w": torch.ones(2)},
        dtype="bfloat16",
        num_nextn_predict_layers=1,
        num_hidden_layers=1,
    )
    assert am_ckpt.verify(folder).warnings == [
        "config.json says bfloat16, most of the weights are F32",
        "config.json says num_nextn_predict_layers=1, no such layer is there: speculative decoding needs it",
    ]


def test_tensors_that_the_index_does_not_name(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "model", {"a": torch.ones(2), "b": torch.ones(2)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    (warning,) = am_ckpt.verify(folder).warnings
    assert (
        "1 tensors of model.safetensors that model.safetensors.index.json does not place there, such as 'b'" in warning
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_part_of_a_distcp_folder_is_read(tmp_path: Path, capsys: Any) -> None:
    state = {"model": {"w": torch.ones(3)}, "optimizer": {"state": {"w": {"exp_avg": torch.zeros(4)}}, "lr": 0.1}}
    dcp.save(state, checkpoint_id=tmp_path / "a")
    assert main(["verify", str(tmp_path / "a"), "--full"]) == 0
    assert "dcp, ok (all tensors read; 1 entries that are no tensors were not)" in capsys.readouterr().out
    state["optimizer"]["state"]["w"]["exp_avg"][2] = torch.inf
    dcp.save(state, checkpoint_id=tmp_path / "b")
    report = am_ckpt.verify(tmp_path / "b", full=True)
    assert (report.exit_code, len(report.warnings)) == (0, 1)
    assert report.warnings[0].startswith("'optimizer.state.w.exp_avg' F32 [4] is NaN or infinite at [2]")
    # The archive of a tensor of the optimizer, whose values are not needed to see it.
    (chunk,) = am_ckpt.inspect(tmp_path / "b").sections["optimizer"]["state.w.exp_avg"].chunks
    flip(chunk.path, chunk.begin + chunk.archive_bytes - 20, 0)
    report = am_ckpt.verify(tmp_path / "b")
    assert (report.exit_code, "'optimizer.state.w.exp_avg' in the archive" in report.problems[0]) == (2, True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["dcp", "torch"])
def test_every_flipped_bit_of_a_tensor_that_torch_saved_is_found(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        "model": {"w": torch.randn(300, 200), "ids": torch.arange(50)},
        "optimizer": {"state": {"m": torch.ones(9)}},
    }
    folder = tmp_path / "step"
    if kind == "dcp":
        dcp.save(state, checkpoint_id=folder)
    else:
        folder.mkdir()
        torch.save(state, folder / "pytorch_model.bin")
    assert am_ckpt.verify(folder, full=True).exit_code == 0
    chance = random.Random(0)
    inventory = am_ckpt.inspect(folder)
    with TensorReader(follow_symlinks=False) as reader:
        for section, tensors in inventory.sections.items():
            for name, source in tensors.items():
                (chunk,) = reader.located(name, source).chunks
                for _ in range(8):
                    byte = chunk.begin + chance.randrange(chunk.box.count * ITEM_BYTES[source.dtype])
                    bit = chance.randrange(8)
                    flip(chunk.path, byte, bit)
                    report = am_ckpt.verify(folder, full=True)
                    assert report.exit_code == 2
                    assert f"{chunk.path} is damaged: bytes " in report.problems[0]
                    whole = name if section == "model" else f"{section}.{name}"
                    assert f"they hold '{whole}'" in report.problems[0]
                    flip(chunk.path, byte, bit)
    assert am_ckpt.verify(folder, full=True).exit_code == 0


def test_a_manifest_that_lists_a_state_without_its_file(step: Path) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["state"].append("schedule")
    del manifest["xxh3_128"]
    (step / "manifest.json").write_bytes(seal(manifest))
    report = am_ckpt.verify(step)
    assert report.exit_code == 3
    assert "lists the state 'schedule', but no file state/schedule.json" in report.problems[0]


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN"])
def test_configs_as_python_writes_them(number: str, tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "model", {"w": torch.ones(2)})
    (folder / "config.json").write_text('{"time_step_limit": [0.0, ' + number + "]}")
    assert am_ckpt.verify(folder).exit_code == 0
    am_ckpt.merge(folder, tmp_path / "merged", dtype="bfloat16")
    assert number in (tmp_path / "merged" / "config.json").read_text()
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        am_ckpt.verify(folder)
