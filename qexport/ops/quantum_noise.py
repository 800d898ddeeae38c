"""The op QuantumNoise: its table entry, its fallback, its shape inference."""

from qexport.errors import UsageError
from qexport.ops.probability_rows import give_like
from qexport.ops.spec import Attr, OpSpec, Param

# The channels, one qubit at a time; docs/noise.md has their Kraus operators.
CHANNELS = (
    "depolarizing",
    "amplitude_damping",
    "phase_damping",
    "thermal_relaxation",
    "bit_flip",
    "phase_flip",
    "readout",
    "kraus",
)
FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)")


def check_channel(op_name: str, values: dict) -> None:
    """The check of an OpSpec with CHANNEL_ATTRIBUTES."""
    channel = values["channel"]
    for name, plain in (("scope", "local"), ("convention", "replace")):
        if channel != "depolarizing" and values[name] != plain:
            raise UsageError(
                f"[{op_name}] {name} must be {plain} with channel {channel}, got {values[name]}; only depolarizing has "
                "others"
            )


# What QuantumNoise and QuantumOverlap share.
CHANNEL_INPUTS = (
    Param(
        "level",
        "P",
        "() or (qubits,); readout also (1, 2) or (qubits, 2)",
        "Strength of the channel, one number or one per qubit; qubit k is bit k of the index. thermal_relaxation: the "
        "time, in units of T1 and T2. readout with two columns: P(1 read | 0), P(0 read | 1). kraus: the probability that "
        "the operators act.",
    ),
    Param("T1", "P", "() or (qubits,)", "Relaxation time; for thermal_relaxation, which needs it.", optional=True),
    Param("T2", "P", "() or (qubits,)", "Dephasing time, at most 2 T1; as T1.", optional=True),
    Param(
        "excited_population",
        "P",
        "() or (qubits,)",
        "Probability of 1 in equilibrium, for thermal_relaxation; 0 when absent.",
        optional=True,
    ),
    Param(
        "kraus",
        "P",
        "(operators, 2, 2, 2) or (qubits, operators, 2, 2, 2)",
        "Kraus operators K_a of each qubit, real and imaginary parts on the last axis; for channel kraus, which needs them. "
        "sum K_a^dagger K_a must be the identity, within 1e-6 (double 1e-10).",
        optional=True,
    ),
)
CHANNEL_ATTRIBUTES = (
    Attr("channel", "string", "The channel; docs/noise.md.", "depolarizing", choices=CHANNELS),
    Attr(
        "scope",
        "string",
        "depolarizing: of each qubit by itself, or of all qubits as one system.",
        "local",
        choices=("local", "global"),
    ),
    Attr(
        "convention",
        "string",
        "depolarizing: level is the share that is replaced by the mixed state (Aer), or the probability of a Pauli "
        "error (PennyLane, Cirq).",
        "replace",
        choices=("replace", "error"),
    ),
)

SPEC = OpSpec(
    name="QuantumNoise",
    stem="quantum_noise",
    summary="What a noise channel on the qubits that hold rows of probabilities does to their measurement, exactly.",
    inputs=(
        Param("probabilities", "T", "(..., n), n >= 1, up to 4 axes", "Rows that sum to one, or of zeros, which stay so."),
        *CHANNEL_INPUTS,
        Param(
            "unitary",
            "P",
            "(2, 2, 2) or (2^qubits, 2^qubits, 2)",
            "A gate on every qubit, or a unitary of all of them, between the channel and the measurement; real and "
            "imaginary parts on the last axis.",
            optional=True,
        ),
    ),
    outputs=(
        Param(
            "noisy",
            "T",
            "as probabilities",
            "Probabilities of measuring 0 .. n-1 after the noise, or without it with inverse 1.",
        ),
        Param(
            "leak",
            "P",
            "(...)",
            "Probability of measuring a state n .. 2^qubits - 1, that stands for nothing.",
            optional=True,
        ),
    ),
    attributes=(
        *CHANNEL_ATTRIBUTES,
        Attr(
            "basis",
            "string",
            "z: measured as it is; x: every qubit behind a Hadamard gate, where phases count.",
            "z",
            choices=("z", "x"),
        ),
        Attr(
            "inverse",
            "int",
            "1: the rows are outcomes that were measured with the noise, in that basis; it is taken off them. The result "
            "sums to one and may have numbers below 0.",
            0,
            choices=(0, 1),
        ),
        Attr("renormalize", "int", "1: rows are divided by what did not leak, if that is above 0.", 0, choices=(0, 1)),
    ),
    type_vars={"T": FLOATS, "P": ("tensor(float)", "tensor(double)")},
    fallback="Identity: no noise, leak 0",
    check=lambda values: check_channel("QuantumNoise", values),
)


def fallback_nodes(opset: int, num_outputs: int):
    """Standard nodes over the names of SPEC: the probabilities as they are, and a leak of zeros."""
    from onnx import helper

    if opset < 17:
        raise UsageError(f"[QuantumNoise] the fallback needs opset 17 or newer, got {opset}")
    nodes = [helper.make_node("Identity", ["probabilities"], ["noisy"])]
    if num_outputs > 1:
        nodes += [
            helper.make_node("Shape", ["probabilities"], ["rows"], start=0, end=-1),
            helper.make_node("ConstantOfShape", ["rows"], ["no_leak"]),
            helper.make_node("CastLike", ["no_leak", "level"], ["leak"]),
        ]
    return nodes


def infer_shapes(ctx) -> None:
    """Type and shape inference for onnx (an `onnx.shape_inference.InferenceContext`)."""
    give_like(ctx, 0, type_of=0)
    give_like(ctx, 1, type_of=1, without_last=True)
