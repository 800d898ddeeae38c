"""nn.MultiheadAttention and QuantumMultiheadAttention side by side: settings, cases, and the comparison."""

import torch
from torch import nn

from qexport.nn import QuantumMultiheadAttention

WIDTH, HEADS, QUERIES, KEYS, BATCH = 24, 4, 5, 7, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SETTINGS = {
    "classical": {"quantum_backend": "classical"},
    "exact-kernel": {"quantum_backend": "exact", "backend": "kernel"},
    "exact-reference": {"quantum_backend": "exact", "backend": "reference"},
    "stratified-kernel": {"quantum_backend": "stratified", "num_samples": KEYS + 2, "backend": "kernel"},
    "stratified-reference": {"quantum_backend": "stratified", "num_samples": KEYS + 2, "backend": "reference"},
}
# Constructor arguments, then what forward gets: `self` query = key = value, `flat` unbatched; masks by shape and type.
CASES = {
    "self": ({}, {"self": True}),
    "cross": ({}, {}),
    "batch_first": ({"batch_first": True}, {}),
    "batch_first_self": ({"batch_first": True}, {"self": True}),
    "one_item": ({}, {"batch": 1}),
    "empty_batch": ({}, {"batch": 0}),
    "no_keys": ({}, {"keys": 0}),
    "one_query": ({}, {"queries": 1}),
    "unbatched": ({}, {"flat": True}),
    "unbatched_batch_first": ({"batch_first": True}, {"flat": True, "self": True}),
    "no_bias": ({"bias": False}, {}),
    "no_bias_self": ({"bias": False, "batch_first": True}, {"self": True}),
    "kdim_vdim": ({"kdim": 10, "vdim": 14}, {}),
    "kdim_alone_no_bias": ({"kdim": 10, "bias": False}, {}),
    "bias_kv": ({"add_bias_kv": True}, {}),
    "zero_attn": ({"add_zero_attn": True}, {}),
    "both_added": ({"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}, {"self": True}),
    "added_masked": ({"add_bias_kv": True, "add_zero_attn": True}, {"attn": "bool", "padding": "bool"}),
    "added_float_masks": ({"add_bias_kv": True, "kdim": 9}, {"attn": "float3", "padding": "float"}),
    "three_heads": ({"num_heads": 3}, {}),
    "one_head": ({"num_heads": 1}, {"attn": "bool3"}),
    "padding_bool": ({}, {"padding": "bool"}),
    "padding_float": ({"batch_first": True}, {"padding": "float"}),
    "mask_bool": ({}, {"attn": "bool"}),
    "mask_float": ({}, {"attn": "float"}),
    "mask_bool_per_head": ({}, {"attn": "bool3"}),
    "mask_float_per_head": ({"batch_first": True}, {"attn": "float3"}),
    "both_bool": ({}, {"attn": "bool", "padding": "bool"}),
    "both_bool_per_head": ({}, {"attn": "bool3", "padding": "bool"}),
    "both_float": ({}, {"attn": "float", "padding": "float"}),
    "bool_mask_float_padding": ({}, {"attn": "bool", "padding": "float"}),
    "float_mask_bool_padding": ({}, {"attn": "float3", "padding": "bool"}),
    "unbatched_masks": ({}, {"flat": True, "attn": "bool", "padding": "bool"}),
    "unbatched_mask_per_head": ({}, {"flat": True, "attn": "float3"}),
    "causal": ({"batch_first": True}, {"self": True, "causal": True}),
    "causal_padded": ({}, {"self": True, "causal": True, "padding": "bool"}),
    "causal_cross": ({}, {"causal": True}),
    "dropout_off_in_eval": ({"dropout": 0.5}, {"attn": "bool"}),
}


def modules(setting, *, dtype=torch.float32, num_heads=HEADS, **arguments):
    """(torch's module, ours with the same state), in evaluation."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, num_heads, dtype=dtype, **arguments).eval()
    for parameter in theirs.parameters():  # torch begins with biases of 0, which hide mistakes
        nn.init.normal_(parameter, std=0.3)
    ours = QuantumMultiheadAttention(WIDTH, num_heads, dtype=dtype, **arguments, **SETTINGS[setting]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def call(module, dtype=torch.float32, **case):
    """The arguments of a forward of one of CASES, the same for both modules."""
    g = torch.Generator().manual_seed(1)
    batch, queries, keys = case.get("batch", BATCH), case.get("queries", QUERIES), case.get("keys", KEYS)
    queries = keys if case.get("self") else queries
    batch_first, flat = module.batch_first, case.get("flat")
    batch = 1 if flat else batch

    def rows(length, size):
        x = torch.randn(batch, length, size, generator=g).to(dtype)
        return x[0] if flat else x if batch_first else x.transpose(0, 1).contiguous()

    query = rows(queries, WIDTH)
    inputs = [query] * 3 if case.get("self") else [query, rows(keys, module.kdim), rows(keys, module.vdim)]
    masks = {}
    if kind := case.get("attn"):
        shape = (batch * module.num_heads, queries, keys) if kind.endswith("3") else (queries, keys)
        masks["attn_mask"] = mask(kind.removesuffix("3"), shape, dtype, g)
    if kind := case.get("padding"):
        masks["key_padding_mask"] = mask(kind, (keys,) if flat else (batch, keys), dtype, g)
    if case.get("causal"):
        masks["attn_mask"] = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        masks["is_causal"] = True
    return inputs, masks


def mask(kind, shape, dtype, generator):
    """True, or -inf, at a third of the places, never at the first key."""
    hidden = torch.rand(shape, generator=generator) < 1 / 3
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    return torch.randn(shape, generator=generator).masked_fill(hidden, -torch.inf).to(dtype)


def assert_same(ours, theirs, dtype=torch.float32):
    """(output, weights or None) of both: equal types and shapes, values up to rounding."""
    for name, a, b in zip(("output", "weights"), ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            scale = b.abs().max().item() if b.numel() else 1
            torch.testing.assert_close(
                a, b, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1), msg=lambda m, n=name: f"{n}: {m}"
            )
