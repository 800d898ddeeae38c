"""convert and compress of mixtures of experts, whose products are grouped by expert."""

import numpy as np
import onnx
import pytest
import torch
import transformers

from qexport.compression import compress
from qexport.conversion import convert
from qexport.errors import QexportError
from qexport.runtime import session
from qexport.sources.torch_export import export_module

CONFIG = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**CONFIG)).eval()
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def converted(mixtral, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "mixtral"
    return folder, convert(mixtral[1], folder, task="causal-lm", strategy="exact")


def test_a_mixture_of_experts_computes_what_torch_does(mixtral, converted):
    model, report = mixtral[0], converted[1]
    assert (len(report.sites), report.left_alone) == (2, [])
    bundle = session(converted[0])
    for length in (1, 13):  # of one token, two experts see nothing
        ids = torch.randint(99, (1, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits.numpy()
        got = bundle.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_its_experts_are_compressed(converted, tmp_path):
    """The file holds codes of them, and no matrix in floats."""
    ids = np.random.default_rng(0).integers(1, 99, (32, 8))
    np.savez(tmp_path / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    report = compress(converted[0], tmp_path / "c", tmp_path / "data.npz", ratio=3, methods=["int8"], profile=False)
    experts = [layer for layer in report.layers if layer["kinds"] == ["experts"]]
    assert [layer["shape"] for layer in experts] == [[4, 32, 128], [4, 64, 32]] * 2
    assert all(layer["method"].startswith("int8") and layer["relative_error"] < 0.01 for layer in experts)
    assert report.outputs["logits"]["relative_error"] < 0.1
    weights = onnx.load(tmp_path / "c" / "model.onnx").graph.initializer
    assert not [w.name for w in weights if len(w.dims) == 3 and w.data_type == onnx.TensorProto.FLOAT]
    assert not any(layer["name"] == w.name for layer in experts for w in weights)


def test_torch_has_an_operator_of_its_own_for_bfloat16(mixtral):
    report = convert(mixtral[1], None, task="causal-lm", dtype="bfloat16", dry_run=True)
    assert (len(report.sites), report.left_alone) == (2, [])


class Paired(torch.nn.Module):
    """As many matrices on the left as on the right, which leaves no rows to share out."""

    def forward(self, left, right):
        return torch._grouped_mm(left, right)


def test_a_grouped_product_without_a_node_is_one_line():
    inputs = torch.randn(2, 8, 16).bfloat16(), torch.randn(2, 16, 8).bfloat16()
    with pytest.raises(QexportError, match=r"torch cannot export .*without offsets") as raised:
        export_module(Paired(), inputs, {}, kind="torch", name="t", opset=23)
    assert "\n" not in str(raised.value)
