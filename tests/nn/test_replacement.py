"""replace_attention: nn.MultiheadAttention and models of transformers, in place, in torch and through convert."""

import copy

import hf_zoo
import nn_zoo
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from qexport.conversion import convert
from qexport.errors import QexportError, UsageError
from qexport.nn import QuantumMultiheadAttention, exact_attention, replace_attention
from qexport.runtime import session


def run(name, model):
    more = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        return model(**hf_zoo.inputs(name), **more).last_hidden_state


def sites_of(model):
    return [m.qexport_site for m in model.modules() if hasattr(m, "qexport_site")]


@pytest.mark.parametrize("name", hf_zoo.SITES)
def test_transformers(name):
    """Exact attention in their place changes nothing; sampled attention does; sdpa brings the model back."""
    model = hf_zoo.build(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    want = run(name, model)
    seen = torch.ones(want.shape[:2], dtype=torch.bool)
    if name in ("bert", "minilm", "gpt2", "llama"):
        seen = hf_zoo.inputs(name)["attention_mask"].bool()
    names = replace_attention(model, {"strategy": "exact"})
    assert len(names) == hf_zoo.SITES[name]
    assert set(names) <= {n for n, _ in model.named_modules()}
    torch.testing.assert_close(run(name, model)[seen], want[seen], rtol=0, atol=2e-5 * want.abs().max().item())
    assert replace_attention(model, hf_zoo.RECIPE) == names, "again, with another recipe"
    sampled = run(name, model)
    assert (sampled - want)[seen].abs().max() > 1e-3 * want.abs().max()
    assert torch.equal(run(name, model), sampled)
    assert torch.equal(run(name, copy.deepcopy(model)), sampled)
    with exact_attention():
        torch.testing.assert_close(run(name, model)[seen], want[seen], rtol=0, atol=2e-5 * want.abs().max().item())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.set_attn_implementation("sdpa")
    assert torch.equal(run(name, model), want)


@pytest.mark.parametrize("name", [name for name in hf_zoo.SITES if name != "bert"])
def test_transformers_through_convert(name, tmp_path):
    report = convert(f"hf_zoo:{name}", tmp_path / "b")
    assert report.left_alone == []
    assert [(s["strategy"], s["num_samples"]) for s in report.sites] == [("stratified", [6])] * hf_zoo.SITES[name]
    model = hf_zoo.build(name)
    states = {"classical.onnx": run(name, model).numpy()}
    found = sorted(s["module"].removeprefix("model.") for s in report.sites)
    assert found == sorted(replace_attention(model, hf_zoo.RECIPE))
    states["model.onnx"] = run(name, model).numpy()
    assert np.abs(states["model.onnx"] - states["classical.onnx"]).max() > 1e-2
    feeds = {k: v.numpy() for k, v in getattr(hf_zoo, name)()[1].items()}
    for file, want in states.items():
        got = session(tmp_path / "b" / file).run(None, feeds)[0]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_weights_of_transformers():
    model = hf_zoo.build("bert")
    model.set_attn_implementation("eager")
    values = hf_zoo.inputs("bert")
    with torch.no_grad():
        want = model(**values, output_attentions=True).attentions
        replace_attention(model, {"strategy": "stratified", "num_samples": 64})
        got = model(**values, output_attentions=True).attentions
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_decoding_with_a_cache():
    """Token by token, exactly: a query of one token sees the whole past."""
    model = hf_zoo.build("llama")
    ids = hf_zoo.inputs("llama")["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids).last_hidden_state
        replace_attention(model, {"strategy": "exact"})
        past, found = None, []
        for piece in (ids[:, :9], ids[:, 9:14], *ids[:, 14:].split(1, 1)):
            done = model(input_ids=piece, past_key_values=past, use_cache=True)
            past = done.past_key_values
            found.append(done.last_hidden_state)
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=0, atol=2e-5 * want.abs().max().item())


@pytest.mark.parametrize("strategy", ["stratified", "naive", "hybrid"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_causal_models_do_not_look_ahead(name, strategy):
    """Not by what they draw either, and although the padding makes their order a mask, of which the op knows nothing."""
    model = hf_zoo.build(name)
    replace_attention(model, hf_zoo.RECIPE | {"strategy": strategy})
    values = hf_zoo.inputs(name)
    other = values | {"input_ids": values["input_ids"].clone()}
    other["input_ids"][:, 12:] += 1
    with torch.no_grad():
        a, b = (model(**v, use_cache=False).last_hidden_state for v in (values, other))
    assert torch.equal(a[0, :12], b[0, :12])
    assert not torch.equal(a[0, 12:], b[0, 12:])


def test_training_of_transformers():
    """A new seed in each call from torch's generator, and dropout; gradients everywhere."""
    model = hf_zoo.build("bert")
    names = replace_attention(model, hf_zoo.RECIPE)
    model.train()
    values = hf_zoo.inputs("bert")
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert all(m.p > 0 for m in dropouts)
    for dropout in dropouts:
        dropout.p = 0.0

    def states():
        return model(**values).last_hidden_state

    torch.manual_seed(3)
    first, second = states(), states()
    torch.manual_seed(3)
    assert torch.equal(states(), first)
    assert not torch.equal(first, second)
    for name in names:
        model.get_submodule(name).dropout.p = 0.5
    torch.manual_seed(3)
    assert not torch.equal(states(), first), "attention has dropout"
    states().square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "attention" in n)
    model.eval()
    assert torch.equal(states(), states())


def test_recipes_by_module():
    model = nn_zoo.encoder()[0]
    recipe = {
        "strategy": "stratified",
        "num_samples": 6,
        "seed": 9,
        "layers": [{"match": "*.layers.1.*", "strategy": "hybrid", "num_samples": [1, 2, 3, 4]}],
    }
    assert replace_attention(model, recipe, backend="reference") == [f"encoder.layers.{i}.self_attn" for i in (0, 1)]
    first, second = (layer.self_attn for layer in model.encoder.layers)
    assert (first.layer, second.layer, int(first.seed), first.backend) == (0, 1, 9, "reference")
    (settings, members), *rest = first.head_groups
    assert (settings["strategy"], settings["num_samples"], members, rest) == ("stratified", [6], [0, 1, 2, 3], [])
    (settings, members), *rest = second.head_groups
    assert (settings["strategy"], settings["num_samples"], members, rest) == ("hybrid", [1, 2, 3, 4], [0, 1, 2, 3], [])
    hugging = hf_zoo.build("bert")
    replace_attention(hugging, recipe | {"layers": [{"match": "encoder.layer.1.*", "num_samples": [1, 2, 3, 4]}]})
    sites = [m.qexport_site for m in hugging.modules() if hasattr(m, "qexport_site")]
    assert [(s.attributes["num_samples"], s.attributes["layer"], s.seed) for s in sites] == [
        ([6], 0, 9),
        ([1, 2, 3, 4], 1, 9),
    ]
    run("bert", hugging)


def test_the_default_recipe_keeps_a_tolerance():
    model = nn_zoo.encoder()[0]
    replace_attention(model)
    attributes = model.encoder.layers[0].self_attn.head_groups[0][0]
    assert (attributes["strategy"], attributes["error_tolerance"]) == ("tree", 0.01)


def test_a_module_that_two_names_share():
    shared = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.ModuleDict({"first": shared, "second": shared, "other": nn.MultiheadAttention(16, 2, batch_first=True)})
    assert replace_attention(model, {"strategy": "exact"}) == ["first", "other"]
    assert model["first"] is model["second"]
    assert all(isinstance(m, QuantumMultiheadAttention) for m in model.values())


def test_transformers_inside_a_torch_module_beside_multihead_attention():
    model = nn.ModuleDict({"text": hf_zoo.build("bert"), "pool": nn.MultiheadAttention(32, 4, batch_first=True)})
    names = replace_attention(model, {"strategy": "exact"})
    assert names == ["pool", *(f"text.encoder.layer.{i}.attention.self" for i in (0, 1))]
    assert model["text"].config._attn_implementation == "qexport"
    assert isinstance(model["pool"], QuantumMultiheadAttention)
    layers = [model["pool"].layer] + [
        m.qexport_site.attributes["layer"] for m in model.modules() if hasattr(m, "qexport_site")
    ]
    assert layers == [0, 1, 2]


class WithPositions(nn.MultiheadAttention):
    """Adds positions to queries and keys by itself."""

    def forward(self, query, key, value, **more):
        place = torch.arange(query.shape[1])[:, None] / 10
        return super().forward(query + place.sin(), key + place.sin(), value, **more)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_what_does_more_than_nn_multihead_attention_stays_as_it_is():
    """A subclass, and a module whose weight is computed: exchanged, either would compute something else."""
    plain, positions, halved = nn.MultiheadAttention(32, 4), WithPositions(32, 4), nn.MultiheadAttention(32, 4)
    parametrize.register_parametrization(halved, "in_proj_weight", Halved())
    model = nn.ModuleDict({"plain": plain, "positions": positions, "halved": halved})
    assert replace_attention(model, {"strategy": "exact"}) == ["plain"]
    assert model["positions"] is positions
    assert model["halved"] is halved
    for module in (positions, halved):
        with pytest.raises(UsageError, match=r"from_classical takes an nn.MultiheadAttention, got .* whose own part"):
            QuantumMultiheadAttention.from_classical(module)


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (lambda: nn.Linear(2, 2), {}, "Linear has no attention that can be replaced"),
        (lambda: nn.MultiheadAttention(4, 2), {}, "is an nn.MultiheadAttention: make it with .*from_classical"),
        (
            lambda: nn_zoo.encoder()[0],
            {"recipe": {"layers": [{"match": "encodre.*", "strategy": "exact"}]}},
            r"layers\[0\].match: 'encodre.\*' fits no attention site; sites are encoder.layers.0.self_attn",
        ),
        (lambda: nn_zoo.encoder()[0], {"recipe": {"strategy": "best"}}, "strategy: must be one of exact"),
        (lambda: nn_zoo.encoder()[0], {"recipe": {"samples": 3}}, "samples"),
        (lambda: nn_zoo.encoder()[0], {"recipe": {"num_samples": [1, 2]}}, "num_samples .*2.*4"),
        (lambda: hf_zoo.build("bert"), {"recipe": {"num_samples": [1, 2]}}, "num_samples .*2.*4"),
        (lambda: nn_zoo.encoder()[0], {"recipe": {"noise": "depolarizing:0.1"}}, "noise is for converted models"),
        (lambda: nn_zoo.encoder()[0], {"backend": "qpu"}, "backend must be one of auto, .*'qpu'"),
    ],
    ids=lambda value: "model" if callable(value) else str(value),
)
def test_errors(model, arguments, words):
    """Nothing is changed by a call that fails."""
    model = model()
    before = [type(m) for m in model.modules()]
    with pytest.raises(UsageError, match=words) as caught:
        replace_attention(model, **arguments)
    assert "\n" not in str(caught.value)
    assert [type(m) for m in model.modules()] == before
    assert getattr(getattr(model, "config", None), "_attn_implementation", "sdpa") == "sdpa"


def test_attention_that_was_added_later():
    model = hf_zoo.build("bert")
    replace_attention(model, {"strategy": "exact"})
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))
    del model.encoder.layer[2].attention.self.qexport_site
    with pytest.raises(QexportError, match="BertSelfAttention was not there when replace_attention was called"):
        run("bert", model)
    assert len(replace_attention(model, {"strategy": "exact"})) == 3
    run("bert", model)
