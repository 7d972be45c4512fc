"""What a run exports is asked as it was trained: with its template, stopping where its turns end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from am_recipes import configs, kd, sft, vlm
from integration_tests import runs

TINY = runs.ROOT / "recipes" / "configs" / "tiny.yaml"
TOKENIZER = runs.ROOT / "recipes" / "data" / "tiny" / "tokenizer"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + (' briefly' if brief else '') + ':\n' + m.content "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant' + (' briefly' if brief else '') + ':\n' }}{% endif %}"
)
QUESTIONS = {"Name a colour.": "Red.", "Name an animal.": "A cat.", "Name a number.": "Seven."}
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, and a base model that stops at another token than its template writes."""
    folder = tmp_path_factory.mktemp("ending")
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in QUESTIONS.items()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    stop = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=stop,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    # As some published models have it: transformers reads this and refuses to write it.
    generation = {"eos_token_id": [stop], "temperature": 0.6, "do_sample": False, "pad_token_id": stop}
    (folder / "base" / "generation_config.json").write_text(json.dumps(generation))
    return folder


def overrides(inputs: Path, run_dir: Path, steps: int, **others: Any) -> list[tuple[str, str]]:
    values = {
        "run_dir": run_dir,
        "model.config": "null",
        "model.name_or_path": inputs / "base",
        "tokenizer.name_or_path": "null",
        "dataset.path": inputs / "rows.jsonl",
        "dataset.split": "train",
        "dataset.chat_template": TEMPLATE,
        "dataset.chat_template_kwargs": "{brief: true}",
        "step_scheduler.global_batch_size": 3,
        "step_scheduler.max_steps": steps,
        "step_scheduler.val_every_steps": "null",
        "optimizer.lr": 1e-2,
        "generate.prompts": json.dumps(list(QUESTIONS)),
        "packed_sequence.packed_sequence_size": 0,
    }
    return [(key, str(value)) for key, value in {**values, **others}.items()]


def ids(*tokens: str) -> list[int]:
    return AutoTokenizer.from_pretrained(TOKENIZER).convert_tokens_to_ids(list(tokens))


def test_stock_generation_from_an_export_stops_where_training_taught_it(inputs: Path, tmp_path: Path) -> None:
    assert sft.main(configs.parse(TINY, overrides(inputs, tmp_path, 40))) == 0
    export = tmp_path / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    assert tokenizer.chat_template == TEMPLATE
    assert model.generation_config.eos_token_id == ids(END_OF_TURN, END_OF_TEXT)
    assert json.loads((export / "generation_config.json").read_text())["temperature"] == 0.6
    for question, answer in QUESTIONS.items():
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", brief=True)
        written = model.generate(**prompt, max_new_tokens=30, do_sample=False, temperature=None)
        assert tokenizer.decode(written[0, prompt["input_ids"].shape[1] :]) == answer + END_OF_TURN
    record = json.loads((tmp_path / "run.json").read_text())
    # With the template's variables too, and without what would follow the end.
    assert record["answers"]["after"] == [list(pair) for pair in QUESTIONS.items()]
    end, text = ids(END_OF_TURN, END_OF_TEXT)
    stops = f"answers end with {END_OF_TURN} ({end}); generation stops there, and at {END_OF_TEXT} ({text}) as before"
    assert stops in record["notes"]
    assert record["launches"][0]["data"]["base weights"].startswith("blake2b of 16 blocks of each file:")
    beside = tmp_path / "checkpoints" / "latest" / "model"
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (beside / name).read_bytes() == (export / name).read_bytes()


def test_an_adapter_has_the_template_and_says_where_to_stop(inputs: Path, tmp_path: Path) -> None:
    lora = {"peft.r": 4, "peft.target_modules": "all-linear", "generate.prompts": "[]"}
    assert sft.main(configs.parse(TINY, overrides(inputs, tmp_path, 3, **lora))) == 0
    for folder in (tmp_path / "export", tmp_path / "checkpoints" / "latest" / "model"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
        assert GenerationConfig.from_pretrained(folder).eos_token_id == ids(END_OF_TURN, END_OF_TEXT)
        assert not (folder / "config.json").exists()


def test_the_template_of_training_is_exported_and_another_one_of_validation_is_told(
    inputs: Path, tmp_path: Path
) -> None:
    rows = runs.ROOT / "recipes" / "data" / "chat" / "validation.jsonl"
    broken = tmp_path / "validation.jsonl"
    broken.write_text(rows.read_text() + json.dumps({"messages": [{"role": "critic", "content": "x"}]}) + "\n")
    changes = {"validation_dataset.path": broken, "validation_dataset.split": "train[-3:]", "generate.prompts": "[]"}
    assert sft.main(configs.parse(TINY, overrides(inputs, tmp_path / "run", 3, **changes))) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "run/export").chat_template == TEMPLATE
    notes = "\n".join(json.loads((tmp_path / "run/run.json").read_text())["notes"])
    assert "val_loss: 3 rows read, 2 kept" in notes
    assert "dropped 1: unknown role" in notes
    assert "WARNING val_loss is rendered with another chat template" in notes


def test_a_random_model_stops_at_its_tokenizers_end_and_at_what_is_taught(tmp_path: Path) -> None:
    processor = runs.ROOT / "recipes" / "data" / "vlm" / "processor"
    own = (processor / "chat_template.jinja").read_text() + "{# as trained #}"
    for recipe, module, template, reader in (("kd", kd, TEMPLATE, AutoTokenizer), ("vlm", vlm, own, AutoProcessor)):
        run_dir = tmp_path / recipe
        changes = {"run_dir": run_dir, "step_scheduler.max_steps": 3, "dataset.chat_template": template}
        file = runs.ROOT / "recipes" / "configs" / recipe / "tiny.yaml"
        assert module.main(configs.parse(file, [(key, str(value)) for key, value in changes.items()])) == 0
        export = run_dir / "export"
        end = GenerationConfig.from_pretrained(export).eos_token_id
        assert AutoTokenizer.from_pretrained(export).eos_token_id in end
        assert f"({end[0]}); generation stops there" in (run_dir / "run.json").read_text()
        assert reader.from_pretrained(export).chat_template == template
