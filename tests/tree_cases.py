"""Inputs for strategy `tree`: keys in loose groups, as trained models have them, so that there is something to choose."""

from dataclasses import dataclass, field

import numpy as np

DEFAULTS = {"strategy": "tree", "num_samples": [64], "control_variate": 0, "residual": "none"}


@dataclass(frozen=True)
class TreeCase:
    name: str
    batch: int = 1
    q_heads: int = 2
    kv_heads: int = 2
    q_len: int = 96
    kv_len: int = 400
    head_size: int = 16
    v_head_size: int = 16
    past_len: int = 0
    mask: str | None = None  # padding: of each batch item, as "bool" or "float"; "query": differs between queries
    nonpad: tuple | None = None
    attributes: dict = field(default_factory=dict)

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, len(self.name)])

        def grouped(heads, length, size, strength):
            centres = rng.standard_normal((self.batch, heads, 12, size)) * strength
            group = rng.integers(0, 12, (self.batch, heads, length))
            return (np.take_along_axis(centres, group[..., None], 2) + rng.standard_normal((*group.shape, size))).astype(
                np.float32
            )

        length = self.past_len + self.kv_len
        keys, values = (
            grouped(self.kv_heads, length, self.head_size, 1.5),
            grouped(self.kv_heads, length, self.v_head_size, 1),
        )
        feeds = {"Q": grouped(self.q_heads, self.q_len, self.head_size, 1.0), "K": keys, "V": values}
        if self.past_len:
            feeds |= {"past_key": keys[:, :, : self.past_len], "past_value": values[:, :, : self.past_len]}
            feeds |= {"K": keys[:, :, self.past_len :], "V": values[:, :, self.past_len :]}
            feeds = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        if self.mask == "query":
            feeds["attn_mask"] = rng.random((self.q_len, length)) < 0.8
        elif self.mask:
            kept = rng.random((self.batch, 1, 1, length)) < 0.8
            kept[..., -length // 5 :] = False
            feeds["attn_mask"] = (
                kept if self.mask == "bool" else np.where(kept, 0, np.finfo(np.float32).min).astype(np.float32)
            )
        if self.nonpad:
            feeds["nonpad_kv_seqlen"] = np.array(self.nonpad, np.int64)
        return feeds

    def all_attributes(self, **more) -> dict:
        return {**DEFAULTS, **self.attributes, **more}


CASES = (
    TreeCase("plain"),
    TreeCase("one_key_in_the_last_cluster", kv_len=401),
    TreeCase("odd_sizes", q_len=77, kv_len=409, head_size=13, v_head_size=21),
    TreeCase("grouped_heads", q_heads=6, kv_heads=2, head_size=32),
    TreeCase("wide_heads", head_size=80, v_head_size=144, q_heads=1, kv_heads=1),
    TreeCase("one_budget_per_head", attributes={"num_samples": [32, 150]}),
    TreeCase("batch", batch=2, q_len=33),
    TreeCase("past", past_len=150, kv_len=300),
    TreeCase("bool_padding", batch=2, mask="bool"),
    TreeCase("float_padding", batch=2, mask="float"),
    TreeCase("nonpad", batch=2, nonpad=(400, 290)),
    TreeCase("causal", q_len=1500, kv_len=1500, attributes={"is_causal": 1}),
    TreeCase("causal_past", q_len=64, kv_len=64, past_len=1000, attributes={"is_causal": 1}),
    TreeCase("causal_padding", q_len=1500, kv_len=1500, mask="bool", attributes={"is_causal": 1}),
    TreeCase("scale", attributes={"scale": 0.4}),
    TreeCase("unbiased", attributes={"residual": "unbiased"}),
    TreeCase("james_stein", attributes={"residual": "james_stein"}),
    TreeCase("tolerance", q_len=1024, kv_len=1024, attributes={"error_tolerance": 0.5, "num_samples": [16]}),
)
EXACT_CASES = (
    TreeCase("few_queries", q_len=31),
    TreeCase("few_keys", kv_len=255),
    TreeCase("dense", attributes={"num_samples": [201]}),
    TreeCase("softcap", attributes={"softcap": 5.0}),
    TreeCase("window", attributes={"left_window_size": 50}),
    TreeCase("mask_by_query", mask="query"),
    TreeCase("mostly_its_own_chunk", q_len=1100, kv_len=1100, attributes={"is_causal": 1}),
    TreeCase("few_queries_for_a_tolerance", q_len=1023, kv_len=1100, attributes={"error_tolerance": 0.9}),
    TreeCase("few_keys_for_a_tolerance", q_len=1024, kv_len=1024, attributes={"error_tolerance": 0.19}),
)
