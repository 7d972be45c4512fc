"""What a run reads its rows with: the tokenizer of a language model, the processor of a vision-language model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

import am_data
from am_recipes import sources
from am_recipes.configs import PretrainConfig, SftConfig, VlmConfig
from am_recipes.settings import Target


def tokenizer_of(config: SftConfig | PretrainConfig, folder: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, by default that of the model's `folder`; see `load_tokenizer`."""
    with config.at("tokenizer"):
        return load_tokenizer(config.tokenizer.name_or_path or folder, config.tokenizer.chat_template)


def processor_of(config: VlmConfig, folder: Path | None) -> ProcessorMixin:
    """The processor of a run, by default that of the model's `folder`; see `load_processor`."""
    with config.at("processor"):
        return load_processor(config.processor.name_or_path or folder, config.processor.chat_template)


def load_tokenizer(name_or_path: str | Path | Target | None, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a Hub id or a target; `chat_template` replaces its own
    (see `am_data.chat_template`).

    Raises ValueError where there is none.
    """
    where = None if name_or_path is None else sources.find(name_or_path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(where)!r} has no tokenizer that can be loaded ({str(error).splitlines()[0]}); set "
            "tokenizer.name_or_path to a folder with tokenizer.json and tokenizer_config.json, or to a Hub id"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = am_data.chat_template(chat_template)
    return tokenizer


def load_processor(name_or_path: str | Path | Target | None, chat_template: str | None) -> ProcessorMixin:
    """The processor of a folder, a Hub id or a target; `chat_template` replaces its own
    (see `am_data.chat_template`).

    Raises ValueError where there is none.
    """
    where = None if name_or_path is None else sources.find(name_or_path)
    try:
        # Code that comes with a processor is never run; left to itself, transformers would ask on the terminal.
        processor: ProcessorMixin = AutoProcessor.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(where)!r} has no processor that can be loaded ({str(error).splitlines()[0]}); set "
            "processor.name_or_path to a folder with processor_config.json, or to a Hub id"
        ) from error
    if chat_template is not None:
        processor.chat_template = am_data.chat_template(chat_template)
    return processor
