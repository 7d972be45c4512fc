"""The command `am-data`. Nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from am_data import __version__

_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}
_EXIT_STATUS = """\
exit status: 0 the shards are written; 1 the data, the tokenizer or the folder will not do (nothing is written);
2 wrong usage"""
_EXAMPLE = """\
example:
  am-data prepare corpus/*.jsonl --tokenizer models/llama --output shards --validation-fraction 0.01

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 refused with a message. Wrong usage exits with 2."""
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        # Read by the tokenizers library when it first encodes a batch.
        os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    from am_data._prepare import prepare

    try:
        summary = prepare(
            options.inputs,
            options.output,
            tokenizer=options.tokenizer,
            text_key=options.text_key,
            prefix=options.prefix,
            validation_fraction=options.validation_fraction,
            shard_tokens=options.shard_tokens,
            max_tokens=options.max_tokens,
            bos=options.bos,
            split_on_blank_lines=options.split_on_blank_lines,
        )
    except (OSError, ValueError, ImportError) as error:
        print(f"am-data prepare: {error}", file=sys.stderr)
        return 1
    print(summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="am-data", description="Data for language-model training.")
    parser.add_argument("--version", action="version", version=f"am-data {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    prepare = commands.add_parser(
        "prepare",
        help="tokenise text, JSONL or Parquet into token shards for pre-training",
        description="Tokenise text, JSON lines or Parquet into nanoGPT .bin shards, which am_data.TokenShards reads.",
        epilog=_EXAMPLE + _EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = prepare.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help=".txt, .jsonl, .json, .parquet, or a folder of them")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for PREFIX_000000.bin, ...")
    add("--tokenizer", type=Path, required=True, metavar="PATH", help="folder with a tokenizer.json, or that file")
    add("--text-key", default="text", metavar="KEY", help="column with the text (default: %(default)s)")
    add("--split-on-blank-lines", action="store_true", help="a .txt file is many documents, blank lines between them")
    add("--prefix", default="train", help="start of the shards' names (default: %(default)s)")
    add(
        "--validation-fraction",
        type=_fraction,
        default=0.0,
        metavar="SHARE",
        help="share of the documents for validation_*.bin, chosen by a hash of the text, so that equal texts are never "
        "on both sides (default: none)",
    )
    add("--shard-tokens", type=_tokens, default=_tokens("100M"), metavar="N", help="tokens per shard (default: 100M)")
    add("--max-tokens", type=_tokens, metavar="N", help="write at most N tokens, as 500M or 1.5B (default: all)")
    bos = prepare.add_mutually_exclusive_group()
    bos.add_argument(
        "--bos",
        metavar="TOKEN",
        default="auto",
        help="token written before each document (default: bos_token, else eos_token, of tokenizer_config.json)",
    )
    bos.add_argument("--no-bos", dest="bos", action="store_const", const=None, help="nothing between documents")
    add("--threads", type=_count, metavar="N", help="threads that tokenise (default: one per core)")
    return parser


def _tokens(text: str) -> int:
    """`500M` as 500,000,000; K, M, B or no unit."""
    number, unit = (text[:-1], _UNITS[text[-1].upper()]) if text[-1:].upper() in _UNITS else (text, 1)
    try:
        value = int(float(number) * unit) if "." in number else int(number) * unit
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; give 1 or more, as 250000, 500M or 1.5B")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a share from 0 to below 1, as 0.05")
    return value


if __name__ == "__main__":
    sys.exit(main())
