"""QuantumNoise, QuantumOverlap and QuantumMeasure as functions of torch tensors: with gradients, traced by torch.compile and
torch.export, exported to ONNX as one node each.

Gradients of noise and overlaps are those of their closed forms, by the reference; a measurement passes on f / p
(docs/noise.md, "Gradients"). In `exact_attention()` there is no noise and no measurement. Rows that are no probabilities are
an error; the kernels of a CUDA device, which nobody waits for, turn them into NaN.
"""

import torch

from qexport.arguments import check_tensors
from qexport.errors import UsageError
from qexport.failures import one_line
from qexport.nn.backends import to_numpy, to_torch
from qexport.nn.cuda import cuda_memory, has_kernels
from qexport.nn.functional import ATTRIBUTE_TYPES, autograd_inside, is_exact, seed_argument
from qexport.ops import QUANTUM_MEASURE, QUANTUM_NOISE, QUANTUM_OVERLAP
from qexport.ops.kernels import kernels
from qexport.ops.quantum_measure_ref import quantum_measure_ref
from qexport.ops.quantum_noise_ref import quantum_noise_ref
from qexport.ops.quantum_overlap_ref import quantum_overlap_ref


def quantum_noise(
    probabilities,
    level,
    T1=None,
    T2=None,
    excited_population=None,
    kraus=None,
    unitary=None,
    **attributes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of measuring registers that hold rows of probabilities, after noise.

    Args:
        probabilities: (..., n), 1 to 4 axes; rows sum to one, or are zeros.
        level: number or tensor, () or (qubits,); readout also (1, 2) or (qubits, 2).
        T1, T2, excited_population: numbers or tensors, () or (qubits,), for thermal_relaxation.
        kraus: (operators, 2, 2, 2) or (qubits, operators, 2, 2, 2), real and imaginary parts last, for channel kraus.
        unitary: (2, 2, 2) or (2^qubits, 2^qubits, 2), between the channel and the measurement.
        attributes: channel, scope, convention, basis, inverse, renormalize, with the defaults of the op table.

    Returns:
        Those of the states 0 .. n - 1, shaped as `probabilities`, and the leak (...) to states that stand for nothing.

    Raises:
        UsageError: an attribute, a parameter or a row outside its limits.
    """
    check_tensors({"probabilities": probabilities})
    inputs = _inputs(
        probabilities,
        level,
        {"T1": T1, "T2": T2, "excited_population": excited_population, "kraus": kraus, "unitary": unitary},
    )
    return _noise(probabilities, *inputs, *QUANTUM_NOISE.resolve(attributes).values())


def quantum_overlap(
    queries, keys, level, T1=None, T2=None, excited_population=None, kraus=None, **attributes
) -> torch.Tensor:
    """The probability of finding the state of each key in that of each query, after noise.

    Args:
        queries: (..., m, d), 2 to 4 axes; rows are divided by their norms and are amplitudes.
        keys: (..., k, d).
        level, T1, T2, excited_population, kraus: as in `quantum_noise`.
        attributes: channel, scope, convention, with the defaults of the op table.

    Returns:
        (..., m, k), from 0 to 1.

    Raises:
        UsageError: an attribute, a parameter or a shape outside its limits.
    """
    check_tensors({"queries": queries, "keys": keys})
    inputs = _inputs(queries, level, {"T1": T1, "T2": T2, "excited_population": excited_population, "kraus": kraus})
    return _overlap(queries, keys, *inputs, *QUANTUM_OVERLAP.resolve(attributes).values())


def quantum_measure(probabilities, seed=0, **attributes) -> torch.Tensor:
    """How often each outcome is found in a number of measurements of rows of probabilities.

    Args:
        probabilities: (..., n), 1 to 4 axes; rows sum to one, or are zeros.
        seed: int, or an int64 scalar tensor.
        attributes: shots and layer, with the defaults of the op table.

    Returns:
        Frequencies, shaped as `probabilities`.

    Raises:
        UsageError: an attribute or a row outside its limits.
    """
    check_tensors({"probabilities": probabilities})
    seed = torch.as_tensor(seed_argument(seed))
    return _measure(probabilities, seed, *QUANTUM_MEASURE.resolve(attributes).values())


def _inputs(rows, level, optional: dict) -> list:
    """The level and other parameters as tensors of the type that the op takes beside these rows.

    Raises:
        UsageError: one is no number and no array of numbers.
    """
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    found = []
    for name, value in {"level": level, **optional}.items():
        try:
            found.append(None if value is None and name in optional else torch.as_tensor(value, dtype=dtype))
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(f"{name} must be a number or a tensor, got {one_line(repr(value))}") from None
    return found


def _reference_noise(probabilities, level, *inputs, **attributes):
    noisy, leak = quantum_noise_ref(probabilities, level, *inputs, **attributes)
    return noisy.contiguous(), leak.to(level.dtype)


def _reference_measure(probabilities, seed, **attributes):
    return (quantum_measure_ref(probabilities, int(seed), **attributes).contiguous(),)


def _no_noise(probabilities, level, *_):
    return probabilities.clone(memory_format=torch.contiguous_format), level.new_zeros(probabilities.shape[:-1])


def _overlap_without_noise(queries, keys, level, *_):
    return (quantum_overlap_ref(queries, keys, 0.0),)


def _computed(spec, tensors, attributes: dict, reference) -> tuple:
    """The outputs of an op, by its kernel where there is one for the device, else by its reference."""
    rows, *more = tensors
    if not has_kernels(rows.device) or (rows.is_cuda and spec is QUANTUM_OVERLAP):
        return reference(*tensors, **attributes)
    try:
        if rows.is_cuda:
            memory = cuda_memory(rows.device)
            more = [x if x is None else memory.seed(x) if x.dtype == torch.int64 else x.numpy(force=True) for x in more]
            found = memory.call(spec.stem, rows, *more, **attributes)
        else:
            arrays = [x if x is None else to_numpy(x.cpu()) for x in tensors]
            found = getattr(kernels(), spec.stem)(*arrays, **attributes, threads=torch.get_num_threads())
    except ValueError as error:
        raise UsageError(str(error)) from None
    found = found if isinstance(found, tuple) else (found,)
    return found if rows.is_cuda else (to_torch(found[0], rows.dtype), *map(torch.from_numpy, found[1:]))


def _schema(spec) -> str:
    """Inputs and attributes of an op as torch writes them."""
    inputs = (f"Tensor{'?' if param.optional and param.name != 'seed' else ''} {param.name}" for param in spec.inputs)
    return ", ".join([*inputs, *(f"{ATTRIBUTE_TYPES[attr.kind]} {attr.name}" for attr in spec.attributes)])


def split_values(spec, values) -> tuple[tuple, dict]:
    """(inputs, attributes) of the values of a call."""
    count = len(spec.inputs)
    return values[:count], dict(zip((attr.name for attr in spec.attributes), values[count:], strict=True))


def _differentiable(spec, fake, reference, exact):
    """The operator qexport::<stem> of an op whose gradient is that of its reference.

    fake: its outputs without their values; exact: what it is in `exact_attention()`. All return a tuple.
    """
    single = len(spec.outputs) == 1

    def forward(*values):
        tensors, attributes = split_values(spec, values)
        found = exact(*tensors) if is_exact() else _computed(spec, tensors, attributes, reference)
        return found[0] if single else found

    def backward(grads, was_exact, *values):
        tensors, attributes = split_values(spec, values)
        with autograd_inside(tensors[0].device):
            leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
            outputs = exact(*leaves) if was_exact else reference(*leaves, **attributes)
            given = [x for x in leaves if x is not None]
            # What does not depend on any input, as the leak of a row of one number, has no gradient to hand on.
            outputs, grads = zip(
                *((x, grad) for x, grad in zip(outputs, grads, strict=True) if x.requires_grad), strict=True
            )
            found = iter(torch.autograd.grad(outputs, given, grads, allow_unused=True, materialize_grads=True))
        # An operator returns no alias of an input, as the gradient of the identity is one of `grads`, and no None.
        layout = {"memory_format": torch.contiguous_format}
        return [tensors[0].new_empty(0) if x is None else next(found).clone(**layout) for x in tensors]

    def setup_context(ctx, inputs, output):
        tensors, _ = split_values(spec, inputs)
        ctx.save_for_backward(*tensors)
        ctx.attributes, ctx.exact = inputs[len(tensors) :], is_exact()

    def gradient(ctx, *grads):
        tensors = ctx.saved_tensors
        found = differentiate(list(grads), ctx.exact, *tensors, *ctx.attributes)
        found = [grad if x is not None else None for x, grad in zip(tensors, found, strict=True)]
        return *found, *[None] * len(ctx.attributes)

    returns = "Tensor" if single else "(" + ", ".join(["Tensor"] * len(spec.outputs)) + ")"
    operator = torch.library.custom_op(
        f"qexport::{spec.stem}", forward, mutates_args=(), schema=f"({_schema(spec)}) -> {returns}"
    )
    differentiate = torch.library.custom_op(
        f"qexport::{spec.stem}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor[] grads, bool was_exact, {_schema(spec)}) -> Tensor[]",
    )
    operator.register_fake(lambda *values: fake(*values)[0] if single else fake(*values))
    differentiate.register_fake(
        lambda grads, was_exact, *values: [
            values[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in split_values(spec, values)[0]
        ]
    )
    operator.register_autograd(gradient, setup_context=setup_context)
    return operator


_noise = _differentiable(
    QUANTUM_NOISE,
    lambda rows, level, *_: (rows.new_empty(rows.shape), level.new_empty(rows.shape[:-1])),
    _reference_noise,
    _no_noise,
)
_overlap = _differentiable(
    QUANTUM_OVERLAP,
    lambda queries, keys, *_: (queries.new_empty(*queries.shape[:-1], keys.shape[-2]),),
    lambda *inputs, **attributes: (quantum_overlap_ref(*inputs, **attributes),),
    _overlap_without_noise,
)


@torch.library.custom_op("qexport::quantum_measure", mutates_args=(), schema=f"({_schema(QUANTUM_MEASURE)}) -> Tensor")
def _measure(probabilities, seed, *values):
    if is_exact():
        return probabilities.clone(memory_format=torch.contiguous_format)
    _, attributes = split_values(QUANTUM_MEASURE, (probabilities, seed, *values))
    return _computed(QUANTUM_MEASURE, (probabilities, seed), attributes, _reference_measure)[0]


@_measure.register_fake
def _(probabilities, seed, *values):
    return probabilities.new_empty(probabilities.shape)


def _keep_rows(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)
    ctx.exact, ctx.others = is_exact(), len(inputs) - 1


def _measured_gradient(ctx, grad):
    p, frequencies = ctx.saved_tensors
    given = grad if ctx.exact else grad * frequencies / p.masked_fill(p == 0, 1)
    return given, *[None] * ctx.others


_measure.register_autograd(_measured_gradient, setup_context=_keep_rows)
