"""The command: what it prints, and for every kind of bad input the exit code and what it names."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

import am_ckpt
from am_ckpt._cli import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = {"embed_tokens.weight": (8, 4), "layers.0.up.weight": (6, 4), "layers.1.up.weight": (6, 4), "norm": (4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


CONFIG = {"num_hidden_layers": 2, "vocab_size": 8, "hidden_size": 4, "tie_word_embeddings": True}


def distcp(folder: Path) -> Path:
    dcp.save({"model": tensors(), "step": 3}, storage_writer=FileSystemWriter(folder, single_file_per_rank=False))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def shard(folder: Path, rank: int, part: dict[str, tuple[torch.Tensor, list[int]]], **metadata: str) -> None:
    """A file as torch's Hugging Face writer names and marks it."""
    folder.mkdir(exist_ok=True)
    info = {name: {"saved_offsets": offsets} for name, (_, offsets) in part.items()}
    save_file(
        {name: tensor.contiguous() for name, (tensor, _) in part.items()},
        folder / f"shard-{rank:05d}-model-00001-of-00001.safetensors",
        metadata={"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info), **metadata},
    )


def shards(folder: Path, ranks: int = 4) -> Path:
    """`ranks` shards along dim 0, rank 1 first."""
    for rank in range(ranks):
        part = {}
        for name, tensor in tensors().items():
            rows = -(-len(tensor) // ranks)
            piece = tensor[rank * rows : (rank + 1) * rows]
            if len(piece):
                part[name] = (piece, [rank * rows] + [0] * (tensor.dim() - 1))
        shard(folder, rank + 1, part)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def own(folder: Path) -> Path:
    model = nn.Module()
    for name, tensor in tensors().items():
        model.register_parameter(name.replace(".", "_"), nn.Parameter(tensor))
    am_ckpt.Checkpointer(folder).save(3, {"model": model})
    return folder / "step_000003"


def plain(folder: Path) -> Path:
    am_ckpt.merge(distcp(folder.with_name("distcp")), folder, max_shard_size=100)
    return folder


def merge(capsys: Any, source: Path, *options: str) -> tuple[int, str]:
    """Exit code and standard error of a merge; nothing may become visible if it fails."""
    target = source.with_name("merged")
    code = main(["merge", str(source), str(target), *options])
    if code:
        assert [path.name for path in target.parent.iterdir() if "merg" in path.name] == []
    return code, capsys.readouterr().err


def test_help_and_merge_start_without_torch(tmp_path: Path) -> None:
    source = distcp(tmp_path / "shards")
    command = [
        sys.executable,
        "-c",
        "import sys; from am_ckpt._cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)",
    ]
    merged = str(tmp_path / "merged")
    for arguments in (["inspect", str(source)], ["merge", str(source), merged], ["verify", "--full", merged]):
        subprocess.run([*command, *arguments], check=True, capture_output=True)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == tensors().keys()
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "am_ckpt._cli", "--help"], check=True, capture_output=True, text=True
    )
    assert "exit codes: 0 ok" in shown.stdout
    assert not any(line.split("|")[-1].strip() in ("torch", "numpy") for line in shown.stderr.splitlines())


def test_the_minute_of_the_readme(tmp_path: Path, capsys: Any) -> None:
    model = tensors()
    model["lm_head.weight"] = model["embed_tokens.weight"]
    dcp.save({"model": model, "optimizer": {"state": {"m": torch.ones(3)}}}, checkpoint_id=tmp_path / "step_100")
    base = tmp_path / "base_model"
    base.mkdir()
    for name, content in (("config.json", json.dumps(CONFIG)), ("tokenizer.json", "{}"), ("chat_template.jinja", "x")):
        (base / name).write_text(content)
    step, merged = str(tmp_path / "step_100"), str(tmp_path / "merged")
    for arguments in (
        ["inspect", step],
        ["verify", step, "--full"],
        ["merge", step, merged, "--like", str(base)],
        ["verify", merged, "--full"],
        ["diff", step, merged],
    ):
        assert main(arguments) == 0, arguments
    shown = capsys.readouterr().out
    assert "lm_head.weight is tied and equals embed_tokens.weight: written once" in shown
    assert f"{merged}: huggingface, ok (all tensors read)" in shown
    assert "5 tensors are equal, 0 are not" in shown


def test_inspect_shows_sections_tensors_and_places(tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    assert main(["inspect", str(source), "--tensors", "layers.0*", "--chunks"]) == 0
    shown = capsys.readouterr().out
    assert "dcp" in shown
    assert "model: 4 tensors, 336 bytes, F32 (4)" in shown
    assert "layers.0.up.weight  F32 [6, 4]  in 1 parts" in shown
    assert "[0:6, 0:4]  " in shown
    assert main(["inspect", str(source), "--json", "--chunks"]) == 0
    data = json.loads(capsys.readouterr().out)
    (chunk,) = data["tensors"]["norm"]["chunks"]
    assert (source / chunk["file"]).stat().st_size == chunk["end"] - chunk["begin"]
    assert (data["kind"], data["others"], data["problems"]) == ("dcp", ["step"], [])


@pytest.mark.parametrize(
    ("make", "kind"), [(distcp, "dcp"), (shards, "dcp-safetensors"), (own, "am-ckpt"), (plain, "huggingface")]
)
def test_every_kind_is_recognised(make: Callable[[Path], Path], kind: str, tmp_path: Path, capsys: Any) -> None:
    source = make(tmp_path / "source")
    assert main(["inspect", str(source), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["kind"], len(data["tensors"]), data["bytes"]) == (kind, 4, 336)
    # Four ranks with two rows of the embedding each may have been five.
    unsaid = ["--assume-complete"] if make is shards else []
    assert main(["merge", str(source), str(tmp_path / "merged"), "--json", *unsaid]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["num_tensors"], report["num_bytes"]) == (kind, 4, 336)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in tensors().items():
        assert torch.equal(found[name if kind != "am-ckpt" else name.replace(".", "_")], tensor)


def test_the_model_folder_of_a_step_and_one_above_shards_work_too(tmp_path: Path, capsys: Any) -> None:
    step = own(tmp_path / "run")
    assert main(["inspect", str(step / "model")]) == 0
    assert "am-ckpt, step 3" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    shards(tmp_path / "other" / "model")
    assert main(["inspect", str(tmp_path / "other")]) == 0
    assert "the model is in the folder 'model'" in capsys.readouterr().out


def test_json_errors_are_json(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "x.pt").touch()
    assert main(["inspect", str(tmp_path), "--json"]) == 4
    error = json.loads(capsys.readouterr().out)
    assert (error["exit_code"], error["kind"]) == (4, "UnsafeError")


def test_a_reader_that_stops_reading_is_no_error(tmp_path: Path) -> None:
    source = distcp(tmp_path / "shards")
    command = [sys.executable, "-c", "import sys; from am_ckpt._cli import main; sys.exit(main(sys.argv[1:]))"]
    with subprocess.Popen(
        [*command, "inspect", str(source), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# Usage: 1.


@pytest.mark.parametrize("arguments", [["merge", "a"], ["nothing"], ["merge", "a", "b", "--dtype", "int4"], []])
def test_wrong_usage(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    assert "am-ckpt" in capsys.readouterr().err


def test_arguments_that_cannot_be_honoured(tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    for options in (
        ["--max-shard-size", "5 bags"],
        ["--threads", "0"],
        ["--section", "teacher"],
        ["--like", str(tmp_path / "nowhere")],
        ["--resume", "--no-fsync"],
    ):
        code, error = merge(capsys, source, *options)
        assert (code, options[-1] in error or "resume" in error) == (1, True)
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty")]) == 1
    step = own(tmp_path / "run")
    assert main(["inspect", str(step.parent)]) == 1
    assert f"give one of them, such as {step}" in capsys.readouterr().err
    for path in (step, step / "model", plain(tmp_path / "plain")):
        assert main(["verify", str(path), "--section", "teacher"]) == 1
        assert "section='teacher': only .distcp folders have sections" in capsys.readouterr().err


# Damaged: 2.


def test_a_truncated_distcp_file(tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    file = max(source.glob("*.distcp"), key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    os.truncate(file, size - 10)
    code, error = merge(capsys, source)
    assert code == 2
    assert f"{file} is truncated: it has {size - 10} bytes" in error
    assert f"is at bytes 0 to {size}" in error


def test_bytes_that_are_no_archive(tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    file = max(source.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(b"\0" * file.stat().st_size)
    code, error = merge(capsys, source)
    assert code == 2
    assert str(file) in error
    assert "in the archive at byte 0 is damaged" in error


def test_an_archive_of_another_shape(tmp_path: Path, capsys: Any) -> None:
    source, other = distcp(tmp_path / "shards"), tmp_path / "other"
    changed = tensors()
    changed["norm"] = torch.zeros(2, 2)
    dcp.save({"model": changed, "step": 3}, storage_writer=FileSystemWriter(other, single_file_per_rank=False))
    places = [json.loads(json.dumps(am_ckpt.inspect(path).to_json()))["tensors"]["norm"] for path in (source, other)]
    content = (other / places[1]["chunks"][0]["file"]).read_bytes()
    target = source / places[0]["chunks"][0]["file"]
    target.write_bytes(content.ljust(target.stat().st_size, b"\0")[: target.stat().st_size])
    code, error = merge(capsys, source)
    assert code == 2
    assert "'norm' in the archive at byte 0" in error


@pytest.mark.parametrize("damage", ["truncated", "trailing", "header", "zero"])
def test_a_damaged_safetensors_shard(damage: str, tmp_path: Path, capsys: Any) -> None:
    source = shards(tmp_path / "shards")
    file = source / "shard-00002-model-00001-of-00001.safetensors"
    content = file.read_bytes()
    changed = {
        "truncated": content[:-3],
        "trailing": content + b"x",
        "header": (2**63 - 1).to_bytes(8, "little") + content[8:],
        "zero": b"",
    }[damage]
    file.write_bytes(changed)
    code, error = merge(capsys, source)
    assert code == 2
    assert str(file) in error


def test_overlapping_shards_of_an_older_save(tmp_path: Path, capsys: Any) -> None:
    source = shards(tmp_path / "shards", ranks=2)
    shard(source, 3, {"norm": (torch.zeros(2), [1])})
    code, error = merge(capsys, source)
    assert code == 2
    assert "'norm' F32 [4]: [1:2] is in two files, shard-00001-model" in error
    assert "shard-00003-model-00001-of-00001.safetensors" in error
    assert "remove the stale one" in error


def test_shards_of_two_saves_of_ours(tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "shards"
    shard(source, 1, {"norm": (torch.zeros(2), [0])}, am_ckpt_save_id="a")
    shard(source, 2, {"norm": (torch.zeros(2), [2])}, am_ckpt_save_id="b")
    code, error = merge(capsys, source)
    assert (code, "mixes files of 2 saves" in error) == (2, True)


def test_shards_of_different_dtypes(tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "shards"
    shard(source, 1, {"norm": (torch.zeros(2), [0])})
    shard(source, 2, {"norm": (torch.zeros(2, dtype=torch.float16), [2])})
    code, error = merge(capsys, source)
    assert (code, "'norm' is F16, the others say F32" in error) == (2, True)


@pytest.mark.parametrize("field", ["offsets", "json", "negative"])
def test_sharding_information_that_makes_no_sense(field: str, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "shards"
    offsets = {"offsets": "[1, 2]", "json": "[", "negative": "[-1]"}[field]
    text = '{"norm": {"saved_offsets": ' + offsets + "}}"
    shard(source, 1, {"norm": (torch.zeros(2), [0])}, DCP_SHARDING_INFO=text)
    code, error = merge(capsys, source)
    assert (code, "DCP_SHARDING_INFO" in error) == (2, True)


@pytest.mark.parametrize("damage", ["manifest", "header", "size"])
def test_a_damaged_step_of_ours(damage: str, tmp_path: Path, capsys: Any) -> None:
    step = own(tmp_path / "run")
    file = step / "manifest.json" if damage == "manifest" else next((step / "model").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[200 if damage == "manifest" else 30] ^= 1
    file.write_bytes(content[: -1 if damage == "size" else None])
    code, error = merge(capsys, step)
    assert (code, str(file) in error) == (2, True)


def test_a_cut_metadata_file(tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    content = (source / ".metadata").read_bytes()
    for end in range(0, len(content), 7):
        (source / ".metadata").write_bytes(content[:end])
        code, error = merge(capsys, source)
        assert (code, str(source / ".metadata") in error) == (2, True)


# Incomplete: 3.


def test_a_missing_distcp_file(tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    file = max(source.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.unlink()
    code, error = merge(capsys, source)
    assert code == 3
    assert f"1 files that .metadata names are missing: {file.name} with 1 entries such as 'model." in error


def test_distcp_files_without_metadata(tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    (source / ".metadata").unlink()
    code, error = merge(capsys, source)
    assert (code, "holds 5 .distcp files but no .metadata" in error) == (3, True)


def test_a_missing_middle_rank(tmp_path: Path, capsys: Any) -> None:
    source = shards(tmp_path / "shards")
    (source / "shard-00002-model-00001-of-00001.safetensors").unlink()
    code, error = merge(capsys, source)
    assert code == 3
    assert (
        "'embed_tokens.weight' F32 [8, 4]: [2:4, 0:4] is in no file (8 of 32 elements missing; found [0:2, 0:4]"
        in error
    )
    assert "(and 3 more: am-ckpt inspect lists them)" in error
    assert main(["inspect", str(source), "--json"]) == 3
    # One object, the same problems in it.
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 4
    assert main(["inspect", str(source)]) == 3
    shown = capsys.readouterr()
    assert (shown.out.count("problem: "), shown.err) == (4, "")


def test_a_missing_last_rank_that_nothing_shows_needs_a_flag(tmp_path: Path, capsys: Any) -> None:
    source = shards(tmp_path / "shards")
    (source / "config.json").unlink()
    last = source / "shard-00004-model-00001-of-00001.safetensors"
    content = last.read_bytes()
    for file in ("shard-00004", "shard-00003"):
        commands = {
            "merge": ["merge", str(source), str(tmp_path / "merge")],
            "reshard": ["reshard", str(source), str(tmp_path / "reshard"), "--mesh", "dp=2"],
            "convert": ["convert", str(source), str(tmp_path / "convert"), "--to", "dcp"],
            "to hf": ["convert", str(source), str(tmp_path / "to hf"), "--to", "hf"],
            "sharded": ["convert", str(source), str(tmp_path / "sharded"), "--to", "sharded"],
            "verify": ["verify", str(source)],
            "verify --full": ["verify", str(source), "--full"],
        }
        for name, command in commands.items():
            assert main(command) == 3, name
            shown = capsys.readouterr()
            assert f"nothing shows that the files of the last ranks are there, after {file}-" in shown.out + shown.err
            assert not (tmp_path / name).exists()
            assert main([*command, "--assume-complete"]) == 0, name
            if (tmp_path / name).exists():
                shutil.rmtree(tmp_path / name)
        capsys.readouterr()
        last.unlink(missing_ok=True)
    # Weights of the same names and shapes show it too, once all are there.
    last.write_bytes(content)
    (tmp_path / "like").mkdir()
    save_file(tensors(), tmp_path / "like" / "model.safetensors")
    (tmp_path / "like" / "config.json").write_text("{}")
    assert merge(capsys, source, "--like", str(tmp_path / "like"))[0] == 0


@pytest.mark.parametrize(
    ("rows", "ranks", "hidden", "shown"),
    [
        (32, 4, 4, True),
        (33, 4, 4, True),
        # A fifth rank would have had no row of the embedding.
        (8, 4, 4, False),
        (32, 1, 4, False),
        (32, 4, 5, False),
    ],
)
def test_what_a_config_shows_of_the_last_ranks(rows: int, ranks: int, hidden: int, shown: bool, tmp_path: Path) -> None:
    tensor = torch.randn(rows, 4)
    source, step = tmp_path / "shards", -(-rows // ranks)
    for rank in range(ranks):
        part = {
            "embed_tokens.weight": (tensor[rank * step : (rank + 1) * step], [rank * step, 0]),
            "up.weight": (torch.ones(2, 3), [2 * rank, 0]),
        }
        shard(source, rank + 1, part)
    (source / "config.json").write_text(json.dumps({"vocab_size": rows, "hidden_size": hidden}))
    # hidden_size is larger: refused for that, whatever is assumed.
    assert main(["merge", str(source), str(tmp_path / "merged")]) == (0 if shown else 3)
    # A part of another tensor that the embedding has no counterpart to.
    shard(source, ranks + 1, {"up.weight": (torch.ones(2, 3), [2 * ranks, 0])})
    assert main(["merge", str(source), str(tmp_path / "again")]) == 3


@pytest.mark.parametrize(
    ("name", "rows", "experts", "files", "parts", "shown"),
    [
        # Cut over eight ranks, the embedding over four; the last four files are there, or not.
        ("mlp.experts.gate_up_proj", 16, {"num_experts": 16}, 8, 8, False),
        ("mlp.experts.gate_up_proj", 16, {"num_experts": 16}, 4, 8, False),
        ("moe.experts.w1", 16, {"num_experts": 16}, 4, 8, False),
        ("mlp.experts.gate_up_proj", 16, {"moe_num_experts": 16}, 4, 8, False),
        ("mlp.experts.gate_up_proj", 16, {"num_experts": 16}, 4, 4, True),
        # Of two ranks, whoever has the embedding's other parts.
        ("mlp.up_proj.weight", 16, {}, 4, 2, False),
        # Three parts of two rows, as four ranks cut five.
        ("mlp.up_proj.bias", 5, {}, 4, 4, True),
    ],
)
def test_parts_that_the_embeddings_ranks_do_not_account_for(
    name: str, rows: int, experts: dict[str, int], files: int, parts: int, shown: bool, tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "shards"
    whole = [("embed_tokens.weight", torch.ones(32, 4), 4), (f"layers.0.{name}", torch.ones(rows, 3), parts)]
    for rank in range(files):
        part = {}
        for tensor_name, tensor, over in whole:
            step = -(-len(tensor) // over)
            if len(piece := tensor[rank * step : (rank + 1) * step]):
                part[tensor_name] = (piece, [rank * step, 0])
        shard(source, rank + 1, part)
    (source / "config.json").write_text(json.dumps({"vocab_size": 32, "hidden_size": 4, **experts}))
    command = ["reshard", str(source), str(tmp_path / "resharded"), "--mesh", "dp=2"]
    assert main(command) == (0 if shown else 3), capsys.readouterr()
    if not shown:
        assert "nothing shows that the files of the last ranks are there" in capsys.readouterr().err
        assert main([*command, "--assume-complete"]) == 0


@pytest.mark.parametrize("by", ["config", "like"])
def test_a_missing_last_rank_shows_in_config_or_like(by: str, tmp_path: Path, capsys: Any) -> None:
    source = shards(tmp_path / "shards")
    (source / "shard-00004-model-00001-of-00001.safetensors").unlink()
    options: list[str] = []
    if by == "like":
        like = tmp_path / "like"
        like.mkdir()
        save_file(tensors(), like / "model.safetensors")
        (like / "config.json").write_text("{}")
        options = ["--like", str(like)]
    code, error = merge(capsys, source, *options)
    assert code == 3
    expected = "vocab_size=8, but 'embed_tokens.weight' has 6 rows" if by == "config" else "[6, 4], there [8, 4]"
    assert expected in error


def test_missing_layers(tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "shards"
    shard(source, 1, {"layers.0.w": (torch.zeros(2), [0])})
    (source / "config.json").write_text(json.dumps(CONFIG))
    code, error = merge(capsys, source)
    assert (code, "num_hidden_layers=2, but layer 1 of layers has no tensor" in error) == (3, True)


def test_a_missing_file_of_an_index_and_of_a_step(tmp_path: Path, capsys: Any) -> None:
    source = plain(tmp_path / "plain")
    file = sorted(source.glob("*.safetensors"))[1]
    file.unlink()
    code, error = merge(capsys, source)
    assert (code, f"{file} is missing" in error) == (3, True)
    step = own(tmp_path / "run")
    file = next((step / "model").glob("*.safetensors"))
    file.unlink()
    assert main(["merge", str(step), str(tmp_path / "merged")]) == 3
    assert f"{file}, written by rank 0, is missing" in capsys.readouterr().err


# Unsafe: 4.


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_in_metadata_is_named_and_not_run(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    source = distcp(tmp_path / "shards")
    (source / ".metadata").write_bytes(pickle.dumps(Code(), protocol=protocol))
    code, error = merge(capsys, source)
    assert (code, "posix.mkdir" in error, "nothing was executed" in error) == (4, True, True)
    # A dotted name reaches through a module that is known.
    (source / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x08mkdir ex\x85R.")
    assert merge(capsys, source)[0] == 4
    # Extension codes stand for globals too.
    (source / ".metadata").write_bytes(b"\x80\x02\x82\x01.")
    assert merge(capsys, source)[0] == 4
    assert not (tmp_path / "executed").exists()


PICKLES = {
    # A tuple of a tuple of ... , 60 times twice: 2 ** 60 elements to hash, in 250 bytes.
    "tuples": b"\x80\x04)" + b"".join(b"\x94h%c\x86" % n for n in range(60)) + b"\x94}h\x3cNs.",
    "length": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "defaults": b"\x80\x04\x8c\x05torch\x8c\x04Size\x93N}\x8c\x0c__defaults__)s\x86b.",
    "frames": b"\x80\x04" + b"]" * 100_000 + b".",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_would_take_time_or_memory_or_change_the_reader(name: str, tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    (source / ".metadata").write_bytes(PICKLES[name])
    started = time.process_time()
    code, error = merge(capsys, source)
    assert time.process_time() - started < 1
    assert (code, str(source / ".metadata") in error) == (4 if name in ("defaults", "length") else 2, True)
    assert main(["inspect", str(distcp(tmp_path / "sound"))]) == 0


def test_code_in_a_tensor_is_named_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    source = distcp(tmp_path / "shards")
    metadata = FileSystemReader(source).read_metadata()
    place = next(item for index, item in metadata.storage_data.items() if index.fqn == "model.norm")
    with zipfile.ZipFile(source / place.relative_path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Code()))
        archive.writestr("archive/data/0", b"\0" * 16)
    place.length = (source / place.relative_path).stat().st_size
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    code, error = merge(capsys, source)
    assert (code, "posix.mkdir" in error, place.relative_path in error) == (4, True, True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", ["../outside.distcp", "/etc/passwd", "sub/x.distcp"])
def test_metadata_cannot_lead_elsewhere(place: str, tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    metadata = FileSystemReader(source).read_metadata()
    for item in metadata.storage_data.values():
        item.relative_path = place
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    code, error = merge(capsys, source)
    assert (code, repr(place) in error) == (4, True)


@pytest.mark.parametrize("make", [distcp, shards])
@pytest.mark.parametrize("what", ["link", "fifo"])
def test_links_and_pipes_instead_of_files(make: Callable[[Path], Path], what: str, tmp_path: Path, capsys: Any) -> None:
    source = make(tmp_path / "shards")
    file = next(path for path in sorted(source.iterdir()) if path.suffix in (".distcp", ".safetensors"))
    file.rename(tmp_path / "elsewhere")
    if what == "link":
        file.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(file)
    code, error = merge(capsys, source)
    assert (code, str(file) in error) == (4, True)


def test_an_index_cannot_lead_elsewhere(tmp_path: Path, capsys: Any) -> None:
    source = plain(tmp_path / "plain")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm": "../secret.safetensors"}}))
    code, error = merge(capsys, source)
    assert (code, "../secret.safetensors" in error) == (4, True)


# Input and output errors: 5. Conflicts: 6.


def test_no_space(tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    num_bytes = 2**42
    header = json.dumps({"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    for number in (1, 2, 3, 4):
        with open(source / f"shard-{number:05d}-model-00001-of-00001.safetensors", "wb") as file:
            text = header.replace(b'"w"', f'"{number}"'.encode())
            file.write(len(text).to_bytes(8, "little") + text)
            # Sparse: only the size is there.
            file.truncate(8 + len(text) + num_bytes)
    code, error = merge(capsys, source)
    assert (code, "bytes" in error, str(tmp_path) in error) == (5, True, True)


def test_a_destination_that_cannot_be_made(tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    (tmp_path / "file").touch()
    assert main(["merge", str(source), str(tmp_path / "file" / "inside" / "merged")]) == 5
    assert "file" in capsys.readouterr().err


def test_what_is_there_is_a_conflict(tmp_path: Path, capsys: Any) -> None:
    source = distcp(tmp_path / "shards")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").touch()
    for options in ([], ["--overwrite"]):
        assert main(["merge", str(source), str(tmp_path / "there"), *options]) == 6
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["thesis.txt"]
    assert f"{tmp_path / 'there'} is not replaced: it holds thesis.txt" in capsys.readouterr().err
