"""The command `am-data prepare`: what it writes is what the tokenizer says, and what it refuses leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios

import datasets
import numpy as np
import pytest

import am_data
from am_data._cli import main

TEXTS = [
    f"The quick brown fox number {n} jumps over {n * n} lazy dogs.\n\nHello there, how are you?" for n in range(60)
]


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(texts)))
    return path


def read_tokens(folder, prefix="train"):
    return [np.fromfile(path, dtype="<u2")[512:].tolist() for path in sorted(folder.glob(f"{prefix}_*.bin"))]


def encode(tokenizer, texts, *bos):
    return [token for text in texts for token in [*bos, *tokenizer(text, add_special_tokens=False).input_ids]]


def run(*arguments):
    return main(["prepare", *map(str, arguments)])


def test_jsonl_parquet_and_text_give_the_same_tokens(tmp_path, tokenizer, tokenizer_folder, capsys):
    write_jsonl(tmp_path / "a.jsonl", TEXTS, key="content")
    datasets.Dataset.from_list([{"content": text} for text in TEXTS]).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(text)
    expected = encode(tokenizer, TEXTS, tokenizer.bos_token_id)
    for source in ("a.jsonl", "b.parquet", "texts"):
        output = tmp_path / f"from_{source}"
        assert run(tmp_path / source, "--output", output, "--tokenizer", tokenizer_folder, "--text-key", "content") == 0
        assert read_tokens(output) == [expected]
        printed = capsys.readouterr().out
        ratio = (len(expected) - 60) / sum(len(text.encode()) for text in TEXTS)
        assert re.search(rf"^60 documents, {len(expected):,} tokens \(uint16\), {ratio:.3f} tokens/byte, ", printed)
        assert "each document starts with <s>\n" in printed
        assert f"train_000000.bin: 60 documents, {len(expected):,} tokens, 1 shard\n" in printed
    dataset = am_data.TokenShards(output, 16, tokenizer=tokenizer, align_to_bos=True)
    assert tokenizer.decode(dataset[0]["input_ids"]).startswith("<s>The quick brown fox number 0")


def test_the_split_is_by_document_and_equal_texts_stay_together(tmp_path, tokenizer, tokenizer_folder, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, *TEXTS])
    options = ("--output", tmp_path / "out", "--tokenizer", tokenizer_folder, "--validation-fraction", "0.3")
    assert run(path, *options, "--shard-tokens", "1K") == 0
    documents = {}
    for split in ("train", "validation"):
        shards = read_tokens(tmp_path / "out", split)
        assert [len(shard) for shard in shards[:-1]] == [1000] * (len(shards) - 1)
        text = tokenizer.decode([token for shard in shards for token in shard])
        documents[split] = text.split("<s>")[1:]
    assert sorted(documents["train"] + documents["validation"]) == sorted([*TEXTS, *TEXTS])
    assert not set(documents["train"]) & set(documents["validation"])
    # Binomial, 60 texts at 0.3: outside 8 to 28 once in some thousands of texts, and these are fixed.
    assert 8 <= len(set(documents["validation"])) <= 28
    printed = capsys.readouterr().out
    assert re.search(r"train_000000.bin to train_\d{6}.bin: \d+ documents", printed)
    assert re.search(rf"validation_000000.bin( to \S+)?: {len(documents['validation'])} documents", printed)


def test_a_token_budget_is_kept_to_the_token(tmp_path, tokenizer, tokenizer_folder):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    expected = encode(tokenizer, TEXTS, tokenizer.bos_token_id)
    for number, (budget, tokens) in enumerate({"0.5K": 500, "1_001": 1001, "900K": len(expected)}.items()):
        output = tmp_path / f"out{number}"
        assert run(path, "--output", output, "--tokenizer", tokenizer_folder, "--max-tokens", budget) == 0
        assert read_tokens(output) == [expected[:tokens]]
    # A document of which only its BOS would be left is left out.
    assert expected[999] == tokenizer.bos_token_id
    assert run(path, "--output", tmp_path / "out", "--tokenizer", tokenizer_folder, "--max-tokens", "1000") == 0
    assert read_tokens(tmp_path / "out") == [expected[:999]]


def test_blank_lines_can_divide_a_text(tmp_path, tokenizer, tokenizer_folder):
    (tmp_path / "a.txt").write_text("\none\ntwo\n\n \n\nthree\n\n")
    options = ("--tokenizer", tokenizer_folder / "tokenizer.json", "--split-on-blank-lines", "--bos", "</s>")
    assert run(tmp_path / "a.txt", "--output", tmp_path / "out", *options) == 0
    assert read_tokens(tmp_path / "out") == [encode(tokenizer, ["one\ntwo", "three"], tokenizer.eos_token_id)]


def test_text_cannot_forge_a_document_start_nor_a_saved_cut_shorten_one(tmp_path, tokenizer, tokenizer_folder):
    text = "hello <s> there </s> " * 20
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    saved = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    assert saved["truncation"]["max_length"] == 5
    path = write_jsonl(tmp_path / "a.jsonl", [text])
    assert run(path, "--output", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer") == 0
    (tokens,) = read_tokens(tmp_path / "out")
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(tokens[1:]) == text


def test_nothing_between_documents_and_texts_left_out(tmp_path, tokenizer, tokenizer_folder, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "", None, "two"])
    options = ("--tokenizer", tokenizer_folder, "--no-bos", "--prefix", "web", "--threads", "1")
    assert run(path, "--output", tmp_path / "out", *options) == 0
    assert read_tokens(tmp_path / "out", "web") == [encode(tokenizer, ["one", "two"])]
    printed = capsys.readouterr().out
    assert "nothing marks where a document starts\nleft out: 2 documents without text\n" in printed
    assert not list((tmp_path / "out").glob("*.idx"))


def test_what_cannot_be_prepared_exits_with_1_and_leaves_nothing(tmp_path, tokenizer_folder, capsys):
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "no.csv").write_text("text\n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("[]")
    (tmp_path / "bare.json").write_text((tokenizer_folder / "tokenizer.json").read_text())
    output = tmp_path / "out"
    for arguments, message in [
        ([tmp_path / "missing.txt"], "missing.txt does not exist; give files of .txt"),
        ([tmp_path / "no.csv"], "no.csv has suffix '.csv'; choose one of .txt, .jsonl"),
        ([tmp_path / "nothing"], "nothing holds none of .txt"),
        ([good, tmp_path / "broken.jsonl"], "broken.jsonl cannot be read: "),
        ([tmp_path / "number.jsonl"], "number.jsonl, row 0: 'text' is int, not text; mend the row"),
        ([good, "--text-key", "body"], "good.jsonl, row 0: no 'body' among id, text; name it with --text-key"),
        ([tmp_path / "latin.txt"], "latin.txt is not UTF-8 at byte 3; convert it"),
        ([tmp_path / "empty.txt"], "no document of the 1 files, "),
        ([good, "--validation-fraction", "0.0001"], "no document fell into --validation-fraction 0.0001; raise it"),
        (
            [good, "--bos", "<none>"],
            "the tokenizer has no token '<none>'; give one that it has with --bos, or --no-bos",
        ),
        ([good, "--prefix", "validation", "--validation-fraction", "0.1"], "prefix='validation' is the name"),
        ([good, "--tokenizer", tmp_path / "nothing"], "tokenizer.json does not exist; give a folder"),
        ([good, "--tokenizer", tmp_path / "bad"], "tokenizer.json is no tokenizer.json (JSON with a 'model')"),
        (
            [good, "--tokenizer", tmp_path / "bare.json"],
            "tokenizer_config.json names no bos_token or eos_token; choose",
        ),
    ]:
        tokenizer = [] if "--tokenizer" in arguments else ["--tokenizer", tokenizer_folder]
        assert run(*arguments, "--output", output, *tokenizer) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("am-data prepare: ")
        assert message in printed.err
        assert not output.exists() or list(output.iterdir()) == []
    assert run(good, "--output", output, "--tokenizer", tokenizer_folder) == 0
    before = read_tokens(output)
    assert run(good, "--output", output, "--tokenizer", tokenizer_folder) == 1
    assert "train_000000.bin exists; move the 1 shards" in capsys.readouterr().err
    assert read_tokens(output) == before


def test_a_split_that_cannot_be_published_takes_the_other_back(tmp_path, tokenizer_folder, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    # A folder in the place of the last file: train_* and validation_000000.bin have their names by then.
    (tmp_path / "out" / "validation_000000.bos.idx").mkdir(parents=True)
    options = ("--output", tmp_path / "out", "--tokenizer", tokenizer_folder, "--validation-fraction", "0.3")
    assert run(path, *options) == 1
    assert "validation_000000.bos.idx" in capsys.readouterr().err
    assert [left.name for left in (tmp_path / "out").iterdir()] == ["validation_000000.bos.idx"]
    (tmp_path / "out" / "validation_000000.bos.idx").rmdir()
    assert run(path, *options) == 0
    assert len(list((tmp_path / "out").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["prepare", "a.txt"], "the following arguments are required: --output, --tokenizer"),
        (["prepare", "--max-tokens", "5Q"], "'5Q' is no number of tokens; give 1 or more, as 250000, 500M or 1.5B"),
        (["prepare", "--max-tokens", "0"], "'0' is no number of tokens"),
        (["prepare", "--validation-fraction", "1"], "'1' must be a share from 0 to below 1"),
        (["prepare", "--validation-fraction", "nan"], "'nan' must be a share"),
        (["prepare", "--threads", "0"], "'0' must be a whole number, at least 1"),
        (["prepare", "--bos", "x", "--no-bos"], "not allowed with argument --bos"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from am_data._cli import main\n"
        "try: main(['prepare', '--help'])\n"
        "finally: print([n for n in ('torch', 'datasets', 'tokenizers', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "exit status: 0 the shards are written" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_a_missing_extra_names_package_purpose_and_command(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    code = (
        "import sys; sys.modules['tokenizers'] = None; from am_data._cli import main\n"
        f"sys.exit(main(['prepare', {str(tmp_path / 'a.txt')!r}, '--output', 'out', '--tokenizer', 'none']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "am-data prepare: the package tokenizers, which turns text into tokens, is not installed; "
        "pip install 'am-data[prepare]'\n"
    )


def test_a_terminal_gets_a_bar_with_tokens_per_second(tmp_path, tokenizer_folder):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(TEXTS * 20))
    terminal, process_end = pty.openpty()
    termios.tcsetwinsize(process_end, (24, 100))
    command = [sys.executable, "-m", "am_data._cli", "prepare", str(path), "--tokenizer", str(tokenizer_folder)]
    command += ["--output", str(tmp_path / "out"), "--max-tokens", "20K", "--split-on-blank-lines"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=process_end, text=True, check=True)
    os.close(process_end)
    shown = b""
    # One read gives a page at most; at the end Linux raises, other systems return nothing.
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 100_000):
            shown += piece
    os.close(terminal)
    assert re.search(r"100%\|.*\| 20.0k/20.0k \[.*tokens/s\]", shown.decode())
    assert "20,000 tokens" in done.stdout


def test_logs_are_silenced_only_while_a_row_is_read(tmp_path, tokenizer_folder):
    # More documents than are encoded at a time.
    write_jsonl(tmp_path / "a.jsonl", [f"number {number}" for number in range(3000)])
    before, between = datasets.logging.get_verbosity(), set()

    def see(frame, event, called):
        if event == "c_call" and called.__name__ == "encode_batch_fast":
            between.add(datasets.logging.get_verbosity())

    sys.setprofile(see)
    try:
        assert run(tmp_path / "a.jsonl", "--output", tmp_path / "tokens", "--tokenizer", tokenizer_folder) == 0
    finally:
        sys.setprofile(None)
    assert between == {before} != {datasets.logging.CRITICAL}
