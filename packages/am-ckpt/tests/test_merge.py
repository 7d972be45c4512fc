"""Merging: every kind of shards, written by stock torch, into folders that are bit for bit the full state dict."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from commit_seed import commit_seed, drawn_from
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import am_ckpt
from am_testing import run_distributed

# What torch says about single-process use and about its own deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]

CONFIG: dict[str, Any] = {"num_hidden_layers": 3, "vocab_size": 37, "hidden_size": 24, "tie_word_embeddings": False}


class Layer(nn.Module):
    """Sizes that shards do not divide, dims of size one, a 0-d tensor and buffers of other dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 530, bias=False)
        self.down = nn.Linear(530, 24)
        self.norm = nn.Parameter(torch.randn(24))
        self.scale = nn.Parameter(torch.randn(1, 3))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(37, 24)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        # Long enough that its shards are copied as ranges.
        self.wide = nn.Parameter(torch.randn(1025, 700))
        self.lm_head = nn.Linear(24, 37, bias=False)


def build(layout: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net().to(torch.bfloat16 if layout.endswith("bf16") else torch.float32)
    size = dist.get_world_size()
    if layout.startswith("fsdp"):
        fully_shard(model, mesh=init_device_mesh("cpu", (size,), mesh_dim_names=("fsdp",)))
    elif layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    else:
        shape = (size,) if layout != "2d" else (2, size // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("tp",) if layout != "2d" else ("fsdp", "tp"))
        for module in model.modules():
            for key, value in list(module._parameters.items()):
                if value is not None and value.dim() == 2:
                    dim = 0 if layout == "tp0" else 1
                    shard = distribute_tensor(value.detach(), mesh["tp"], [Shard(dim)])
                    module._parameters[key] = nn.Parameter(shard)
                elif value is not None:
                    module._parameters[key] = nn.Parameter(distribute_tensor(value.detach(), mesh["tp"]))
        if layout == "2d":
            fully_shard(model, mesh=mesh["fsdp"])
    return model


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def save_stock(layout: str, writer: str, directory: str) -> dict[str, Any]:
    """Every rank; returns the full state dict as plain lists of bytes."""
    model = build(layout)
    state: dict[str, Any] = get_model_state_dict(model)
    if writer == "distcp":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5
        expected = full(model)
        state = {"model": {name: value.clone() for name, value in model.state_dict().items()}}
        optimizer.step()
        state["optim"] = get_optimizer_state_dict(model, optimizer)
        state["train"] = {"step": 3, "names": ["a"], "seen": torch.tensor(5)}
        dcp.save(state, checkpoint_id=directory)
    elif writer == "distcp_flat":
        expected = full(model)
        dcp.save(state, storage_writer=FileSystemWriter(directory, single_file_per_rank=False, thread_count=2))
    else:
        expected = full(model)
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(directory, save_distributed=True))
    return {name: (str(value.dtype), tuple(value.shape), raw(value)) for name, value in expected.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    weight_map = json.loads(index.read_text())["weight_map"]
    for file in sorted(set(weight_map.values())):
        part = load_file(folder / file)
        assert {name for name, home in weight_map.items() if home == file} == set(part)
        tensors |= part
    return tensors


def assert_same(folder: Path, expected: dict[str, Any]) -> None:
    found = weights(folder)
    assert found.keys() == expected.keys()
    for name, (dtype, shape, content) in expected.items():
        assert (str(found[name].dtype), tuple(found[name].shape)) == (dtype, shape), name
        assert raw(found[name]) == content, name


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


LAYOUTS = [("fsdp", 1), ("fsdp", 2), ("fsdp_bf16", 4), ("hsdp", 4), ("tp0", 2), ("tp1", 4), ("2d", 4)]
STOCK = [(*layout, writer) for writer in ("distcp", "distcp_flat", "safetensors") for layout in LAYOUTS]
# The other half, which is another with each commit, is slow.
HALF = drawn_from(STOCK, 2, commit_seed())


@pytest.mark.parametrize(
    ("layout", "size", "writer"),
    [pytest.param(*kind, marks=() if kind in HALF else pytest.mark.slow) for kind in STOCK],
)
def test_stock_shards_become_the_full_state_dict(layout: str, size: int, writer: str, tmp_path: Path) -> None:
    expected = run_distributed(save_stock, size, layout, writer, str(tmp_path / "shards"))[0]
    before = snapshot(tmp_path / "shards")
    # torch's safetensors do not say how large the whole tensors are.
    unsaid = writer == "safetensors"
    report = am_ckpt.merge(
        tmp_path / "shards", tmp_path / "merged", max_shard_size=10**6, threads=2, assume_complete=unsaid
    )
    assert_same(tmp_path / "merged", expected)
    assert report.num_tensors == len(expected)
    assert report.num_bytes == sum(len(content) for _, _, content in expected.values())
    assert snapshot(tmp_path / "shards") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "shards"]
    sizes = [path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors")]
    assert len(sizes) > 1


def llama() -> Any:
    torch.manual_seed(3)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True))


def save_llama(writer: str, directory: str) -> None:
    model = llama()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    if writer == "own":
        am_ckpt.Checkpointer(directory).save(1, {"model": model})
    elif writer == "distcp":
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=directory)
    else:
        state = get_model_state_dict(model)
        # torch's writer refuses tied tensors.
        del state["lm_head.weight"]
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(directory, save_distributed=True))


@pytest.mark.parametrize("writer", ["own", "distcp", "safetensors"])
def test_transformers_opens_the_result(writer: str, tmp_path: Path) -> None:
    run_distributed(save_llama, 4, writer, str(tmp_path / "shards"))
    reference = llama()
    reference.config.save_pretrained(tmp_path / "like")
    source = tmp_path / "shards" / "step_000001" if writer == "own" else tmp_path / "shards"
    am_ckpt.merge(source, tmp_path / "merged", like=tmp_path / "like")
    model, found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert am_ckpt.verify(tmp_path / "merged", full=True).problems == []


def own_step(directory: str, kind: str) -> dict[str, Any]:
    """A step written by Checkpointer; returns what the published files must hold."""
    torch.manual_seed(1)
    files = {"config.json": json.dumps({"tie_word_embeddings": True}), "tokenizer.json": "{}"}
    mapping = None
    if kind == "adapter":
        tensors = {"base.q.lora_A.weight": torch.randn(2, 6), "base.q.lora_B.weight": torch.randn(6, 2)}
        model: Any = Adapter(tensors)
        files = {"adapter_config.json": "{}"}
        expected = dict(tensors)
    elif kind == "tied":
        model = Tied()
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        expected = {"embed_tokens.weight": full(model)["embed_tokens.weight"]}
    else:
        model = nn.Module()
        model.experts = nn.Parameter(torch.randn(4, 6, 1030))
        model.down = nn.Parameter(torch.randn(4, 6, 5))
        model.plain = nn.Parameter(torch.randn(3))
        whole = full(model)
        mapping = []
        expected = {"plain": whole["plain"]}
        for expert in range(4):
            for half, name in ((0, "gate"), (1, "up")):
                rows = [3 * half, 3 * half + 3]
                place = {"parameter": "experts", "slice": [[expert, expert + 1], rows, None], "transpose": True}
                mapping.append({"file": f"experts.{expert}.{name}", **place})
                expected[f"experts.{expert}.{name}"] = whole["experts"][expert, rows[0] : rows[1]].T
            place = {"parameter": "down", "slice": [[expert, expert + 1], None, None], "transpose": False}
            mapping.append({"file": f"experts.{expert}.down", **place})
            expected[f"experts.{expert}.down"] = whole["down"][expert]
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name, dim in (("experts", 2), ("down", 0)):
            value = distribute_tensor(getattr(model, name).detach(), mesh, [Shard(dim)])
            setattr(model, name, nn.Parameter(value))
        files = {}
    am_ckpt.Checkpointer(directory, files=files, mapping=mapping).save(3, {"model": model})
    return {name: (str(value.dtype), tuple(value.shape), raw(value)) for name, value in expected.items()}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


class Adapter:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        return self.tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = state

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, nn.Parameter(value)) for name, value in self.tensors.items()]


@pytest.mark.parametrize("kind", ["tied", "mapped"])
def test_our_steps_become_published_files(kind: str, tmp_path: Path) -> None:
    expected = run_distributed(own_step, 2, str(tmp_path / "run"), kind)[0]
    report = am_ckpt.merge(tmp_path / "run" / "step_000003", tmp_path / "merged")
    assert_same(tmp_path / "merged", expected)
    assert report.kind == "am-ckpt"
    if kind == "tied":
        assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"


def test_an_adapter_stays_an_adapter(tmp_path: Path) -> None:
    expected = run_distributed(own_step, 1, str(tmp_path / "run"), "adapter")[0]
    am_ckpt.merge(tmp_path / "run" / "step_000003", tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    found = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert {name: raw(value) for name, value in found.items()} == {name: item[2] for name, item in expected.items()}
    am_ckpt.merge(tmp_path / "merged", tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "merged")


def test_a_config_that_would_lose_the_tied_head_is_refused(tmp_path: Path) -> None:
    run_distributed(own_step, 2, str(tmp_path / "run"), "tied")
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to embed_tokens.weight .* it would be lost"):
        am_ckpt.merge(tmp_path / "run" / "step_000003", tmp_path / "merged", like=tmp_path / "like")


def state(scale: float = 1.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    tensors = {name: torch.randn(value.shape).mul_(scale) for name, value in Net().state_dict().items()}
    tensors["layers.0.ids"] = torch.arange(5)
    tensors["layers.0.small"] = torch.randn(4).to(torch.float8_e4m3fn)
    # Saved with its own strides.
    tensors["layers.0.columns"] = torch.randn(700, 40).t()
    return tensors


def expected_of(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (str(value.dtype), tuple(value.shape), raw(value)) for name, value in tensors.items()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A `.distcp` folder of one process, one file per tensor, with a config."""
    writer = FileSystemWriter(tmp_path / "shards", single_file_per_rank=False)
    dcp.save({"model": state()}, storage_writer=writer)
    (tmp_path / "shards" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "shards"


def test_strided_integer_and_8_bit_tensors(shards: Path, tmp_path: Path) -> None:
    am_ckpt.merge(shards, tmp_path / "merged")
    assert_same(tmp_path / "merged", expected_of(state()))
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == CONFIG


def test_a_plain_folder_is_cut_and_cast_anew(shards: Path, tmp_path: Path) -> None:
    am_ckpt.merge(shards, tmp_path / "one")
    am_ckpt.merge(tmp_path / "one", tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    am_ckpt.merge(tmp_path / "many", tmp_path / "half", dtype="bfloat16", threads=2)
    expected = {k: v.to(torch.bfloat16) if v.dtype == torch.float32 else v for k, v in state().items()}
    assert_same(tmp_path / "half", expected_of(expected))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "dtype" not in json.loads((tmp_path / "many" / "config.json").read_text())


def test_like_brings_the_files_and_is_compared(shards: Path, tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "modeling_net.py", "notes.md"):
        (like / name).write_text(json.dumps(CONFIG))
    tensors = {name: value.contiguous() for name, value in state().items() if not name.startswith("layers.1.")}
    tensors["wide"] = torch.zeros(1, 2)
    save_file(tensors, like / "model.safetensors")
    report = am_ckpt.merge(shards, tmp_path / "merged", like=like)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "modeling_net.py",
        "tokenizer.json",
    ]
    assert any("'wide' is [1025, 700], there [1, 2]" in note for note in report.notes)
    assert any("not in" in note and "layers.1.count" in note for note in report.notes)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_is_written_once_if_it_is_the_same(same: bool, tmp_path: Path) -> None:
    tensors = state()
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    if not same:
        tensors["lm_head.weight"][36, 23] += 1
    dcp.save(tensors, checkpoint_id=tmp_path / "shards")
    (tmp_path / "shards" / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    if same:
        am_ckpt.merge(tmp_path / "shards", tmp_path / "merged")
        del tensors["lm_head.weight"]
        assert_same(tmp_path / "merged", expected_of(tensors))
    else:
        with pytest.raises(ValueError, match=r"lm_head.weight and embed_tokens.weight .* hold different values"):
            am_ckpt.merge(tmp_path / "shards", tmp_path / "merged")


def test_the_section_is_found_or_asked_for(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 3)}
    dcp.save(
        {"app": {"model": tensors, "optim": {"state": {"a.weight": {"exp_avg": torch.zeros(2, 3)}}}}},
        checkpoint_id=tmp_path / "app",
    )
    inventory = am_ckpt.inspect(tmp_path / "app")
    assert (inventory.section, list(inventory.tensors)) == ("app.model", ["a.weight"])
    assert list(inventory.sections["app.optim"]) == ["state.a.weight.exp_avg"]
    dcp.save({"student": tensors, "teacher": tensors}, checkpoint_id=tmp_path / "two")
    with pytest.raises(ValueError, match=r"'student' \(1 tensors\), 'teacher' \(1 tensors\): say which is the model"):
        am_ckpt.inspect(tmp_path / "two")
    am_ckpt.merge(tmp_path / "two", tmp_path / "merged", section="teacher")
    assert_same(tmp_path / "merged", expected_of(tensors))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"net": {"a.weight": torch.ones(2)}, "step": torch.tensor(3)}, "say which is the model with section="),
        ({"state_dict": {"w": torch.ones(2)}, "ema": torch.ones(2)}, "say which is the model with section="),
        ({"optim": {"state": {"w": {"exp_avg": torch.ones(2)}}}}, "say which is the model with section="),
    ],
)
def test_no_part_is_taken_for_the_model_by_chance(state: dict[str, Any], message: str, tmp_path: Path) -> None:
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "saved"))
    with pytest.raises(ValueError, match=message):
        am_ckpt.merge(tmp_path / "saved", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=FileSystemWriter(tmp_path / "saved"))
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "saved" / "notes.txt").symlink_to(tmp_path / "secret")
    for action in (am_ckpt.merge, am_ckpt.convert):
        options: dict[str, Any] = {} if action is am_ckpt.merge else {"to": "sharded"}
        with pytest.raises(ValueError, match=r"notes\.txt is a symbolic link"):
            action(tmp_path / "saved", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nested_modules_are_the_models(tmp_path: Path) -> None:
    state = {"model": {"a": {"w": torch.ones(2)}, "b": torch.zeros(3)}, "step": torch.tensor(3)}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "saved"))
    am_ckpt.merge(tmp_path / "saved", tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == {"a.w", "b"}


@pytest.mark.parametrize("command", [am_ckpt.merge, am_ckpt.reshard, am_ckpt.convert])
def test_no_threads_copy_nothing(command: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"w": torch.ones(4)}, tmp_path / "model" / "model.safetensors")
    options: dict[str, Any] = {"mesh": {"dp": 2}} if command is am_ckpt.reshard else {}
    if command is am_ckpt.convert:
        options["to"] = "sharded"
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"threads={threads} must be at least 1"):
            command(tmp_path / "model", tmp_path / "out", threads=threads, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_step_without_its_manifest_is_none(tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": nn.Linear(2, 2)})
    step = tmp_path / "step_000001"
    (step / "manifest.json").unlink()
    for action in (am_ckpt.verify, am_ckpt.inspect):
        with pytest.raises(ValueError, match=r"a step of am_ckpt without its manifest\.json: it was not finished"):
            action(step)


def test_an_interrupted_merge_is_resumed(shards: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert not (tmp_path / "merged").exists()
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        am_ckpt.merge(shards, tmp_path / "merged", progress=interrupt, threads=1)
    assert not (tmp_path / "merged").exists()
    counts: list[tuple[int, int]] = []
    report = am_ckpt.merge(shards, tmp_path / "merged", resume=True, progress=lambda *now: counts.append(now))
    assert 0 < report.resumed_bytes < report.num_bytes
    assert counts[0][0] > report.resumed_bytes
    assert counts[-1] == (report.num_bytes, report.num_bytes)
    assert_same(tmp_path / "merged", expected_of(state()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "shards"]


@pytest.mark.parametrize("change", ["source", "arguments", "no journal"])
def test_only_the_same_merge_is_resumed(change: str, shards: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        am_ckpt.merge(shards, tmp_path / "merged", progress=interrupt, threads=1)
    tensors = state()
    if change == "source":
        tensors = state(scale=2.0)
        shutil.rmtree(shards)
        dcp.save({"model": tensors}, storage_writer=FileSystemWriter(shards, single_file_per_rank=False))
    elif change == "no journal":
        (tmp_path / ".merged.merging" / "journal.jsonl").unlink()
    size = "1MB" if change == "arguments" else "5GB"
    report = am_ckpt.merge(shards, tmp_path / "merged", resume=True, max_shard_size=size)
    assert report.resumed_bytes == 0
    assert any("started from zero" in note for note in report.notes)
    assert_same(tmp_path / "merged", expected_of(tensors))


def test_a_merge_is_resumed_twice(shards: Path, tmp_path: Path) -> None:
    report = am_ckpt.merge(shards, tmp_path / "whole", dtype="bfloat16", threads=1)

    for least in (report.num_bytes // 3, 2 * report.num_bytes // 3):

        def interrupt(done: int, total: int, least: int = least) -> None:
            if done > least:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            am_ckpt.merge(shards, tmp_path / "merged", dtype="bfloat16", threads=1, progress=interrupt, resume=True)
        with open(tmp_path / ".merged.merging" / "journal.jsonl", "ab") as journal:
            # The power goes in the middle of a line.
            journal.write(b'[[3, "')
    resumed = am_ckpt.merge(shards, tmp_path / "merged", dtype="bfloat16", threads=1, resume=True)
    assert resumed.resumed_bytes > report.num_bytes // 2
    assert_same(tmp_path / "merged", expected_of(load_file(tmp_path / "whole" / "model.safetensors")))


def test_a_killed_merge_leaves_nothing_visible_and_is_done_again(shards: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, am_ckpt\n"
        "def kill(done, total):\n"
        "    if done > total // 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "am_ckpt.merge(sys.argv[1], sys.argv[2], progress=kill)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(shards), str(tmp_path / "merged")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".merged.merging", "shards"]
    am_ckpt.merge(shards, tmp_path / "merged")
    assert_same(tmp_path / "merged", expected_of(state()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "shards"]


def test_a_merge_under_way_is_not_disturbed(shards: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time, am_ckpt\n"
        "def wait(done, total):\n"
        "    print('here', flush=True)\n"
        "    time.sleep(60)\n"
        "am_ckpt.merge(sys.argv[1], sys.argv[2], progress=wait)\n"
    )
    arguments = [sys.executable, "-c", code, str(shards), str(tmp_path / "merged")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(FileExistsError, match="another process is merging"):
            am_ckpt.merge(shards, tmp_path / "merged", resume=True)
        other.kill()


def test_merges_to_one_destination_take_turns(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a": torch.ones(10)}, source / "model.safetensors")
    code = (
        "import sys, am_ckpt\n"
        "for _ in range(100):\n"
        "    try:\n"
        "        am_ckpt.merge(sys.argv[1], sys.argv[2], overwrite=True, threads=1, fsync=False)\n"
        "    except FileExistsError as error:\n"
        "        if 'another process is merging' not in str(error):\n"
        "            raise\n"
    )
    target = tmp_path / "out" / "merged"
    am_ckpt.merge(source, target)
    arguments = [sys.executable, "-W", "ignore", "-c", code, str(source), str(target)]
    others = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [other.communicate()[1] for other in others] == [""] * 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]
    assert_same(target, expected_of({"a": torch.ones(10)}))


REPLACE = """
import os, signal, sys, am_ckpt
import am_ckpt._copy.publish
# As on NFS.
am_ckpt._copy.publish.exchange = lambda one, other: False
def hook(event, arguments):
    if event == "os.link" and sys.argv[4] == "no links":
        raise OSError(1, "Operation not permitted")
    if event == "os.rename" and os.path.basename(arguments[0]) == "folder" and os.fspath(arguments[1]) == sys.argv[2]:
        if sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(5, "Input/output error")
sys.addaudithook(hook)
am_ckpt.merge(sys.argv[1], sys.argv[2], overwrite=True, threads=1)
"""


@pytest.mark.parametrize("links", ["links", "no links"])
@pytest.mark.parametrize("how", ["kill", "error"])
def test_what_is_replaced_is_put_back_where_that_comes_to_nothing(
    how: str, links: str, shards: Path, tmp_path: Path
) -> None:
    target = tmp_path / "merged"
    am_ckpt.merge(shards, target, max_shard_size="1MB")
    before = snapshot(target)
    arguments = [sys.executable, "-W", "ignore", "-c", REPLACE, str(shards), str(target), how, links]
    ended = subprocess.run(arguments, capture_output=True, text=True)
    if how == "kill":
        assert ended.returncode == -signal.SIGKILL
        assert not target.exists()
    else:
        assert "Input/output error" in ended.stderr
        assert snapshot(target) == before
    with pytest.raises(FileExistsError, match="--overwrite"):
        am_ckpt.merge(shards, target)
    assert snapshot(target) == before
    am_ckpt.merge(shards, target, overwrite=True)
    assert_same(target, expected_of(state()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "shards"]


def test_an_older_model_is_not_resumed(shards: Path, tmp_path: Path) -> None:
    """A merge that was killed when it had replaced another has nothing but that one in its folder."""
    other = tmp_path / "other"
    dcp.save({"model": state(scale=2.0)}, storage_writer=FileSystemWriter(other, single_file_per_rank=False))
    am_ckpt.merge(other, tmp_path / "merged")
    code = (
        "import os, signal, sys, am_ckpt\n"
        "def hook(event, arguments):\n"
        "    if event == 'os.rename' and '.trash-' in os.fspath(arguments[1]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(hook)\n"
        "am_ckpt.merge(sys.argv[1], sys.argv[2], overwrite=True)\n"
    )
    arguments = [sys.executable, "-W", "ignore", "-c", code, str(shards), str(tmp_path / "merged")]
    assert subprocess.run(arguments).returncode == -signal.SIGKILL
    assert_same(tmp_path / "merged", expected_of(state()))
    am_ckpt.merge(shards, tmp_path / "merged", overwrite=True, resume=True)
    assert_same(tmp_path / "merged", expected_of(state()))


def test_what_is_there_is_replaced_only_on_request_and_only_if_it_is_an_export(shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    am_ckpt.merge(shards, target, max_shard_size="1MB")
    before = snapshot(target)
    with pytest.raises(FileExistsError, match="--overwrite"):
        am_ckpt.merge(shards, target)
    assert snapshot(target) == before
    am_ckpt.merge(shards, target, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(target, expected_of(state()))
    # What a Hugging Face folder may have too, and a folder: all of it somebody's own.
    for name in ("optimizer.pt", "notes.txt", "train.py", "embeddings.safetensors", "README.md"):
        (target / name).write_text("mine")
        before = snapshot(target)
        for overwrite in (False, True):
            with pytest.raises(
                FileExistsError, match=r"is not replaced: it holds .*, which no export of am_ckpt wrote"
            ):
                am_ckpt.merge(shards, target, overwrite=overwrite)
        assert snapshot(target) == before
        (target / name).unlink()
    (target / "results").mkdir()
    with pytest.raises(FileExistsError, match=r"it holds results, which no export"):
        am_ckpt.merge(shards, target, overwrite=True)
    for place in (shards, shards / "merged", shards.parent):
        with pytest.raises(ValueError, match="contain one another"):
            am_ckpt.merge(shards, place, overwrite=True)


@pytest.mark.parametrize("kind", ["torch's shards", "a step", "another's model", "scripts"])
def test_swapped_arguments_lose_nothing(kind: str, tmp_path: Path) -> None:
    """A merge from the export to what it was made of, or to another folder of the user."""
    theirs = tmp_path / "theirs"
    if kind == "a step":
        am_ckpt.Checkpointer(tmp_path).save(1, {"model": nn.Linear(2, 2)})
        theirs = tmp_path / "step_000001"
    elif kind == "torch's shards":
        am_ckpt.Checkpointer(tmp_path / "run").save(1, {"model": nn.Linear(2, 2)})
        shutil.copytree(tmp_path / "run" / "step_000001" / "model", theirs)
    else:
        theirs.mkdir()
        weights_of = "model.safetensors" if kind != "scripts" else "embeddings.safetensors"
        save_file({"w": torch.ones(2)}, theirs / weights_of)
        for name in ("config.json",) if kind != "scripts" else ("train.py", "notes.txt", "results.json"):
            (theirs / name).write_text("{}")
    am_ckpt.merge(theirs if kind == "a step" else _a_step(tmp_path / "other"), tmp_path / "hf")
    before = snapshot(theirs)
    with pytest.raises(FileExistsError, match=rf"{theirs} is not replaced.*if {tmp_path / 'hf'} was to be replaced"):
        am_ckpt.merge(tmp_path / "hf", theirs, overwrite=True)
    for action, options in ((am_ckpt.reshard, {"mesh": {"dp": 2}}), (am_ckpt.convert, {"to": "sharded"})):
        with pytest.raises(FileExistsError, match=f"{theirs} is not replaced"):
            action(tmp_path / "hf", theirs, **options)
    assert snapshot(theirs) == before


def _a_step(folder: Path) -> Path:
    am_ckpt.Checkpointer(folder).save(1, {"model": nn.Linear(2, 2)})
    return folder / "step_000001"


def test_what_is_put_into_the_destination_during_a_merge_is_not_lost(shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    am_ckpt.merge(shards, target)

    def put(done: int, total: int) -> None:
        (target / "notes.txt").write_text("mine")

    with pytest.raises(FileExistsError, match=r"it holds notes\.txt, which no export"):
        am_ckpt.merge(shards, target, overwrite=True, progress=put)
    assert (target / "notes.txt").read_text() == "mine"


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A sparse source of 128 MiB in two shards along dim 1, which all goes through tiles."""
    peaks = []
    for rows in (2**10, 2**14):
        folder = tmp_path / f"rows-{rows}"
        folder.mkdir()
        for rank in range(2):
            sharding = {"w": {"saved_offsets": [0, rank * 1024]}}
            header = {
                "__metadata__": {"DCP_SHARDING_INFO": json.dumps(sharding)},
                "w": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]},
            }
            text = json.dumps(header).encode()
            with open(folder / f"shard-0000{rank + 1}-model-00001-of-00001.safetensors", "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + rows * 4096)
        code = (
            "import resource, sys, am_ckpt\n"
            "am_ckpt.merge(sys.argv[1], sys.argv[2], threads=2, fsync=False, assume_complete=True)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 'torch' in sys.modules)\n"
        )
        arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "merged")]
        output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()
        assert output[1] == "False"
        peaks.append(int(output[0]))
        (tmp_path / "merged" / "model.safetensors").unlink()
        (tmp_path / "merged").rmdir()
    # Kilobytes: interpreter, numpy, and a few MiB a thread.
    assert peaks[1] < peaks[0] + 24 * 1024


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    whole = torch.arange(600 * 4.0).reshape(600, 4)
    (tmp_path / "shards").mkdir()
    for rank in range(600):
        sharding = json.dumps({"w": {"saved_offsets": [rank, 0]}})
        name = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file({"w": whole[rank : rank + 1]}, tmp_path / "shards" / name, metadata={"DCP_SHARDING_INFO": sharding})
    code = (
        "import resource, sys, am_ckpt\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 4096))\n"
        "am_ckpt.merge(sys.argv[1], sys.argv[2], assume_complete=True)\n"
        "assert am_ckpt.diff(sys.argv[1], sys.argv[2]).num_equal == 1\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "shards"), str(tmp_path / "merged")], check=True)
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["w"], whole)
