"""Beside stock code: torch.distributed.checkpoint saves and loads with our storage, on any number of ranks."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import am_ckpt
from am_ckpt._files.step import seal
from am_testing import run_distributed

# torch says so of every save and load without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def state_dict(seed: int, layout: str = "plain", extra: Any = None) -> dict[str, Any]:
    """A model of odd sizes, the state of its optimizer under torch's names, and values that are no tensors."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    model.register_buffer("count", torch.tensor(seed))
    model.register_buffer("scales", torch.randn(5).to(torch.float8_e4m3fn))
    model.register_buffer("nothing", torch.empty(0, 2))
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",)))
    elif layout == "tp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        for layer in model:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(1)]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5 if seed else 0.1)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 2
    optimizer.step()
    return {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
        "progress": {"step": seed, "name": "x", "pair": (1, 2.5), "extra": extra},
    }


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by path, tensors whole and as bytes."""
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in flat(item, f"{path}/{name}").items()}
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return {path: whole.detach().reshape(-1).view(torch.uint8).numpy().tobytes()}
    return {path: value}


def test_what_torch_saves_and_loads_with_our_storage(tmp_path: Path) -> None:
    saved = state_dict(0, extra={"t": torch.arange(3)})
    dcp.save(saved, storage_writer=am_ckpt.StorageWriter(tmp_path / "step", step=7))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]
    loaded = state_dict(1, extra={"t": torch.zeros(3, dtype=torch.int64)})
    dcp.load(loaded, storage_reader=am_ckpt.StorageReader(tmp_path / "step"))
    assert flat(loaded) == flat(saved)
    # Our own tools read it.
    inventory = am_ckpt.inspect(tmp_path / "step")
    assert (inventory.kind, inventory.step, inventory.problems) == ("am-ckpt", 7, [])
    assert set(inventory.tensors) == set(saved["model"])
    assert am_ckpt.verify(tmp_path / "step", full=True).problems == []
    am_ckpt.merge(tmp_path / "step", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert flat(merged) == flat(saved["model"])
    # And so does torch.
    target = {name: torch.zeros_like(tensor) for name, tensor in saved["model"].items() if tensor.numel()}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "step" / "model")))
    assert flat(target).items() <= flat(saved["model"]).items()


def save(directory: str, layout: str) -> dict[str, Any]:
    saved = state_dict(0, layout)
    dcp.save(saved, checkpoint_id=directory, storage_writer=am_ckpt.StorageWriter("unused"))
    return flat(saved)


def load(directory: str, layout: str) -> dict[str, Any]:
    loaded = state_dict(1, layout)
    dcp.load(loaded, checkpoint_id=directory, storage_reader=am_ckpt.StorageReader("unused"))
    return flat(loaded)


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 4), ("tp", 2)])
def test_saved_on_some_ranks_and_loaded_on_others(layout: str, world_size: int, tmp_path: Path) -> None:
    saved = run_distributed(save, world_size, str(tmp_path / "step"), layout)[0]
    for target, ranks in (("fsdp", 3), ("tp", 4), ("plain", 1)):
        for loaded in run_distributed(load, ranks, str(tmp_path / "step"), target):
            assert loaded == saved
    assert am_ckpt.verify(tmp_path / "step", full=True).problems == []


def test_torchs_asynchronous_save_publishes_too(tmp_path: Path) -> None:
    saved = state_dict(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dcp.async_save(saved, storage_writer=am_ckpt.StorageWriter(tmp_path / "step")).result()
    finally:
        dist.destroy_process_group()
    loaded = state_dict(1)
    dcp.load(loaded, storage_reader=am_ckpt.StorageReader(tmp_path / "step"))
    assert flat(loaded) == flat(saved)


def test_what_needs_pickle_is_refused_by_name(tmp_path: Path) -> None:
    for extra in (numpy.random.default_rng(0), torch.Generator):
        with pytest.raises(CheckpointException, match=r"'progress.extra' has a type which cannot be stored"):
            dcp.save(state_dict(0, extra=extra), storage_writer=am_ckpt.StorageWriter(tmp_path / "step"))
    assert os.listdir(tmp_path) == []
    assert not leases()


def leases() -> list[threading.Thread]:
    """Threads that keep a staging folder from being removed, once those that were told to end have."""
    for thread in threading.enumerate():
        if thread.name == "am-ckpt lease":
            thread.join(1.0)
    return [thread for thread in threading.enumerate() if thread.name == "am-ckpt lease"]


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    writer = am_ckpt.StorageWriter(tmp_path / "step")
    dcp.save(state_dict(0), storage_writer=writer)
    before = (tmp_path / "step" / "manifest.json").read_bytes()
    with pytest.raises(CheckpointException, match="exists and is never overwritten"):
        dcp.save(state_dict(1), storage_writer=writer)
    assert (tmp_path / "step" / "manifest.json").read_bytes() == before


def failing(directory: str) -> tuple[str, list[str]]:
    writer = am_ckpt.StorageWriter(f"{directory}/step")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = ""
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        dcp.save(state_dict(0, "fsdp"), storage_writer=writer)
    except CheckpointException as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    there = [name for name in os.listdir(directory) if not name.startswith(".staging-")]
    dist.barrier()
    dcp.save(state_dict(0, "fsdp"), storage_writer=writer)
    dist.barrier()
    return message, there + sorted(os.listdir(directory))


def abandoned(directory: str) -> list[str]:
    """Only rank 0 creates the folder, only rank 1 fails, and the writer is given up."""
    # Of values that are no tensors, torch has every rank write those that it alone has.
    own = {f"rank{dist.get_rank()}": object() if dist.get_rank() == 1 else 1}
    with pytest.raises(CheckpointException, match="'rank1' has a type which cannot be stored"):
        dcp.save({**state_dict(0), **own}, storage_writer=am_ckpt.StorageWriter(f"{directory}/step"))
    gc.collect()
    assert not leases()
    dist.barrier()
    return os.listdir(directory)


def test_a_writer_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    assert run_distributed(abandoned, 2, str(tmp_path)) == [[], []]


@pytest.mark.parametrize("dcp_entry", [{}, {"prefix": 3, "paths": {}}, {"prefix": "", "paths": {"a": "b"}}, []])
def test_a_manifest_whose_names_make_no_sense_is_refused(dcp_entry: Any, tmp_path: Path, caplog: Any) -> None:
    dcp.save(state_dict(0), storage_writer=am_ckpt.StorageWriter(tmp_path / "step"))
    path = tmp_path / "step" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["xxh3_128"]
    path.write_bytes(seal({**manifest, "dcp": dcp_entry}))
    with pytest.raises(CheckpointException):
        dcp.load(state_dict(1), storage_reader=am_ckpt.StorageReader(tmp_path / "step"))
    # Logged, since not every torch hands the reader's error on.
    assert "damaged or of another program: it has dcp=" in caplog.text


def test_a_failure_of_one_rank_publishes_nothing(tmp_path: Path) -> None:
    for message, names in run_distributed(failing, 2, str(tmp_path)):
        assert "File too large" in message
        assert names == ["step"]


def test_a_missing_part_is_an_error_before_anything_is_read(tmp_path: Path, caplog: Any) -> None:
    run_distributed(save, 4, str(tmp_path / "step"), "fsdp")
    os.unlink(tmp_path / "step" / "model" / "shard-00002-model-00001-of-00001.safetensors")
    loaded = state_dict(1)
    before = flat(loaded)
    with pytest.raises(CheckpointException):
        dcp.load(loaded, storage_reader=am_ckpt.StorageReader(tmp_path / "step"))
    assert re.search(r"shard-00002-model-00001-of-00001.safetensors.* is missing", caplog.text)
    assert flat(loaded) == before


def test_steps_of_the_checkpointer_and_hugging_face_folders_are_read(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": model})
    (tmp_path / "hf").mkdir()
    save_file({name: tensor.detach() for name, tensor in model.named_parameters()}, tmp_path / "hf/model.safetensors")
    for folder in ("step_000001", "hf"):
        for prefix in ("", "model."):
            other = nn.Linear(3, 2)
            target: dict[str, Any] = other.state_dict()
            dcp.load(
                {"model": target} if prefix else target,
                storage_reader=am_ckpt.StorageReader(tmp_path / folder, prefix=prefix),
            )
            assert flat(target) == flat(model.state_dict())


def test_distcp_files_are_left_to_torch(tmp_path: Path, caplog: Any) -> None:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "step")
    with pytest.raises(CheckpointException):
        dcp.load({"a": torch.zeros(2)}, storage_reader=am_ckpt.StorageReader(tmp_path / "step"))
    assert "torch's FileSystemReader reads them" in caplog.text
