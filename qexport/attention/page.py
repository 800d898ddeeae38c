"""Attention maps as one HTML page that needs nothing else: no network, no other file.

A map goes into the page as two gray PNG images, one byte per cell: square roots of the probabilities in the classical model,
and signed square roots of the difference. The page colours them; what it says of a cell has about two digits.
"""

import base64
import json
import struct
import zlib
from importlib import resources

import numpy as np

from qexport.attention.maps import MEASURES, SHARES, AttentionMaps, SiteMap, largest_in_blocks, site_labels

# Cells of all maps of a page. Larger maps are drawn in blocks of cells, each with its largest entry.
MOST_CELLS = 6_000_000


def page(maps: AttentionMaps) -> str:
    """The HTML document."""
    block = _block(maps)
    data = {
        "bundle": maps.bundle,
        "source": maps.data["source"],
        "seed": maps.seed,
        "notes": maps.data["notes"] + maps.notes,
        "block": block,
        "measures": [{"key": key, "title": title, "share": key in SHARES} for key, title in MEASURES.items()],
        "items": [_item(item, block) for item in maps.items],
    }
    # "<" would let a token end the script that holds it
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return resources.files("qexport.attention").joinpath("page.html").read_text("utf-8").replace("{{DATA}}", text)


def _block(maps: AttentionMaps) -> int:
    """The least side of the blocks with which all maps have at most MOST_CELLS."""
    shapes = [site.classical.shape for item in maps.items for site in item]
    block = 1
    while sum(heads * -(-q // block) * -(-k // block) for heads, q, k in shapes) > MOST_CELLS:
        block += 1
    return block


def _item(item: list[SiteMap], block: int) -> dict:
    sites = []
    for site, label in zip(item, site_labels(item), strict=True):
        signed = np.sqrt(np.abs(site.difference) / (site.top_difference or 1.0)) * np.sign(site.difference)
        sites.append(
            {
                **{key: getattr(site, key) for key in ("name", "layer", "module", "strategy", "heads", "queries", "keys")},
                "label": label,
                "top": site.top,
                "top_difference": site.top_difference,
                "measures": {key: [_number(x) for x in values] for key, values in site.measures().items()},
                "classical": [_image(255 * np.sqrt(head / site.top), block) for head in site.classical],
                "difference": [_image(127 * head, block, 128) for head in signed],
            }
        )
    words = " ".join(item[0].queries)
    title = words if len(words) <= 60 else words[:59] + "…"
    return {"title": title, "sites": sites}


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _image(values: np.ndarray, block: int, zero: int = 0) -> str:
    """A matrix as a PNG image in base64: gray, 8 bits, in blocks of block x block cells."""
    pixels = np.rint(largest_in_blocks(values, block, block) + zero).clip(0, 255).astype(np.uint8)
    rows, columns = pixels.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels], axis=1)  # each line begins with its filter, none
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()
