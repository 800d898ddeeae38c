"""Attention as a noisy quantum device would measure it, in torch, with gradients (docs/noise.md, "In torch")."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch.nn import functional

from qexport.arguments import as_seed, check_finite, check_tensors, real
from qexport.errors import UsageError
from qexport.nn.backends import get_backend
from qexport.noise.channels import global_share, num_qubits
from qexport.noise.density import kraus_operators, overlap_probabilities
from qexport.noise.measured import MeasuredNoise, measured
from qexport.noise.mitigation import Mitigation, mitigated, parse_mitigation
from qexport.noise.model import NoiseModel, as_models, parse_noise
from qexport.ops import QUANTUM_MEASURE
from qexport.ops.kernels import kernels

BASES = ("z", "x", "overlap")
MOST_SHOTS = QUANTUM_MEASURE.attribute("shots").maximum
LEVEL = 0.01  # of a noise model that is given by its name alone


class QuantumAttentionSimulator:
    """Attention whose weights are measured on qubits behind noise.

    A row of softmax probabilities p is the state sum_j sqrt(p_j) |j> of ceil(log2 n) qubits. The noise meets every qubit,
    the register is measured `num_samples` times, and the frequencies are the weights. In basis x a Hadamard gate on every
    qubit precedes the measurement, so that phases count (the weights are then no softmax even without noise). In basis
    overlap there is no softmax: the rows of Q and K, divided by their norms, are amplitudes of ceil(log2 d) qubits; the
    noise E meets the state of the query, and the weight of a key is <k| E(|q><q|) |k> divided by the sum over keys, a
    quantum kernel attention. Each overlap is estimated by itself: q is prepared, k is undone, and the share of `num_samples`
    shots that find all qubits 0 is its value.

    Attributes:
        noise: (NoiseModel, ...), in the order they act.
        leak: (...), after a call: the share of each row that was measured in states that stand for no key,
            n .. 2^qubits - 1, or for keys that the query does not see. These outcomes are discarded: weights there are 0.
    """

    def __init__(
        self,
        noise_model: str | NoiseModel | Sequence[NoiseModel] = "depolarizing",
        *,
        scope: str = "local",
        convention: str = "replace",
        basis: str = "z",
        T1=None,
        T2=None,
        excited_population=None,
        mitigation: str | Mitigation | None = None,
        renormalize: bool = True,
        seed: int = 0,
        backend: str = "auto",
    ):
        """
        Args:
            noise_model: name of a channel of docs/noise.md, text of `parse_noise`, or one or several NoiseModels.
            scope, convention: of depolarizing noise that is given by its name.
            basis: z, x or overlap.
            T1, T2, excited_population: of thermal_relaxation that is given by its name; numbers or tensors () or (qubits,).
                T1 and T2 are 1 where they are not given, and the level a time in their unit.
            mitigation: none, readout_inversion[:project], zne[:1-2-3], pec, repetition[:3] or a
                `qexport.noise.mitigation.Mitigation`; it knows the noise, and shares `num_samples` out among what it
                measures. Weights may be negative. In basis overlap there is none.
            renormalize: where outcomes are discarded, since n is no power of two or keys are masked (and always in basis
                overlap), divide each row of weights by its sum.
            seed: of the draws; a call with the same seed draws alike.
            backend: `kernel` (C++, on the CPU), `reference` (torch, any device), `auto` (the first where it can), or the
                name of an entry point of `qexport.backends` that has `measure_rows`.

        Raises:
            UsageError: an unknown name, or settings that do not fit the noise model.
        """
        own = {"T1": T1, "T2": T2, "excited_population": excited_population, "scope": scope, "convention": convention}
        self.noise, self._named = _models(noise_model, own)
        if basis not in BASES:
            raise UsageError(f"basis must be one of {', '.join(BASES)}, got {basis!r}")
        self.mitigation = parse_mitigation(mitigation or "none") if not isinstance(mitigation, Mitigation) else mitigation
        self._device = None if backend in ("auto", "kernel", "reference") else _measure_rows(backend)
        if basis == "overlap":
            _check_overlap(self.noise, self.mitigation, self._device)
        self.basis, self.renormalize, self.seed, self.backend = basis, renormalize, as_seed(seed), backend
        self.leak = None

    def simulate_attention(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        num_samples: int | None = 32,
        noise_level=None,
        *,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        seed: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Measured attention.

        Differentiable in Q, K, V, a float mask, the level and the times of the noise. Without shots the gradient is that of
        the closed form. With shots it is unbiased for losses that are linear in the output
        (`qexport.noise.measured.measured`), up to renormalisation: where outcomes are discarded, and in basis overlap, the
        weights are ratios, whose bias falls as 1 / num_samples. At a level where a channel has no derivative (amplitude
        damping 1 in basis x, any 0 in basis overlap) it is infinite or NaN.

        Args:
            Q: (..., q_len, d), two to four axes.
            K: (..., n, d), the axes before as those of Q.
            V: (..., n, v_head_size).
            num_samples: shots per row (in basis overlap per pair); None for infinitely many.
            noise_level: level of every noise model, a number or a tensor () or (qubits,); readout also (qubits, 2). None:
                the models' own, 0.01 where the noise was given by its name.
            attn_mask: bool (true = attend) or float (added to the scores), broadcastable to (..., q_len, n). A query that
                sees no key has weights 0. Bool alone in basis overlap.
            is_causal: query i sees keys 0 .. i.
            scale: of the scores, 1 / sqrt(d) when None; not in basis overlap.
            enable_gqa: K and V may have fewer heads, axis -3, a divisor of Q's.
            seed: in place of the simulator's, with which all calls draw alike; runs to average need one each.

        Returns:
            (output (..., q_len, v_head_size), weights (..., q_len, n)), weights the measured frequencies, mitigated.

        Raises:
            UsageError: shapes that do not fit, or a number outside its limits, NaN and infinity in tensors included.
        """
        check_tensors({"Q": Q, "K": K, "V": V}, {"attn_mask": attn_mask})
        if scale is not None and not isinstance(scale, torch.Tensor):
            scale = real("scale", scale)
        K, V = _checked(Q, K, V, num_samples, enable_gqa)
        models = self.noise
        if noise_level is not None or self._named:
            models = tuple(model.at(LEVEL if noise_level is None else noise_level) for model in models)
        mask = _mask(attn_mask, is_causal, Q, K)
        seed = self.seed if seed is None else as_seed(seed)
        if self.basis == "overlap":
            if scale is not None or (mask is not None and mask.dtype != torch.bool):
                raise UsageError("basis overlap has no scores: scale must be None and attn_mask bool; leave them out")
            weights = self._overlaps(Q, K, mask, models, num_samples, seed)
        else:
            weights = self._rows(*_softmax(Q, K, mask, scale), models, num_samples, seed)
        weights = weights.to(Q.dtype)
        return weights @ V, weights

    def _rows(self, p, hidden, models, shots, seed):
        """Weights of rows p (..., q_len, n), float64; hidden: bool like p, keys that a query does not see, or None."""
        if self._device is not None and shots is None:
            raise UsageError(f"backend {self.backend} measures: num_samples must be >= 1, got None")
        n = p.shape[-1]
        noise = MeasuredNoise(models, n, self.basis, kernel=self._kernel(p))
        weights = mitigated(self.mitigation, noise, p, shots, seed, device=self._device)
        weights, leaked = weights[..., :n], weights[..., n:]
        if hidden is not None:  # or a causal model would learn of later tokens through the noise
            leaked = torch.cat([leaked, weights.masked_fill(~hidden, 0)], -1)
            weights = weights.masked_fill(hidden, 0)
        self.leak = leaked.detach().sum(-1)
        return _normalized(weights) if self.renormalize and leaked.shape[-1] else weights

    def _overlaps(self, Q, K, mask, models, shots, seed):
        qubits = num_qubits(Q.shape[-1])
        spare = (0, (1 << qubits) - Q.shape[-1])
        q, k = (functional.pad(functional.normalize(x.double(), dim=-1), spare) for x in (Q, K))
        overlaps = overlap_probabilities(q, k, _kraus(models, qubits).to(q.device)).clamp(0, 1)
        for model in models:  # kept apart: it is no product of channels on qubits
            if model.scope == "global":
                share = global_share(model.convention, model.level, qubits).to(q.device)
                whole = q.square().sum(-1)[..., :, None] * k.square().sum(-1)[..., None, :]
                overlaps = (1 - share) * overlaps + share * whole / (1 << qubits)
        if shots is not None:
            pairs = torch.stack([overlaps, 1 - overlaps], -1)
            flat = pairs.reshape(-1, pairs.shape[-3] * pairs.shape[-2], 2)
            overlaps = measured(flat, shots, seed, kernel=self._kernel(flat))[..., 0].reshape(overlaps.shape)
        self.leak = overlaps.new_zeros(overlaps.shape[:-1])
        if mask is not None:
            overlaps = overlaps.masked_fill(~mask, 0)
        return _normalized(overlaps) if self.renormalize else overlaps

    def _kernel(self, p: torch.Tensor) -> bool:
        if self.backend == "kernel" and p.device.type != "cpu":
            raise UsageError(f"backend kernel takes tensors on the CPU, got {p.device}; take backend reference")
        if self.backend == "kernel" and kernels() is None:
            raise UsageError(
                "backend kernel: qexport was installed without its kernels; take backend reference, or reinstall"
            )
        return self.backend in ("kernel", "auto") and p.device.type == "cpu" and kernels() is not None


def _models(noise_model, own: dict) -> tuple[tuple[NoiseModel, ...], bool]:
    """The models, and whether they were given by a name alone, without a level."""
    if isinstance(noise_model, str) and ":" not in noise_model:
        return (NoiseModel(noise_model, LEVEL, **own),), True
    plain = {"scope": "local", "convention": "replace"}
    for name, value in own.items():
        if value is not plain.get(name) and value != plain.get(name):
            raise UsageError(f"{name} is for noise given by its name, got {name}={value}; write it into the noise model")
    if isinstance(noise_model, str):
        return parse_noise(noise_model), False
    return as_models(noise_model, "noise_model must be a name, a text such as depolarizing:0.01 or NoiseModels"), False


def _measure_rows(backend: str):
    found = getattr(get_backend(backend), "measure_rows", None)
    if found is None:
        raise UsageError(f"backend {backend} has no measure_rows and cannot measure; take backend auto")
    return found


def _check_overlap(models, mitigation, device) -> None:
    if device is not None:
        raise UsageError("basis overlap must have backend auto, kernel or reference; hardware measures basis z and x")
    if type(mitigation) is not Mitigation:
        raise UsageError(f"mitigation is for rows measured in basis z or x, got {mitigation} in basis overlap; leave it out")
    for model in models:
        if model.channel == "readout":
            raise UsageError("basis overlap takes noise of states, and readout acts on outcomes; leave it out")
    if len({model.scope for model in models}) > 1:
        raise UsageError("basis overlap takes noise of one scope, got local and global; take scope local")


def _checked(Q, K, V, num_samples, enable_gqa):
    """K and V with as many heads as Q."""
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip("QKV", (Q, K, V), strict=True))
    if not Q.is_floating_point() or not Q.dtype == K.dtype == V.dtype:
        raise UsageError(f"Q, K and V must share one float type, got {Q.dtype}, {K.dtype} and {V.dtype}")
    if not 2 <= Q.dim() == K.dim() == V.dim() <= 4:
        raise UsageError(f"Q, K and V must all have the same 2 to 4 dimensions, got {shapes}")
    if enable_gqa and Q.dim() > 2 and K.shape[-3] and Q.shape[-3] % K.shape[-3] == 0 and K.shape[-3] == V.shape[-3]:
        K, V = (x.repeat_interleave(Q.shape[-3] // x.shape[-3], -3) for x in (K, V))
    fits = Q.shape[:-2] == K.shape[:-2] == V.shape[:-2] and Q.shape[-1] == K.shape[-1] and K.shape[-2] == V.shape[-2]
    if not fits or K.shape[-2] == 0 or Q.shape[-1] == 0:
        raise UsageError(
            f"Q, K and V must be (..., q_len, d), (..., n, d), (..., n, v_head_size) with n, d >= 1, got {shapes}"
        )
    if num_samples is not None and not (isinstance(num_samples, Integral) and 1 <= num_samples <= MOST_SHOTS):
        raise UsageError(f"num_samples must be an int in 1 to {MOST_SHOTS}, or None for infinitely many, got {num_samples}")
    for name, tensor in zip("QKV", (Q, K, V), strict=True):
        check_finite(name, tensor)
    return K, V


def _mask(attn_mask, is_causal, Q, K):
    rows = (*Q.shape[:-1], K.shape[-2])
    if attn_mask is not None:
        fits = attn_mask.dim() <= len(rows) and all(
            a in (1, b) for a, b in zip(attn_mask.shape[::-1], rows[::-1], strict=False)
        )
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise UsageError(f"attn_mask must be bool (true = attend) or float, got {attn_mask.dtype}")
        if not fits:
            raise UsageError(f"attn_mask must broadcast to {rows}, got {tuple(attn_mask.shape)}")
        if attn_mask.is_floating_point():
            check_finite("attn_mask, but for -inf,", attn_mask.masked_fill(attn_mask.isneginf(), 0))
    if not is_causal:
        return attn_mask
    causal = torch.ones(rows[-2:], dtype=torch.bool, device=Q.device).tril()
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return causal if attn_mask is None else attn_mask & causal
    return attn_mask.masked_fill(~causal, -torch.inf)


def _softmax(Q, K, mask, scale):
    """(float64 rows, of zeros where a query sees no key; bool like them, keys that a query does not see, or None)."""
    scores = Q @ K.mT * (Q.shape[-1] ** -0.5 if scale is None else scale)
    check_finite(f"Q K^T * scale in {scores.dtype}", scores)
    if mask is None:
        return scores.softmax(-1, dtype=torch.float64), None
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    hidden = scores.isneginf()
    blind = hidden.all(-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(-1, dtype=torch.float64).masked_fill(blind, 0), hidden


def _kraus(models, qubits):
    """Of all models of scope local together: complex128 (qubits, operators, 2, 2)."""
    kraus = torch.eye(2, dtype=torch.complex128).expand(qubits, 1, 2, 2)
    for model in models:
        if model.scope == "local":
            after = kraus_operators(model.channel, qubits, **model.inputs, convention=model.convention)
            kraus = (after[:, :, None] @ kraus[:, None]).flatten(1, 2)
    return kraus


def _normalized(weights):
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)
