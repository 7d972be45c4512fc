"""Rows of several files, patterns and compressed files, and where a broken one is broken."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re

import datasets
import pytest
from PIL import Image
from vision_processors import make_llava

import am_data
from am_data import _cli


def row(number, **columns):
    question = {"role": "user", "content": f"What is {number}?"}
    return {"messages": [question, {"role": "assistant", "content": f"It is {number}."}], **columns}


def lines(*rows):
    return "".join(json.dumps(each) + "\n" for each in rows)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(row(0), row(1)))
    # Another column, and one more key of a message: each file has a schema of its own.
    other = row(2, source="there")
    other["messages"][1]["weight"] = 1
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(other).encode()))
    datasets.Dataset.from_list([row(3), row(4)]).to_parquet(tmp_path / "c.parquet")
    return tmp_path


def test_several_files_and_patterns_are_read_one_after_the_other(tokenizer, files):
    names = ["a.jsonl", "b.jsonl.gz", "c.parquet"]
    expected = am_data.ChatDataset([row(number) for number in range(5)], tokenizer)
    for path in ([files / name for name in names], [str(files / name) for name in names], f"{files}/[a-c].*"):
        dataset = am_data.ChatDataset(path, tokenizer)
        assert dataset.fingerprint == expected.fingerprint
    assert dataset.report.ignored_columns == ("source",)
    sliced = am_data.ChatDataset(f"{files}/?.*", tokenizer, split="train[1:4]")
    assert sliced.fingerprint == am_data.ChatDataset([row(number) for number in (1, 2, 3)], tokenizer).fingerprint
    twice = am_data.ChatDataset([files / "a.jsonl", files / "a.jsonl"], tokenizer)
    assert len(twice) == 4


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_files_are_read_as_they_are(tokenizer, tmp_path, suffix, compress):
    for kind in ("jsonl", "csv"):
        text = (
            lines(row(0), row(1))
            if kind == "jsonl"
            else "prompt,completion\nWhat is 0?,It is 0.\nWhat is 1?,It is 1.\n"
        )
        path = tmp_path / f"rows.{kind}.{suffix}"
        path.write_bytes(compress(text.encode()))
        assert (
            am_data.ChatDataset(path, tokenizer).fingerprint
            == am_data.ChatDataset([row(0), row(1)], tokenizer).fingerprint
        )


def test_a_dropped_row_of_several_files_is_named_by_its_file(tokenizer, files):
    (files / "d.jsonl").write_text(lines(row(5), {"messages": row(6)["messages"][:1]}, row(7, id="seven")))
    dataset = am_data.ChatDataset([files / "a.jsonl", files / "d.jsonl"], tokenizer)
    assert dataset.report.dropped["no assistant turn"].examples == ["d.jsonl:1"]
    with pytest.raises(ValueError, match=r"row d\.jsonl:1: no assistant turn"):
        am_data.ChatDataset([files / "a.jsonl", files / "d.jsonl"], tokenizer, split="train[3:]", on_bad_row="raise")


def test_paths_that_name_no_rows(tokenizer, files):
    (files / "notes.txt").write_text("text")
    (files / "pairs.jsonl").write_text(lines({"prompt": "a", "completion": "b"}))
    refused = {
        f"{files}/*.csv": (FileNotFoundError, "no file matches"),
        (f"{files}/a.jsonl", f"{files}/z.jsonl"): (FileNotFoundError, "z.jsonl does not exist"),
        (f"{files}/a.jsonl", str(files)): (ValueError, "is a folder among several paths; name its files by a pattern"),
        f"{files}/*.txt": (ValueError, "notes.txt has suffix '.txt'"),
        (f"{files}/a.jsonl", f"{files}/pairs.jsonl"): (
            ValueError,
            "messages in .*a.jsonl, prompt_completion in .*pairs",
        ),
    }
    for path, (kind, message) in refused.items():
        with pytest.raises(kind, match=message):
            am_data.ChatDataset(path, tokenizer)


def test_a_broken_line_is_named_by_its_number_in_the_file(tokenizer, tmp_path, capfd):
    good = json.dumps(row(0))
    # Far beyond the block in which Arrow counts.
    (tmp_path / "big.jsonl").write_text(f"{good}\n" * 150_000 + '{"messages": [}\n' + good)
    latin = lines(row(0)).encode() * 100 + '{"messages": "café"}\n'.encode("latin-1")
    (tmp_path / "latin.jsonl").write_bytes(latin)
    # In a list Arrow lets it pass, and reading the row fails.
    (tmp_path / "later.jsonl").write_bytes("\n".join([good, good, good.replace("What", "café")]).encode("latin-1"))
    (tmp_path / "latin.csv").write_bytes("prompt,completion\na,b\nc,café\n".encode("latin-1"))
    (tmp_path / "fields.csv").write_text("prompt,completion\na,b\nc,d,e\n")
    (tmp_path / "array.json").write_text(f"[\n{good},\n{good[:-1]}\n]")
    (tmp_path / "value.json").write_text(json.dumps(row(0), indent=1)[:-10])
    (tmp_path / "lines.json").write_text(f"\n{good}\n" + '{"messages": [}\n' + good)
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(f"{good}\n{good[:-1]}\n".encode()))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(latin * 100)[:-30])
    (tmp_path / "fine.jsonl").write_text(good)
    found = {
        "big.jsonl": r"big.jsonl'.* cannot be read: line 150,001 is not JSON: .* at character 15",
        "latin.jsonl": r"latin.jsonl'.* cannot be read: line 101 is not UTF-8 at its byte 18 \(0xe9\)",
        "later.jsonl": r"later.jsonl' cannot be read: line 3 is not UTF-8 at its byte \d+ .*; convert it to UTF-8",
        "latin.csv": r"latin.csv'.* cannot be read: line 3 is not UTF-8 at its byte 6",
        "fields.csv": "fields.csv'.* cannot be read: .*in line 3",
        "array.json": "array.json'.* cannot be read: line 4 is not JSON",
        "value.json": r"value.json'.* cannot be read: line 9 is not JSON",
        "lines.json": "lines.json'.* cannot be read: line 3 is not JSON",
        "broken.jsonl.gz": "broken.jsonl.gz'.* cannot be read: line 2 is not JSON",
        "cut.jsonl.gz": "cut.jsonl.gz'.* cannot be read: ",
    }
    for name, message in found.items():
        with pytest.raises(ValueError, match=message):
            am_data.ChatDataset([tmp_path / "fine.jsonl", tmp_path / name], tokenizer)
    assert "in row" not in capfd.readouterr().err, "datasets says another place beside ours"


def test_what_cannot_be_read_is_named_wherever_it_is_found(tokenizer, tmp_path):
    (tmp_path / "fine.jsonl").write_text(lines(row(0)))
    # Arrow lets it pass, and the first row is read before all others, for its columns.
    (tmp_path / "first.jsonl").write_bytes(lines(row(0)).replace("What", "café").encode("latin-1"))
    for suffix in ("gz", "bz2", "xz"):
        (tmp_path / f"plain.jsonl.{suffix}").write_text(lines(row(0)))
    damaged = bytearray(gzip.compress("".join(lines(row(number)) for number in range(2000)).encode()))
    damaged[len(damaged) // 2 :] = bytes(len(damaged) - len(damaged) // 2)
    (tmp_path / "damaged.jsonl.gz").write_bytes(damaged)
    (tmp_path / "control.jsonl").write_text(lines(row(0)) + lines(row(1)).replace("What", "\t"))
    found = {
        "first.jsonl": r"first.jsonl' cannot be read: line 1 is not UTF-8 at its byte \d+",
        "plain.jsonl.gz": r"plain.jsonl.gz' .*cannot be read: Not a gzipped file",
        "plain.jsonl.bz2": "plain.jsonl.bz2' .*cannot be read: Invalid data stream",
        "plain.jsonl.xz": "plain.jsonl.xz' .*cannot be read: Input format not supported",
        "damaged.jsonl.gz": "damaged.jsonl.gz' .*cannot be read: ",
        "control.jsonl": "control.jsonl' .*cannot be read: line 2 is not JSON: Invalid control character at character",
    }
    for name, message in found.items():
        for path in (tmp_path / name, [tmp_path / "fine.jsonl", tmp_path / name]):
            with pytest.raises(ValueError, match=message):
                am_data.ChatDataset(path, tokenizer)
    for name, message in found.items():
        stem, _, kind = name.partition(".")
        folder = tmp_path / f"{stem}_{kind}"
        folder.mkdir()
        (folder / f"train.{kind}").write_bytes((tmp_path / name).read_bytes())
        fault = message.partition("read: ")[2]
        with pytest.raises(ValueError, match=rf"{stem}_{kind}' .*cannot be read: train.{kind}, {fault}"):
            am_data.ChatDataset(folder, tokenizer)


def test_images_of_several_files_start_from_their_one_folder(tmp_path):
    Image.new("RGB", (24, 24)).save(tmp_path / "red.png")
    content = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "What is it?"}]
    rows = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "It is."}]}
    for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines(rows))
    dataset = am_data.VisionChatDataset(f"{tmp_path}/*.jsonl", processor=make_llava())
    assert dataset.report.num_images == 2
    assert dataset[1]["pixel_values"].shape[0] == 1
    paths = [tmp_path / "a.jsonl", tmp_path / "sub" / "c.jsonl"]
    with pytest.raises(ValueError, match=r"in 2 folders .*; give images="):
        am_data.VisionChatDataset(paths, processor=make_llava())
    assert len(am_data.VisionChatDataset(paths, processor=make_llava(), images=tmp_path)) == 2


def test_tokens_are_prepared_from_patterns_and_compressed_files(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    for name, text in {"a.jsonl": lines({"text": "one two"}, {"text": "three"}), "b.txt": "four\nfive"}.items():
        (tmp_path / "plain" / name).write_text(text)
        (tmp_path / "packed" / f"{name}.gz").write_bytes(gzip.compress(text.encode()))

    def prepared(source):
        output = tmp_path / re.sub(r"\W", "", source)
        command = [
            "prepare",
            f"{tmp_path}/{source}",
            "--output",
            str(output),
            "--tokenizer",
            str(tmp_path / "tokenizer"),
        ]
        assert _cli.main(command) == 0, capsys.readouterr().err
        return (output / "train_000000.bin").read_bytes()

    assert prepared("plain") == prepared("packed") == prepared("packed/*.gz")
    (tmp_path / "bad.jsonl").write_text(lines({"text": "x"}) * 3 + '{"text": }\n')
    (tmp_path / "plain.jsonl.gz").write_text(lines({"text": "x"}))
    (tmp_path / "plain.txt.gz").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    for name, message in {
        "bad.jsonl": "bad.jsonl cannot be read: line 4 is not JSON",
        "plain.jsonl.gz": "plain.jsonl.gz cannot be read: Not a gzipped file",
        "plain.txt.gz": "plain.txt.gz cannot be read: Not a gzipped file",
        "empty.jsonl": "no document of the 1 files, ",
    }.items():
        arguments = ["prepare", f"{tmp_path}/{name}", "--output", f"{tmp_path}/bad"]
        assert _cli.main([*arguments, "--tokenizer", f"{tmp_path}/tokenizer"]) == 1
        assert message in capsys.readouterr().err
