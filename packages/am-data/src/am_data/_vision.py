"""Conversations with images: the mask of `ChatDataset`, with every image expanded to the tokens of its features.

The mask is derived on the rendering as the template writes it, where an image is one placeholder token; then each
placeholder becomes the tokens that the processor itself writes for that image. How many they are depends on the
image's size alone, so the processor is asked once a size. Pixels are made when an example is asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from am_data._files import expand, is_pattern, paths_of
from am_data._messages import Format, Message, Row, RowRefusedError, ignored_columns, normalise
from am_data._render import IGNORE_INDEX, Renderer, TrainOn
from am_data._report import DatasetReport
from am_data._row_filter import (
    NUM_SAMPLES,
    Refused,
    check_options,
    collect,
    cut,
    digest_of,
    ends_of,
    layout_of,
    row_id,
    segments,
)
from am_data._rows import Rows, columns_of, read_rows
from am_data._templates import TEMPLATES
from am_data._tokens import TextExample, TokenDataset
from am_data._vision_images import load_image, require_pillow, undecoded
from am_data._vision_processor import VisionProcessor, vision_processor

if TYPE_CHECKING:
    from PIL import Image
    from transformers import ProcessorMixin

_PLACEHOLDER = "<image>"


class VisionChatDataset:
    """A map-style dataset of conversations with images: `dataset[i]` is `{"input_ids": int64 [S], "labels": int64
    [S]}` and, where the row has images, the processor's own tensors (`pixel_values`, ...).

    `path` and `format` are those of `ChatDataset`; a content is a string or a list of parts. An image is a part
    `{"type": "image"}` with `image` or `path` (a path, the bytes of a file, `{"bytes", "path"}`, a PIL image), or it is
    taken in order from the row's column `images` (or `image`) by parts that hold none and by `<image>` in strings,
    whose text stays as it is. Relative paths start from `images`; without it, from the folder of the rows' file, or the
    working directory. `processor`: a transformers processor of a declared family, or a `VisionProcessor`.

    The tokens are those of `processor.apply_chat_template`; labels are as in `ChatDataset`, never on image tokens.
    A row is refused too where an image is missing, unreadable (each is decoded once, here), zero-sized, animated, of
    more than 8 bits a channel, a URL or in an assistant turn; where images, placeholders and features differ in
    number; and where a text holds the image token. Images are turned as EXIF says; transparency is laid on white.

    A row longer than `max_length` tokens is refused, or with `truncation=True` cut after its last image, never inside
    or before it. ValueError where no row is left, or an image file has changed when its example is asked for.
    """

    def __init__(
        self,
        path: Rows,
        *,
        processor: ProcessorMixin | VisionProcessor,
        images: str | Path | None = None,
        split: str = "train",
        format: Format = "auto",
        max_length: int | None = None,
        truncation: bool = False,
        train_on: TrainOn = "assistant",
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_bad_row: Literal["drop", "raise"] = "drop",
        name: str | None = None,
    ) -> None:
        require_pillow()
        check_options(format, on_bad_row, max_length, truncation)
        adapter = processor if isinstance(processor, VisionProcessor) else vision_processor(processor)
        read = read_rows(path, split=split, name=name)
        source = undecoded(read)
        layout = layout_of(source, format, path, split)
        tokenizer = adapter.processor.tokenizer
        template = chat_template or adapter.processor.chat_template
        if not isinstance(template, str):
            holder = type(adapter.processor).__name__
            raise ValueError(
                f"chat_template={chat_template!r}, and that of the {holder} is {template!r}; give one: a name "
                f"({', '.join(TEMPLATES)}), the path of a .jinja file, or Jinja text"
            )
        renderer = Renderer(tokenizer, chat_template=template, chat_template_kwargs=chat_template_kwargs)
        masker = _Masker(adapter, renderer, layout, _folder(images, path), train_on, max_length, truncation)
        indices, kept, dropped = collect(map(masker, source), source, path, on_bad_row)

        digests = [digest for row in kept for digest in (row.digest, *row.images)]
        fingerprint = hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
        self._tokens = TokenDataset((row.example for row in kept), fingerprint=fingerprint)
        self._adapter = adapter
        # Examples may be made in a loader's thread while the processor is in use, and a tokenizer is set (to pad, to
        # cut) and asked in two calls.
        self._own_adapter = dataclasses.replace(adapter, processor=copy.deepcopy(adapter.processor))
        self._masker = masker
        self._source = source
        self._indices = indices
        self._images = [row.images for row in kept]
        self._report = DatasetReport(
            rows_read=len(source),
            rows_kept=len(kept),
            rows_truncated=sum(row.truncated for row in kept),
            dropped=dropped,
            num_tokens=self._tokens.num_tokens,
            num_supervised_tokens=self._tokens.num_supervised_tokens,
            samples=[segments(row.example, masker.decode) for row in kept[:NUM_SAMPLES]],
            num_images=sum(len(row.images) for row in kept),
            num_image_tokens=sum(int((row.example["input_ids"] == adapter.image_token_id).sum()) for row in kept),
            ignored_columns=ignored_columns(columns_of(read), layout, ("images", "image")),
        )
        self._end_token_ids = tuple(sorted(frozenset().union(*(row.ends for row in kept))))

    @property
    def report(self) -> DatasetReport:
        """As `ChatDataset.report`, with the number of images and of image tokens."""
        return self._report

    @property
    def processor_adapter(self) -> VisionProcessor:
        """The adapter in use: its `join` is for the loader, its `image_token_id` to compare with a model's config."""
        return self._adapter

    @property
    def chat_template(self) -> str | None:
        """The template (Jinja) that rows are rendered with."""
        return self._masker.renderer.chat_template

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """The variables that the template was given."""
        return self._masker.renderer.template_kwargs

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """As `ChatDataset.end_token_ids`."""
        return self._end_token_ids

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each conversation, image tokens included, int64 `[num_rows]`."""
        return self._tokens.lengths

    @property
    def fingerprint(self) -> str:
        """Equal for equal conversations, images, mask and length limit."""
        return self._tokens.fingerprint

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._tokens[index]
        images = self.images(index)
        if not images:
            return dict(example)
        _, tensors = self._own_adapter.process(images)
        return {**example, **tensors}

    def images(self, index: int) -> list[Image.Image]:
        """The images of row `index` as the processor gets them: RGB, upright, on white."""
        if not self._images[index]:
            return []
        place = self._indices[index]
        row = self._source[place]
        try:
            _, _, sources = read_conversation(row, self._masker.layout)
            loaded = [load_image(source, self._masker.folder) for source in sources]
            if [digest for _, digest in loaded] != self._images[index]:
                raise ValueError("an image is not the one that was there when the dataset was made; make it anew")
        except ValueError as error:
            raise ValueError(f"row {row_id(self._source, place)}: {error}") from error
        return [image for image, _ in loaded]


@dataclasses.dataclass(frozen=True)
class _Kept:
    example: TextExample
    truncated: bool
    digest: bytes
    images: list[bytes]
    ends: frozenset[int]


@dataclasses.dataclass(frozen=True)
class _Masker:
    """One row to its tokens, its mask and the digests of its images."""

    adapter: VisionProcessor
    renderer: Renderer
    layout: Format
    folder: Path
    train_on: TrainOn
    max_length: int | None
    truncation: bool
    # By the size of an image: the tokens that it becomes, and their text.
    expansions: dict[tuple[int, int], tuple[NDArray[np.int64], str]] = dataclasses.field(default_factory=dict)

    def __call__(self, row: Row) -> _Kept | Refused:
        try:
            messages, tools, sources = read_conversation(row, self.layout)
            self._refuse_image_token(messages)
            ids, labels = self.renderer.mask(messages, tools=tools, train_on=self.train_on)
            loaded = [load_image(source, self.folder) for source in sources]
            text = self.renderer.render(messages, tools)
            ids, labels, last_image = self._expand(text, ids, labels, [image for image, _ in loaded])
            full_length, ends = len(ids), ends_of(labels)
            ids, labels = cut(ids, labels, self.max_length, self.truncation)
            if len(ids) < last_image:
                detail = f"the last image ends at token {last_image}, max_length={self.max_length}"
                raise RowRefusedError("truncation would cut an image", detail)
        except RowRefusedError as refusal:
            return Refused(refusal.reason, refusal.detail, str(refusal))
        digest = digest_of(messages, tools, labels)
        images = [digest for _, digest in loaded]
        taught = frozenset(ids[ends[ends < len(ids)]].tolist())
        return _Kept({"input_ids": ids, "labels": labels}, len(ids) < full_length, digest, images, taught)

    def decode(self, ids: NDArray[np.int64]) -> str:
        """The text of `ids`, with every run of image tokens as `<image x 64>`."""
        text = ""
        for is_image, run in itertools.groupby(ids.tolist(), lambda token: token == self.adapter.image_token_id):
            tokens = list(run)
            text += f"<image x {len(tokens)}>" if is_image else self.adapter.processor.tokenizer.decode(tokens)
        return text

    def _refuse_image_token(self, messages: list[Message]) -> None:
        for turn, message in enumerate(messages):
            for part in message["content"]:
                if part["type"] == "text" and self.adapter.image_token in part["text"]:
                    raise RowRefusedError(
                        "a text holds the image token", f"turn {turn} has {self.adapter.image_token!r} in a text part"
                    )

    def _expand(
        self, text: str, ids: NDArray[np.int64], labels: NDArray[np.int64], images: list[Image.Image]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Tokens and labels with every placeholder replaced, and the end of the last image (0 if there is none)."""
        places = np.flatnonzero(ids == self.adapter.image_token_id).tolist()
        if len(places) != len(images):
            raise RowRefusedError(
                "the template drops or adds an image", f"it writes {len(places)} placeholders for {len(images)}"
            )
        if not images:
            return ids, labels, 0
        expansions = [self._expansion(image) for image in images]
        all_ids, all_labels, end = [ids[: places[0]]], [labels[: places[0]]], 0
        for place, following, (tokens, _) in zip(places, [*places[1:], len(ids)], expansions):
            all_ids += [tokens, ids[place + 1 : following]]
            all_labels += [np.full_like(tokens, IGNORE_INDEX), labels[place + 1 : following]]
            end = sum(map(len, all_ids[:-1]))
        expanded = np.concatenate(all_ids)
        texts = text.split(self.adapter.image_token)
        whole = "".join([texts[0], *(part for (_, own), rest in zip(expansions, texts[1:]) for part in (own, rest))])
        # White space beside a placeholder may be tokenised otherwise beside what it becomes.
        if self._encode(whole) != expanded.tolist():
            raise RowRefusedError("the tokens around an image change when it is expanded", repr(text[:80]))
        return expanded, np.concatenate(all_labels), end

    def _expansion(self, image: Image.Image) -> tuple[NDArray[np.int64], str]:
        if image.size not in self.expansions:
            ids, _ = self.adapter.process([image])
            text = self.adapter.processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if self._encode(text) != ids.tolist():
                raise ValueError(
                    f"the tokens of an image of {image.size} pixels decode to {text[:80]!r}, which is tokenised "
                    "otherwise; add the tokens that the processor writes to its tokenizer as special tokens"
                )
            self.expansions[image.size] = ids, text
        return self.expansions[image.size]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.adapter.processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def read_conversation(row: Row, layout: Format) -> tuple[list[Message], list[dict[str, Any]] | None, list[object]]:
    """`(messages, tools, images)`: contents are lists of text parts and bare image parts, images in their order.

    Raises RowRefusedError, also where placeholders and the images of the row's column differ in number.
    """
    column = row.get("images") if row.get("images") is not None else row.get("image")
    given = list(column) if isinstance(column, Sequence) and not isinstance(column, str | bytes) else [column]
    given = [] if column is None else given
    waiting = iter(given)
    images: list[object] = []
    num_placeholders = 0

    def placeholder() -> dict[str, Any]:
        nonlocal num_placeholders
        num_placeholders += 1
        images.append(next(waiting, None))
        return {"type": "image"}

    def read_content(content: object, turn: int) -> list[dict[str, Any]]:
        if isinstance(content, str):
            texts = content.split(_PLACEHOLDER)
            parts = [[placeholder(), {"type": "text", "text": text}] for text in texts[1:]]
            flat = [{"type": "text", "text": texts[0]}, *itertools.chain.from_iterable(parts)]
            return [part for part in flat if part["type"] == "image" or part["text"]]
        if not isinstance(content, Sequence):
            raise RowRefusedError("content of an unknown kind", f"turn {turn} has a {type(content).__name__}")
        return [read_part(part, turn) for part in content]

    def read_part(part: object, turn: int) -> dict[str, Any]:
        # Arrow gives every part the keys of all of them.
        held = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
        kind = held.pop("type", None)
        if kind == "text" and isinstance(held.get("text"), str):
            return {"type": "text", "text": held["text"]}
        if kind == "image_url" or "url" in held:
            raise RowRefusedError("an image is a URL", f"turn {turn}; download it and give its path")
        if kind != "image":
            raise RowRefusedError("content of an unknown kind", f"turn {turn} has a part of type {kind!r}")
        if not held:
            return placeholder()
        if held.keys() == {"image"}:
            images.append(held["image"])
        elif held.keys() <= {"path", "bytes"}:
            images.append(held)
        else:
            raise RowRefusedError("content of an unknown kind", f"turn {turn} has an image part with {sorted(held)}")
        return {"type": "image"}

    messages, tools = normalise(row, layout, read_content)
    if num_placeholders != len(given):
        raise RowRefusedError(
            "images and placeholders differ in number", f"{len(given)} images, {num_placeholders} placeholders"
        )
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and any(part["type"] == "image" for part in message["content"]):
            raise RowRefusedError("an image in an assistant turn", f"turn {turn}; a model does not learn to draw here")
    return messages, tools, images


def _folder(images: str | Path | None, rows: Rows) -> Path:
    if images is not None:
        folder = Path(images).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"images={str(images)!r} is not a folder; give the one that paths start from")
        return folder
    paths = paths_of(rows) or []
    if len(paths) == 1 and paths[0].is_dir():
        return paths[0]
    files = [file for path in paths for file in (expand(path) if is_pattern(path) else [path])]
    folders = sorted({file.parent for file in files if file.is_file()})
    if len(folders) > 1:
        raise ValueError(
            f"the files of rows are in {len(folders)} folders ({', '.join(map(str, folders[:3]))}); give images=, the "
            "folder that the paths of images start from"
        )
    if folders:
        return folders[0]
    return Path()
