"""Activations of trained models at 16k and 64k tokens, from a small file: weights in 8 bits and what the models read.

    python -m bench.cuda.activations -o FILE [--layers 3]

The file serves a machine that has neither the models nor a network: it holds the first layers of each model and its input,
and `Activations.layers` runs them there, in torch, on the device.

minilm    all-MiniLM-L6-v2 on film reviews, one after the other; embeddings of the vocabulary that occurs, positions beyond 512
          interpolated linearly
stories   stories15M on the same, causal; rotary angles divided by n / 256

Weights are rounded to 8 bits with a scale for each output (`--check` tells what that does to queries, keys and values).
Stretched positions make neighbours look more alike than in a model that was trained at that length: errors are optimistic.
"""

import argparse
import io
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import embedding, gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention, silu

LONGEST = 65536


@dataclass(frozen=True)
class Activations:
    """A model's first layers and its input.

    Attributes:
        name, causal, heads, kv_heads: of the model's attention.
        settings: what else it needs to run.
        weights: int8 with `NAME.scale` for each row, or float16.
    """

    name: str
    causal: bool
    heads: int
    kv_heads: int
    settings: dict
    weights: dict[str, np.ndarray]

    def layers(self, n: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(q, k, v) of each layer on the first `n` tokens, (1, n, heads * size); float16, on the CPU float32.

        Raises:
            ValueError: the file has fewer tokens.
        """
        longest = self.weights["ids"].shape[0]
        if n > longest:
            raise ValueError(f"n must be at most {longest}, the tokens of {self.name} in the file, got {n}")
        dtype = torch.float16 if device == "cuda" else torch.float32
        with torch.inference_mode():
            return _MODELS[self.name](self, n, lambda name: self._tensor(name, device, dtype))

    def _tensor(self, name: str, device: str, dtype) -> torch.Tensor:
        tensor = torch.from_numpy(self.weights[name]).to(device)
        if tensor.dtype.is_floating_point:
            return tensor.to(dtype)
        if tensor.dtype != torch.int8:
            return tensor.long()
        scale = torch.from_numpy(self.weights[f"{name}.scale"]).to(device)
        return (tensor.float() * scale.float()[:, None]).to(dtype)


def load(file: Path) -> list[Activations]:
    """What `save` wrote."""
    with lzma.open(file) as stream, np.load(io.BytesIO(stream.read())) as arrays:
        found = []
        for settings in json.loads(str(arrays["models"])):
            prefix = f"{settings['name']}/"
            weights = {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}
            found.append(Activations(**settings, weights=weights))
        return found


def save(models: list[Activations], file: Path) -> None:
    """Write models to one file, compressed."""
    settings = [{key: value for key, value in vars(model).items() if key != "weights"} for model in models]
    arrays = {f"{model.name}/{key}": value for model in models for key, value in model.weights.items()}
    stream = io.BytesIO()
    np.savez(stream, models=json.dumps(settings), **arrays)
    file.write_bytes(lzma.compress(stream.getvalue()))


def packed(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Matrices as int8 with a scale for each row, everything else in float16."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            scale = (tensor.abs().amax(1) / 127).clamp(min=2**-20).half()
            found[name] = (tensor / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).numpy()
            found[f"{name}.scale"] = scale.numpy()
        else:
            found[name] = tensor.half().numpy()
    return found


def _heads(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor.unflatten(-1, (count, -1)).transpose(1, 2)


def _merged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).flatten(2)


def _bert(model: Activations, n: int, weight) -> list:
    """A BERT of transformers, all tokens of one segment and none masked."""
    eps, taken = model.settings["eps"], []

    def normed(x, name):
        return layer_norm(x, x.shape[-1:], weight(f"{name}.weight"), weight(f"{name}.bias"), eps)

    def dense(x, name):
        return linear(x, weight(f"{name}.weight"), weight(f"{name}.bias"))

    positions = weight("embeddings.position_embeddings.weight")
    if n > len(positions):
        positions = torch.nn.functional.interpolate(positions.T[None], size=n, mode="linear", align_corners=True)[0].T
    x = embedding(weight("ids")[:n], weight("embeddings.word_embeddings.weight"))[None]
    x = normed(x + positions[:n] + weight("embeddings.token_type_embeddings.weight")[0], "embeddings.LayerNorm")
    for layer in range(model.settings["layers"]):
        at = f"encoder.layer.{layer}"
        qkv = [dense(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value")]
        taken.append(tuple(qkv))
        y = _merged(scaled_dot_product_attention(*(_heads(tensor, model.heads) for tensor in qkv)))
        x = normed(dense(y, f"{at}.attention.output.dense") + x, f"{at}.attention.output.LayerNorm")
        y = dense(gelu(dense(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        x = normed(y + x, f"{at}.output.LayerNorm")
    return taken


def _llama(model: Activations, n: int, weight) -> list:
    """A Llama of transformers; positions beyond `positions` of the settings are squeezed into them."""
    settings, taken = model.settings, []
    x = embedding(weight("ids")[:n], weight("embed_tokens.weight"))[None]
    size = settings["head_size"]
    rates = settings["theta"] ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    squeezed = torch.arange(n, device=x.device, dtype=torch.float32) / max(1.0, n / settings["positions"])
    angles = torch.outer(squeezed, torch.cat([rates, rates]))
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def turned(tensor):
        first, second = tensor.chunk(2, -1)
        return tensor * cos + torch.cat([-second, first], -1) * sin

    def normed(x, name):
        return rms_norm(x, x.shape[-1:], weight(f"{name}.weight"), settings["eps"])

    for layer in range(settings["layers"]):
        at = f"layers.{layer}"
        y = normed(x, f"{at}.input_layernorm")
        q, k, v = (linear(y, weight(f"{at}.self_attn.{name}_proj.weight")) for name in "qkv")
        q, k = (turned(_heads(tensor, count)) for tensor, count in ((q, model.heads), (k, model.kv_heads)))
        taken.append((_merged(q).contiguous(), _merged(k).contiguous(), v))
        grouped = model.heads != model.kv_heads
        y = scaled_dot_product_attention(q, k, _heads(v, model.kv_heads), is_causal=True, enable_gqa=grouped)
        x = x + linear(_merged(y), weight(f"{at}.self_attn.o_proj.weight"))
        y = normed(x, f"{at}.post_attention_layernorm")
        y = silu(linear(y, weight(f"{at}.mlp.gate_proj.weight"))) * linear(y, weight(f"{at}.mlp.up_proj.weight"))
        x = x + linear(y, weight(f"{at}.mlp.down_proj.weight"))
    return taken


_MODELS = {"minilm": _bert, "stories": _llama}


def _used(ids: np.ndarray, table: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Token ids counted over those that occur, and their rows of the table of embeddings."""
    used, places = np.unique(ids, return_inverse=True)
    return places.astype(np.int32), table[torch.from_numpy(used)]


def _of_layers(state: dict, prefix: str, layers: int) -> dict:
    """The tensors of the first layers, and all that belong to no layer."""

    def kept(name):
        number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else "0"
        return int(number) < layers

    return {name: tensor for name, tensor in state.items() if kept(name)}


def minilm(layers: int, n: int = LONGEST) -> Activations:
    from bench import activations, models

    bert = models.minilm()[0].model
    state = _of_layers({name: tensor.detach() for name, tensor in bert.named_parameters()}, "encoder.layer.", layers)
    name = "embeddings.word_embeddings.weight"
    ids, state[name] = _used(activations.minilm_tokens(n), state[name])
    settings = {"layers": layers, "eps": bert.config.layer_norm_eps}
    heads = bert.config.num_attention_heads
    return Activations("minilm", False, heads, heads, settings, packed(state) | {"ids": ids})


def stories(layers: int, n: int = LONGEST) -> Activations:
    from bench import activations, models

    llama = models.stories15m_llama().model
    state = _of_layers({name: tensor.detach() for name, tensor in llama.named_parameters()}, "layers.", layers)
    del state["norm.weight"]
    ids, state["embed_tokens.weight"] = _used(activations.stories_tokens(n), state["embed_tokens.weight"])
    config = llama.config
    heads = config.num_attention_heads
    settings = {"layers": layers, "eps": config.rms_norm_eps, "head_size": config.hidden_size // heads, "theta": 10000.0}
    settings["positions"] = config.max_position_embeddings
    return Activations("stories", True, heads, config.num_key_value_heads, settings, packed(state) | {"ids": ids})


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m bench.cuda.activations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--layers", type=int, default=3, help="of each model")
    arguments = parser.parse_args(argv)
    save([minilm(arguments.layers), stories(arguments.layers)], arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
