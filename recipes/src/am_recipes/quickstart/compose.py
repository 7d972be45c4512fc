"""A new vision-language model: the weights and tokenizer of a language model under a vision tower of random weights.

What comes out is an ordinary Hugging Face folder, so that a recipe starts from a folder here too. Same language model,
config, processor and seed: same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from am_recipes import sources
from am_recipes.quickstart.cache import made_once
from am_recipes.settings import ArgumentError, Target, checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Part of the cache key: raise it when composing writes something else.
COMPOSITION = 1
# What the config of a composed model takes from elsewhere, and from where.
TAKEN = {
    "text_config": "language_model",
    "tie_word_embeddings": "language_model",
    "image_token_id": "the processor",
}


class ImageProcessor(Protocol):
    """What a composed model needs of its processor, such as a `transformers.ProcessorMixin`."""

    image_token_id: int

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> object: ...


def _check(arguments: Mapping[str, Any]) -> None:
    """Hold the config against its class, and the processor against what `compose` passes to it."""
    from am_recipes import model_config

    config, processor = arguments["config"], arguments["processor"]
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise ArgumentError("config", "needs a model_type, such as idefics3")
    for key in TAKEN.keys() & config.keys():
        raise ArgumentError(f"config.{key}", f"it comes from {TAKEN[key]}; remove it")
    try:
        model_config.check(config)
    except ArgumentError as error:
        raise ArgumentError(f"config.{error.path}".rstrip("."), str(error)) from error
    if not isinstance(processor, Target) or not processor.partial:
        raise ArgumentError("processor", "needs a _target_ with _partial_: true, which is given the tokenizer")
    processor.bind(("tokenizer",))


@checked(_check)
def compose(
    language_model: str | os.PathLike[str],
    config: Mapping[str, Any],
    processor: Callable[..., ImageProcessor],
    replace_tokens: Mapping[str, str] | None = None,
    seed: int = 42,
) -> Path:
    """The folder of the composed model, made where it is not there yet; any process may ask at once.

    Args:
        language_model: what `am_recipes.sources.resolve` takes; its weights and tokenizer are the model's.
        config: the transformers config of the whole, without what `language_model` and the processor say (`TAKEN`).
        processor: called with `tokenizer=`.
        replace_tokens: unused tokens of the tokenizer, and the names that the processor looks for.
        seed: of the random weights.

    Raises ValueError where `replace_tokens` does not fit the tokenizer or the processor needs tokens without an
    embedding, what `am_recipes.sources.resolve` raises for the language model, and what transformers raises for the
    config and the processor.
    """
    source = sources.resolve(language_model)
    with tempfile.TemporaryDirectory() as temporary:
        files = Path(temporary) / "processor"
        image_token_id = _write_processor(source, processor, replace_tokens or {}, files)
        description = hashlib.blake2b(digest_size=6)
        for part in (COMPOSITION, seed, config, sources.fingerprint(source), (source / "config.json").read_text()):
            description.update(json.dumps(part, sort_keys=True).encode())
        for path in sorted(files.iterdir()):
            description.update(path.name.encode() + path.read_bytes())

        def make(folder: Path) -> None:
            shutil.copytree(files, folder)
            model = _model(source, config, image_token_id, seed)
            model.save_pretrained(folder)
            random = [name for name, part in model.base_model.named_children() if part is not model.get_decoder()]
            sources.note_random_parts(folder, [f"{model.base_model_prefix}.{name}" for name in random])

        name = f"composed-{config['model_type']}-{description.hexdigest()}"
        return made_once(name, make, waiting_for="another process that composes the model")


def _model(source: Path, config: Mapping[str, Any], image_token_id: int, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    language_model = AutoModelForCausalLM.from_pretrained(source)
    text_config = language_model.config.to_dict()
    whole = AutoConfig.for_model(
        **config,
        text_config=text_config,
        image_token_id=image_token_id,
        tie_word_embeddings=text_config["tie_word_embeddings"],
    )
    # The description decides the random weights, not what was drawn before in this process.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(whole, dtype=language_model.dtype)
    model.get_decoder().load_state_dict(language_model.get_decoder().state_dict())
    model.get_output_embeddings().load_state_dict(language_model.get_output_embeddings().state_dict())
    model.generation_config = language_model.generation_config
    return model


def _write_processor(
    source: Path, processor: Callable[..., ImageProcessor], names: Mapping[str, str], folder: Path
) -> int:
    """Write the processor around the tokenizer of `source` into `folder`; return the id of its image token."""
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        renamed = _renamed_tokens(source, names, Path(temporary) / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(renamed)
    built = processor(tokenizer=tokenizer)
    if len(tokenizer) > AutoConfig.from_pretrained(source).vocab_size:
        added = sorted(tokenizer.get_added_vocab(), key=tokenizer.convert_tokens_to_ids)[-4:]
        raise ValueError(
            f"the processor needs tokens that {source} has no embedding for, such as {', '.join(added)}; name unused "
            "tokens for them in replace_tokens"
        )
    built.save_pretrained(folder)
    return built.image_token_id


def _renamed_tokens(source: Path, names: Mapping[str, str], folder: Path) -> Path:
    """Write the tokenizer of `source` into `folder` with unused tokens under the names the processor looks for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    for old, new in names.items():
        if old not in tokenizer.get_added_vocab():
            raise ValueError(
                f"replace_tokens: {old!r} is no added token of the tokenizer; choose among "
                f"{', '.join(tokenizer.get_added_vocab())}"
            )
        if new in tokenizer.get_vocab():
            raise ValueError(f"replace_tokens: the tokenizer has a token {new!r} already; leave {old!r} as it is")
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (source / name).read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        (folder / name).write_text(text, encoding="utf-8")
    return folder
