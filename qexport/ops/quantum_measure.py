"""The op QuantumMeasure: its table entry, its fallback, its shape inference."""

from qexport.errors import UsageError
from qexport.ops.probability_rows import give_like
from qexport.ops.quantum_noise import FLOATS
from qexport.ops.spec import Attr, OpSpec, Param

SPEC = OpSpec(
    name="QuantumMeasure",
    stem="quantum_measure",
    summary="`shots` measurements of rows of probabilities: how often each outcome was found.",
    inputs=(
        Param("probabilities", "T", "(..., n), n >= 1, up to 4 axes", "Rows that sum to one, or of zeros, which stay so."),
        Param("seed", "I", "()", "Seed of the draws; 0 when absent.", optional=True),
    ),
    outputs=(Param("frequencies", "T", "as probabilities", "Share of the shots that found each outcome."),),
    attributes=(
        Attr("shots", "int", "Measurements per row.", 1024, minimum=1, maximum=2**31 - 1),
        Attr(
            "layer", "int", "Number of the site in its model; part of the random counter.", 0, minimum=0, maximum=2**32 - 1
        ),
    ),
    type_vars={"T": FLOATS, "I": ("tensor(int64)",)},
    fallback="Identity: the probabilities, as after infinitely many shots",
)


def fallback_nodes(opset: int, num_outputs: int):
    """Standard nodes over the names of SPEC: the probabilities as they are."""
    from onnx import helper

    if opset < 17:
        raise UsageError(f"[QuantumMeasure] the fallback needs opset 17 or newer, got {opset}")
    return [helper.make_node("Identity", ["probabilities"], ["frequencies"])]


def infer_shapes(ctx) -> None:
    """Type and shape inference for onnx (an `onnx.shape_inference.InferenceContext`)."""
    give_like(ctx, 0, type_of=0)
