"""Inputs for QuantumAttention: every form that the op table allows, by name. Shapes are small and odd on purpose."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from qexport.ops import QUANTUM_ATTENTION

INPUT_NAMES = tuple(param.name for param in QUANTUM_ATTENTION.inputs[:7])


PADDING = ("b", 1, 1, "kv")  # a mask that all rows of a batch item share
GROUPS = 12  # of a head whose rows lie in groups


@dataclass(frozen=True)
class Case:
    """One call: the shapes of its inputs, its attributes, and which optional inputs it has."""

    name: str
    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 4
    q_len: int = 7
    kv_len: int = 19
    head_size: int = 16
    v_head_size: int = 16
    past_len: int = 0
    mask: tuple | None = None  # shape of attn_mask; an axis named "kv" or "q" is filled in
    mask_kind: str = "float"
    nonpad: tuple | None = None
    three_d: bool = False
    grouped: bool = False  # rows in loose groups, as trained models have them, in place of Gaussian ones
    attributes: dict = field(default_factory=dict)

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random float32 inputs, by name; the same for the same seed."""
        rng = np.random.default_rng([seed, len(self.name), self.q_len, self.kv_len])
        total, new, past = self.past_len + self.kv_len, np.s_[:, :, self.past_len :], np.s_[:, :, : self.past_len]
        q = self._rows(rng, self.q_heads, self.q_len, self.head_size)
        k = self._rows(rng, self.kv_heads, total, self.head_size, strength=1.5)
        v = self._rows(rng, self.kv_heads, total, self.v_head_size)
        feeds = {"Q": q, "K": k[new], "V": v[new]}
        if self.three_d:
            feeds = {name: x.swapaxes(1, 2).reshape(self.batch, x.shape[2], -1) for name, x in feeds.items()}
        if self.mask is not None:
            sizes = {"kv": total, "q": self.q_len, "b": self.batch, "h": self.q_heads}
            feeds["attn_mask"] = self._mask(rng, [sizes.get(axis, axis) for axis in self.mask])
        if self.past_len:
            feeds |= {"past_key": k[past], "past_value": v[past]}
        if self.nonpad is not None:
            feeds["nonpad_kv_seqlen"] = np.array(self.nonpad, np.int64)
        return {name: np.ascontiguousarray(value) for name, value in feeds.items()}

    def _rows(self, rng, heads, length, size, strength=1.0):
        """(batch, heads, length, size); `strength` is how far apart groups lie, in their own deviations."""
        x = rng.standard_normal((self.batch, heads, length, size))
        if self.grouped:
            centres = strength * rng.standard_normal((self.batch, heads, GROUPS, size))
            x += np.take_along_axis(centres, rng.integers(0, GROUPS, (self.batch, heads, length, 1)), 2)
        return x.astype(np.float32)

    def _mask(self, rng, shape):
        if self.mask_kind == "none_allowed":
            return np.zeros(shape, bool)
        if self.mask_kind == "float":
            mask = np.where(rng.random(shape) < 0.2, -np.inf, rng.standard_normal(shape)).astype(np.float32)
            mask[..., 0] = 0.5
            return mask
        kept = rng.random(shape) < 0.7
        kept[..., 0] = True  # some key is always seen; full masking has its own case
        if self.mask_kind == "bool":
            return kept
        kept[..., -shape[-1] // 5 :] = False
        return np.where(kept, 0, np.finfo(np.float32).min).astype(np.float32) if self.mask_kind == "float_padding" else kept

    def all_attributes(self, **more) -> dict:
        """The case's attributes, head counts included where the inputs are 3-D, and `more`."""
        heads = {"q_num_heads": self.q_heads, "kv_num_heads": self.kv_heads} if self.three_d else {}
        return {**heads, **self.attributes, **more}


# Long enough for clusters of keys, in groups so that there is something to choose.
clustered = partial(Case, batch=1, q_heads=2, kv_heads=2, q_len=96, kv_len=400, grouped=True)

CASES = (
    Case("plain"),
    Case("one_key", kv_len=1),
    Case("one_query", q_len=1),
    Case("longer_than_a_tile", q_len=70, kv_len=150, head_size=32, v_head_size=32),
    Case("odd_head_sizes", head_size=13, v_head_size=21),
    Case("wide_heads", head_size=96, v_head_size=80, q_heads=2, kv_heads=2),
    Case("grouped_heads", q_heads=6, kv_heads=2),
    Case("one_kv_head", q_heads=5, kv_heads=1),
    Case("3d", three_d=True),
    Case("3d_grouped_odd", three_d=True, q_heads=6, kv_heads=3, head_size=10, v_head_size=7),
    Case("scale", attributes={"scale": 0.05}),
    Case("softcap", attributes={"softcap": 1.5}),
    Case("causal", q_len=19, attributes={"is_causal": 1}),
    Case("causal_long", q_len=130, kv_len=130, attributes={"is_causal": 1}),
    Case("causal_with_past", past_len=9, attributes={"is_causal": 1}),
    Case("3d_with_past", three_d=True, past_len=5),
    Case("float_mask_2d", mask=("q", "kv")),
    Case("float_mask_3d", mask=("h", "q", "kv")),
    Case("float_mask_4d", mask=("b", "h", "q", "kv")),
    Case("float_mask_per_key", mask=PADDING),
    Case("float_mask_short", mask=("q", 11)),
    Case("float_mask_1d", mask=("kv",)),
    Case("bool_mask_2d", mask=("q", "kv"), mask_kind="bool"),
    Case("bool_mask_per_query", mask=("b", 1, "q", "kv"), mask_kind="bool"),
    Case("bool_mask_per_key", mask=PADDING, mask_kind="bool"),
    Case("bool_mask_causal", q_len=19, mask=PADDING, mask_kind="bool", attributes={"is_causal": 1}),
    Case("nothing_allowed", mask=("q", "kv"), mask_kind="none_allowed"),
    Case("nonpad", nonpad=(19, 8)),
    Case("nonpad_causal", nonpad=(19, 8), attributes={"is_causal": 1}),
    Case("nonpad_causal_short", nonpad=(3, 6), attributes={"is_causal": 1}),
    Case("nonpad_wide_window", nonpad=(3, 1), attributes={"right_window_size": 30}),  # wider than the keys are many
    Case("window", q_len=19, attributes={"left_window_size": 5, "right_window_size": 2}),
    Case("window_causal_past", past_len=9, attributes={"left_window_size": 4, "is_causal": 1}),
    Case("softcap_mask_causal", q_len=19, mask=("h", "q", "kv"), attributes={"softcap": 2.0, "is_causal": 1}),
)
