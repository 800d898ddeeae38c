"""convert of mixtures of experts, whose products are grouped by expert."""

import numpy as np
import pytest
import torch
import transformers

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


def test_a_mixture_of_experts_computes_what_torch_does(mixtral, tmp_path):
    model, folder = mixtral
    report = convert(folder, tmp_path / "b", task="causal-lm", strategy="exact")
    assert (len(report.sites), report.left_alone) == (2, [])
    bundle = session(tmp_path / "b")
    for length in (1, 13):  # of one token, two experts see nothing
        ids = torch.randint(99, (1, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits.numpy()
        got = bundle.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


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
