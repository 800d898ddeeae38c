"""Calls of the ops on a device, with the arrays of the test cases: what attention_backends.py and noise_cases.py do on the
CPU."""

import numpy as np
from attention_backends import DTYPES, OUTPUT_NAMES
from attention_cases import INPUT_NAMES
from noise_cases import PARAMETERS, TYPES

from qexport import _core
from qexport.ops import QUANTUM_ATTENTION, QUANTUM_MEASURE, QUANTUM_NOISE
from qexport.ops.strategies import BLOCKWISE

SEED = 1234567890123  # both words count


def ids(value):
    """For `parametrize`: the name of what has one."""
    return getattr(value, "name", None)


def seed_on(device, seed: int):
    return device.put(np.array(seed, np.int64))


def attention(device, feeds, dtype, seed, attributes, present=False, probabilities=False, put=None):
    """Outputs by name, as float32. `put` brings the inputs to the device, where not as they are."""
    typed = {name: v.astype(DTYPES[dtype], copy=False) if v.dtype == np.float32 else v for name, v in feeds.items()}
    tensors = {name: (put or device.put)(value) for name, value in typed.items()}
    attributes = {name: value for name, value in QUANTUM_ATTENTION.resolve(attributes).items() if value is not None}
    outputs = _core.quantum_attention(
        *(tensors.get(name) for name in INPUT_NAMES),
        seed=seed_on(device, seed),
        key_summary=tensors.get("key_summary"),
        **attributes,
        present=present,
        qk_matmul_output=probabilities,
        error_estimate=attributes["strategy"] in BLOCKWISE,
        device=device,
    )
    named = zip(OUTPUT_NAMES, outputs, strict=True)
    return {name: np.asarray(device.get(v)).astype(np.float32, copy=False) for name, v in named if v is not None}


def noise(device, p, given, attributes, dtype="float64"):
    resolved = QUANTUM_NOISE.resolve(attributes)
    inputs = device.put(p.astype(TYPES[dtype])), *(given.get(name) for name in PARAMETERS)
    return tuple(device.get(x).astype(np.float64) for x in _core.quantum_noise(*inputs, **resolved, device=device))


def measure(device, p, seed, dtype="float64", **attributes):
    resolved = QUANTUM_MEASURE.resolve(attributes)
    found = _core.quantum_measure(device.put(p.astype(TYPES[dtype])), seed_on(device, seed), **resolved, device=device)
    return device.get(found).astype(np.float64)


def train(device, name, *arrays, **attributes):
    """mps_decode, mps_attention or mpo_linear."""
    return device.get(getattr(_core, name)(*map(device.put, arrays), **attributes, device=device))
