"""layout="direct": steps whose model is a Hugging Face folder, written by all ranks together."""

from __future__ import annotations

import json
import resource
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import other_machine
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from commit_seed import commit_seed, drawn_from
from safetensors import safe_open
from safetensors.torch import load_file
from test_async import gate, state_of
from test_distributed import LAYOUTS, Cursor, Net, build, everything, step
from test_hf import build as build_family
from test_hf import expert_mapping, on_meta, same_tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch_processes import torch_processes

import am_ckpt
from am_ckpt._files.step import seal
from am_testing import run_distributed


def save(layout: str, directory: str, asynchronous: bool = False) -> dict[str, numpy.ndarray]:
    model, optimizer = build(layout, 0)
    step(model, optimizer)
    checkpoints = am_ckpt.Checkpointer(directory, layout="direct", asynchronous=asynchronous)
    state = {"model": model, "optimizer": optimizer, "data": Cursor((3, "x"))}
    checkpoints.save(3, state)
    saved = everything(model, optimizer)
    if asynchronous:
        # Training goes on.
        step(model, optimizer)
    else:
        # The same again does nothing.
        checkpoints.save(3, state)
    checkpoints.wait()
    return saved


def load(layout: str, directory: str) -> dict[str, numpy.ndarray]:
    model, optimizer = build(layout, 1)
    state = {"model": model, "optimizer": optimizer, "data": Cursor(None)}
    assert am_ckpt.Checkpointer(directory).load(state) == 3
    return everything(model, optimizer)


def require_equal(found: dict[str, numpy.ndarray], expected: dict[str, numpy.ndarray], what: str = "") -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), (what, name)


@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", ["plain", "ddp2", "fsdp3", "tp4", "hsdp4", "fsdp_tp4"])
def test_every_layout_loads_what_another_saved(source: str, share: int, tmp_path: Path) -> None:
    saved = run_distributed(save, LAYOUTS[source], source, str(tmp_path))[0]
    # With each commit, others.
    for target in drawn_from(("plain", "fsdp2", "tp3", "fsdp4", "fsdp_tp4"), share, f"{commit_seed()} {source}"):
        for loaded in run_distributed(load, LAYOUTS[target], target, str(tmp_path)):
            require_equal(loaded, saved, target)
    model = tmp_path / "step_000003" / "model"
    assert [path.name for path in model.iterdir()] == ["model.safetensors"]
    with safe_open(model / "model.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "am_ckpt_save_id"}
        # Tied weights once.
        assert "head.weight" not in file.keys()  # noqa: SIM118 - a safe_open is no dict
    for name, tensor in load_file(model / "model.safetensors").items():
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == saved[name].tobytes(), name
    assert am_ckpt.verify(tmp_path / "step_000003", full=True).problems == []


def test_in_the_background(tmp_path: Path) -> None:
    saved = run_distributed(save, 4, "fsdp_tp4", str(tmp_path), True)[0]
    require_equal(run_distributed(load, 2, "fsdp2", str(tmp_path))[0], saved)


def test_given_up_in_the_middle_publishes_nothing(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, layout="direct", asynchronous=True)
    checkpoints.save(1, state_of(1.0))
    checkpoints.wait()
    opened = threading.Event()
    with gate(opened):
        checkpoints.save(2, state_of(2.0))
        assert not checkpoints.flush(0.1)
    with pytest.raises(TimeoutError, match="given up"):
        checkpoints.wait()
    assert checkpoints.load(state_of(9.0)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]


def save_family(family: str, tied: bool, directory: str, layout: str, size: str = "5GB") -> None:
    torch.manual_seed(0)
    model = build_family(family, tied)
    records = expert_mapping(model) if family == "qwen3_moe" else None
    files = {"config.json": model.config.to_json_string()}
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    checkpoints = am_ckpt.Checkpointer(directory, layout=layout, max_shard_size=size, mapping=records, files=files)
    checkpoints.save(1, {"model": model})
    # The same again does nothing.
    checkpoints.save(1, {"model": model})


def load_family(family: str, tied: bool, directory: str) -> None:
    torch.manual_seed(0)
    reference = build_family(family, tied)
    model = on_meta(family, tied)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu")
    if tied:
        model.tie_weights()
    am_ckpt.Checkpointer(directory).load({"model": model})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), reference.get_parameter(name)), name


@pytest.mark.parametrize(
    ("family", "tied", "size"), [("llama", False, "50KB"), ("llama", True, "5GB"), ("qwen3_moe", False, "30KB")]
)
def test_the_model_of_a_step_is_what_transformers_opens(family: str, tied: bool, size: str, tmp_path: Path) -> None:
    run_distributed(save_family, 3, family, tied, str(tmp_path / "direct"), "direct", size)
    run_distributed(save_family, 3, family, tied, str(tmp_path / "sharded"), "sharded")
    folder = tmp_path / "direct" / "step_000001"
    assert (folder / "model" / "model.safetensors.index.json").exists() == (size != "5GB")
    torch.manual_seed(0)
    reference = build_family(family, tied)
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    same_tensors(opened, reference)
    run_distributed(load_family, 2, family, tied, str(tmp_path / "direct"))
    # What reads steps reads these as well, and finds the same in both.
    assert am_ckpt.diff(tmp_path / "sharded" / "step_000001", folder).exit_code == 0
    merged = am_ckpt.merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged" / "model.safetensors.index.json").exists()
    am_ckpt.merge(tmp_path / "sharded" / "step_000001", tmp_path / "from_shards")
    assert merged.num_tensors == len(am_ckpt.inspect(folder).tensors)
    assert am_ckpt.diff(tmp_path / "merged", tmp_path / "from_shards").exit_code == 0
    am_ckpt.reshard(folder, tmp_path / "resharded" / "step_000001", mesh={"dp": 2})
    assert am_ckpt.verify(tmp_path / "resharded" / "step_000001", full=True).problems == []
    run_distributed(load_family, 2, family, tied, str(tmp_path / "resharded"))


def transposed(directory: str, layout: str) -> list[torch.Tensor]:
    """Two parameters: one in files row by row and transposed, one whole; sharded by rows, or by columns."""
    values = torch.arange(24.0).view(4, 6)
    model = nn.Module()
    dim = 0 if layout == "rows" else 1
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("cut", "turned"):
        model.register_parameter(name, nn.Parameter(distribute_tensor(values + len(name), mesh, [Shard(dim)])))
    records = [
        {"file": f"row.{i}", "parameter": "cut", "slice": [[i, i + 1], None], "transpose": False} for i in range(4)
    ]
    records.append({"file": "turned.T", "parameter": "turned", "slice": None, "transpose": True})
    checkpoints = am_ckpt.Checkpointer(directory, layout="direct", mapping=records)
    if layout == "rows":
        checkpoints.save(1, {"model": model})
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert checkpoints.load({"model": model}) == 1
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


def test_a_mapping_is_applied_and_undone(tmp_path: Path) -> None:
    saved = run_distributed(transposed, 3, str(tmp_path), "rows")[0]
    found = load_file(tmp_path / "step_000001" / "model" / "model.safetensors")
    assert torch.equal(torch.stack([found[f"row.{i}"] for i in range(4)]), saved[0])
    assert torch.equal(found["turned.T"].T, saved[1])
    for loaded in run_distributed(transposed, 2, str(tmp_path), "columns"):
        assert torch.equal(loaded[0], saved[0])
        assert torch.equal(loaded[1], saved[1])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # no_dist says so itself
def test_torch_reads_a_step_through_the_storage_reader(tmp_path: Path) -> None:
    saved = run_distributed(save, 3, "tp3", str(tmp_path))[0]
    target = {"model": {"middle.weight": torch.zeros(5, 6)}}
    reader = am_ckpt.StorageReader(tmp_path / "step_000003", prefix="model.")
    dcp.load(target, storage_reader=reader, no_dist=True)
    assert target["model"]["middle.weight"].numpy().tobytes() == saved["middle.weight"].tobytes()


@pytest.mark.parametrize("source", ["fsdp4", "tp4"])
def test_any_flipped_bit_is_found_with_its_tensor_and_range(source: str, tmp_path: Path) -> None:
    run_distributed(save, 4, source, str(tmp_path))
    folder = tmp_path / "step_000003"
    file = folder / "model" / "model.safetensors"
    content = file.read_bytes()
    entries = {
        name: (chunk.begin, chunk.begin + tensor["chunks"][0]["end"] - tensor["chunks"][0]["begin"])
        for name, tensor in am_ckpt.inspect(folder).to_json()["tensors"].items()
        for chunk in am_ckpt.inspect(folder).tensors[name].chunks
    }
    chance = numpy.random.default_rng(0)
    for name, (begin, end) in entries.items():
        position = int(chance.integers(begin, end))
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(chance.integers(8))
        file.write_bytes(damaged)
        (problem,) = am_ckpt.verify(folder, full=True).problems
        assert f"{file} is damaged: {name!r} [" in problem
        first, last = problem.split("between bytes ")[1].split(", ")[0].split(" and ")
        assert int(first) <= position < int(last)
    file.write_bytes(content)
    assert am_ckpt.verify(folder, full=True).problems == []


def test_what_no_digest_covers_is_a_problem(tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path, layout="direct").save(1, {"model": Net()})
    path = tmp_path / "step_000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    (record,) = [record for record in manifest["files"] if record["path"] == "model/model.safetensors"]
    del record["boxes_xxh3_128"]["thin"]
    del manifest["xxh3_128"]
    path.write_bytes(seal(manifest))
    (problem,) = am_ckpt.verify(tmp_path / "step_000001").problems
    assert "what was written of 'thin' has 3 elements, its shards hold 0" in problem


def test_an_adapter_is_direct_already(tmp_path: Path) -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Parameter(torch.ones(2, 3))

    model = Adapter()

    class State:
        def state_dict(self) -> dict[str, Any]:
            return {"low": model.low.detach()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            model.load_state_dict(state)

        def named_parameters(self) -> Any:
            return model.named_parameters()

    am_ckpt.Checkpointer(tmp_path, layout="direct").save(1, {"model": State()})
    assert [path.name for path in (tmp_path / "step_000001" / "model").iterdir()] == ["adapter_model.safetensors"]


def full_disk(directory: str) -> str:
    """Rank 1 cannot write its part of the shared file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    torch.manual_seed(0)
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.randn(2**18)) for i in range(8)})
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        am_ckpt.Checkpointer(directory, layout="direct", max_shard_size=2**21).save(1, {"model": model})
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def test_a_rank_that_cannot_write_is_the_error_of_all(tmp_path: Path) -> None:
    first, second = run_distributed(full_disk, 2, str(tmp_path))
    assert first == second
    assert "rank 1 of 2: [Errno 27] File too large" in first
    assert not any(tmp_path.glob("step_*"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # no_dist says so itself
def test_torch_reads_the_names_of_the_module(tmp_path: Path) -> None:
    model = nn.Linear(4, 2, bias=False)
    mapping = [
        {"file": f"row.{i}", "parameter": "weight", "slice": [[i, i + 1], None], "transpose": False} for i in range(2)
    ]
    am_ckpt.Checkpointer(tmp_path, layout="direct", mapping=mapping).save(1, {"model": model})
    target = {"weight": torch.zeros(2, 4)}
    dcp.load(target, storage_reader=am_ckpt.StorageReader(tmp_path / "step_000001"), no_dist=True)
    assert torch.equal(target["weight"], model.weight)


@pytest.mark.parametrize("layout", ["sharded", "direct"])
def test_a_mapping_of_something_else_is_refused(layout: str, tmp_path: Path) -> None:
    mapping = [{"file": "q", "parameter": "typo", "slice": None, "transpose": False}]
    with pytest.raises(ValueError, match="mapping names 'typo'"):
        am_ckpt.Checkpointer(tmp_path, layout=layout, mapping=mapping).save(1, {"model": nn.Linear(2, 2)})
    assert not any(tmp_path.iterdir())


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout='flat' must be 'sharded' or 'direct'"):
        am_ckpt.Checkpointer(tmp_path, layout="flat")  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_ranks_of_two_machines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "boot_id").write_text("another\n")
    context = torch_processes()
    with ProcessPoolExecutor(1, context) as here, ProcessPoolExecutor(1, context) as there:
        if not there.submit(other_machine.see_another_boot, str(tmp_path / "boot_id")).result():
            pytest.skip("needs mount namespaces")
        store, out = str(tmp_path / "store"), str(tmp_path / "out")
        ranks = [machine.submit(other_machine.save, store, rank, out) for rank, machine in enumerate((here, there))]
        for rank in ranks:
            assert "layout='direct' needs all ranks on one machine, ranks 0 and 1 are on two" in rank.result(60)
    assert not (tmp_path / "out").exists()
