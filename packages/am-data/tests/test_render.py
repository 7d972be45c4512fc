"""Exact masks on templates of several families, and the refusals."""

from __future__ import annotations

import pytest

import am_data

USER = {"role": "user", "content": "What is two plus two?"}
ANSWER = {"role": "assistant", "content": "It is four."}
AGAIN = {"role": "user", "content": "Hello there"}
FINE = {"role": "assistant", "content": "I am fine 😀"}
SYSTEM = {"role": "system", "content": "You are very quick."}


def supervised(tokenizer, messages, **options):
    """The texts under loss, one per run of supervised tokens; checks what holds for every rendering."""
    ids, labels = am_data.render_and_mask(tokenizer, messages, **options)
    kwargs = options.get("chat_template_kwargs", {})
    expected = tokenizer.apply_chat_template(
        messages, tools=options.get("tools"), chat_template=options.get("chat_template"), return_dict=False, **kwargs
    )
    assert ids.tolist() == expected
    assert ids.dtype == labels.dtype == "int64"
    runs, open_run = [], False
    for token, label in zip(ids.tolist(), labels.tolist()):
        assert label in (-100, token)
        if label == -100:
            open_run = False
        elif open_run:
            runs[-1].append(token)
        else:
            runs, open_run = [*runs, [token]], True
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chatml", ["It is four.<|im_end|>", "I am fine 😀<|im_end|>"]),
        ("default_system", ["It is four.<|im_end|>", "I am fine 😀<|im_end|>"]),
        ("generation_tags", ["It is four.<|im_end|>", "I am fine 😀<|im_end|>"]),
        ("llama3", ["It is four.<|eot_id|>", "I am fine 😀<|eot_id|>"]),
        ("mistral", [" It is four.</s>", " I am fine 😀</s>"]),
        ("mistral_nemo", ["It is four.</s>", "I am fine 😀</s>"]),
        ("qwen3", ["It is four.<|im_end|>", "<think>\n\n</think>\n\nI am fine 😀<|im_end|>"]),
    ],
)
def test_every_answer_with_its_end_is_under_loss_and_nothing_else(tokenizer, templates, template, expected):
    messages = [USER, ANSWER, AGAIN, FINE]
    assert supervised(tokenizer, messages, chat_template=templates[template]) == expected
    assert supervised(tokenizer, messages, chat_template=templates[template], train_on="last") == expected[-1:]


def test_the_mask_is_that_of_the_templates_own_generation_tags(tokenizer, templates):
    messages, template = [SYSTEM, USER, ANSWER, AGAIN, FINE], templates["generation_tags"]
    _, labels = am_data.render_and_mask(tokenizer, messages, chat_template=template)
    theirs = tokenizer.apply_chat_template(messages, chat_template=template, return_assistant_tokens_mask=True)
    assert (labels != -100).tolist() == [bool(value) for value in theirs["assistant_masks"]]


def test_content_that_the_template_trims(tokenizer, templates):
    messages = [{"role": "user", "content": " Hello \n"}, {"role": "assistant", "content": "\n\n I am fine \n"}]
    assert supervised(tokenizer, messages, chat_template=templates["llama3"]) == ["I am fine<|eot_id|>"]
    assert supervised(tokenizer, messages, chat_template=templates["mistral_nemo"]) == ["\n\n I am fine \n</s>"]


def test_consecutive_answers_are_two_turns(tokenizer):
    assert supervised(tokenizer, [USER, ANSWER, FINE]) == ["It is four.<|im_end|>", "I am fine 😀<|im_end|>"]


def test_equal_contents_are_told_apart(tokenizer):
    messages = [{"role": role, "content": "Hello"} for role in ("user", "assistant", "user", "assistant")]
    assert supervised(tokenizer, messages) == ["Hello<|im_end|>"] * 2


def test_reasoning_is_learned_where_the_template_writes_it(tokenizer, templates):
    field = {"role": "assistant", "content": "four", "reasoning_content": "hmm"}
    inline = {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nfour"}
    for message in (field, inline):
        found = supervised(tokenizer, [USER, message], chat_template=templates["qwen3"])
        assert found == ["<think>\nhmm\n</think>\n\nfour<|im_end|>"]


@pytest.mark.parametrize(
    "message", [{"content": "four", "reasoning_content": "hmm"}, {"content": "<think>hmm</think>four"}]
)
def test_reasoning_of_an_earlier_turn_may_be_left_out_only_where_it_is_not_learned(tokenizer, templates, message):
    messages = [USER, {"role": "assistant", **message}, AGAIN, FINE]
    with pytest.raises(ValueError, match="drops the reasoning of an assistant turn: turn 1"):
        am_data.render_and_mask(tokenizer, messages, chat_template=templates["qwen3"])
    found = supervised(tokenizer, messages, chat_template=templates["qwen3"], train_on="last")
    assert found == ["<think>\n\n</think>\n\nI am fine 😀<|im_end|>"]


def test_a_generation_prompt_that_holds_the_think_block_takes_it_out_of_the_loss(tokenizer, templates):
    options = {"chat_template": templates["qwen3"], "chat_template_kwargs": {"enable_thinking": False}}
    assert supervised(tokenizer, [USER, ANSWER], **options) == ["It is four.<|im_end|>"]


def test_tool_calls_are_under_loss_and_tool_results_are_not(tokenizer, templates):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"left": 2, "right": 2}}}
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        ANSWER,
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    assert supervised(tokenizer, messages, tools=tools, chat_template=templates["with_tools"]) == [
        '<tool_call>add{"left": 2, "right": 2}</tool_call><|im_end|>',
        "It is four.<|im_end|>",
    ]
    with pytest.raises(ValueError, match="the template drops a tool call"):
        am_data.render_and_mask(tokenizer, messages, chat_template=templates["chatml"])
    with pytest.raises(ValueError, match="the template drops a tool:"):
        am_data.render_and_mask(tokenizer, [USER, ANSWER], tools=tools, chat_template=templates["chatml"])


def test_arguments_given_as_a_json_string_are_written_as_an_object(tokenizer, templates):
    def render(arguments):
        call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return am_data.render_and_mask(tokenizer, messages, chat_template=templates["with_tools"])[0].tolist()

    assert render('{"left": 2}') == render({"left": 2})


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("drops_system", [SYSTEM, USER, ANSWER], "the template drops a system turn: turn 0"),
        ("mistral_nemo", [SYSTEM, USER, ANSWER], "the template drops a system turn: turn 0"),
        ("mistral", [SYSTEM, USER, ANSWER], "the template refuses the conversation: roles must alternate"),
        ("without_end_of_turn", [USER, ANSWER], "no end-of-turn token"),
        ("chatml", [USER], r"no assistant turn: the roles are \['user'\]"),
        ("chatml", [], "no messages"),
        ("chatml", [ANSWER], "no prompt before an assistant turn"),
        ("chatml", [{"role": "critic", "content": "x"}, ANSWER], "unknown role: turn 0 has role='critic'"),
        ("chatml", [USER, {"role": "assistant", "content": " "}], r"empty turn: turn 1 \(assistant\)"),
        ("chatml", [USER, {"role": "assistant", "content": [{"type": "image"}]}], "part of type 'image'"),
        ("chatml", [USER, {"role": "assistant", "content": "four", "reasoning_content": "hmm"}], "drops the reasoning"),
        (
            "chatml",
            [USER, {"role": "assistant", "content": "four<|im_end|>five"}],
            "two derivations of the mask disagree",
        ),
    ],
)
def test_refusals_name_the_turn_and_the_reason(tokenizer, templates, template, messages, reason):
    with pytest.raises(ValueError, match=reason):
        am_data.render_and_mask(tokenizer, messages, chat_template=templates[template])


def test_a_template_that_cuts_or_repeats_a_content_is_refused(tokenizer, templates):
    cuts = templates["chatml"].replace("m.content +", "m.content[:12] +")
    with pytest.raises(ValueError, match="the template changes a content"):
        am_data.render_and_mask(tokenizer, [USER, ANSWER], chat_template=cuts)
    repeats = templates["chatml"].replace("m.content +", "m.content + m.content +")
    with pytest.raises(ValueError, match="writes a user turn twice"):
        am_data.render_and_mask(tokenizer, [USER, ANSWER], chat_template=repeats)


def test_a_template_that_rewrites_the_past_is_refused_except_for_the_last_turn(tokenizer, templates):
    counts = "{{ '<s>' + (messages | length | string) + '\n' }}" + templates["chatml"]
    with pytest.raises(ValueError, match="the template rewrites earlier turns"):
        am_data.render_and_mask(tokenizer, [USER, ANSWER], chat_template=counts)


def test_a_prompt_that_splits_otherwise_when_text_follows_is_still_cut_cleanly(tokenizer, templates):
    prompt = tokenizer.apply_chat_template(
        [USER], chat_template=templates["llama3"], add_generation_prompt=True, return_dict=False
    )
    ids, _ = am_data.render_and_mask(tokenizer, [USER, ANSWER], chat_template=templates["llama3"])
    assert ids[: len(prompt)].tolist() != prompt
    assert supervised(tokenizer, [USER, ANSWER], chat_template=templates["llama3"]) == ["It is four.<|eot_id|>"]


def test_a_token_that_reaches_from_prompt_into_answer_is_refused(tokenizer, templates):
    # "assistant\n\n" + "\nHello": the three line ends do not split where the prompt ends.
    template = templates["llama3"].replace(" | trim", "")
    messages = [USER, {"role": "assistant", "content": "\n\nHello"}]
    with pytest.raises(ValueError, match="a token covers both prompt and answer"):
        am_data.render_and_mask(tokenizer, messages, chat_template=template)


def test_unknown_options_and_missing_templates_are_errors(tokenizer):
    with pytest.raises(ValueError, match="train_on='all' is unknown; choose 'assistant' or 'last'"):
        am_data.render_and_mask(tokenizer, [USER, ANSWER], train_on="all")
    without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template; give one: a name"):
        am_data.render_and_mask(without, [USER, ANSWER])
