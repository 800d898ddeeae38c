"""Generating token by token: what keeping the past costs, by how it is kept.

    python -m bench.kv_cache [--threads 1] [--new-tokens 200] [--json FILE]

`story`: stories15M's greedy text behind a prompt of 5 tokens, in tokens per second. `steps`: one step of a Llama of the same
sizes with random weights (speed does not depend on them) behind a past of so many tokens, in milliseconds. All have the same
weights, and those of `story` must say the same text:

    in place       the bundle with the op library, strategy exact: caches that are appended in place
    tree           the same with strategy tree and 512 keys per query, which reads summaries of the caches (`steps` alone)
    fallback       the same file without the op library: onnxruntime's Attention over the whole buffer
    joined         the classical form before: Attention of onnxruntime with past_key and past_value, which returns past and
                   new keys joined; inputs and outputs bound, so that this is the only copy
    without        no past: the whole text in every step
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

import qexport
from bench import common
from bench.models import stories15m_folder
from qexport.bundle import Bundle
from qexport.installed import onnxruntime
from qexport.runtime import quiet_options

PROMPT = [1, 9038, 2501, 263, 931]
PASTS = (256, 2048, 8192, 16000)
LONG = 16384


def joined(classical: Path, path: Path) -> Path:
    """The classical model of a bundle with caches that grow: Attention joins past and new keys itself."""
    model = onnx.load(classical)
    graph = model.graph
    scatters = {node.output[0]: node for node in graph.node if node.op_type == "TensorScatter"}
    for node in graph.node:
        if node.op_type == "Attention":
            key, value = (scatters[name] for name in node.input[1:3])
            node.input[:] = [node.input[0], key.input[1], value.input[1], "", key.input[0], value.input[0]]
            node.output.extend([key.output[0], value.output[0]])
    for node in scatters.values():
        graph.node.remove(node)
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[2].dim_param = value.name.split(".")[0]
    onnx.save(model, path)
    return path


class Joined:
    """A session of a model with growing caches, stepped with outputs of one run as inputs of the next."""

    def __init__(self, bundle: Path, path: Path, threads: int):
        self.names = Bundle.open(bundle).manifest["kv_cache"]
        self.session = qexport.session(path, library=False, options=quiet_options(threads))
        self.shape = next(value.shape for value in self.session.get_inputs() if value.name == self.names["caches"][0][0])
        self.start(0)

    def start(self, past: int) -> None:
        rng, shape = np.random.default_rng(0), (1, self.shape[1], past, self.shape[3])
        caches = {name: rng.standard_normal(shape, np.float32) for name, _ in self.names["caches"]}
        self.past, self.caches = past, {name: _value(array) for name, array in caches.items()}

    def append(self, tokens) -> np.ndarray:
        """As `qexport.Generator.append`."""
        binding, ids = self.session.io_binding(), np.array(tokens)
        held = {"input_ids": _value(ids), "past_len": _value(np.array([self.past]))} | self.caches
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for name in (self.names["logits"], *(present for _, present in self.names["caches"])):
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        self.caches = {past: value for (past, _), value in zip(self.names["caches"], presents, strict=True)}
        self.past += ids.shape[1]
        return logits.numpy()[:, -1]


def _value(array):
    return onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


class Without:
    """The in-place model with nothing in its caches: the whole text in every step."""

    def __init__(self, generator):
        self.generator, self.text = generator, []

    def append(self, tokens) -> np.ndarray:
        """As `qexport.Generator.append`."""
        self.text += tokens[0]
        self.generator.reset()
        return self.generator.append([self.text])


def tell(model, count: int) -> tuple[list[int], float]:
    """The greedy text behind the prompt, and the tokens per second after the first."""
    tokens = [int(model.append([PROMPT])[0].argmax())]
    began = time.perf_counter()
    while len(tokens) < count:
        tokens.append(int(model.append([tokens[-1:]])[0].argmax()))
    return tokens, (count - 1) / (time.perf_counter() - began)


def generators(bundle: Path, threads: int) -> dict:
    return {
        "in place": qexport.Generator(bundle, options=quiet_options(threads)),
        "fallback": qexport.Generator(bundle, library=False, options=quiet_options(threads)),
    }


def story_table(folder: Path, threads: int, count: int, rounds: int) -> list[dict]:
    bundle = folder / "stories"
    qexport.convert(stories15m_folder(folder / "stories15m"), bundle, kv_cache=256, strategy="exact")
    models = generators(bundle, threads)
    grown = joined(bundle / "classical.onnx", folder / "joined.onnx")
    speeds, texts = {}, []
    for _ in range(rounds):
        for name in ("in place", "fallback", "joined", "without"):
            if name in models:
                models[name].reset()
            fresh = {"joined": lambda: Joined(bundle, grown, threads), "without": lambda: Without(models["in place"])}
            text, speed = tell(fresh[name]() if name in fresh else models[name], count)
            texts.append(text)
            speeds.setdefault(name, []).append(speed)
    if any(text != texts[0] for text in texts):
        raise ValueError("the models do not say the same text")
    return [{"past": name, "tokens_per_s": round(statistics.median(found), 1)} for name, found in speeds.items()]


def step_table(folder: Path, threads: int, rounds: int) -> list[dict]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32000, max_position_embeddings=LONG)).save_pretrained(folder / "long")
    qexport.convert(folder / "long", folder / "long_bundle", kv_cache=LONG, strategy="exact")
    qexport.convert(folder / "long", folder / "tree_bundle", kv_cache=LONG, strategy="tree", num_samples=512)
    models = generators(folder / "long_bundle", threads)
    models["tree"] = qexport.Generator(folder / "tree_bundle", options=quiet_options(threads))
    rng = np.random.default_rng(0)
    for generator in models.values():
        for name, value in generator.caches.items():
            if not name.endswith("summary"):
                value.update_inplace(rng.standard_normal(value.shape(), np.float32))
    models["joined"] = Joined(
        folder / "long_bundle", joined(folder / "long_bundle" / "classical.onnx", folder / "long.onnx"), threads
    )
    rows = []
    for past in PASTS:
        times = {name: [] for name in models}
        for model in models.values():
            _skip(model, past)
            model.append([[5]])
        for _ in range(rounds):
            for name, model in models.items():
                began = time.perf_counter()
                model.append([[5]])
                times[name].append(1e3 * (time.perf_counter() - began))
        rows.append({"past": past} | {f"{name}_ms": round(statistics.median(found), 2) for name, found in times.items()})
    return rows


def _skip(model, past: int) -> None:
    """As if `past` tokens had been appended: the caches are full of noise."""
    if isinstance(model, Joined):
        model.start(past)
    else:
        model.past = np.array([past])


def main():
    arguments = common.parser(__doc__.split("\n")[0], new_tokens=200, rounds=3, step_rounds=20).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables = {
            "story": story_table(Path(folder), arguments.threads, arguments.new_tokens, arguments.rounds),
            "steps": step_table(Path(folder), arguments.threads, arguments.step_rounds),
        }
    parameters = {"new_tokens": arguments.new_tokens, "rounds": arguments.rounds, "step_rounds": arguments.step_rounds}
    common.report("kv_cache", arguments.threads, parameters, tables, arguments.json)


if __name__ == "__main__":
    main()
