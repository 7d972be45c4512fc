"""Make the small data that ships with the recipes: chat rows and two byte-level BPE tokenizers.

The rows come from the source archive of the Python package llamafactory 0.9.5. Fetch it, then run this file:

    pip download --no-deps --no-binary :all: llamafactory==0.9.5
    python make.py llamafactory-0.9.5.tar.gz

The selection and the tokenizers depend on the archive alone, so a second run rewrites the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tarfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

MEMBER = "llamafactory-0.9.5/data/alpaca_en_demo.json"
MEMBER_SHA256 = "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"
MIN_WORDS, MAX_WORDS = 30, 230
NUM_TRAIN, NUM_VALIDATION = 490, 60
# Rows in which a model speaks of itself teach an identity, which is not what a quickstart is for.
IDENTITY = ("{{", "openai", "chatgpt", "as an ai", "language model", "gpt-")
# Some rows spell out that they have no input; others ask about a page that nobody attached.
NO_INPUT = ("noinput", "no input", "none", "n/a")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def read_rows(archive: Path) -> list[dict[str, str]]:
    """The `instruction, input, output` rows of the archive, whose bytes are checked."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile(MEMBER)
        if member is None:
            raise ValueError(f"{archive} has no file {MEMBER}; give the source archive of llamafactory 0.9.5")
        content = member.read()
    found = hashlib.sha256(content).hexdigest()
    if found != MEMBER_SHA256:
        raise ValueError(f"{MEMBER} has sha256 {found}, expected {MEMBER_SHA256}; give the archive of version 0.9.5")
    return json.loads(content)


def select(rows: list[dict[str, str]]) -> list[dict]:
    """Short to medium rows as `messages`, in the order of a hash of their instruction, each instruction once."""
    chosen: dict[str, dict] = {}
    for row in rows:
        text = " ".join((row["instruction"], row["input"], row["output"]))
        has_input = row["input"] and row["input"].strip("`<>. \n").lower() not in NO_INPUT
        question = row["instruction"] + ("\n\n" + row["input"] if has_input else "")
        usable = row["output"].strip() and not any(word in text.lower() for word in (*IDENTITY, "http"))
        if usable and MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
            chosen.setdefault(row["instruction"], {"messages": messages})
    return [chosen[key] for key in sorted(chosen, key=lambda key: hashlib.sha256(key.encode()).hexdigest())]


def write_rows(path: Path, rows: list[dict]) -> None:
    """One JSON object per line, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_tokenizer(folder: Path, rows: list[dict], vocab_size: int) -> None:
    """A byte-level BPE tokenizer with a ChatML template, in the layout that AutoTokenizer reads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The role names are part of every prompt, so they are worth a token each.
    texts = [f"{message['role']}\n{message['content']}\n" for row in rows for message in row["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the rows give {tokenizer.get_vocab_size()} tokens, {vocab_size} were asked for")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "extra_special_tokens": ["<|im_start|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="llamafactory-0.9.5.tar.gz")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    arguments = parser.parse_args()
    rows = select(read_rows(arguments.archive))
    if len(rows) < NUM_TRAIN + NUM_VALIDATION:
        raise ValueError(f"{len(rows)} rows are usable, {NUM_TRAIN + NUM_VALIDATION} are needed; widen MAX_WORDS")
    train, validation = rows[:NUM_TRAIN], rows[NUM_TRAIN : NUM_TRAIN + NUM_VALIDATION]
    write_rows(arguments.output / "chat" / "train.jsonl", train)
    write_rows(arguments.output / "chat" / "validation.jsonl", validation)
    write_tokenizer(arguments.output / "tiny" / "tokenizer", train, 2048)
    write_tokenizer(arguments.output / "bench" / "tokenizer", train, 8192)


if __name__ == "__main__":
    main()
