"""Which figure stands for a model, and what it counts."""

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from compression_cases import model_of

from qexport.metrics import choose_metric

PIXELS = """<ir_version: 10, opset_import: ["": 23]>
g (float[b,3,h,w] x) => (float[b,5,h,w] NAME) { NAME = Conv(x, k) }"""


@pytest.mark.parametrize(("output", "metric"), [("logits", "top1"), ("features", "cosine")])
def test_the_classes_of_pixels_are_the_second_axis(output, metric):
    """Not the width of the image, along which argmax would tell where, and not what."""
    rng = np.random.default_rng(0)
    model = model_of(PIXELS.replace("NAME", output), {"k": rng.standard_normal((5, 3, 1, 1)).astype(np.float32)})
    classical = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    spec = {"name": "x", "kind": "other", "shape": ["b", 3, "h", "w"], "dtype": "float32"}
    bundle = SimpleNamespace(path="bundle", manifest={"inputs": [spec]})
    feed = {"x": rng.standard_normal((2, 3, 4, 6)).astype(np.float32)}
    chosen = choose_metric(bundle, SimpleNamespace(feeds=[feed]), classical, None)
    assert chosen.name == metric
    value = classical.run(None, feed)[0]
    scaled = value * np.exp(rng.standard_normal((2, 1, 4, 6)))  # the same classes, by other figures
    total, count = chosen.add(bundle.manifest, feed, value, scaled)
    if metric == "top1":
        assert (total, count) == (2 * 4 * 6, 2 * 4 * 6)
    else:  # one figure an item, of all its numbers and not of their mean over channels
        assert count == 2
        flat = value.reshape(2, -1), scaled.reshape(2, -1)
        expected = (flat[0] * flat[1]).sum(1) / np.linalg.norm(flat[0], axis=1) / np.linalg.norm(flat[1], axis=1)
        assert total == pytest.approx(expected.sum(), rel=1e-6)
