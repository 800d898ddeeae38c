"""Models that give real queries, keys and values on a machine with torch alone: their first layers, from one small file."""

import io
import json
import lzma
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import embedding, gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention, silu

PATCH = 14


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
            ValueError: the input in the file is shorter.
        """
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


def _ids(model: Activations, n: int, weight) -> torch.Tensor:
    ids = weight("ids")
    if n > len(ids):
        raise ValueError(f"n must be at most {len(ids)}, the tokens of {model.name} in the file, got {n}")
    return ids[None, :n]


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
    x = embedding(_ids(model, n, weight), weight("embeddings.word_embeddings.weight"))
    x = normed(x + positions[:n] + weight("embeddings.token_type_embeddings.weight")[0], "embeddings.LayerNorm")
    for layer in range(model.settings["layers"]):
        at = f"encoder.layer.{layer}"
        qkv = [dense(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value")]
        taken.append(tuple(qkv))
        if layer == model.settings["layers"] - 1:
            break
        y = _merged(scaled_dot_product_attention(*(_heads(tensor, model.heads) for tensor in qkv)))
        x = normed(dense(y, f"{at}.attention.output.dense") + x, f"{at}.attention.output.LayerNorm")
        y = dense(gelu(dense(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        x = normed(y + x, f"{at}.output.LayerNorm")
    return taken


def _llama(model: Activations, n: int, weight) -> list:
    """A Llama of transformers; positions beyond `positions` of the settings are squeezed into them."""
    settings, taken = model.settings, []
    x = embedding(_ids(model, n, weight), weight("embed_tokens.weight"))
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
        if layer == settings["layers"] - 1:
            break
        grouped = model.heads != model.kv_heads
        y = scaled_dot_product_attention(q, k, _heads(v, model.kv_heads), is_causal=True, enable_gqa=grouped)
        x = x + linear(_merged(y), weight(f"{at}.self_attn.o_proj.weight"))
        y = normed(x, f"{at}.post_attention_layernorm")
        y = silu(linear(y, weight(f"{at}.mlp.gate_proj.weight"))) * linear(y, weight(f"{at}.mlp.up_proj.weight"))
        x = x + linear(y, weight(f"{at}.mlp.down_proj.weight"))
    return taken


def grid(n: int) -> tuple[int, int]:
    """Rows and columns of n - 1 patches, as square as their number allows."""
    rows = next(r for r in range(math.isqrt(n - 1), 0, -1) if (n - 1) % r == 0)
    return rows, (n - 1) // rows


def _vit(model: Activations, n: int, weight) -> list:
    """A Dinov2Model of transformers on the upper left of an image."""
    from PIL import Image

    rows, columns = grid(n)
    pixels = np.asarray(Image.open(io.BytesIO(model.weights["image"].tobytes())), np.float32) / 255
    pixels = (pixels - model.settings["mean"]) / model.settings["std"]
    if pixels.shape[0] < PATCH * rows or pixels.shape[1] < PATCH * columns:
        raise ValueError(f"n = {n} is {rows} x {columns} patches, more than the image in the file has")
    taken = []

    def normed(x, name):
        return layer_norm(x, x.shape[-1:], weight(f"{name}.weight"), weight(f"{name}.bias"), model.settings["eps"])

    def dense(x, name):
        return linear(x, weight(f"{name}.weight"), weight(f"{name}.bias"))

    kernel = weight("patch.weight")
    image = torch.from_numpy(pixels[: PATCH * rows, : PATCH * columns].transpose(2, 0, 1)[None].copy()).to(kernel)
    patches = torch.nn.functional.conv2d(image, kernel, weight("patch.bias"), stride=PATCH).flatten(2).transpose(1, 2)
    table = weight("positions").float()  # (1, size, rows, columns)
    table = torch.nn.functional.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
    places = table.to(kernel.dtype).flatten(2).transpose(1, 2)
    x = torch.cat([(weight("cls") + weight("cls_position"))[None, None], patches + places], 1)
    for layer in range(model.settings["layers"]):
        at = f"layer.{layer}"
        y = normed(x, f"{at}.norm1")
        qkv = [dense(y, f"{at}.{name}") for name in ("query", "key", "value")]
        taken.append(tuple(qkv))
        if layer == model.settings["layers"] - 1:
            break
        y = _merged(scaled_dot_product_attention(*(_heads(tensor, model.heads) for tensor in qkv)))
        x = x + weight(f"{at}.scale1") * dense(y, f"{at}.output")
        y = dense(gelu(dense(normed(x, f"{at}.norm2"), f"{at}.fc1")), f"{at}.fc2")
        x = x + weight(f"{at}.scale2") * y
    return taken


_MODELS = {"minilm": _bert, "vit": _vit, "stories": _llama}
