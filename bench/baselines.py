"""Other approximations in a real model: what Performer, Linformer, top-k and uniform sampling cost on tasks, beside ours.

    python -m bench.baselines [--tables sts_b reviews heads runs] [--threads 2] [--reviews 200] [--json FILE]

all-MiniLM-L6-v2 with one attention in the place of all six, nothing retrained. Ours are bundles of `qexport convert` in
onnxruntime; the others are torch functions that the torch model calls where it called scaled_dot_product_attention. So
errors compare across, and times compare with the classical model of the same runtime (`x_classical`). Texts of one length
share a batch, and the model takes token ids alone: without padding there is nothing to mask.

sts_b     Spearman x 100 on the STS-B test split, sentences of 14 tokens: no fewer keys than 32 leave anything to estimate
reviews   film reviews of 512 tokens: cosine with the classical embedding, and accuracy of a probe (as in `bench.imdb`)
heads     relative error of a head on the queries, keys and values of the classical model, 512 tokens of reviews
runs      time of a run at batch 1, and the memory that its first one needs beside the loaded model

Performer and Linformer are meant for training with them: random features and projections are all that a model has which was
not. Linformer mixes a fixed number of positions: its module is made for 512 here, and a shorter text is fed as if zeros
filled the rest (the package cuts the projections, which is the same). Each layer has its own draw.

With --json, tables that are not asked for stay as they are in the file: a task may be measured on a machine that has other
work, times may not.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

import qexport
from bench import common
from bench.activations import activations
from bench.imdb import compared, embed, right
from bench.minilm_error import texts
from bench.models import minilm
from bench.sts_b import correlation, embed_all, pairs, tokenizer
from qexport.memory.rss import extra_rss
from qexport.profiling.timing import interleaved
from qexport.recipe import defaults
from qexport.runtime import quiet_options
from qexport.scaling import baselines, nodes, reference

LAYERS, HEADS, SIZE, LONGEST = 6, 12, 32, 512
RANK = 256  # mixtures of Linformer, its package's default
LENGTHS = (16, 512)
ONNXRUNTIME, TORCH = "onnxruntime", "torch"
RECIPES = {"default": {}, "tree, 64 keys": {"strategy": "tree", "num_samples": [64]}} | {
    f"{strategy}, {keys} keys": {"strategy": strategy, "num_samples": [keys]}
    for strategy in ("stratified", "hybrid")
    for keys in (32, 8)
}
# name -> a function of (q, k, v) from the seed of a layer; None is the model as it is
FUNCTIONS: dict[str, Callable[[int], Callable] | None] = {
    "classical": None,
    "Performer": lambda seed: baselines.performer(None, SIZE, False, seed),
    f"Linformer, {RANK} mixtures": lambda seed: baselines.linformer(RANK, LONGEST, HEADS, SIZE, seed),
    "top-k, 32 keys": lambda seed: baselines.top_k(32, False),
    "top-k, 32 keys and mean V": lambda seed: baselines.top_k(32, True),
    "top-k, 8 keys": lambda seed: baselines.top_k(8, False),
    "uniform, 32 keys": lambda seed: baselines.uniform(32, seed),
    "uniform, 8 keys": lambda seed: baselines.uniform(8, seed),
}
DRAWING = ("stratified", "Performer", "Linformer", "uniform")


@dataclass(frozen=True)
class Contender:
    """A model with one attention. `open()` gives a fresh session, or what looks like one."""

    name: str
    runtime: str
    open: Callable

    @property
    def draws(self) -> bool:
        return self.name.startswith(DRAWING)

    def seeds(self, count: int) -> list[int | None]:
        """As many seeds where it draws, else none."""
        return list(range(count)) if self.draws else [None]

    def row(self) -> dict:
        return {"attention": self.name, "runtime": self.runtime}


class TorchSession:
    """MiniLM in torch with the attention that `make(seed of the layer)` gives, in the form of an onnxruntime session."""

    def __init__(self, make, threads: int):
        self._model, self._threads = _torch_minilm(), threads
        self._functions = cache(lambda seed: [make(LAYERS * seed + layer) for layer in range(LAYERS)]) if make else None

    def get_inputs(self) -> list:
        return [SimpleNamespace(name="input_ids")]

    def run(self, outputs, feeds: dict) -> list[np.ndarray]:
        """The hidden states of texts without padding; a feed `seed` chooses the draws."""
        import torch

        torch.set_num_threads(self._threads)
        ids = torch.from_numpy(feeds["input_ids"])
        with torch.inference_mode():
            if self._functions is None:
                return [self._model(ids).numpy()]
            layers = iter(self._functions(int(feeds.get("seed", 0))))
            patch = mock.patch(
                "torch.nn.functional.scaled_dot_product_attention", lambda q, k, v, *_, **__: next(layers)(q, k, v)
            )
            with patch:
                hidden = self._model(ids).numpy()
        if next(layers, None) is not None:
            raise ValueError("the model did not call scaled_dot_product_attention in every layer")
        return [hidden]


@cache
def _torch_minilm():
    return unpadded()[0]


def unpadded():
    """MiniLM on token ids alone, for `qexport convert bench.baselines:unpadded`."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            # past the model's own forward, which makes a mask of all pairs for an export, with nothing to mask
            return self.model.encoder(self.model.embeddings(input_ids=input_ids)).last_hidden_state

    module, (ids, _), (axes, _) = minilm()
    return Encoder(module.model).eval(), (ids,), (axes,)


def contenders(folder: Path, threads: int) -> list[Contender]:
    """All of them; the model is converted to `folder`."""

    def opened(path: Path):
        options = quiet_options(threads)
        # the idle threads of one model would take the cores from the other
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return qexport.session(path, options=options)

    bundle = folder / "bundle"
    qexport.convert("bench.baselines:unpadded", bundle)
    files = {"classical": bundle / "classical.onnx"}
    for name, recipe in RECIPES.items():
        files[name] = common.with_attributes(
            bundle / "model.onnx", bundle / f"{len(files)}.onnx", **defaults(recipe), **recipe
        )
    found = [Contender(name, ONNXRUNTIME, partial(opened, file)) for name, file in files.items()]
    return found + [Contender(name, TORCH, partial(TorchSession, make, threads)) for name, make in FUNCTIONS.items()]


def sts_b(found: list[Contender], draws: int, limit: int | None = None) -> list[dict]:
    """`loss_percent` is relative to the classical model in onnxruntime; mean over the seeds of those that draw."""
    first, second, scores = (part[:limit] for part in pairs("test"))
    sequences = [encoding.ids for encoding in tokenizer().encode_batch(first + second)]
    rows, classical, best = [], None, None
    for contender in found:
        session = contender.open()
        embeddings = [embed_all(session, sequences, seed) for seed in contender.seeds(draws)]
        values = [correlation(one, scores) for one in embeddings]
        if classical is None:
            classical, best = embeddings[0], values[0]
        mean, half = common.mean_interval(values)
        row = contender.row() | {"spearman_x100": mean, "ci95": half if len(values) > 1 else None}
        row |= {"loss_percent": 100 * (best - mean) / best}
        rows.append(row | {"cosine": float(np.mean([(one * classical).sum(1).mean() for one in embeddings]))})
    return rows


def reviews(found: list[Contender], count: int) -> list[dict]:
    """Texts of 512 tokens, one draw."""
    ids, positive = texts(count, LONGEST)
    rows, classical, known = [], None, None
    for contender in found:
        embeddings = embed(contender.open(), ids, contender.seeds(1)[0])
        judged = right(embeddings, positive)
        if classical is None:
            classical, known = embeddings, judged
        rows.append(contender.row() | {"cosine": float((embeddings * classical).sum(1).mean())} | compared(judged, known))
    return rows


def heads(threads: int) -> list[dict]:
    """Mean and worst of the 72 heads."""
    q, k, v = activations(f"minilm-{LONGEST}")
    places = np.arange(LONGEST)
    expected = reference.attention(q, k, v, places, False)
    calls = {}
    for name, recipe in RECIPES.items():
        calls[name, ONNXRUNTIME] = nodes.quantum(q, k, v, threads, **defaults(recipe), **recipe)
    for name, make in FUNCTIONS.items():
        if make is not None:
            calls[name, TORCH] = nodes.torch_call(make(0), q, k, v, threads)
    rows = []
    for (name, runtime), contender in calls.items():
        contender.call()
        errors = reference.head_errors(contender.output(), expected)
        rows.append({"attention": name, "runtime": runtime, "mean": float(errors.mean()), "worst": float(errors.max())})
    return rows


def runs(found: list[Contender], seconds: float) -> list[dict]:
    """Median time of a run; `x_classical`: how many times as long the classical model of the same runtime takes."""
    rows = []
    for n in LENGTHS:
        ids = np.random.default_rng(n).integers(1000, 20000, (1, n))
        calls = {}
        for contender in found:
            calls[contender] = partial(contender.open().run, None, {"input_ids": ids})
        times = interleaved(calls, 5, seconds, warmup=2)
        classical = {c.runtime: times[c] for c in found if c.name == "classical"}
        for contender, ms in times.items():
            low, median, high = (float(x) for x in np.percentile(ms, [25, 50, 75]))
            row = contender.row() | {"n": n, "ms": median, "ms_p25": low, "ms_p75": high}
            row |= common.ratio("x_classical", classical[contender.runtime], ms)
            rows.append(row | {"memory_mb": _memory(contender, calls[contender])})
    return rows


def _memory(contender: Contender, warm: Callable) -> float | None:
    """MB that the first run of a fresh model needs; the run before it has loaded the code."""
    warm()
    run = partial(contender.open().run, *warm.args)
    extra = extra_rss(run)
    return None if extra is None else extra / 1e6


TABLES = ("sts_b", "reviews", "heads", "runs")


def measured(names, threads: int, draws: int, count: int, seconds: float) -> dict[str, list[dict]]:
    """The tables `names`."""
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(Path(folder), threads)
        makers = {
            "sts_b": lambda: sts_b(found, draws),
            "reviews": lambda: reviews(found, count),
            "heads": lambda: heads(threads),
            "runs": lambda: runs(found, seconds),
        }
        return {name: makers[name]() for name in TABLES if name in names}


def kept(file: str | None, parameters: dict) -> dict[str, list[dict]]:
    """The tables that are in the file already, if they were measured with the same parameters."""
    if not file or not Path(file).is_file():
        return {}
    before = json.loads(Path(file).read_text())
    return {name: before[name] for name in TABLES if name in before and before["parameters"] == parameters}


def main():
    parser = common.parser(__doc__.split("\n")[0], seeds=3, reviews=200, seconds=20.0)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    arguments = parser.parse_args()
    parameters = {"seeds": arguments.seeds, "reviews": arguments.reviews, "threads": arguments.threads}
    parameters |= {"linformer_rank": RANK, "tokens": LONGEST}
    new = measured(arguments.tables, arguments.threads, arguments.seeds, arguments.reviews, arguments.seconds)
    tables = kept(arguments.json, parameters) | new
    ordered = {name: tables[name] for name in TABLES if name in tables}
    common.report("baselines", arguments.threads, parameters, ordered, arguments.json)


if __name__ == "__main__":
    main()
