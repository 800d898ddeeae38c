"""A character-level GPT of 3.2 million parameters, trained here on WikiText-2: a language model to compress and convert.

    python -m bench.char_gpt --threads 2 [--json FILE]
    qexport convert bench.char_gpt:char_gpt -o DIR

Both train the model, for a quarter of an hour, when it is not in the user's cache yet. The first prints nats and perplexity
per character of the texts it was not trained on, cut into rows of the model's context: the first character of a row is
predicted from one, the last from 128. The architecture is GPT-2's (Radford et al. 2019) without biases: pre-norm blocks,
learned positions, a head that shares the embedding's weights.
"""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import platformdirs
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

from bench import common
from bench.data import wikitext
from qexport.errors import QexportError


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and how it is trained; a step reads `batch` windows, anywhere in the text."""

    vocabulary: int = 192  # 191 characters and "unknown", which is 0.02 % of the training text
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 256
    steps: int = 8000
    batch: int = 8
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0


CONFIG = Config()


class Block(nn.Module):
    """Causal attention and a feed-forward network, each added to its input: (batch, length, width) to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        )
        x = x + self.attended(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.feed_forward_norm(x))))


class CharGPT(nn.Module):
    """Ids (batch, length) int64 of at most `context` characters -> logits (batch, length, vocabulary) of the next ones."""

    def __init__(self, config: Config):
        super().__init__()
        self.characters = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        # Small weights, smaller still where 2 x layers outputs add up: at first the model guesses uniformly.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                added = name.endswith(("attended.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if added else 0.02)

    def forward(self, input_ids):
        x = self.characters(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return linear(self.norm(x), self.characters.weight)


def vocabulary(text: str, size: int) -> str:
    """The size - 1 most frequent characters of a text; the id of one is its place plus 1, id 0 is any other character."""
    return "".join(character for character, _ in Counter(text).most_common(size - 1))


def encode(text: str, characters: str) -> np.ndarray:
    """Ids (length,) int64 of the characters of a text by a `vocabulary`."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    ids = np.zeros(0x110000, dtype=np.int64)
    ids[[ord(c) for c in characters]] = np.arange(1, len(characters) + 1)
    return ids[points]


def windows(ids: np.ndarray, context: int) -> np.ndarray:
    """Ids cut into rows (count, context + 1) int64: inputs and, one place later, targets; an incomplete row is dropped.

    The last id of a row is the first of the next, so that every id but the first is a target once. QexportError when the
    text is not even one row.
    """
    count = (len(ids) - 1) // context
    if count < 1:
        raise QexportError(f"a text of {len(ids)} characters is less than one window of {context + 1}: take a longer text")
    return ids[: count * context + 1][np.arange(context + 1) + context * np.arange(count)[:, None]]


def train(config: Config, ids: np.ndarray) -> tuple[CharGPT, list[float]]:
    """A model trained on a text (length,) from its seed on, and the loss of every step in nats per character.

    AdamW with a linear warmup and a cosine to zero (Loshchilov and Hutter 2019); products are bfloat16, weights float32.
    """
    torch.manual_seed(config.seed)
    model = CharGPT(config)
    text = torch.from_numpy(ids)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)

    def rate(step):
        return min((step + 1) / config.warmup, (1 + math.cos(math.pi * step / config.steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    row = torch.arange(config.context + 1)
    losses = []
    for _ in range(config.steps):
        rows = text[torch.randint(len(text) - config.context, (config.batch, 1)) + row]
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), losses


def _loss(predict, rows, reduction="mean"):
    return cross_entropy(predict(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def nats_per_character(predict: Callable[[torch.Tensor], torch.Tensor], rows: np.ndarray, batch: int = 32) -> float:
    """Mean cross-entropy of the targets of rows (count, context + 1), as `windows` makes them.

    `predict`: ids (batch, context) to logits (batch, context, vocabulary), a model or a session wrapped in a function.
    """
    total = sum(_loss(predict, part, "sum").item() for part in torch.from_numpy(rows).split(batch))
    return total / rows[:, 1:].size


def trained(config: Config) -> tuple[CharGPT, str, float]:
    """The model trained on WikiText-2, the characters of its vocabulary, and the minutes that its training took.

    From the user's cache, where its file is named by a hash of the configuration; trained and stored first when it is not.
    """
    path = cached_file(config)
    if not path.is_file():
        start = time.perf_counter()
        text = wikitext("train")
        characters = vocabulary(text, config.vocabulary)
        model, _ = train(config, encode(text, characters))
        minutes = (time.perf_counter() - start) / 60
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename cannot leave half a file.
        scratch = path.with_suffix(f".{os.getpid()}")
        torch.save({"state": model.state_dict(), "characters": characters, "minutes": minutes}, scratch)
        scratch.replace(path)
    content = torch.load(path, weights_only=True)
    model = CharGPT(config)
    model.load_state_dict(content["state"])
    return model.eval(), content["characters"], content["minutes"]


def cached_file(config: Config) -> Path:
    """Where `trained` keeps the model of a configuration."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()
    return platformdirs.user_cache_path("qexport") / "trained" / f"char_gpt-{digest[:8]}.pt"


def text_windows(split: str, characters: str, context: int) -> np.ndarray:
    """The `windows` of the "train", "valid" or "test" text of WikiText-2, (count, context + 1) int64."""
    return windows(encode(wikitext(split), characters), context)


def char_gpt():
    """The trained model for `qexport convert`: ids (batch, sequence) of at most 128 characters -> logits of the next."""
    model, characters, _ = trained(CONFIG)
    ids = torch.from_numpy(text_windows("valid", characters, 64)[:2, :-1].copy())
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=CONFIG.context)}
    return model, (ids,), (axes,)


def main():
    arguments = common.parser(__doc__.split("\n")[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    model, characters, minutes = trained(CONFIG)
    rows = []
    for split in ("valid", "test"):
        part = text_windows(split, characters, CONFIG.context)
        nats = nats_per_character(model, part)
        rows.append({"text": split, "characters": part[:, 1:].size, "nats": nats, "perplexity": math.exp(nats)})
    count = sum(parameter.numel() for parameter in model.parameters())
    parameters = dataclasses.asdict(CONFIG) | {"parameters": count, "training_minutes": minutes}
    common.report("char_gpt", arguments.threads, parameters, {"per_character": rows}, arguments.json)


if __name__ == "__main__":
    main()
