"""One process: what is stored comes back exactly, what is damaged or foreign is refused, what is old is tidied."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from crash_matrix import Server, can_inject
from safetensors import safe_open
from torch import nn

import am_ckpt


class Holder:
    """State that is given and taken as it is."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def model_of(value: float = 1.0) -> nn.Module:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return model


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_public_names() -> None:
    assert am_ckpt.__all__ == [
        "ArgumentError",
        "Checkpointer",
        "DiffReport",
        "Difference",
        "IncompleteError",
        "Inventory",
        "MergeReport",
        "MissingTorchError",
        "NewerError",
        "PerRank",
        "StorageReader",
        "StorageWriter",
        "UnsafeError",
        "VerifyReport",
        "convert",
        "diff",
        "hf_files",
        "inspect",
        "load_hf",
        "merge",
        "require_replaceable",
        "reshard",
        "save_hf",
        "verify",
    ]
    assert all(name in dir(am_ckpt) and callable(getattr(am_ckpt, name)) for name in am_ckpt.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Checkpoint'"):
        am_ckpt.Checkpoint  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, am_ckpt; print([n for n in ('torch', 'numpy', 'transformers', 'safetensors') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


VALUES = [
    None,
    True,
    0,
    -(2**63),
    2**64 + 1,
    -(10**30),
    1.5,
    -0.0,
    5e-324,
    0.1,
    1e16,
    math.inf,
    -math.inf,
    "text \u00e9\n\0",
    b"\0\xff",
    [1, [2, (3, ())]],
    {"a": {"$tensor": 1}},
    {1: "a", (2, 3): "b", None: "c", 1.5: "d"},
    OrderedDict(b=1, a=2),
    Counter({3: 2}),
    {1, 2, "x"},
    torch.Size([2, 3]),
    torch.bfloat16,
    torch.device("cpu"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_state_comes_back_exactly(value: Any, tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path).save(1, {"data": Holder(value)})
    holder = Holder()
    assert am_ckpt.Checkpointer(tmp_path).load({"data": holder}) == 1
    assert holder.value == value
    assert type(holder.value) is type(value)
    # Tells -0.0 from 0.0 and 1 from True, inside containers too; a set has no order to compare.
    if not isinstance(value, set):
        assert repr(holder.value) == repr(value)


def test_nan_keeps_its_bits(tmp_path: Path) -> None:
    value = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
    am_ckpt.Checkpointer(tmp_path).save(1, {"data": Holder(value)})
    holder = Holder()
    am_ckpt.Checkpointer(tmp_path).load({"data": holder})
    assert struct.pack(">d", holder.value).hex() == "fff8000000000123"


def awkward() -> dict[str, torch.Tensor]:
    return {
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 3),
        "one": torch.ones(1),
        "bool": torch.tensor([True, False]),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bf16": torch.randn(3, 5).bfloat16(),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "complex": torch.randn(3, dtype=torch.complex64),
        "strided": torch.randn(6, 4).T,
        "part": torch.randn(10, 10)[2:5, 3:7],
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    }


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    a, b = (t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(a, b)


def test_tensors_of_every_kind_come_back_bit_equal(tmp_path: Path) -> None:
    tensors = awkward()
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor.clone(memory_format=torch.preserve_format))
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": model, "data": Holder(tensors)})
    other, holder = nn.Module(), Holder()
    for name, tensor in tensors.items():
        other.register_buffer(name, torch.zeros_like(tensor))
    am_ckpt.Checkpointer(tmp_path).load({"model": other, "data": holder})
    for name, tensor in tensors.items():
        assert same_bits(getattr(other, name), tensor), name
        assert same_bits(holder.value[name], tensor), name


def test_a_large_strided_tensor_goes_through_bounded_buffers(tmp_path: Path) -> None:
    # 48 MiB and not contiguous: three buffers' worth, cut along its first dim.
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(3 * 2**10, 2**12).T)
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": model})
    other = nn.Module()
    other.weight = nn.Parameter(torch.zeros(3 * 2**10, 2**12).T)
    am_ckpt.Checkpointer(tmp_path).load({"model": other})
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, object()]}, r"data\['value'\]\['a'\]\[1\] has type builtins.object"),
        ({"a": lambda: 1}, r"data\['value'\]\['a'\] has type builtins.function"),
        (torch.ones(2, device="meta"), r"data\['value'\] is on the meta device"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_path(value: Any, path: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=path):
        am_ckpt.Checkpointer(tmp_path / "run").save(1, {"data": Holder(value)})
    assert not (tmp_path / "run").exists()


def test_the_layout_on_disk(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    (tmp_path / "tokenizer.json").write_text("{}")
    files = {"config.json": "{}", "added.bin": b"\0", "tokenizer.json": tmp_path / "tokenizer.json"}
    checkpoints = am_ckpt.Checkpointer(tmp_path / "run", files=files, mapping=[], fingerprints={"seed": 3})
    checkpoints.save(100, {"model": model, "optimizer": optimizer}, metrics={"val_loss": math.nan})
    checkpoints.wait()
    step = tmp_path / "run" / "step_000100"
    assert names(tmp_path / "run") == ["latest", "step_000100"]
    assert os.readlink(tmp_path / "run" / "latest") == "step_000100"
    assert names(step) == ["manifest.json", "model", "optim", "state"]
    shard = "shard-00001-model-00001-of-00001.safetensors"
    assert names(step / "model") == ["added.bin", "config.json", shard, "tokenizer.json"]
    assert names(step / "state") == ["optimizer.json"]
    with safe_open(step / "optim" / shard, "pt") as file:
        assert sorted(file.keys()) == [
            f"{slot}/{n}" for slot in ("exp_avg", "exp_avg_sq", "step") for n in ("bias", "weight")
        ]
        info = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        assert info["exp_avg/weight"] == {"saved_offsets": [0, 0], "global_shape": [2, 3]}
        assert file.metadata()["format"] == "pt"
    with open(step / "model" / shard, "rb") as raw:
        assert (8 + struct.unpack("<Q", raw.read(8))[0]) % 4096 == 0
    manifest = json.loads((step / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["fingerprints"]) == (100, 1, {"seed": 3})
    listed = {record["path"]: record for record in manifest["files"]}
    assert set(listed) == {str(p.relative_to(step)) for p in step.rglob("*") if p.is_file()} - {"manifest.json"}
    import xxhash

    for path, record in listed.items():
        content = (step / path).read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0] if path.endswith(".safetensors") else 0
        found = [xxhash.xxh3_128_hexdigest(part) for part in (content[:start], content[start:])]
        if start:
            assert [record["header_xxh3_128"], *record["blocks_xxh3_128"]] == found
        else:
            assert record["xxh3_128"] == found[1]


def test_retention_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=2, keep_best=("loss", "min", 1))
    for step, loss in enumerate([5.0, 1.0, 3.0, math.nan, 4.0], start=1):
        checkpoints.save(step, {"model": model_of(step)}, metrics={"loss": loss})
    assert names(tmp_path) == ["best", "latest", "step_000002", "step_000004", "step_000005"]
    assert (os.readlink(tmp_path / "best"), os.readlink(tmp_path / "latest")) == ("step_000002", "step_000005")
    model = model_of()
    assert checkpoints.load({"model": model}, "best") == 2
    assert model.weight[0, 0] == 2
    assert checkpoints.load({"model": model}, "step_000004") == 4
    assert checkpoints.load({"model": model}, tmp_path / "step_000005") == 5
    with pytest.raises(ValueError, match=r"lack 'loss'"):
        checkpoints.save(6, {"model": model}, metrics={"val_loss": 1.0})


def test_links_are_hints_only(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"model": model_of(step)})
    os.unlink(tmp_path / "latest")
    os.symlink("step_000001", tmp_path / "latest")
    assert checkpoints.load({"model": model_of()}) == 2


def test_steps_that_are_links_are_loaded_and_never_deleted(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    am_ckpt.Checkpointer(there).save(3, {"model": model_of(3)})
    here.mkdir()
    (here / "step_000003").symlink_to(there / "step_000003")
    checkpoints = am_ckpt.Checkpointer(here, keep_last=1)
    model = model_of()
    assert checkpoints.load({"model": model}) == 3
    assert model.weight[0, 0] == 3
    checkpoints.save(4, {"model": model_of(4)})
    assert names(here) == ["latest", "step_000003", "step_000004"]
    assert names(there) == ["latest", "step_000003"]


def test_a_link_to_nowhere_is_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "step_000003").symlink_to(tmp_path / "moved")
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints is whole: .*step_000003 is not a checkpoint"):
        checkpoints.load({"model": model_of()})
    with pytest.warns(UserWarning, match="set a damaged checkpoint aside"):
        checkpoints.save(3, {"model": model_of(3)})
    assert checkpoints.load({"model": model_of()}) == 3


def test_one_broken_step_stops_neither_saving_nor_loading(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=1)
    checkpoints.save(1, {"model": model_of(1)})
    checkpoints.save(5, {"model": model_of(5)})
    broken = tmp_path / "step_000005"
    moved = tmp_path / "moved"
    (broken / "model").rename(moved)
    (broken / "model").write_text("a file")
    (tmp_path / "step_000007").write_text("a file")
    checkpoints.save(2, {"model": model_of(2)})
    with pytest.warns(UserWarning, match="SKIPPED a damaged checkpoint, going back to step_000002") as warnings:
        assert checkpoints.load({"model": model_of()}) == 2
    assert len(warnings) == 2
    assert names(tmp_path) == ["latest", "moved", "step_000002", "step_000005", "step_000007"]


def test_a_step_of_a_newer_release_is_left_alone(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=1)
    checkpoints.save(1, {"model": model_of(1)})
    path = tmp_path / "step_000001" / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"was written by a newer am_ckpt: it has format version 2"):
        checkpoints.save(1, {"model": model_of(1)})
    with pytest.raises(ValueError, match=r"was written by a newer am_ckpt"):
        checkpoints.load({"model": model_of(1)})
    checkpoints.save(2, {"model": model_of(2)})
    assert path.read_bytes() == before


def test_a_step_is_named_by_number_and_found_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, value in (("here", 1), ("there", 2)):
        am_ckpt.Checkpointer(tmp_path / folder).save(5, {"model": model_of(value)})
    # A process that runs in a folder with a step of the same name.
    monkeypatch.chdir(tmp_path / "there")
    for which in (5, "step_000005"):
        model = model_of(9)
        assert am_ckpt.Checkpointer(tmp_path / "here").load({"model": model}, which) == 5
        assert model.weight[0, 0] == 1
    with pytest.raises(FileNotFoundError, match="step_000006 is not a checkpoint folder"):
        am_ckpt.Checkpointer(tmp_path / "here").load({"model": model}, 6)


class WithExtraState(nn.Linear):
    """A module with state of its own kind, as fp8 layers have."""

    def __init__(self, extra: Any) -> None:
        super().__init__(3, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_extra_state_of_modules_comes_back(tmp_path: Path) -> None:
    def build(scale: float) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), WithExtraState({"scale": torch.full((4,), scale), "history": (1, scale)}))

    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, {"model": build(2.0)})
    loaded = build(0.0)
    assert checkpoints.load({"model": torch.compile(loaded, backend="eager")}) == 1
    assert torch.equal(loaded[1].extra["scale"], torch.full((4,), 2.0))
    assert loaded[1].extra["history"] == (1, 2.0)
    with pytest.raises(ValueError, match=r"1 only in the checkpoint: 1\._extra_state"):
        checkpoints.load({"model": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))})
    with pytest.raises(TypeError, match=r"model\['1._extra_state'\] has type builtins.object"):
        checkpoints.save(2, {"model": nn.Sequential(nn.Linear(3, 3), WithExtraState(object()))})


def test_optimizer_state_of_no_parameter_is_refused(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["global"]["step"] = 3
    with pytest.raises(ValueError, match=r"state\['optimizer'\].state has an entry for 'global', which is in none"):
        am_ckpt.Checkpointer(tmp_path).save(1, {"model": model, "optimizer": optimizer})


@pytest.mark.parametrize("asynchronous", [False, True])
def test_conjugated_and_negated_views_are_stored_as_what_they_show(asynchronous: bool, tmp_path: Path) -> None:
    values = torch.randn(5, 3, dtype=torch.complex64)
    model = nn.Module()
    model.register_buffer("conjugate", values.conj())
    model.register_buffer("negative", values.conj().imag)
    assert model.conjugate.is_conj()
    assert model.negative.is_neg()
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=asynchronous)
    checkpoints.save(1, {"model": model, "state": Holder(values.conj())})
    loaded = nn.Module()
    # Read into such views too.
    loaded.register_buffer("conjugate", torch.zeros(5, 3, dtype=torch.complex64).conj())
    loaded.register_buffer("negative", torch.zeros(5, 3))
    holder = Holder()
    assert checkpoints.load({"model": loaded, "state": holder}) == 1
    assert torch.equal(loaded.conjugate, torch.conj_physical(values))
    assert torch.equal(loaded.negative, -values.imag)
    assert torch.equal(holder.value, torch.conj_physical(values))


def test_tensors_without_values_are_refused(tmp_path: Path) -> None:
    meta = torch.ones(2, device="meta")
    module = nn.Module()
    module.register_buffer("there", meta)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["momentum_buffer"] = meta
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    for state in ({"model": module}, {"model": model, "optimizer": optimizer}, {"data": Holder(meta)}):
        with pytest.raises(ValueError, match="is on the meta device and has no values to store"):
            checkpoints.save(1, state)
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": model})
    with torch.device("meta"):
        other = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="weight is on the meta device: give it memory first"):
        checkpoints.load({"model": other})


def test_inference_tensors_are_loaded_in_inference_mode(tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": model_of(3)})
    with torch.inference_mode():
        model = nn.Module()
        # Transposed, so that it cannot be read in place.
        model.register_buffer("weight", torch.zeros(3, 2).T)
        model.register_buffer("bias", torch.zeros(2))
        assert am_ckpt.Checkpointer(tmp_path).load({"model": model}) == 1
        assert model.weight.unique().tolist() == [3.0]


def test_a_digest_tells_what_was_restored(tmp_path: Path) -> None:
    def state(value: float) -> dict[str, Any]:
        model = model_of(value)
        optimizer = torch.optim.AdamW(model.parameters(), lr=value)
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer, "data": Holder(value)}

    checkpoints = am_ckpt.Checkpointer(tmp_path)
    saved, loaded = state(1.0), state(2.0)
    expected = checkpoints.digest(saved)
    assert expected.keys() == {"tensors", "bytes", "xxh3_128"}
    assert (expected["tensors"], expected["bytes"]) == (2 + 6, 3 * 8 * 4 + 2 * 4)
    assert checkpoints.digest(loaded) != expected
    checkpoints.save(1, saved)
    checkpoints.load(loaded)
    assert checkpoints.digest(loaded) == expected
    # A single bit, and what is no tensor.
    with torch.no_grad():
        loaded["model"].bias[1:].view(torch.int32).bitwise_xor_(1)
    assert checkpoints.digest(loaded) != expected
    checkpoints.load(loaded)
    loaded["data"].value = 3.0
    assert checkpoints.digest(loaded) != expected


@pytest.mark.parametrize("entries", [("model",), ("model", "optimizer")])
def test_a_step_that_is_deleted_while_it_is_loaded(entries: tuple[str, ...], tmp_path: Path) -> None:
    def state(value: float) -> dict[str, Any]:
        model = model_of(value)
        optimizer = torch.optim.AdamW(model.parameters(), lr=value)
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    saved, loaded = state(1.0), state(2.0)
    am_ckpt.Checkpointer(tmp_path).save(1, saved)
    readers = set()

    def delete(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function is os.preadv and not readers:
            readers.add(threading.current_thread())
            shutil.rmtree(tmp_path / "step_000001")

    threading.setprofile(delete)
    chosen = {entry: loaded[entry] for entry in entries}
    try:
        if "optimizer" in entries:
            # Its file was not open yet.
            with pytest.raises(FileNotFoundError, match=r"step_000001 was loaded in part, .*optim/shard-00001"):
                am_ckpt.Checkpointer(tmp_path).load(chosen, verify=False)
        else:
            assert am_ckpt.Checkpointer(tmp_path).load(chosen, verify=False) == 1
            assert torch.equal(loaded["model"].weight, saved["model"].weight)
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    assert readers


STALE = """
import ctypes, errno, sys, torch, am_ckpt
model = torch.nn.Linear(4, 3, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.ones(4)).sum().backward(); optimizer.step()
state = {"model": model, "optimizer": optimizer}
checkpoints = am_ckpt.Checkpointer(sys.argv[1])
checkpoints.save(1, state)
before = checkpoints.digest(state)
optimizer.state[model.weight]["momentum_buffer"].zero_()
# A row of the tensor has 48 bytes.
ctypes.CDLL(None).staleshim_arm(b"/optim/", ctypes.c_size_t(48), int(sys.argv[2]), errno.ESTALE)
print(checkpoints.load(state), checkpoints.digest(state) == before)
"""


@pytest.mark.skipif(not can_inject(), reason="reads are made to fail with LD_PRELOAD: Linux and cc")
@pytest.mark.parametrize(("count", "status", "printed"), [(1, 0, "1 True"), (2, 1, "Stale file handle")])
def test_a_stale_handle_is_opened_again_once(
    count: int, status: int, printed: str, server: Server, tmp_path: Path
) -> None:
    ended, text = server.run(STALE, str(tmp_path), str(count))
    assert ended == status, text
    assert printed in text


def test_an_empty_directory_has_nothing_to_load(tmp_path: Path) -> None:
    assert am_ckpt.Checkpointer(tmp_path / "none").load({"model": model_of()}) is None
    with pytest.raises(FileNotFoundError, match=r"steps in .*: none"):
        am_ckpt.Checkpointer(tmp_path).load({"model": model_of()}, "step_000007")
    with pytest.raises(ValueError, match="needs keep_best"):
        am_ckpt.Checkpointer(tmp_path).load({"model": model_of()}, "best")


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, {"model": model_of(1), "data": Holder(1)})
    before = (tmp_path / "step_000001" / "manifest.json").read_bytes()
    # The same content, as after a resume that is stopped at once.
    checkpoints.save(1, {"model": model_of(1), "data": Holder(1)})
    for other in ({"model": model_of(2), "data": Holder(1)}, {"model": model_of(1), "data": Holder(2)}):
        with pytest.raises(FileExistsError, match="never overwritten"):
            checkpoints.save(1, other)
    assert (tmp_path / "step_000001" / "manifest.json").read_bytes() == before


def test_equal_bytes_under_other_names_are_other_content(tmp_path: Path) -> None:
    def named(name: str, *shape: int) -> dict[str, Any]:
        model = nn.Module()
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        return {"model": model}

    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, named("a", 4, 2), metrics={"loss": 0.5})
    for same in (None, {"loss": 0.5}):
        checkpoints.save(1, named("a", 4, 2), metrics=same)
    others = [(named("b", 4, 2), None), (named("a", 2, 4), None), (named("a", 4, 2), {"loss": 0.4})]
    for state, metrics in others:
        with pytest.raises(FileExistsError, match="exists with other content, metrics or number of ranks"):
            checkpoints.save(1, state, metrics=metrics)


SHARD = "model/shard-00001-model-00001-of-00001.safetensors"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_first_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    moved = path.with_name("moved")
    path.rename(moved)
    os.symlink(moved.name, path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("manifest.json", os.unlink),
        ("manifest.json", truncate),
        ("manifest.json", flip_first_byte),
        (SHARD, os.unlink),
        (SHARD, truncate),
        (SHARD, flip_first_byte),
        (SHARD, replace_by_link),
        ("state/data.json", flip_first_byte),
        ("state/data.json", truncate),
        ("state/data.safetensors", flip_first_byte),
    ],
)
def test_a_damaged_step_is_skipped_loudly_or_refused_by_name(file: str, damage: Any, tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=3)
    for step in (1, 2):
        checkpoints.save(step, {"model": model_of(step), "data": Holder({"step": step, "t": torch.ones(1)})})
    damage(tmp_path / "step_000002" / file)
    model, data = model_of(9), Holder()
    with pytest.warns(UserWarning, match=r"SKIPPED a damaged checkpoint, going back to step_000001: .*step_000002"):
        assert checkpoints.load({"model": model, "data": data}) == 1
    assert model.weight[0, 0] == 1
    with pytest.raises(ValueError, match="step_000002"):
        checkpoints.load({"model": model}, "step_000002")
    # The run goes on over the damaged step, which is kept aside.
    with pytest.warns(UserWarning, match="set a damaged checkpoint aside"):
        checkpoints.save(2, {"model": model_of(7), "data": Holder(7)})
    assert checkpoints.load({"model": model}) == 2
    assert model.weight[0, 0] == 7
    assert any(name.startswith(".damaged-step_000002") for name in names(tmp_path))


def test_nothing_but_damaged_steps_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, {"model": model_of()})
    truncate(tmp_path / "step_000001" / SHARD)
    with pytest.raises(ValueError, match="none of the 1 checkpoints is whole"):
        checkpoints.load({"model": model_of()})


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4))
        self.bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.scales = nn.Parameter(torch.zeros(1))


def test_another_model_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    source = model_of()
    source.scale = nn.Parameter(torch.ones(1))
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": source})
    model = Renamed()
    with pytest.raises(ValueError) as error:
        am_ckpt.Checkpointer(tmp_path).load({"model": model})
    text = str(error.value)
    assert "1 not in the checkpoint: scales (nearest: scale)" in text
    assert "1 only in the checkpoint: scale (nearest: scales)" in text
    assert "weight: here F32 [2, 4], in the checkpoint F32 [2, 3]" in text
    assert "bias: here F64 [2], in the checkpoint F32 [2]" in text
    assert not any(parameter.any() for parameter in model.parameters())


def test_state_and_fingerprints_must_match(tmp_path: Path) -> None:
    model = model_of()
    am_ckpt.Checkpointer(tmp_path, fingerprints={"data": "a", "seed": 1}).save(1, {"model": model})
    with pytest.raises(ValueError, match=r"another run: seed: checkpoint 1, here 2"):
        am_ckpt.Checkpointer(tmp_path, fingerprints={"seed": 2}).load({"model": model})
    with pytest.raises(ValueError, match=r"no state \['data'\]; it holds \['model'\]"):
        am_ckpt.Checkpointer(tmp_path).load({"model": model, "data": Holder()})
    with pytest.raises(TypeError, match="needs state_dict"):
        am_ckpt.Checkpointer(tmp_path).save(2, {"model": model, "data": object()})


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_tied_weights_are_stored_once_and_must_be_tied_again(tmp_path: Path) -> None:
    source, target = Tied(True), Tied(True)
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": source})
    with safe_open(tmp_path / "step_000001" / SHARD, "pt") as file:
        assert list(file.keys()) == ["embedding.weight"]
    am_ckpt.Checkpointer(tmp_path).load({"model": target})
    assert torch.equal(target.head.weight, source.embedding.weight)
    with pytest.raises(ValueError, match="separate here, but tied in the checkpoint"):
        am_ckpt.Checkpointer(tmp_path).load({"model": Tied(False)})
    am_ckpt.Checkpointer(tmp_path).save(2, {"model": Tied(False)})
    with pytest.raises(ValueError, match="one tied tensor here, but separate in the checkpoint"):
        am_ckpt.Checkpointer(tmp_path).load({"model": Tied(True)})


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> None:
    for index in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 3), float(index + 1))).square().sum().backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resumed_training_equals_uninterrupted_training(kind: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = OPTIMIZERS[kind](model.parameters())
        return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], gamma=0.5)

    straight = build()
    train(*straight, 4)
    am_ckpt.Checkpointer(tmp_path).save(4, dict(zip(("model", "optimizer", "schedule"), straight, strict=True)))
    train(*straight, 4)
    resumed = build()
    nn.init.zeros_(resumed[0][0].weight)
    am_ckpt.Checkpointer(tmp_path).load(dict(zip(("model", "optimizer", "schedule"), resumed, strict=True)))
    train(*resumed, 4)
    for first, second in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(first, second)


def test_low_precision_parameters_keep_fp32_moments(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model.weight] = {"step": torch.tensor(1.0), "exp_avg": torch.full((2, 3), 1 / 3)}
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": model, "optimizer": optimizer})
    other = torch.optim.AdamW(model.parameters())
    am_ckpt.Checkpointer(tmp_path).load({"model": model, "optimizer": other})
    assert torch.equal(other.state[model.weight]["exp_avg"], torch.full((2, 3), 1 / 3))


def test_optimizer_groups_are_matched_by_name(tmp_path: Path) -> None:
    model = model_of()
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": model, "optimizer": torch.optim.AdamW(groups, lr=0.1)})
    swapped = torch.optim.AdamW([{"params": [model.bias]}, {"params": [model.weight]}], lr=0.2)
    am_ckpt.Checkpointer(tmp_path).load({"model": model, "optimizer": swapped})
    assert [(g["weight_decay"], g["lr"]) for g in swapped.param_groups] == [(0.0, 0.1), (0.1, 0.1)]
    with pytest.raises(ValueError, match="is none of the checkpoint's 2 groups"):
        am_ckpt.Checkpointer(tmp_path).load({"model": model, "optimizer": torch.optim.AdamW(model.parameters())})
    with pytest.raises(ValueError, match="is SGD, the checkpoint holds AdamW"):
        am_ckpt.Checkpointer(tmp_path).load({"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1)})
    other = torch.optim.SGD(model_of().parameters(), lr=1)
    with pytest.raises(ValueError, match="is not a parameter of state"):
        am_ckpt.Checkpointer(tmp_path).save(2, {"model": model, "optimizer": other})


class Adapter:
    """What am_ckpt asks of an adapter, around one trainable matrix of a larger model."""

    def __init__(self, value: float) -> None:
        self.matrix = nn.Parameter(torch.full((2, 3), value))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [("base_model.model.q.lora_A.weight", self.matrix)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            self.matrix.copy_(state["base_model.model.q.lora_A.weight"])


def test_an_adapter_is_stored_in_pefts_file_with_its_config(tmp_path: Path) -> None:
    adapter = Adapter(2.0)
    optimizer = torch.optim.AdamW([adapter.matrix])
    adapter.matrix.grad = torch.ones(2, 3)
    optimizer.step()
    checkpoints = am_ckpt.Checkpointer(tmp_path, files={"adapter_config.json": "{}"})
    checkpoints.save(1, {"model": adapter, "optimizer": optimizer})
    assert names(tmp_path / "step_000001" / "model") == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(tmp_path / "step_000001" / "model" / "adapter_model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("base_model.model.q.lora_A.weight"), adapter.matrix)
    other = Adapter(0.0)
    restored = torch.optim.AdamW([other.matrix])
    checkpoints.load({"model": other, "optimizer": restored})
    assert torch.equal(other.matrix, adapter.matrix)
    assert torch.equal(restored.state[other.matrix]["exp_avg"], optimizer.state[adapter.matrix]["exp_avg"])
    with pytest.raises(ValueError, match="holds an adapter"):
        checkpoints.load({"model": model_of()})


def test_a_full_disk_is_found_before_writing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        checkpoints = am_ckpt.Checkpointer(disk)
        checkpoints.save(1, {"model": model_of()})
        large = nn.Linear(1000, 1000)
        with pytest.raises(OSError, match=r"No space|needed \d+ bytes .* free are \d+") as error:
            checkpoints.save(2, {"model": large})
        assert error.value.errno == 28
        assert names(disk) == ["latest", "step_000001"]
        assert checkpoints.load({"model": model_of()}) == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="step 1 was not saved in"):
        am_ckpt.Checkpointer(tmp_path / "file" / "run").save(1, {"model": model_of()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_last": 0}, "keep_last=0 must be at least 1"),
        ({"keep_best": ("loss", "smallest", 1)}, "'min' or 'max'"),
        ({"keep_best": ("loss", "min")}, r"keep_best=\('loss', 'min'\) must be \(metric name, 'min' or 'max', count"),
        ({"files": {"../x": ""}}, "not a plain file name"),
        ({"files": {"model.safetensors": b""}}, "weights in model/ are written from the state"),
        ({"files": {"shard-1.json": b""}}, "weights in model/ are written from the state"),
        ({"files": {"model.safetensors.index.json": b""}}, "weights in model/ are written from the state"),
    ],
)
def test_impossible_arguments_are_refused_at_once(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        am_ckpt.Checkpointer(tmp_path, **arguments)


def test_a_live_writer_keeps_others_out(tmp_path: Path) -> None:
    import socket

    # A lease of the parent process, which is alive while this test runs.
    staging = tmp_path / ".staging-step_000001-other"
    staging.mkdir()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    start = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    lease = {
        "host": socket.gethostname(),
        "boot_id": boot,
        "pid_namespace": os.readlink("/proc/self/ns/pid"),
        "pid": os.getppid(),
        "start_time": start,
    }
    (staging / "lease.json").write_text(json.dumps(lease))
    with pytest.raises(RuntimeError, match="another process is saving to this directory"):
        am_ckpt.Checkpointer(tmp_path).save(2, {"model": model_of()})
    lease["start_time"] = "1"
    (staging / "lease.json").write_text(json.dumps(lease))
    am_ckpt.Checkpointer(tmp_path).save(2, {"model": model_of()})
    assert names(tmp_path) == ["latest", "step_000002"]
