"""Make the images of the vision-language quickstart: Noto drawings to train on, Twemoji drawings to test with.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python tools/make_vlm_data.py emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz

A training row shows Noto's drawing of a name, once as it is and otherwise moved, turned, stretched, mirrored or
recoloured; a validation row shows Twemoji's drawing of the same name, as it is. No Twemoji drawing is trained on.
The rows depend on the two archives alone, their bytes also on the WebP encoder inside the installed Pillow.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

SHA256 = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
IMAGE_SIZE = 48
COPIES = 16
QUESTION = "What is this?"
# Answer -> code point of the emoji. Chosen for names of everyday things with one object in the image.
NAMES = {
    "tomato": "1f345",
    "grapes": "1f347",
    "watermelon": "1f349",
    "lemon": "1f34b",
    "banana": "1f34c",
    "pineapple": "1f34d",
    "pear": "1f350",
    "peach": "1f351",
    "strawberry": "1f353",
    "cherries": "1f352",
    "carrot": "1f955",
    "corn": "1f33d",
    "eggplant": "1f346",
    "avocado": "1f951",
    "broccoli": "1f966",
    "mushroom": "1f344",
    "pizza": "1f355",
    "hamburger": "1f354",
    "pretzel": "1f968",
    "cheese": "1f9c0",
    "cookie": "1f36a",
    "donut": "1f369",
    "popcorn": "1f37f",
    "taco": "1f32e",
    "frog": "1f438",
    "panda": "1f43c",
    "fox": "1f98a",
    "octopus": "1f419",
    "crab": "1f980",
    "snail": "1f40c",
    "turtle": "1f422",
    "snake": "1f40d",
    "whale": "1f433",
    "butterfly": "1f98b",
    "bee": "1f41d",
    "ladybug": "1f41e",
    "penguin": "1f427",
    "owl": "1f989",
    "cactus": "1f335",
    "rose": "1f339",
    "tulip": "1f337",
    "sunflower": "1f33b",
    "maple leaf": "1f341",
    "fire": "1f525",
    "rainbow": "1f308",
    "soccer ball": "26bd",
    "basketball": "1f3c0",
    "guitar": "1f3b8",
    "key": "1f511",
    "lock": "1f512",
    "bell": "1f514",
    "gift": "1f381",
    "balloon": "1f388",
    "candle": "1f56f-fe0f",
    "crown": "1f451",
    "scissors": "2702-fe0f",
    "hammer": "1f528",
    "anchor": "2693",
    "rocket": "1f680",
    "bicycle": "1f6b2",
    "house": "1f3e0",
    "light bulb": "1f4a1",
    "camera": "1f4f7",
    "television": "1f4fa",
    "pencil": "270f-fe0f",
    "skull": "1f480",
    "ghost": "1f47b",
}


def read_images(archive: Path, vendor: str) -> dict[str, Image.Image]:
    """The vendor's 64 x 64 RGBA drawing of every name, from an archive whose bytes are checked."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256[vendor]:
        raise ValueError(f"{archive} has sha256 {found}, expected {SHA256[vendor]}; give version 16.0.0 of the package")
    wanted = {f"package/img/{vendor}/64/{code}.png": name for name, code in NAMES.items()}
    images = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in wanted:
                image = Image.open(io.BytesIO(tar.extractfile(member).read()))
                images[wanted[member.name]] = image.convert("RGBA")
    return images


def vary(image: Image.Image, rng: random.Random) -> Image.Image:
    """A moved, turned, stretched, perhaps mirrored and recoloured copy of an RGBA image, of the same size."""
    angle = math.radians(rng.uniform(-15, 15))
    scale = rng.uniform(0.8, 1.1)
    scale_x, scale_y = scale * rng.uniform(0.9, 1.1), scale * rng.uniform(0.9, 1.1)
    cos, sin = math.cos(angle), math.sin(angle)
    # The inverse map, output pixel to input pixel, that turns around the (moved) centre.
    a, b, d, e = cos / scale_x, sin / scale_x, -sin / scale_y, cos / scale_y
    centre_x, centre_y = image.width / 2, image.height / 2
    to_x, to_y = centre_x + rng.uniform(-5, 5), centre_y + rng.uniform(-5, 5)
    matrix = (a, b, centre_x - a * to_x - b * to_y, d, e, centre_y - d * to_x - e * to_y)
    # Premultiplied alpha keeps the colour of transparent pixels out of the edges.
    moved = image.convert("RGBa").transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    moved = moved.convert("RGBA")
    if rng.random() < 0.5:
        moved = moved.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    alpha = moved.getchannel("A")
    colours = ImageEnhance.Contrast(moved.convert("RGB")).enhance(rng.uniform(0.75, 1.2))
    gain, shift = rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
    channels = []
    for channel in colours.split():
        slope = gain * rng.uniform(0.88, 1.12)
        channels.append(channel.point([min(255, max(0, round(value * slope + shift))) for value in range(256)]))
    return Image.merge("RGBA", (*channels, alpha))


def encode(image: Image.Image) -> bytes:
    """The WebP bytes of an RGBA image on white, IMAGE_SIZE pixels wide and high."""
    flat = Image.new("RGBA", image.size, "white")
    flat.alpha_composite(image)
    small = flat.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, format="WEBP", quality=85, method=6)
    return content.getvalue()


def row(name: str, path: str, image: Image.Image) -> dict:
    """One question about one image; `path` says which drawing it is."""
    question = [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": name}]},
        ],
        "images": [{"bytes": encode(image), "path": path}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("google", type=Path, help="emoji-datasource-google-16.0.0.tgz")
    parser.add_argument("twitter", type=Path, help="emoji-datasource-twitter-16.0.0.tgz")
    default = Path(__file__).parent.parent / "recipes" / "data" / "vlm"
    parser.add_argument("--output", type=Path, default=default, help="folder (default: %(default)s)")
    arguments = parser.parse_args()

    rng = random.Random(0)
    noto = read_images(arguments.google, "google")
    twemoji = read_images(arguments.twitter, "twitter")
    train = [
        row(name, f"noto/{NAMES[name]}.{copy}.webp", vary(noto[name], rng) if copy else noto[name])
        for copy in range(COPIES)
        for name in NAMES
    ]
    validation = [row(name, f"twemoji/{NAMES[name]}.webp", twemoji[name]) for name in NAMES]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for file, rows in (("train", train), ("validation", validation)):
        pq.write_table(pa.Table.from_pylist(rows), arguments.output / f"{file}.parquet", compression="zstd")
        print(f"{file}: {len(rows)} rows, {(arguments.output / f'{file}.parquet').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
