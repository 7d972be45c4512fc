"""Images as rows hold them (paths, the bytes of files, PIL images) become RGB images, or are refused with a reason.

An image is decoded whole when it is checked: a header says nothing about a file that was cut.
"""

from __future__ import annotations

import copy
import hashlib
import io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from am_data._messages import Row, RowRefusedError
from am_data._rows import FileRows, Source

if TYPE_CHECKING:
    import datasets
    from PIL import Image

# What Pillow's decoders raise at files that are cut or broken.
_DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error)


def require_pillow() -> None:
    """ImportError with the command that installs it, where pillow is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("am-data reads images with pillow; pip install am-data[vision]") from error


def load_image(source: object, folder: Path) -> tuple[Image.Image, bytes]:
    """The image as an RGB PIL image, and a digest of what it was made from; raises RowRefusedError.

    `source` is a path (relative ones start from `folder`), the bytes of a file, `{"bytes", "path"}` as Arrow stores
    images, or a PIL image. The EXIF orientation is applied, transparency is laid on white, palettes and grey become
    RGB. Refused: what is missing, unreadable, without pixels, of more than one frame, or of more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        where, content = "the image in the row", None
    else:
        where, content = _read(source, folder)
        if not content:
            raise RowRefusedError("an image is zero-sized", f"{where} has 0 bytes")
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(content or b""))
        if 0 in image.size:
            raise RowRefusedError("an image is zero-sized", f"{where} is {image.width} x {image.height} pixels")
        if _has_second_frame(image):
            raise RowRefusedError("an image is animated", f"{where} has more than one frame; give one of them")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            detail = f"{where} has pixels of mode {image.mode!r}; convert it to 8 bits a channel"
            raise RowRefusedError("an image has more than 8 bits a channel", detail)
        if image.has_transparency_data:
            opaque = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
        image = image.convert("RGB")
    except RowRefusedError:
        raise
    except (*_DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise RowRefusedError("an image is unreadable", f"{where}: {error}") from error
    digest = hashlib.blake2b(content or image.tobytes() + repr(image.size).encode(), digest_size=16)
    return image, digest.digest()


def _read(source: object, folder: Path) -> tuple[str, bytes]:
    if isinstance(source, Mapping):
        content = source.get("bytes")
        if content is not None:
            return str(source.get("path") or "the image in the row"), content
        source = source.get("path")
    if isinstance(source, bytes):
        return "the image in the row", source
    if not isinstance(source, str | Path):
        known = "a path, bytes, {'bytes', 'path'} and PIL images"
        raise RowRefusedError("an image is of an unknown kind", f"it is a {type(source).__name__}; {known} are read")
    if "://" in str(source) or str(source).startswith("data:"):
        raise RowRefusedError("an image is a URL", f"{str(source)[:80]}; download it and give its path")
    path = folder / Path(source).expanduser()
    if not path.is_file():
        raise RowRefusedError("an image is missing", f"{path} is not a file")
    try:
        return str(path), path.read_bytes()
    except OSError as error:
        raise RowRefusedError("an image is unreadable", str(error)) from error


def _has_second_frame(image: Image.Image) -> bool:
    # The further frames of a phone's MPO are previews and depth maps of the one photograph.
    if image.format == "MPO":
        return False
    try:
        image.seek(1)
    except EOFError:
        return False
    image.seek(0)
    return True


class _UndecodedRows(Sequence[Row]):
    """Rows of a `datasets.Dataset` with images as bytes: decoding them, it fails for the whole row."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self._rows = dataset.with_format("arrow")
        self._features = copy.deepcopy(dataset.features)
        _keep_bytes(self._features)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._features.decode_example(self._rows[index].to_pylist()[0])


def _keep_bytes(feature: object) -> None:
    import datasets

    if isinstance(feature, datasets.Image):
        feature.decode = False
    elif isinstance(feature, Mapping):
        for inner in feature.values():
            _keep_bytes(inner)
    elif isinstance(feature, datasets.List | datasets.LargeList):
        _keep_bytes(feature.feature)


def undecoded(source: Source) -> Source:
    """Rows whose images stay the bytes of their files."""
    if isinstance(source, FileRows):
        return source.each(undecoded)
    # A transform of the user's makes the rows that they want to be read.
    if isinstance(source, Sequence) or source.format["type"] == "custom":
        return source
    return _UndecodedRows(source)
