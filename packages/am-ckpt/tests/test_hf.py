"""Hugging Face folders: into meta and sharded models, and out of them again."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import am_ckpt
from am_ckpt._cli import main
from am_ckpt.errors import UnsafeError
from am_testing import run_distributed

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def build(family: str, tied: bool = False) -> Any:
    if family == "gemma3":
        config = transformers.Gemma3TextConfig(
            **SIZES, tie_word_embeddings=tied, layer_types=["sliding_attention", "full_attention"]
        )
        return transformers.Gemma3ForCausalLM(config)
    if family == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, tie_word_embeddings=tied))
    if family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        return transformers.Qwen3MoeForCausalLM(config)
    rope = {"llama": None, "llama3": LLAMA3, "yarn": YARN}[family]
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied, rope_parameters=rope)
    return transformers.LlamaForCausalLM(config)


def on_meta(family: str, tied: bool = False) -> Any:
    with torch.device("meta"):
        return build(family, tied)


def same_tensors(model: nn.Module, reference: nn.Module) -> None:
    here = dict(model.named_parameters()) | dict(model.named_buffers())
    there = dict(reference.named_parameters()) | dict(reference.named_buffers())
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        value = here[name].full_tensor() if isinstance(here[name], DTensor) else here[name]
        assert value.dtype == tensor.dtype
        assert torch.equal(value, tensor), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama3", "yarn", "qwen3", "gemma3"])
def test_a_meta_model_becomes_the_stock_model(family: str, tied: bool, tmp_path: Path) -> None:
    reference = build(family, tied)
    reference.save_pretrained(tmp_path / "stock")
    stock = type(reference).from_pretrained(tmp_path / "stock")
    model = on_meta(family, tied)
    am_ckpt.load_hf(model, tmp_path / "stock")
    same_tensors(model, stock)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    am_ckpt.save_hf(model, tmp_path / "ours", files_from=tmp_path / "stock")
    am_ckpt.save_hf(model, tmp_path / "own_config", max_shard_size=20_000)
    assert (tmp_path / "own_config" / "model.safetensors.index.json").is_file()
    ids = torch.arange(12)[None]
    for folder in ("ours", "own_config"):
        opened, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(opened(ids).logits, stock(ids).logits)


def sharded(folder: str, tied: bool, out: str) -> bool:
    model = on_meta("llama", tied)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    am_ckpt.load_hf(model, folder)
    same_tensors(model, transformers.LlamaForCausalLM.from_pretrained(folder))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    logits = model(torch.arange(12)[None]).logits
    am_ckpt.save_hf(model, out, files_from=folder, max_shard_size=30_000)
    return bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("tied", [False, True])
def test_shards_are_filled_and_written_without_gathering(tied: bool, tmp_path: Path) -> None:
    reference = build("llama", tied)
    reference.save_pretrained(tmp_path / "stock", max_shard_size=40_000)
    assert run_distributed(sharded, 4, str(tmp_path / "stock"), tied, str(tmp_path / "out")) == [True] * 4
    same_tensors(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out"), reference)


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def counted(folder: str) -> int:
    with torch.device("meta"):
        model = nn.Linear(512, 4096, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    before = read_bytes()
    am_ckpt.load_hf(model, folder)
    return read_bytes() - before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count bytes read per process")
def test_each_rank_reads_its_share_of_the_bytes(tmp_path: Path) -> None:
    whole = {"weight": torch.randn(4096, 512)}
    save_file(whole, tmp_path / "model.safetensors")
    total = whole["weight"].nbytes
    for count in run_distributed(counted, 4, str(tmp_path)):
        # A quarter of the data and the header; the rest is a margin for what the interpreter itself reads.
        assert total / 4 <= count < total / 4 + 100_000


def expert_mapping(model: nn.Module) -> list[dict[str, Any]]:
    records = []
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            base, (experts, double, _) = name.removesuffix("gate_up_proj"), parameter.shape
            for expert in range(experts):
                for index, part in enumerate(("gate_proj", "up_proj")):
                    rows = [index * double // 2, (index + 1) * double // 2]
                    slice_ = [[expert, expert + 1], rows, None]
                    records.append(
                        {
                            "file": f"{base}{expert}.{part}.weight",
                            "parameter": name,
                            "slice": slice_,
                            "transpose": False,
                        }
                    )
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("down_proj")
            for expert in range(parameter.shape[0]):
                slice_ = [[expert, expert + 1], None, None]
                records.append(
                    {"file": f"{base}{expert}.down_proj.weight", "parameter": name, "slice": slice_, "transpose": False}
                )
    return records


def moe(folder: str, out: str) -> int:
    model = on_meta("qwen3_moe")
    records = expert_mapping(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    am_ckpt.load_hf(model, folder, mapping=records)
    same_tensors(model, transformers.Qwen3MoeForCausalLM.from_pretrained(folder))
    am_ckpt.save_hf(model, out, mapping=records, files_from=folder)
    return len(records)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fused_experts_come_from_and_go_to_per_expert_files(world_size: int, tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "stock")
    stock = load_file(tmp_path / "stock" / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in stock
    run_distributed(moe, world_size, str(tmp_path / "stock"), str(tmp_path / "out"))
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], value) for name, value in stock.items())


def rounded(folder: str, out: str) -> None:
    model = on_meta("qwen3_moe")
    records = expert_mapping(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    am_ckpt.load_hf(model, folder, mapping=records)
    names = [name for name, _ in model.named_parameters() if "norm" not in name]
    am_ckpt.save_hf(model, out, mapping=records, files_from=folder, dtypes=dict.fromkeys(names, torch.bfloat16))
    same_tensors(model, transformers.Qwen3MoeForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("world_size", [1, 2])
def test_files_may_hold_parameters_in_another_dtype(world_size: int, tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "stock")
    stock = load_file(tmp_path / "stock" / "model.safetensors")
    run_distributed(rounded, world_size, str(tmp_path / "stock"), str(tmp_path / "out"))
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        expected = value if "norm" in name else value.bfloat16()
        assert ours[name].dtype == expected.dtype
        assert torch.equal(ours[name], expected)


def test_a_dtype_for_no_parameter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtypes: 'wieght' cannot be written as torch\.bfloat16; .*nearest.*weight"):
        am_ckpt.save_hf(nn.Linear(2, 2), tmp_path / "out", dtypes={"wieght": torch.bfloat16})
    with pytest.raises(ValueError, match=r"dtypes: 'weight' cannot be written as torch\.int8"):
        am_ckpt.save_hf(nn.Linear(2, 2), tmp_path / "out", dtypes={"weight": torch.int8})


def transposed(folder: str) -> torch.Tensor:
    with torch.device("meta"):
        model = nn.Linear(6, 5, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    record = {"file": "w", "parameter": "weight", "slice": None, "transpose": True}
    am_ckpt.load_hf(model, folder, mapping=[record])
    am_ckpt.save_hf(model, f"{folder}/out", mapping=[record])
    return model.weight.full_tensor().detach()


@pytest.mark.parametrize("world_size", [1, 2])
def test_transposed_tensors(world_size: int, tmp_path: Path) -> None:
    value = torch.randn(6, 5)
    save_file({"w": value}, tmp_path / "model.safetensors")
    for result in run_distributed(transposed, world_size, str(tmp_path)):
        assert torch.equal(result, value.T)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], value)


def stacked() -> nn.Module:
    model = nn.Module()
    for name, shape in (("matrix", (2, 5)), ("experts", (2, 3, 1))):
        value = torch.arange(float(math.prod(shape))).reshape(shape)
        model.register_parameter(name, nn.Parameter(value))
    return model


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_and_columns_one_by_one(dim: int, transpose: bool, tmp_path: Path) -> None:
    """A row is the same row however a record turns it; a dim of one that the parameter has is kept, and turned."""
    model = stacked()
    mapping, expected = [], {}
    for index in range(model.matrix.shape[dim]):
        place = [[index, index + 1] if dim == other else None for other in range(2)]
        mapping.append({"file": f"part.{index}", "parameter": "matrix", "slice": place, "transpose": transpose})
        expected[f"part.{index}"] = model.matrix.detach().select(dim, index)
    for index in range(2):
        place = [[index, index + 1], None, None]
        mapping.append({"file": f"expert.{index}", "parameter": "experts", "slice": place, "transpose": transpose})
        value = model.experts.detach()[index]
        expected[f"expert.{index}"] = value.T if transpose else value
    am_ckpt.Checkpointer(tmp_path / "sharded", mapping=mapping).save(1, {"model": model})
    am_ckpt.merge(tmp_path / "sharded/step_000001", tmp_path / "merged")
    am_ckpt.Checkpointer(tmp_path / "direct", layout="direct", mapping=mapping).save(1, {"model": model})
    am_ckpt.save_hf(model, tmp_path / "saved", mapping=mapping)
    folders = [tmp_path / "merged", tmp_path / "direct/step_000001/model", tmp_path / "saved"]
    for folder in folders:
        found = load_file(folder / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(found[name].shape == value.shape and found[name].equal(value) for name, value in expected.items())
    blank = [stacked().requires_grad_(False) for _ in range(3)]
    for other in blank:
        other.matrix.zero_()
        other.experts.zero_()
    am_ckpt.load_hf(blank[0], tmp_path / "saved", mapping=mapping)
    for other, layout in zip(blank[1:], ("sharded", "direct"), strict=True):
        am_ckpt.Checkpointer(tmp_path / layout, mapping=mapping).load({"model": other})
    for other in blank:
        assert other.matrix.equal(model.matrix)
        assert other.experts.equal(model.experts)


class WithAdapter(nn.Module):
    """A linear layer with two small matrices that start as LoRA's do: one random, one zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 6, bias=False)
        self.lora_A = nn.Parameter(torch.empty(4, 8))
        self.lora_B = nn.Parameter(torch.empty(6, 4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.lora_A)
        nn.init.zeros_(self.lora_B)


def adapted(folder: str, seed: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = nn.Sequential(OrderedDict(first=WithAdapter(), second=WithAdapter()))
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    before = torch.get_rng_state()
    am_ckpt.load_hf(model, folder, initialise=("*lora_*",), seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}


def test_initial_values_depend_on_name_and_seed_alone(tmp_path: Path) -> None:
    save_file({f"{n}.base.weight": torch.randn(6, 8) for n in ("first", "second")}, tmp_path / "model.safetensors")
    one = run_distributed(adapted, 1, str(tmp_path), 5)[0]
    four = run_distributed(adapted, 4, str(tmp_path), 5)[3]
    other = run_distributed(adapted, 1, str(tmp_path), 6)[0]
    assert all(torch.equal(one[name], four[name]) for name in one)
    assert not torch.equal(one["first.lora_A"], one["second.lora_A"])
    assert not torch.equal(one["first.lora_A"], other["first.lora_A"])
    assert one["first.lora_A"].any()
    assert not one["first.lora_B"].any()


class Scaled(nn.Module):
    """Its child starts as this says, not as torch's Linear does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 50, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.linear.weight, std=3.0)


def test_a_whole_model_can_be_initialised_without_files() -> None:
    def initialised(seed: int) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            model = nn.Sequential(nn.Embedding(10, 40), Scaled(), nn.LayerNorm(50))
        am_ckpt.load_hf(model, None, initialise=("*",), seed=seed)
        return model.state_dict()

    first, second, other = initialised(1), initialised(1), initialised(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["1.linear.weight"].std().item() == pytest.approx(3.0, rel=0.1)
    assert torch.equal(first["2.weight"], torch.ones(50))
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.parametrize("kind", ["llama", "head"])
def test_what_a_transformers_model_starts_from_is_for_its_family_to_say(kind: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=50))
    folder, names = (None, ("*",)) if kind == "llama" else (tmp_path, ("score.*",))
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification of transformers; pass initialiser=am_models"):
        am_ckpt.load_hf(model, folder, initialise=names, ignore=("lm_head.*",))


def drawn(model: nn.Module, name: str) -> torch.Tensor:
    """An initialiser of the caller's own."""
    return torch.randn(model.get_parameter(name).shape) + 100


def with_drawn_bias(folder: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = checkpoint_wrapper(nn.Sequential(OrderedDict(first=nn.Linear(6, 8), second=nn.Linear(8, 4))))
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    am_ckpt.load_hf(model, folder, initialise=("*bias",), initialiser=drawn, seed=3)
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}


def test_an_initialiser_gives_whole_values_of_wrapped_and_sharded_models(tmp_path: Path) -> None:
    layers = nn.Sequential(OrderedDict(first=nn.Linear(6, 8), second=nn.Linear(8, 4)))
    save_file(
        {name: value for name, value in layers.state_dict().items() if "weight" in name}, tmp_path / "model.safetensors"
    )
    one = run_distributed(with_drawn_bias, 1, str(tmp_path))[0]
    four = run_distributed(with_drawn_bias, 4, str(tmp_path))[3]
    assert all(torch.equal(one[name], four[name]) for name in one)
    assert {name.rpartition(".")[2] for name in one if (one[name] > 90).all()} == {"bias"}
    with pytest.raises(ValueError, match=r"the initialiser gave \[1\] for 'first.bias', which is \[8\]"):
        am_ckpt.load_hf(layers, tmp_path, initialise=("*bias",), initialiser=lambda model, name: torch.zeros(1))


def test_values_are_cast_to_the_parameters_dtype(tmp_path: Path) -> None:
    value = torch.randn(5, 6)
    save_file({"weight": value}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Linear(6, 5, bias=False, dtype=torch.bfloat16)
    am_ckpt.load_hf(model, tmp_path)
    assert torch.equal(model.weight, value.bfloat16())


def test_real_tensors_keep_their_memory(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(5, 6)}, tmp_path / "model.safetensors")
    model = nn.Linear(6, 5, bias=False)
    parameter, address = model.weight, model.weight.data_ptr()
    am_ckpt.load_hf(model, tmp_path)
    assert model.weight is parameter
    assert (model.weight.data_ptr(), model.weight.sum().item()) == (address, 30.0)


def test_every_difference_is_reported_at_once_and_nothing_is_touched(tmp_path: Path) -> None:
    save_file(
        {"0.wieght": torch.ones(3, 5), "0.bias": torch.ones(4), "1.weight": torch.ones(2, 3)},
        tmp_path / "model.safetensors",
    )
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        am_ckpt.load_hf(model, tmp_path)
    text = str(error.value)
    assert "2 missing in the files: 0.weight (nearest: 0.wieght)" in text
    assert "1 in the files only: 0.wieght (nearest: 0.weight)" in text
    assert "0.bias: model [3], file [4]" in text
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def table(model: nn.Module, name: str) -> torch.Tensor:
    assert name == "table"
    return torch.arange(3.0)


def test_a_buffer_that_nothing_recomputes_is_named(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Opaque()
    with pytest.raises(ValueError, match="the buffer 'table' of Opaque is in no file"):
        am_ckpt.load_hf(model, tmp_path)
    with torch.device("meta"):
        model = Opaque()
    am_ckpt.load_hf(model, tmp_path, initialiser=table)
    assert torch.equal(model.table, torch.arange(3.0))


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


ENTRY = b'"weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"{" + ENTRY + b"," + ENTRY + b"}", b"\0" * 8, None, "occurs twice"),
        (b"{" + ENTRY + b"}", b"\0" * 8, 2**40, "its header claims"),
        (b"{" + ENTRY + b"}", b"\0" * 4, None, "truncated"),
        (b"{" + ENTRY + b"}", b"\0" * 12, None, "belong to no tensor"),
        (b"{" + ENTRY.replace(b"[0,8]", b"[4,12]") + b"}", b"\0" * 12, None, "leaves a hole"),
        (b"{" + ENTRY.replace(b"[2]", b"[-2]") + b"}", b"\0" * 8, None, "non-negative"),
        (b"{" + ENTRY.replace(b"[2]", b"[3]") + b"}", b"\0" * 8, None, "do not fit"),
        (b"{" + ENTRY.replace(b"F32", b"F99") + b"}", b"\0" * 8, None, "has dtype 'F99'"),
        (b'{"weight":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (2**59 - 1, 2**59 - 1), b"", None, "larger"),
        (b'{"__metadata__":{"format":"pt"}, }', b"", None, "not valid JSON"),
        (b"[" * 5000, b"", None, "not valid JSON"),
    ],
)
def test_damaged_headers_are_refused(
    header: bytes, data: bytes, length: int | None, message: str, tmp_path: Path
) -> None:
    write_raw(tmp_path / "model.safetensors", header, data, length)
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        am_ckpt.load_hf(model, tmp_path)


@pytest.mark.parametrize("shape", [(2**62,) * 20 + (0,), (0, 2**62), (2**62, 0, 2**62)])
def test_a_tensor_without_elements_has_sizes_of_any_product(shape: tuple[int, ...], tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    write_raw(tmp_path / "model.safetensors", json.dumps({"weight": entry}).encode())
    assert am_ckpt.inspect(tmp_path).tensors["weight"].shape == shape


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("../secret.safetensors", ValueError, "only safetensors files of the folder itself"),
        ("/etc/passwd", ValueError, "only safetensors files of the folder itself"),
        ("gone.safetensors", FileNotFoundError, "safetensors is missing"),
        ("other.safetensors", ValueError, "which lacks it"),
    ],
)
def test_the_index_cannot_lead_elsewhere(place: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    save_file({"bias": torch.ones(2)}, tmp_path / "other.safetensors")
    index = {"weight_map": {"weight": place}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        am_ckpt.load_hf(nn.Linear(2, 2), tmp_path)


def test_quantised_files_are_not_cast(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(5, 6, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="dequantise the file first"):
        am_ckpt.load_hf(nn.Linear(6, 5, bias=False), tmp_path)


def test_a_tied_tensor_stored_twice_must_be_equal(tmp_path: Path) -> None:
    build("llama", tied=True).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    am_ckpt.load_hf(on_meta("llama", tied=True), tmp_path)
    weights["lm_head.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="one tied tensor in the model"):
        am_ckpt.load_hf(on_meta("llama", tied=True), tmp_path)


def test_an_export_replaces_only_an_export(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    am_ckpt.save_hf(model, tmp_path / "out", max_shard_size=20)
    with torch.no_grad():
        model.weight.add_(1)
    am_ckpt.save_hf(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], model.weight)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        am_ckpt.save_hf(model, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_config_that_would_lose_the_head_is_refused(tmp_path: Path) -> None:
    build("llama", tied=False).save_pretrained(tmp_path / "separate")
    build("llama", tied=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match="it would be lost"):
        am_ckpt.save_hf(build("llama", tied=True), tmp_path / "out", files_from=tmp_path / "separate")
    with pytest.raises(ValueError, match="it would be ignored"):
        am_ckpt.save_hf(build("llama", tied=False), tmp_path / "out", files_from=tmp_path / "tied")


def test_an_export_is_replaced_without_a_moment_in_which_there_is_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    am_ckpt.save_hf(nn.Linear(3, 2), out)
    before = {path.name for path in out.iterdir()}
    seen = []

    def look(frame: FrameType, event: str, function: Any) -> None:
        # Around every call that could change the file system.
        if event in ("c_call", "c_return") and function.__module__ in ("posix", "_ctypes"):
            sys.setprofile(None)
            seen.append({path.name for path in out.iterdir()} if out.exists() else set())
            sys.setprofile(look)

    second = nn.Linear(3, 2)
    sys.setprofile(look)
    try:
        am_ckpt.save_hf(second, out)
    finally:
        sys.setprofile(None)
    assert len(seen) > 20
    assert all(names == before for names in seen)
    assert torch.equal(load_file(out / "model.safetensors")["weight"], second.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".out-staging-0123456789abcdef"
    (left / "folder").mkdir(parents=True)
    # Nobody has signed it for two minutes.
    os.utime(left, (time.time() - 120,) * 2)
    am_ckpt.save_hf(nn.Linear(3, 2), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def in_the_cache(cache: Path, original: Path) -> Path:
    """`original` as huggingface_hub lays it out: a snapshot of links to blobs."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "main", cache / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for path in original.iterdir():
        (blobs / f"digest-of-{path.name}").write_bytes(path.read_bytes())
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"digest-of-{path.name}"))
    return snapshot


def everything_that_reads(folder: Path, out: Path) -> list[tuple[str, Callable[[], Any]]]:
    """What reads or copies the files of a Hugging Face folder."""
    model = nn.Linear(4, 3)
    return [
        ("hf_files", lambda: am_ckpt.hf_files(folder)),
        ("load_hf", lambda: am_ckpt.load_hf(nn.Linear(4, 3), folder)),
        ("save_hf", lambda: am_ckpt.save_hf(model, out / "saved", files_from=folder)),
        ("merge", lambda: am_ckpt.merge(folder, out / "merged")),
        ("merge like", lambda: am_ckpt.merge(out / "step_000001", out / "like", like=folder)),
        ("reshard", lambda: am_ckpt.reshard(folder, out / "resharded", mesh={"dp": 1})),
        ("convert", lambda: am_ckpt.convert(folder, out / "converted", to="dcp")),
        ("verify", lambda: am_ckpt.verify(folder, full=True)),
        ("diff", lambda: am_ckpt.diff(folder, folder)),
        ("Checkpointer", lambda: am_ckpt.Checkpointer(out / "run", files=am_ckpt.hf_files(folder))),
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_links_of_the_cache_are_followed(tmp_path: Path) -> None:
    files = {"config.json": "{}", "tokenizer.json": "{}", "LICENSE.txt": "free", "chat_template.jinja": ""}
    model = nn.Linear(4, 3)
    am_ckpt.save_hf(model, tmp_path / "original", files=files, max_shard_size=16)
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": model})
    snapshot = in_the_cache(tmp_path / "cache", tmp_path / "original")
    for what, read in everything_that_reads(snapshot, tmp_path):
        result = read()
        assert what != "verify" or result.problems == []
    for name in ("saved", "merged", "like"):
        assert (tmp_path / name / "LICENSE.txt").read_text() == "free"


@pytest.mark.parametrize("name", ["LICENSE.txt", "config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["out of a folder", "out of the cache", "blobs elsewhere", "other model"])
def test_links_elsewhere_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    """A folder that was downloaded must not carry other files of this machine into what is published."""
    am_ckpt.save_hf(nn.Linear(4, 3), tmp_path / "folder", files={"config.json": "{}", "LICENSE.txt": "free"})
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": nn.Linear(4, 3)})
    secret = tmp_path / "secrets" / "blobs" / f"digest-of-{name}"
    secret.parent.mkdir(parents=True)
    secret.write_bytes((tmp_path / "folder" / name).read_bytes())
    folder = tmp_path / "folder"
    if kind != "out of a folder":
        folder = in_the_cache(tmp_path / "cache", folder)
    if kind == "blobs elsewhere":
        blobs = folder.parent.parent / "blobs"
        for path in blobs.iterdir():
            (secret.parent / path.name).write_bytes(path.read_bytes())
            path.unlink()
        blobs.rmdir()
        blobs.symlink_to(secret.parent)
    else:
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
    for what, read in everything_that_reads(folder, tmp_path):
        weights = what not in ("hf_files", "save_hf", "Checkpointer")
        if (
            kind != "blobs elsewhere"
            and (what == "load_hf" or not weights)
            and weights != name.endswith(".safetensors")
        ):
            # Which does not open such files.
            continue
        with pytest.raises(UnsafeError, match=f"{folder}/.* is a symbolic link to {secret.parent}"):
            read()
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 4
    assert sorted(path.name for path in tmp_path.iterdir() if "cache" not in path.name) == [
        "folder",
        "latest",
        "secrets",
        "step_000001",
    ]


@pytest.mark.parametrize("name", ["__metadata__", "half\ud800"])
def test_names_that_no_file_can_hold_are_refused_when_saving(name: str, tmp_path: Path) -> None:
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.ones(3)))
    buffered = nn.Linear(2, 2)
    buffered.register_buffer(name, torch.ones(3))
    mapping = [{"file": name, "parameter": "weight", "slice": None, "transpose": False}]
    checkpoints = am_ckpt.Checkpointer(tmp_path / "run")
    background = am_ckpt.Checkpointer(tmp_path / "run", asynchronous=True)
    direct = am_ckpt.Checkpointer(tmp_path / "run", layout="direct")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saves: list[Callable[[], Any]] = [
        lambda: checkpoints.save(1, {"model": model}),
        lambda: checkpoints.save(1, {"model": buffered}),
        lambda: checkpoints.save(1, {"model": model, "optimizer": optimizer}),
        lambda: background.save(1, {"model": model}),
        lambda: direct.save(1, {"model": model}),
        lambda: am_ckpt.save_hf(model, tmp_path / "saved"),
        lambda: am_ckpt.save_hf(nn.Linear(2, 2), tmp_path / "saved", mapping=mapping),
    ]
    for save in saves:
        with pytest.raises(ValueError, match=re.escape(f"cannot hold a tensor named {name!r}")):
            save()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["__metadata__", "half\ud800"])
def test_names_that_no_file_can_hold_are_refused_by_other_writers(name: str, tmp_path: Path) -> None:
    state = {name: torch.ones(3)}
    with pytest.raises(CheckpointException, match=re.escape(f"cannot hold a tensor named {name!r}")):
        dcp.save(state, storage_writer=am_ckpt.StorageWriter(tmp_path / "step"), no_dist=True)
    if name == "__metadata__":
        dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "dcp").mkdir()
        (tmp_path / "pytorch_model.bin").rename(tmp_path / "dcp" / "pytorch_model.bin")
    for write in (
        lambda: am_ckpt.merge(tmp_path / "dcp", tmp_path / "merged"),
        lambda: am_ckpt.reshard(tmp_path / "dcp", tmp_path / "merged", mesh={"dp": 2}),
    ):
        with pytest.raises(ValueError, match=re.escape(f"cannot hold a tensor named {name!r}")):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]
