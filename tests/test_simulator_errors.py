"""QuantumAttentionSimulator: what is refused."""

import pytest
import torch
from simulator_cases import qkv

from qexport.errors import UsageError
from qexport.nn import QuantumAttentionSimulator


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_model": "cosmic"}, "channel must be one of depolarizing, amplitude_damping, .*, got 'cosmic'"),
        ({"noise_model": "bit_flip:x"}, "noise level must be a number, got 'x'"),
        ({"noise_model": 5}, "noise_model must be a name, a text .* or NoiseModels, got 5"),
        ({"noise_model": "thermal_relaxation", "T1": "x"}, "noise T1 must be a number, got 'x'"),
        ({"noise_model": [3]}, "noise_model must be a name, a text .* or NoiseModels, got 3"),
        ({"noise_model": "bit_flip:0.1", "T1": 2.0}, r"T1 is for noise given by its name, got T1=2\.0; write it into"),
        ({"noise_model": "bit_flip", "T1": 2.0}, "T1 is for channel thermal_relaxation, got bit_flip; leave it out"),
        ({"noise_model": "bit_flip", "scope": "global"}, "scope must be local with channel bit_flip, got global"),
        ({"mitigation": "hope"}, "mitigation must be one of none, .*, got 'hope'"),
        ({"seed": 2**63}, r"seed must be a whole number of 64 bits, -2\^63 to 2\^63 - 1, got 9223372036854775808"),
        ({"basis": "y"}, "basis must be one of z, x, overlap, got 'y'"),
        ({"backend": "lab"}, "backend must be one of auto, kernel, .*reference, got 'lab'"),
        ({"basis": "overlap", "mitigation": "zne"}, "mitigation is for rows measured in basis z or x, got zne in basis"),
        (
            {"basis": "overlap", "noise_model": "readout"},
            "basis overlap takes noise of states, and readout acts on outcomes",
        ),
        (
            {"basis": "overlap", "noise_model": "depolarizing:0.1:scope=global,bit_flip:0.1"},
            "basis overlap takes noise of one scope",
        ),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(UsageError, match=message) as raised:
        QuantumAttentionSimulator(**settings)
    assert "\n" not in str(raised.value)


Q, K, V = qkv(4, 8, keys=6)
NAN, INF = float("nan"), float("inf")


def holding(tensor, value):
    """A copy with another number at [2, 1]."""
    changed = tensor.clone()
    changed[2, 1] = value
    return changed


@pytest.mark.parametrize(
    ("settings", "call", "more", "message"),
    [
        ({}, (Q, K, V, 0), {}, "num_samples must be an int in 1 to 2147483647, or None for infinitely many, got 0"),
        ({}, (Q, K, V, 2.5), {}, r"num_samples must be an int in 1 to .*, got 2\.5"),
        ({}, (Q, K, V, 32, 1.5), {}, r"level must be in 0 to 1\.33333 .*, got 1\.5"),
        ({}, (Q, K, V, 32, torch.ones(2)), {}, r"level has shape \(2,\), expected one number or \(3,\), one per qubit"),
        (
            {"noise_model": "thermal_relaxation", "T1": 1.0, "T2": 2.5},
            (Q, K, V),
            {},
            r"T2 must be at most 2 T1 = 2, got 2\.5",
        ),
        ({}, (Q, K[:, :7], V), {}, r"must be \(\.\.\., q_len, d\), .*, got Q \(4, 8\), K \(6, 7\), V \(6, 3\)"),
        ({}, (Q, K, V[:5]), {}, r"must be .*, got Q \(4, 8\), K \(6, 8\), V \(5, 3\)"),
        ({}, (Q, K[:0], V[:0]), {}, r"n, d >= 1, got Q \(4, 8\), K \(0, 8\), V \(0, 3\)"),
        ({}, (Q[None], K, V), {}, r"must all have the same 2 to 4 dimensions, got Q \(1, 4, 8\)"),
        ({}, (Q.float(), K, V), {}, r"must share one float type, got torch\.float32"),
        ({}, (Q, K, V), {"attn_mask": torch.ones(3, 6, dtype=torch.bool)}, r"must broadcast to \(4, 6\), got \(3, 6\)"),
        ({}, (Q, K, V, 2**31), {}, "num_samples must be an int in 1 to .*, got 2147483648"),
        ({}, (Q, K, V), {"attn_mask": torch.ones(4, 6, dtype=torch.int64)}, r"attn_mask must be bool .*, got torch\.int64"),
        ({"mitigation": "zne"}, (Q, K, V, 2), {}, "zne with 3 scales needs at least 3 shots, got 2"),
        ({"mitigation": "repetition", "noise_model": "phase_flip"}, (Q, K, V), {}, "repetition corrects flips"),
        ({}, (holding(Q, NAN), K, V), {}, r"^Q must be finite, got nan at \[2, 1\]$"),
        ({"basis": "overlap"}, (Q, holding(K, -INF), V), {}, r"^K must be finite, got -inf at \[2, 1\]$"),
        ({}, (Q, K, holding(V, INF), None), {}, r"^V must be finite, got inf at \[2, 1\]$"),
        ({}, (Q, K, V), {"attn_mask": holding(torch.zeros(4, 6), NAN)}, r"attn_mask, but for -inf, must be .* \[2, 1\]"),
        ({}, (Q, K, V), {"scale": "x"}, "scale must be a number, got 'x'"),
        ({}, (Q, K, V, 32, "x"), {}, "noise level must be a number, got 'x'"),
        ({}, (Q, K, V), {"scale": NAN}, r"Q K\^T \* scale in torch\.float64 must be finite, got nan at \[0, 0\]"),
        ({}, (300 * Q.half(), 300 * K.half(), V.half()), {}, r"scale in torch\.float16 must be finite, got -?inf at"),
        ({}, (Q.numpy(), K, V), {}, r"^Q must be a torch\.Tensor, got numpy\.ndarray; give torch\.from_numpy\(Q\)$"),
        ({}, (Q, K, V.tolist()), {}, r"^V must be a torch\.Tensor, got list; give torch\.as_tensor\(V\)$"),
        ({}, (Q, None, V), {}, r"^K must be a torch\.Tensor, got NoneType$"),
        ({}, (Q, K, V), {"attn_mask": torch.zeros(4, 6).numpy()}, r"attn_mask must be a torch\.Tensor, got numpy"),
        ({}, (Q, K, V), {"seed": "1"}, r"seed must be a whole number of 64 bits, .*, got '1'"),
        ({"basis": "overlap"}, (Q, K, V), {"scale": 0.5}, "basis overlap has no scores"),
        ({"basis": "overlap"}, (Q, K, V), {"attn_mask": torch.zeros(4, 6)}, "basis overlap has no scores"),
    ],
)
def test_calls_that_are_refused(settings, call, more, message):
    with pytest.raises(UsageError, match=message) as raised:
        QuantumAttentionSimulator(**settings).simulate_attention(*call, **more)
    assert "\n" not in str(raised.value)
