"""A small but real bundle for tests: a two-layer encoder with fixed weights, classical and with QuantumAttention.

Unlike a converted model it is made in milliseconds without torch, and tests can plant errors in it.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qexport.bundle import MODEL, SAMPLES
from qexport.bundle_writer import write_bundle
from qexport.ops import DOMAIN, QUANTUM_ATTENTION
from qexport.ops.proto import function_proto, make_node
from qexport.ops.strategies import read_by
from qexport.recipe import SAMPLING

VOCAB, HEADS, HEAD_SIZE, LIMIT = 50, 2, 8, 64
WIDTH = HEADS * HEAD_SIZE


def site_output(layer: int) -> str:
    """Name of the value that attention `layer` writes, in both models."""
    return f"layer{layer}.attention.out"


def build_model(
    *,
    quantum: bool,
    layers: int = 2,
    attention: dict | None = None,
    per_layer: dict | None = None,
    sharp=3.0,
    hidden: int = WIDTH,
):
    """The encoder as an ONNX model.

    Args:
        quantum: QuantumAttention nodes with their fallback function and a seed input; else ai.onnx Attention.
        attention: attributes of every QuantumAttention node; `per_layer[i]` overrides them for layer i.
        sharp: standard deviation of the query and key weights, times sqrt(WIDTH); the larger, the more peaked the softmax.
        hidden: width of the feed-forward layers.
    """
    rng = np.random.default_rng(1)
    weights, nodes = [], []

    def weight(name, *shape, scale=1.0):
        array = (rng.standard_normal(shape) * scale / np.sqrt(shape[0])).astype(np.float32)
        weights.append(numpy_helper.from_array(array, name))
        return name

    def constant(name, array):
        weights.append(numpy_helper.from_array(array, name))
        return name

    def node(op, inputs, output, **attributes):
        nodes.append(helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes))
        return output

    constant("heads_shape", np.array([0, 0, HEADS, HEAD_SIZE]))
    constant("flat_shape", np.array([0, 0, WIDTH]))
    constant("key_axes", np.array([1, 2]))
    constant("query_axes", np.array([1, 3]))
    ones = constant("ones", np.ones(WIDTH, np.float32))
    # (batch, 1, query, key): padded keys are hidden from every query but the padded ones
    given = node("Cast", ["attention_mask"], "mask_bool", to=TensorProto.BOOL)
    padded = node("Not", [node("Unsqueeze", [given, "query_axes"], "mask_queries")], "padded_queries")
    mask = node("Or", [node("Unsqueeze", [given, "key_axes"], "mask_keys"), padded], "mask")
    x = node("Gather", [weight("embedding", VOCAB, WIDTH, scale=np.sqrt(VOCAB)), "input_ids"], "embedded")
    for i in range(layers):
        at = f"layer{i}"
        heads = []
        for which in "qkv":
            scale = 1.0 if which == "v" else sharp / 2
            flat = node("MatMul", [x, weight(f"{at}.{which}.weight", WIDTH, WIDTH, scale=scale)], f"{at}.{which}")
            split = node("Reshape", [flat, "heads_shape"], f"{at}.{which}.split")
            heads.append(node("Transpose", [split], f"{at}.{which}.heads", perm=[0, 2, 1, 3]))
        if quantum:
            chosen = {"num_samples": [4], "layer": i, **(attention or {}), **(per_layer or {}).get(i, {})}
            site = make_node(
                "QuantumAttention",
                [*heads, mask, "", "", "", "seed"],
                [site_output(i)],
                name=f"{at}.attention",
                **chosen,
            )
            entry = site.metadata_props.add()
            entry.key, entry.value = "qexport.module", f"encoder.{i}.attention"
            nodes.append(site)
        else:
            nodes.append(helper.make_node("Attention", [*heads, mask], [site_output(i)], name=f"{at}.attention"))
        joined = node("Transpose", [site_output(i)], f"{at}.joined", perm=[0, 2, 1, 3])
        flat = node("Reshape", [joined, "flat_shape"], f"{at}.flat")
        projected = node("MatMul", [flat, weight(f"{at}.o.weight", WIDTH, WIDTH)], f"{at}.projected")
        x = node("LayerNormalization", [node("Add", [x, projected], f"{at}.sum"), ones], f"{at}.norm", axis=-1)
        raised = node("Relu", [node("MatMul", [x, weight(f"{at}.up.weight", WIDTH, hidden)], f"{at}.up")], f"{at}.relu")
        x = node("Add", [x, node("MatMul", [raised, weight(f"{at}.down.weight", hidden, WIDTH)], f"{at}.down")], f"{at}.out")
    node("Identity", [x], "hidden")
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in _INPUTS]
    if quantum:
        ids.append(helper.make_tensor_value_info("seed", TensorProto.INT64, []))
        constant("seed", np.array(0))
    outputs = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "sequence", WIDTH])]
    graph = helper.make_graph(nodes, "encoder", ids, outputs, initializer=weights)
    opsets = [helper.make_opsetid("", 23)] + ([helper.make_opsetid(DOMAIN, 1)] if quantum else [])
    functions = [function_proto("QuantumAttention", 23)] if quantum else []
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10, producer_name="tests")


_INPUTS = ("input_ids", "attention_mask")


def manifest(layers: int = 2, **attention) -> dict:
    """The manifest of the encoder's bundle, without its files; `attention` as for `build_model`."""
    named = {"strategy": "stratified", "num_samples": [4]} | {k: v for k, v in attention.items() if k in SAMPLING}
    named = read_by(named["strategy"], named)
    sampling = {key: QUANTUM_ATTENTION.attribute(key).default for key in SAMPLING} | named
    return {
        "schema_version": 1,
        "qexport_version": "0",
        "source": {"kind": "onnx", "name": "tests"},
        "recipe": named,
        "opset": 23,
        "ir_version": 10,
        "min_onnxruntime": "1.23",
        "seed_input": "seed",
        "files": {},
        "sites": [
            {
                "name": f"layer{i}.attention",
                "layer": i,
                "module": f"encoder.{i}.attention",
                **sampling,
                "q_heads": HEADS,
                "kv_heads": HEADS,
                "head_size": HEAD_SIZE,
                "output": site_output(i),
            }
            for i in range(layers)
        ],
        "left_alone": [],
        "inputs": [
            {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"], "kind": "token_ids", "high": VOCAB},
            {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "sequence"], "kind": "mask", "high": 2},
        ],
        "limits": {"sequence": LIMIT},
        "versions": {},
        "metrics": {},
    }


def make_bundle(folder, *, layers: int = 2, plant=None, **model_options):
    """Write the bundle to `folder`.

    Args:
        plant: called with the converted ModelProto before it is saved, to break it.
        model_options: `attention`, `per_layer`, `sharp` and `hidden` of `build_model`.
    """
    common = {name: model_options[name] for name in ("sharp", "hidden") if name in model_options}
    attention = model_options.get("attention") or {}
    classical = build_model(quantum=False, layers=layers, **common)
    model = build_model(quantum=True, layers=layers, **model_options)
    if plant:
        plant(model)
    with write_bundle(folder) as writer:
        onnx.save(classical, writer.path / "classical.onnx")
        onnx.save(model, writer.path / MODEL)
        _write_samples(writer.path)
        writer.manifest = manifest(layers, **attention)
    return folder


# What `make_text_bundle` makes of a text; some of these words would break a page or a picture.
TEXT = "the cat sat </script><b> $x_1$ 日本"
TOKENS = ["[CLS]", "the", "cat", "sat", "</script><b>", "$x_1$", "日本", "[SEP]"]


def make_text_bundle(folder, **options):
    """The bundle with a tokenizer of the words of TEXT; `options` as for `make_bundle`."""
    import tokenizers

    make_bundle(folder, **options)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *TOKENS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[(word, words[word]) for word in ("[CLS]", "[SEP]")]
    )
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def _write_samples(path) -> None:
    import onnxruntime

    rng = np.random.default_rng(2)
    feed = {"input_ids": rng.integers(0, VOCAB, (2, 12)), "attention_mask": np.arange(12) < np.array([[12], [7]])}
    feed["attention_mask"] = feed["attention_mask"].astype(np.int64)
    session = onnxruntime.InferenceSession(str(path / "classical.onnx"), providers=["CPUExecutionProvider"])
    outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
    samples = path / SAMPLES
    samples.mkdir()
    for kind, arrays in (("input", feed), ("output", outputs)):
        for i, (name, array) in enumerate(arrays.items()):
            (samples / f"{kind}_{i}.pb").write_bytes(numpy_helper.from_array(array, name).SerializeToString())


def attribute(model: onnx.ModelProto, node_name: str, name: str):
    """The attribute `name` of the node `node_name`, for planting errors."""
    node = next(n for n in model.graph.node if n.name == node_name)
    return next(a for a in node.attribute if a.name == name)
