"""`merge(digest=True)`: what every byte of the result must be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import FileSystemWriter

import am_ckpt
from am_ckpt._cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {f"layers.{index}.weight": torch.randn(300 + index, 1000) for index in range(6)}
    # Fortran order, so that it is put together in tiles.
    tensors["turned"] = torch.randn(700, 500).t()
    dcp.save({"model": tensors}, storage_writer=FileSystemWriter(tmp_path / "source"))
    return tmp_path / "source"


def digests_of(folder: Path) -> dict[str, list[tuple[int, int, str]]]:
    """The ranges of every file, checked against its bytes and for holes."""
    content = json.loads((folder / "am_ckpt_digests.json").read_bytes())
    assert sorted(content["files"]) == sorted(path.name for path in folder.glob("*.safetensors"))
    small = {path.name for path in folder.iterdir()} - content["files"].keys() - {"am_ckpt_digests.json"}
    assert content["small_xxh3_128"] == {
        name: xxhash.xxh3_128_hexdigest((folder / name).read_bytes()) for name in small
    }
    for name, record in content["files"].items():
        data = (folder / name).read_bytes()
        assert record["bytes"] == len(data)
        position = 8 + int.from_bytes(data[:8], "little")
        assert record["header_xxh3_128"] == xxhash.xxh3_128_hexdigest(data[:position])
        for begin, end, value in record["ranges_xxh3_64"]:
            assert begin == position
            assert value == xxhash.xxh3_64_hexdigest(data[begin:end])
            position = end
        assert position == len(data)
    return {name: record["ranges_xxh3_64"] for name, record in content["files"].items()}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_every_byte_is_in_exactly_one_digest(source: Path, dtype: str | None, tmp_path: Path) -> None:
    report = am_ckpt.merge(source, tmp_path / "merged", digest=True, dtype=dtype, max_shard_size="2MB")
    assert "am_ckpt_digests.json" in report.files
    assert len(digests_of(tmp_path / "merged")) > 1


def test_digests_of_what_was_copied_before_an_interruption_are_kept(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        am_ckpt.merge(source, tmp_path / "merged", digest=True, dtype="bfloat16", progress=interrupt, threads=1)
    # Without digests, it is another merge.
    with pytest.raises(KeyboardInterrupt):
        am_ckpt.merge(source, tmp_path / "other", dtype="bfloat16", progress=interrupt, threads=1)
    assert am_ckpt.merge(source, tmp_path / "other", dtype="bfloat16", digest=True, resume=True).resumed_bytes == 0
    resumed = am_ckpt.merge(source, tmp_path / "merged", digest=True, dtype="bfloat16", resume=True)
    assert resumed.resumed_bytes > 0
    assert digests_of(tmp_path / "merged") == digests_of(tmp_path / "other")


def test_digests_are_not_carried_to_another_model(source: Path, tmp_path: Path) -> None:
    am_ckpt.merge(source, tmp_path / "merged", digest=True)
    am_ckpt.merge(tmp_path / "merged", tmp_path / "again", max_shard_size="1MB")
    assert not (tmp_path / "again" / "am_ckpt_digests.json").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"]
)
def test_small_files_are_covered(name: str, source: Path, tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text('{"torch_dtype": "float32"}')
    (like / "tokenizer.json").write_text('{"a": "bcdef"}')
    (like / "chat_template.jinja").write_text("{{ messages }}")
    merged = Path(am_ckpt.merge(source, tmp_path / "merged", like=like, digest=True, max_shard_size="2MB").destination)
    digests_of(merged)
    assert am_ckpt.verify(merged).problems == []
    content = (merged / name).read_bytes()
    # A space is still JSON.
    (merged / name).write_bytes(content + b" ")
    report = am_ckpt.verify(merged)
    assert (report.problems, report.exit_code) == (
        [f"{merged / name} is not what merge wrote: it is damaged, or was edited since; copy it again"],
        2,
    )
    if not name.endswith("index.json"):
        (merged / name).unlink()
        assert any(f"{merged} lacks {name!r}" in problem for problem in am_ckpt.verify(merged).problems)
        assert am_ckpt.verify(merged).exit_code == 3
    (merged / name).write_bytes(content)
    # What was added later, such as a model card, is no problem.
    (merged / "generation_config.json").write_text("{}")
    assert am_ckpt.verify(merged).problems == []


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 4
    path.write_bytes(content)


def test_verify_finds_what_changed_since(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = Path(am_ckpt.merge(source, tmp_path / "merged", digest=True, max_shard_size="2MB").destination)
    (merged / "config.json").write_text("{}")
    assert am_ckpt.verify(merged, full=True).problems == []
    first = merged / "model-00001-of-00007.safetensors"
    (chunk,) = am_ckpt.inspect(merged).tensors["layers.0.weight"].chunks
    assert chunk.path == first
    flip(first, chunk.begin + 5000)
    # Without --full, no data is read.
    assert main(["verify", str(merged)]) == 0
    assert main(["verify", str(merged), "--full"]) == 2
    shown = capsys.readouterr().out
    assert f"problem: {first} is damaged: bytes " in shown
    assert "they hold 'layers.0.weight'" in shown
    flip(first, chunk.begin + 5000)
    # The header: a name.
    content = first.read_bytes()
    first.write_bytes(content.replace(b'"format":"pt"', b'"format":"pT"'))
    assert "its header is not the one of am_ckpt_digests.json" in am_ckpt.verify(merged).problems[0]
    first.write_bytes(content)
    digests = merged / "am_ckpt_digests.json"
    text = digests.read_text()
    digests.write_text(text.replace("00001-of", "00009-of"))
    missing, other = am_ckpt.verify(merged).problems
    assert "has digests of 'model-00009-of-00007.safetensors', which is not there" in missing
    assert "has no digests of 'model-00001-of-00007.safetensors'" in other
    digests.write_text(text.replace('"version": 1', '"version": 2'))
    assert main(["verify", str(merged)]) == 8
    assert f"{digests} was written by a newer am_ckpt" in capsys.readouterr().err
    for damaged in (
        text.replace('"small_xxh3_128": {', '"other": {'),
        text.replace("[[", "[[[", 1).replace("]]", "]]]", 1),
        "{}",
    ):
        digests.write_text(damaged)
        with pytest.raises(ValueError, match=r"digests\.json is damaged; copy it again"):
            am_ckpt.verify(merged)
