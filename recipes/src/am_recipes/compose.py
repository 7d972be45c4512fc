"""A new vision-language model: the weights and tokenizer of a language model under a vision tower of random weights.

What comes out is an ordinary Hugging Face folder, kept beside other converted models, so that a recipe starts from a
folder here too. Same description, same seed, same language model: same folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from am_recipes import assets
from am_recipes.sections import Compose
from am_recipes.settings.schema import plain


def compose(spec: Compose, seed: int) -> Path:
    """The folder of the model that ``spec`` describes, built where it is not there yet; any process may ask at once.

    Raises ValueError where ``replace_tokens`` does not fit the tokenizer or the processor needs tokens without an
    embedding, what `am_recipes.assets.resolve` raises for the language model, and what transformers raises for the
    config and the processor.
    """
    source = assets.resolve(spec.language_model)
    settings = {path.name: path.read_text(encoding="utf-8") for path in source.glob("*.json")}
    described = json.dumps([plain(spec), seed, assets.fingerprint(source), settings], sort_keys=True)
    digest = hashlib.blake2b(described.encode(), digest_size=6).hexdigest()
    folder = assets.cache_folder() / f"composed-{spec.config['model_type']}-{digest}"
    with assets.locked(folder.with_name(folder.name + ".lock"), waiting_for="another process that composes the model"):
        if not folder.is_dir():
            for abandoned in folder.parent.glob(f"{folder.name}.part-*"):
                shutil.rmtree(abandoned)
            with tempfile.TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as temporary:
                _build(spec, seed, source, Path(temporary) / "folder")
                (Path(temporary) / "folder").rename(folder)
    return assets.check_folder(folder)


def _build(spec: Compose, seed: int, source: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(_renamed_tokens(source, spec.replace_tokens, folder))
    processor = spec.processor.build(tokenizer=tokenizer)
    if len(tokenizer) > AutoConfig.from_pretrained(source).vocab_size:
        added = sorted(tokenizer.get_added_vocab(), key=tokenizer.convert_tokens_to_ids)[-4:]
        raise ValueError(
            f"the processor needs tokens that {spec.language_model} has no embedding for, such as {', '.join(added)}; "
            "name unused tokens for them in model.compose.replace_tokens"
        )
    language_model = AutoModelForCausalLM.from_pretrained(source)
    text_config = language_model.config.to_dict()
    config = AutoConfig.for_model(
        **spec.config,
        text_config=text_config,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=text_config["tie_word_embeddings"],
    )
    # The description decides the random weights, not what was drawn before in this process.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=language_model.dtype)
    model.get_decoder().load_state_dict(language_model.get_decoder().state_dict())
    model.get_output_embeddings().load_state_dict(language_model.get_output_embeddings().state_dict())
    model.generation_config = language_model.generation_config
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _renamed_tokens(source: Path, names: Mapping[str, Any], folder: Path) -> Path:
    """Write the tokenizer of ``source`` into ``folder`` with unused tokens under the names the processor looks for."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    for old, new in names.items():
        if old not in tokenizer.get_added_vocab():
            raise ValueError(
                f"model.compose.replace_tokens: {old!r} is no added token of the tokenizer; choose among "
                f"{', '.join(tokenizer.get_added_vocab())}"
            )
        if new in tokenizer.get_vocab():
            raise ValueError(
                f"model.compose.replace_tokens: the tokenizer has a token {new!r} already; leave {old!r} as it is"
            )
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (source / name).read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        (folder / name).write_text(text, encoding="utf-8")
    return folder
