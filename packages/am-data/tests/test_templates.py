"""Chat templates by name, by path and as text: what they write, and that rows can be masked with them."""

from __future__ import annotations

import copy

import pytest

import am_data
from am_data._render import render_and_mask
from am_data._templates import TEMPLATES

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
]
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n",
    "gemma": "{bos}<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n",
    "llama3": "{bos}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n",
    "zephyr": "<|system|>\nBe brief.{eos}\n<|user|>\nHi{eos}\n<|assistant|>\nHello.{eos}\n",
}
TURN_ENDS = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "phi3": "<|end|>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_by_name_are_written_as_published_and_can_be_masked(tokenizer, name):
    tokenizer = copy.deepcopy(tokenizer)
    text = EXPECTED[name].format(bos=tokenizer.bos_token or "", eos=tokenizer.eos_token)
    template = am_data.chat_template(name)
    assert tokenizer.apply_chat_template(MESSAGES, chat_template=template, tokenize=False) == text
    begin = tokenizer.apply_chat_template(
        MESSAGES[:2], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(begin)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_ENDS.get(name, tokenizer.eos_token)]})
    ids, labels = render_and_mask(tokenizer, MESSAGES, chat_template=name)
    assert tokenizer.decode(ids[labels != -100]) == "Hello." + TURN_ENDS.get(name, tokenizer.eos_token)


def test_a_path_text_and_what_is_neither(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert am_data.chat_template(str(file)) == am_data.chat_template("{{ messages }}") == "{{ messages }}"
    with pytest.raises(ValueError, match=r"chat_template='chatlm' is no template; give a name \(chatml, gemma"):
        am_data.chat_template("chatlm")
    with pytest.raises(FileNotFoundError, match=r"chat_template='no\.jinja' cannot be read"):
        am_data.chat_template("no.jinja")


def test_a_name_that_the_tokenizer_has_is_its_own_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    mine = tokenizer.chat_template
    tokenizer.chat_template = {"default": "{{ 'no' }}", "brief": mine, "chatml": mine}
    for name in ("brief", "chatml"):
        dataset = am_data.ChatDataset([{"messages": MESSAGES}], tokenizer, chat_template=name)
        assert dataset.chat_template == mine
