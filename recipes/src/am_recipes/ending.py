"""Where a trained model stops: what it is asked with afterwards is what its rows were rendered with.

A model learns to end its turns with the token that the template of its rows writes there, which need not be the one
that its base stopped at. The export, the checkpoints and the answers of a run itself go by what was taught.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import am_data
from am_recipes.data import IGNORED, spread

GENERATION_CONFIG = "generation_config.json"
# The dialect of a line that asks to be read.
_WARNING = "WARNING answers never end"


@dataclass(frozen=True)
class Ending:
    """The tokens that training taught to end turns with, and those of the base; `str(ending)` is for people.

    `taught` is None where it is not known before training: of a stream.
    """

    taught: Mapping[int, str] | None
    base: Mapping[int, str]

    @property
    def token_ids(self) -> list[int]:
        """Where generation stops: the tokens taught, then the base's."""
        return list(dict.fromkeys([*(self.taught or {}), *self.base]))

    def __str__(self) -> str:
        base = _listed(self.base) if self.base else "nowhere before max_new_tokens"
        if self.taught is None:
            return f"where answers end is not known of a stream; generation stops at {base}"
        if not self.taught:
            return f"{_WARNING}: no row teaches a special token at the end of a turn;\ngeneration stops at {base}"
        others = {token: text for token, text in self.base.items() if token not in self.taught}
        also = f", and at {_listed(others)} as before" if others else ""
        return f"answers end with {_listed(self.taught)}; generation stops there{also}"


def follow(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    folder: Path | None,
    dataset: am_data.Dataset | am_data.Stream,
) -> Ending:
    """Give `tokenizer` the template of `dataset`, and the generation config of `model` the tokens that end its turns.

    Those stand beside the tokens at which generation stopped before: of the model in `folder`; of a random model, for
    which nobody chose any, the tokenizer's end of text.
    """
    if isinstance(dataset, am_data.Rendered) and dataset.chat_template is not None:
        tokenizer.chat_template = dataset.chat_template
    reader: PreTrainedTokenizerBase = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
    stops = reader.eos_token_id if folder is None else _stops(model, folder)
    base = stops if isinstance(stops, list) else [] if stops is None else [stops]
    taught = _taught(dataset, reader)
    ending = Ending(None if taught is None else _texts(reader, taught), _texts(reader, base))
    model.generation_config.eos_token_id = ending.token_ids or None
    return ending


def generation_config(model: PreTrainedModel, folder: Path | None) -> bytes:
    """The generation config of `model` as a file: all that the one in `folder` says, with the tokens that stop it."""
    file = None if folder is None else folder / GENERATION_CONFIG
    if file is None or not file.is_file():
        return model.generation_config.to_json_string().encode()
    # As it is: transformers refuses to write some of the configs that it reads.
    values = json.loads(file.read_text(encoding="utf-8")) | {"eos_token_id": model.generation_config.eos_token_id}
    return (json.dumps(values, indent=2) + "\n").encode()


def _stops(model: PreTrainedModel, folder: Path) -> int | list[int] | None:
    file = folder / GENERATION_CONFIG
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found: int | list[int] | None = values.get("eos_token_id", model.generation_config.eos_token_id)
    return found


def _taught(dataset: am_data.Dataset | am_data.Stream, tokenizer: PreTrainedTokenizerBase) -> Sequence[int] | None:
    """The tokens that end turns under loss; of a dataset that does not say, special ones at the end of its targets."""
    if isinstance(dataset, am_data.Rendered):
        return dataset.end_token_ids
    if not isinstance(dataset, am_data.Dataset):
        return None
    special = {token for token, value in tokenizer.added_tokens_decoder.items() if value.special}
    ends = {token for example in spread(dataset) for token in _span_ends(example["labels"])}
    return sorted(ends & (special | set(tokenizer.all_special_ids)))


def _span_ends(labels: Any) -> Iterable[int]:
    values = [int(label) for label in labels]
    return (token for token, following in zip(values, [*values[1:], IGNORED]) if token != IGNORED == following)


def _texts(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> dict[int, str]:
    return {token: str(tokenizer.convert_ids_to_tokens([token])[0]) for token in tokens}


def _listed(tokens: Mapping[int, str]) -> str:
    return " or ".join(f"{text} ({token})" for token, text in tokens.items())
