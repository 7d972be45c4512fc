"""Conversations with pictures: tokens and tensors are the processor's, labels the answers', bad pictures refused."""

import numpy as np
import pytest
import torch
from vision_processors import make_idefics3, make_llava, make_llava_siglip, make_picture

import am_data

PROCESSORS = {"idefics3": make_idefics3, "llava": make_llava, "llava_siglip": make_llava_siglip}
ANSWER = "It is a red square."


def row(*pictures, answer=ANSWER, **columns):
    content = [{"type": "image", "image": picture} for picture in pictures]
    content.append({"type": "text", "text": "What is in the picture?"})
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **columns}


@pytest.mark.parametrize("family", PROCESSORS)
def test_tokens_and_tensors_are_those_of_the_processor(family):
    processor = PROCESSORS[family]()
    rows = [row(make_picture()), row(), row(make_picture(30, 30), make_picture(40, 10, seed=1))]
    dataset = am_data.VisionChatDataset(rows, processor=processor, on_bad_row="raise")
    for index, own in enumerate(rows):
        answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
        expected = processor.apply_chat_template(
            [own["messages"][0], answer],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"add_special_tokens": False},
        )
        example = dataset[index]
        assert example["input_ids"].tolist() == expected["input_ids"][0].tolist()
        assert dataset.lengths[index] == len(example["input_ids"])
        names = set(expected) - {"input_ids", "attention_mask"}
        assert set(example) == {"input_ids", "labels"} | names
        for name in names:
            tensor = expected[name][0] if family == "idefics3" else expected[name]
            assert torch.equal(example[name], tensor)


@pytest.mark.parametrize("family", PROCESSORS)
def test_labels_are_the_answer_and_its_end(family):
    processor = PROCESSORS[family]()
    example = am_data.VisionChatDataset([row(make_picture())], processor=processor)[0]
    ids, labels = example["input_ids"], example["labels"]
    end = "<end_of_utterance>" if family == "idefics3" else "</s>"
    assert processor.tokenizer.decode(ids[labels != -100]) == f" {ANSWER}{end}"
    assert np.array_equal(labels[labels != -100], ids[labels != -100])
    assert not (labels == processor.image_token_id).any()
