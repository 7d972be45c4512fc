"""Make the processor of the tiny vision-language config: a small tokenizer and 48-pixel images of four tokens.

    python make_processor.py

The tokenizer is trained on the questions and names of `train.parquet`, so a second run writes the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

IMAGE_SIZE, TOKENS_PER_IMAGE, VOCAB_SIZE = 48, 4, 384
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_processor(rows: list[dict]) -> Idefics3Processor:
    """Idefics3's processor, which writes one image as `TOKENS_PER_IMAGE` tokens and never splits it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    messages = [message for row in rows for message in row["messages"]]
    parts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    bpe.train_from_iterator([*(f"{message['role']}\n" for message in messages), *parts], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", *SPECIAL_TOKENS[3:]],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    size = {"longest_edge": IMAGE_SIZE}
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False, size=size, max_image_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=TOKENS_PER_IMAGE, chat_template=CHAT_TEMPLATE)


def main() -> None:
    folder = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=folder / "processor", help="folder to write to")
    processor = make_processor(pq.read_table(folder / "train.parquet").to_pylist())
    processor.save_pretrained(parser.parse_args().output)


if __name__ == "__main__":
    main()
