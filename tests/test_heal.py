"""Healing: the torch module with compressed weights computes what the graph does with them, and distillation helps."""

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from qexport.compression.checkpoint import Checkpoint
from qexport.compression.distillation import rate
from qexport.compression.forms import Half, Method, Seen
from qexport.compression.heal import heal
from qexport.compression.layers import find_layers
from qexport.compression.lowrank import LowRank
from qexport.compression.quantize import Quantized
from qexport.errors import QexportError, UsageError
from qexport.metrics import COSINE, PERPLEXITY, Metric
from qexport.sources.opening import open_source

VOCAB, WIDTH, LENGTH = 96, 64, 12


class Model(nn.Module):
    """Weights as they occur: a tied table, a table of positions, a square Linear, a product with its matrix as it is."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(VOCAB, WIDTH)
        self.mixed, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 8)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) + self.places(input_ids.flip(-1))
        kept = attention_mask[..., None].to(x.dtype)
        x = x + (self.mixed(x) * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        return self.head((x + torch.relu(self.up(x)) @ self.down) / 8)


def model():
    torch.manual_seed(0)
    ids = torch.arange(2 * LENGTH).reshape(2, LENGTH)
    return Model(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def half_model():
    module, inputs = model()
    return module.half(), inputs


def detached_model():
    """A module that lets no gradient through."""
    module, inputs = model()
    module.forward = torch.no_grad()(module.forward)
    return module, inputs


def batches(count, masked=0, seed=0):
    """Feeds of 4 x LENGTH ids, the last `masked` positions padded."""
    rng = np.random.default_rng(seed)
    mask = np.ones((4, LENGTH), np.int64)
    mask[:, LENGTH - masked :] = 0
    return [{"input_ids": rng.integers(0, VOCAB, (4, LENGTH)), "attention_mask": mask} for _ in range(count)]


def metric_of(source, name=PERPLEXITY):
    return Metric(name, source.model.graph.outputs[0].name, ("batch", "sequence", VOCAB), "input_ids")


def compressed(layers, bits=4):
    """Codes for some layers, low-rank factors for others."""
    forms = {}
    for number, layer in enumerate(layers):
        seen = Seen(layer, np.eye(layer.matrix().shape[0]) if layer.products else np.ones(layer.shape[0]))
        forms[layer.name] = seen.make(Method(*(("int", bits, 32) if number % 2 else ("low-rank", bits, 32, 32))))
    assert {type(form) for form in forms.values()} == {Quantized, LowRank}
    return forms


@pytest.fixture(scope="module")
def source():
    return open_source("test_heal:model")


@pytest.fixture(scope="module")
def layers(source):
    found = find_layers(source.model)
    assert len(found) == 6  # the tied table is stored for either use
    return found


def logits_of(source, layers, feed, forms=None):
    """What onnxruntime makes of the graph with the weights of these forms."""
    model = ir.from_proto(ir.to_proto(source.model))
    for layer in layers if forms else ():
        model.graph.initializers[layer.name].const_value = ir.tensor(layer.as_stored(forms[layer.name].dense()))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def divergence(source, layers, feed, forms) -> float:
    """Nats per position that counts from the original distribution to that of the forms."""

    def log_softmax(x):
        x = x.astype(np.float64)
        return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)

    p, q = (log_softmax(logits_of(source, layers, feed, which)) for which in (None, forms))
    return float((np.exp(p) * (p - q)).sum(-1)[feed["attention_mask"] == 1].mean())


def quiet(step, share):
    assert 0 <= share <= 1


def healed(source, layers, forms, feeds, folder, name=PERPLEXITY, **options):
    options = {"steps": 60, "learning_rate": 3e-3} | options
    store = Checkpoint(folder / "store", {})
    return heal(source, layers, forms, feeds, metric=metric_of(source, name), store=store, say=quiet, **options)


def test_logits_come_nearer_to_the_original_in_the_graph_itself(source, layers, tmp_path):
    forms, (feed, unseen) = compressed(layers), batches(2, masked=3)
    result = healed(source, layers, forms, [feed], tmp_path)
    assert result.notes == []
    assert result.before == pytest.approx(divergence(source, layers, feed, forms), rel=1e-3)
    assert result.after == pytest.approx(divergence(source, layers, feed, result.forms), rel=1e-3)
    assert result.after < 0.5 * result.before
    assert result.step > 0
    for layer in layers:
        assert type(result.forms[layer.name]) is type(forms[layer.name])
        assert result.forms[layer.name].nbytes == forms[layer.name].nbytes
        assert not np.array_equal(result.forms[layer.name].dense(), forms[layer.name].dense())
    # one batch is learnt by heart; many are not
    result = healed(source, layers, forms, batches(40, seed=1), tmp_path, steps=120)
    assert divergence(source, layers, unseen, result.forms) < 0.8 * divergence(source, layers, unseen, forms)


def test_what_is_padded_does_not_count(source, layers, tmp_path):
    forms, (feed,) = compressed(layers), batches(1)
    everywhere = healed(source, layers, forms, [feed], tmp_path / "a", steps=1).before
    masked = dict(feed, attention_mask=batches(1, masked=3)[0]["attention_mask"])
    result = healed(source, layers, forms, [masked], tmp_path / "b", steps=1)
    assert result.before == pytest.approx(divergence(source, layers, masked, forms), rel=1e-3)
    assert result.before != pytest.approx(everywhere, rel=1e-3)


def test_other_outputs_by_their_squared_error(source, layers, tmp_path):
    forms, (feed,) = compressed(layers), batches(1)

    def error(forms):
        base = logits_of(source, layers, feed)
        return np.square(logits_of(source, layers, feed, forms) - base).sum() / np.square(base).sum()

    result = healed(source, layers, forms, [feed], tmp_path, COSINE)
    assert result.before == pytest.approx(error(forms), rel=1e-3)
    assert result.after == pytest.approx(error(result.forms), rel=1e-3)
    assert result.after < 0.5 * result.before


def test_a_stopped_run_goes_on_where_it_was(source, layers, tmp_path):
    forms, feeds = compressed(layers), batches(5)
    whole = healed(source, layers, forms, feeds, tmp_path / "whole")

    def stop(step, share):
        if share > 0.7:
            raise KeyboardInterrupt

    options = {"metric": metric_of(source), "steps": 60, "learning_rate": 3e-3}
    store = Checkpoint(tmp_path / "store", {})
    with pytest.raises(KeyboardInterrupt):
        heal(source, layers, forms, feeds, store=store, say=stop, **options)
    again = []
    rest = heal(source, layers, forms, feeds, store=store, say=lambda step, share: again.append(share), **options)
    assert again[0] == pytest.approx(25 / 60)
    assert (rest.before, rest.after, rest.step) == (whole.before, whole.after, whole.step)
    for name, form in whole.forms.items():
        np.testing.assert_array_equal(rest.forms[name].dense(), form.dense())


def test_forms_stay_when_no_step_improves_them(source, layers, tmp_path):
    forms = compressed(layers, bits=8)
    result = healed(source, layers, forms, batches(3), tmp_path, learning_rate=1e3)
    assert (result.step, result.after) == (0, result.before)
    assert all(result.forms[name] is form for name, form in forms.items())
    assert "none of 60 steps of healing" in result.notes[0]


def test_weights_that_are_no_parameters_are_left_alone(source, layers, tmp_path):
    forms, feeds = compressed(layers), batches(1)
    strange = ir.Value(name=layers[0].name, const_value=ir.tensor(layers[0].stored() + 1))
    changed = [dataclasses.replace(layers[0], value=strange), *layers[1:]]
    result = healed(source, changed, forms, feeds, tmp_path, steps=5)
    assert result.notes[0].startswith("not healed")
    assert result.notes[0].endswith(f": {layers[0].label}")
    assert result.forms[layers[0].name] is forms[layers[0].name]
    with pytest.raises(QexportError, match="none of the compressed weights is a parameter"):
        healed(source, changed[:1], {layers[0].name: forms[layers[0].name]}, feeds, tmp_path)


def test_equal_parameters_cannot_be_told_apart(layers, tmp_path):
    source = open_source("test_heal:model")
    source.runnable.module.twin = nn.Parameter(torch.from_numpy(layers[0].stored()))
    result = healed(source, layers, compressed(layers), batches(1), tmp_path, steps=1)
    assert result.notes[0].endswith(": words, head")


def test_half_precision_stays_as_it_is(source, layers, tmp_path):
    forms = compressed(layers) | {layers[0].name: Half(layers[0].matrix().astype(np.float16))}
    result = healed(source, layers, forms, batches(1), tmp_path, steps=30)
    assert result.notes == []
    assert result.forms[layers[0].name] is forms[layers[0].name]


def test_a_module_in_half_precision(tmp_path):
    source = open_source("test_heal:half_model")
    layers = find_layers(source.model)
    result = healed(source, layers, compressed(layers), batches(1), tmp_path)
    assert result.notes == []
    assert result.after < 0.5 * result.before
    assert {x.dtype for x in source.runnable.module.parameters()} == {torch.float16}


def test_a_module_without_gradients_is_one_line(tmp_path):
    source = open_source("test_heal:detached_model")
    layers = find_layers(source.model)
    with pytest.raises(QexportError, match="detached_model: torch cannot learn on these inputs: RuntimeError"):
        healed(source, layers, compressed(layers), batches(1), tmp_path)


def test_the_module_is_left_as_it_was(source, layers, tmp_path):
    before = {name: (x.detach().clone(), x.requires_grad) for name, x in source.runnable.module.named_parameters()}
    healed(source, layers, compressed(layers), batches(1), tmp_path, steps=5)
    for name, x in source.runnable.module.named_parameters():
        assert torch.equal(x, before[name][0])
        assert x.requires_grad == before[name][1]
        assert x.grad is None


@pytest.mark.parametrize("name", ["masked", "encoder", "reversed_inputs"])
def test_the_module_takes_the_inputs_of_the_graph(name):
    source = open_source(f"torch_zoo:{name}")
    with torch.no_grad():
        got = source.runnable(source.examples, source.runnable.weights())
    assert got.keys() == source.expected.keys()
    for output, value in got.items():
        np.testing.assert_allclose(value, source.expected[output], rtol=0, atol=1e-6)


def test_only_torch_modules_and_sensible_numbers(source, layers, tmp_path):
    forms, feeds = compressed(layers), batches(1)
    with pytest.raises(UsageError, match="needs the torch model"):
        healed(dataclasses.replace(source, runnable=None), layers, forms, feeds, tmp_path)
    with pytest.raises(UsageError, match="steps >= 1"):
        healed(source, layers, forms, feeds, tmp_path, steps=0)
    with pytest.raises(UsageError, match="learning rate > 0"):
        healed(source, layers, forms, feeds, tmp_path, learning_rate=float("nan"))


def test_the_rate_rises_and_falls_to_zero():
    rates = [rate(step, 100) for step in range(101)]
    assert rates[4] == max(rates) == 1
    assert rates[0] == pytest.approx(0.2)
    assert rates[100] == pytest.approx(0)
    assert np.all(np.diff(rates[5:]) < 0)
