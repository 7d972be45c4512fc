"""A load holds what it reads against the digests of the step: any flipped bit is found, wherever it is."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from crash_matrix import Server, can_inject
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import am_ckpt
from am_ckpt._files.step import seal
from am_testing import run_distributed


class Holder:
    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def state_of(value: float, *, sharded: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    nn.init.constant_(model[0].weight, value)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=value)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "data": Holder([value, torch.tensor([value])])}


def checkpointer(directory: Path | str, layout: Any) -> am_ckpt.Checkpointer:
    return am_ckpt.Checkpointer(directory, layout=layout, max_shard_size=60, files={"config.json": '{"a": 1}\n'})


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("layout", ["sharded", "direct"])
def test_a_flipped_bit_in_any_file_is_found(layout: str, tmp_path: Path) -> None:
    checkpoints = checkpointer(tmp_path, layout)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    checkpoints.pin(1)
    files = sorted(path for path in (tmp_path / "step_000002").rglob("*") if path.is_file())
    assert {path.parent.name for path in files} == {"step_000002", "model", "optim", "state"}
    assert len(files) >= 6
    for path in files:
        whole = path.read_bytes()
        # In the header, where there is one, and in the last byte of the data.
        for position in (len(whole) // 3, -1):
            flip(path, position)
            before, state = checkpoints.digest(state_of(9)), state_of(9)
            with pytest.raises(ValueError, match=f"step_000002/.*{path.name}"):
                checkpoints.load(state, 2)
            assert checkpoints.digest(state) == before, f"{path} was found too late"
            with pytest.warns(UserWarning, match=rf"SKIPPED .* going back to step_000001: .*{path.name}"):
                assert checkpoints.load(state) == 1
            assert checkpoints.digest(state) == checkpoints.digest(state_of(1))
            path.write_bytes(whole)
    # What is not in the step decides nothing.
    (tmp_path / "step_000001.pin").write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.load(state_of(9)) == 2


def test_only_what_is_loaded_is_verified_and_not_without_being_asked(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, state_of(1))
    weights = next((tmp_path / "step_000001" / "optim").iterdir())
    flip(weights, -1)
    state = state_of(9)
    assert checkpoints.load({"model": state["model"]}) == 1
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints is whole: .*they hold 'exp_avg"):
        checkpoints.load(state)
    assert checkpoints.load(state, verify=False) == 1


def test_an_adapter_is_verified(tmp_path: Path) -> None:
    class Adapter:
        def __init__(self, value: float) -> None:
            self.weight = nn.Parameter(torch.full((3,), value))

        def state_dict(self) -> dict[str, Any]:
            return {"a.weight": self.weight.detach()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.weight.data.copy_(state["a.weight"])

        def named_parameters(self) -> Any:
            yield "a.weight", self.weight

    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, {"model": Adapter(1.0)})
    flip(tmp_path / "step_000001" / "model" / "adapter_model.safetensors", -2)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged: .*they hold 'a\.weight'"):
        checkpoints.load({"model": Adapter(2.0)}, 1)


def on_two_ranks(directory: str, layout: str) -> list[str]:
    """Every file of the newest step damaged in turn: what each rank hears, and what it has then."""
    heard = []
    checkpoints = checkpointer(directory, layout)
    for step in (1, 2):
        checkpoints.save(step, state_of(step, sharded=True))
    rank = torch.distributed.get_rank()
    expected = checkpoints.digest(state_of(1, sharded=True))
    for path in sorted((Path(directory) / "step_000002").glob("*/*.safetensors")):
        torch.distributed.barrier()
        if rank == 0:
            flip(path, -1)
        torch.distributed.barrier()
        state = state_of(9, sharded=True)
        try:
            checkpoints.load(state, 2)
        except ValueError as error:
            heard.append(str(error))
            assert path.name in heard[-1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert checkpoints.load(state) == 1
        assert sum("SKIPPED" in str(warning.message) for warning in caught) == (rank == 0)
        assert checkpoints.digest(state) == expected
        torch.distributed.barrier()
        if rank == 0:
            flip(path, -1)
    return heard


@pytest.mark.parametrize("layout", ["sharded", "direct"])
def test_all_ranks_agree_on_what_is_damaged(layout: str, tmp_path: Path) -> None:
    first, second = run_distributed(on_two_ranks, 2, str(tmp_path), layout)
    assert first == second
    assert len(first) >= 5
    # On another number of ranks.
    flip(sorted(tmp_path.glob("step_000002/optim/*.safetensors"))[-1], -1)
    with pytest.warns(UserWarning, match="going back to step_000001"):
        assert checkpointer(tmp_path, layout).load(state_of(9)) == 1


def test_saving_over_a_step_whose_bytes_have_changed_writes_it_anew(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, state_of(1))
    flip(next((tmp_path / "step_000001" / "model").iterdir()), -1)
    with pytest.warns(UserWarning, match=r"set a damaged checkpoint aside as \.damaged-step_000001"):
        checkpoints.save(1, state_of(1))
    state = state_of(9)
    assert checkpoints.load(state) == 1
    assert checkpoints.digest(state) == checkpoints.digest(state_of(1))


def test_retention_does_not_count_a_step_that_was_skipped(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=1)
    checkpoints.save(1, state_of(1))
    shutil.copytree(tmp_path / "step_000001", tmp_path / "kept")
    checkpoints.save(5, state_of(5))
    shutil.move(tmp_path / "kept", tmp_path / "step_000001")
    flip(next((tmp_path / "step_000005" / "model").iterdir()), -1)
    with pytest.warns(UserWarning, match="going back to step_000001"):
        assert checkpoints.load(state_of(9)) == 1
    with pytest.warns(UserWarning, match=r"set a damaged checkpoint aside as \.damaged-step_000005"):
        checkpoints.save(2, state_of(2))
    checkpoints.save(3, state_of(3))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000003"]
    assert checkpoints.load(state_of(9)) == 3


def test_a_step_that_was_set_aside_and_written_anew_stays(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    flip(next((tmp_path / "step_000002" / "model").iterdir()), -1)
    with pytest.warns(UserWarning, match="going back to step_000001"):
        assert checkpoints.load(state_of(9)) == 1
    with pytest.warns(UserWarning, match=r"set a damaged checkpoint aside as \.damaged-step_000002"):
        checkpoints.save(2, state_of(2))
    for step in (3, 4):
        checkpoints.save(step, state_of(step))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{step:06d}" for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("section", ["model", "optim", "state"])
@pytest.mark.parametrize("position", [12, -1])
def test_a_step_that_was_skipped_does_not_stop_the_saves_of_what_was_loaded(
    section: str, position: int, tmp_path: Path
) -> None:
    """Wherever the damage was found: in a header, by which every load knows it, or in the data."""
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=1)
    checkpoints.save(1, state_of(1))
    checkpoints.pin(1)
    checkpoints.save(5, state_of(5))
    flip(next((tmp_path / "step_000005" / section).iterdir()), position)
    with pytest.warns(UserWarning, match="going back to step_000001"):
        assert checkpoints.load(state_of(9)) == 1
    with pytest.warns(UserWarning, match=r"set a damaged checkpoint aside as \.damaged-step_000005"):
        checkpoints.save(2, state_of(2))
    assert checkpoints.load(state_of(9)) == 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("layout", ["sharded", "direct"])
def test_torchs_own_load_verifies_what_it_reads_from(layout: str, tmp_path: Path) -> None:
    checkpointer(tmp_path, layout).save(1, state_of(1))
    weights = sorted((tmp_path / "step_000001" / "model").glob("*.safetensors"))[-1]
    flip(weights, -1)
    there = {name: tensor.clone() for name, tensor in state_of(9)["model"].state_dict().items()}
    reader = am_ckpt.StorageReader(tmp_path / "step_000001")
    with pytest.raises(CheckpointException, match=rf"{weights.name} is damaged"):
        dcp.load(there, storage_reader=reader, no_dist=True)
    dcp.load(there, storage_reader=am_ckpt.StorageReader(tmp_path / "step_000001", verify=False), no_dist=True)
    if layout == "direct":
        # A file from which nothing is read is not looked at.
        other = {"0.weight": there["0.weight"]}
        with safe_open(weights, "pt") as opened:
            assert set(opened.keys()).isdisjoint(other)
        dcp.load(other, storage_reader=am_ckpt.StorageReader(tmp_path / "step_000001"), no_dist=True)


UNREAD = """
import ctypes, errno, json, os, sys, warnings, torch, am_ckpt
folder, part, size, count, which = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
model = torch.nn.Linear(4, 3, bias=False)
checkpoints = am_ckpt.Checkpointer(folder)
for step in (1, 5):
    torch.nn.init.constant_(model.weight, step)
    checkpoints.save(step, {"model": model})
def load(which, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            step = checkpoints.load({"model": model}, which, **options)
        except (ValueError, OSError) as error:
            return [type(error).__name__, str(error)]
    return [step, model.weight[0, 0].item(), *(str(warning.message) for warning in caught)]
def arm(count):
    ctypes.CDLL(None).staleshim_arm(part.encode(), ctypes.c_size_t(size), count, errno.EIO)
arm(count)
answers = [load(which)]
if answers[0][0] == 1:
    arm(count)
    answers.append(load(which, discard_newer=True))
    arm(0)
    checkpoints.save(2, {"model": model})
    checkpoints.save(3, {"model": model})
    arm(count)
    try:
        checkpoints.save(5, {"model": model})
    except OSError as error:
        answers.append(str(error))
arm(0)
print("ANSWERS", json.dumps([*answers, load("latest"), sorted(name for name in os.listdir(folder) if "step" in name)]))
"""
NO_SHIM = pytest.mark.skipif(not can_inject(), reason="reads are made to fail with LD_PRELOAD: Linux and cc")
# A header's length, that of a manifest is longer, and all values of the tensor.
PLACES = [("/step_000005/model/", 8), ("/step_000005/manifest.json", 0), ("/step_000005/model/", 48)]


def answers_of(server: Server, folder: Path, place: tuple[str, int], count: int, which: str) -> list[Any]:
    ended, text = server.run(UNREAD, str(folder), place[0], str(place[1]), str(count), which)
    assert ended == 0, text
    return json.loads(text.partition("ANSWERS ")[2].splitlines()[0])


@NO_SHIM
@pytest.mark.parametrize("place", PLACES)
def test_a_read_that_fails_once_is_done_again(place: tuple[str, int], server: Server, tmp_path: Path) -> None:
    first, second, there = answers_of(server, tmp_path, place, 1, "latest")
    assert (first, second, there) == ([5, 5.0], [5, 5.0], ["step_000001", "step_000005"])


@NO_SHIM
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_could_not_be_read_is_not_damaged(place: tuple[str, int], server: Server, tmp_path: Path) -> None:
    first, discarding, over, last, there = answers_of(server, tmp_path, place, 2, "latest")
    assert first[:2] == [1, 1.0]
    (warning,) = first[2:]
    assert warning.startswith(
        "SKIPPED a checkpoint that could not be read, going back to step_000001: step_000005 could"
    )
    assert "Input/output error" in warning
    assert "damaged" not in warning
    assert discarding[0] == "ValueError"
    assert "would delete step_000005, which could not be read and may be whole" in discarding[1]
    # Saves went on beside it, none in its place, and it is there for whoever can read it.
    assert "step 5 was not saved" in over
    assert "Input/output error" in over
    assert there == [f"step_{step:06d}" for step in (1, 2, 3, 5)]
    assert last == [5, 5.0]


@NO_SHIM
def test_a_named_step_that_cannot_be_read_is_an_error_of_the_system(server: Server, tmp_path: Path) -> None:
    first, *_ = answers_of(server, tmp_path, ("/step_000005/model/", 48), 2, "step_000005")
    assert first[0] == "OSError"
    assert "step_000005 could not be read: [Errno 5] Input/output error" in first[1]


def test_digests_of_what_is_in_no_file_are_damage(tmp_path: Path) -> None:
    checkpoints = checkpointer(tmp_path, "direct")
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    path = tmp_path / "step_000002" / "manifest.json"
    whole = json.loads(path.read_text())
    del whole["xxh3_128"]
    for name, box in (("none", [[0], [4], "0"]), ("0.bias", [[0, 0], [2, 2], "0"]), ("0.bias", [[2], [2**40], "0"])):
        manifest = copy.deepcopy(whole)
        (record,) = [r for r in manifest["files"] if "0.bias" in r.get("boxes_xxh3_128", ())]
        record["boxes_xxh3_128"][name] = [box]
        path.write_bytes(seal(manifest))
        with pytest.raises(ValueError, match=rf"step_000002/model/.*{name}"):
            checkpoints.load(state_of(9), 2)
        with pytest.warns(UserWarning, match=rf"SKIPPED a damaged checkpoint, going back to step_000001: .*{name}"):
            assert checkpoints.load(state_of(9)) == 1
