"""QuantumMultiheadAttention: nn.MultiheadAttention whose attention is sampled."""

import torch
from torch import nn

from qexport.arguments import as_seed, check_tensors
from qexport.errors import UsageError
from qexport.nn.backends import get_backend
from qexport.nn.functional import attend
from qexport.nn.heads import PER_HEAD, columns_of, head_groups
from qexport.nn.masks import check_masks, merged_mask
from qexport.ops import QUANTUM_ATTENTION

# Draws of the heads of one configuration must not repeat those of another: each group counts as a layer of its own.
GROUP_STRIDE = 1 << 16


class QuantumMultiheadAttention(nn.MultiheadAttention):
    """A drop-in for `torch.nn.MultiheadAttention`: its arguments, parameters, state dict, shapes and masks.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as there.
        quantum_backend: `classical` (torch's own attention), or how keys are sampled: `stratified`, `adaptive`, `hybrid`,
            `naive`, `tree` or `exact` (docs/math.md).
        num_samples: keys read per query. A query that sees no more keys than that is computed exactly.
        adaptive_samples: with `stratified`, share the samples out over queries and heads by the entropy of their rows.
        control_variate: sample in proportion to p |v - mean v|, around mean v.
        precision, error_tolerance, residual: of `exact` and `tree`, as in the op table. What the strategy does not read must
            keep its default.
        heads: one dict per head with the keys above, from `quantum_backend` on, where heads differ; what a dict leaves out
            is as above.
        backend: who computes: `auto`, `kernel`, `reference` or an installed one (`qexport.nn.backend_names()`).
        seed: of the draws in evaluation. Training draws a new one from torch's generator in each call.
        layer: number of the module in its model: modules with equal seed and layer draw alike. `number_layers` sets it.

    The weights that `forward` returns are the softmax probabilities that are sampled from. Queries that may attend to no key
    get 0, where torch gives NaN.

    Raises:
        UsageError: one of the arguments after `dtype` has a value outside its limits.
        AssertionError, RuntimeError: as nn.MultiheadAttention.
    """

    # What nn.MultiheadAttention sees of itself while it is built.
    quantum_backend = "classical"

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
        *,
        quantum_backend: str = "stratified",
        num_samples: int = 32,
        adaptive_samples: bool = True,
        control_variate: bool = True,
        precision: str = "fp32",
        error_tolerance: float = 0.0,
        residual: str = "verify_only",
        heads: list[dict] | None = None,
        backend: str = "auto",
        seed: int = 0,
        layer: int = 0,
    ):
        super().__init__(
            *(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        )
        shared = locals()
        shared = {name: shared[name] for name in PER_HEAD}
        self.head_groups = head_groups(shared, heads, num_heads)
        if backend != "auto":
            get_backend(backend)
        self.quantum_backend = quantum_backend
        self.backend = backend
        self.layer = QUANTUM_ATTENTION.attribute("layer").check(layer, "QuantumMultiheadAttention")
        self.register_buffer("seed", torch.tensor(as_seed(seed), dtype=torch.int64, device=device), persistent=False)

    @classmethod
    def from_classical(cls, module: nn.MultiheadAttention, **quantum) -> "QuantumMultiheadAttention":
        """A sampling module in the place of a classical one, in the same mode (training or evaluation).

        Args:
            module: whose parameters it takes: shared, not copied.
            quantum: the keyword arguments of this class, from `quantum_backend` on.

        Raises:
            UsageError: another module, a subclass too, or one of the keyword arguments has a value outside its limits.
        """
        if not is_plain(module):
            more = ", whose own part would be lost" if isinstance(module, nn.MultiheadAttention) else ""
            raise UsageError(f"from_classical takes an nn.MultiheadAttention, got {type(module).__name__}{more}")
        weight = module.out_proj.weight
        new = cls(
            *(module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None),
            *(module.bias_k is not None, module.add_zero_attn, module.kdim, module.vdim, module.batch_first),
            device="meta",
            dtype=weight.dtype,
            **quantum,
        )
        for name, parameter in module.named_parameters(recurse=False):
            setattr(new, name, parameter)
        new.out_proj = module.out_proj
        new.seed = torch.tensor(quantum.get("seed", 0), dtype=torch.int64, device=weight.device)
        return new.train(module.training)

    @property
    def _qkv_same_embed_dim(self):
        # torch's encoder layers read this before they take a fused path that goes past forward().
        return self._packed and self.quantum_backend == "classical"

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value):
        self._packed = value

    def extra_repr(self):
        return f"{self.embed_dim}, {self.num_heads}, quantum_backend={self.quantum_backend!r}, backend={self.backend!r}"

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        """As nn.MultiheadAttention.forward.

        Args:
            query: (q_len, batch, embed_dim), (batch, q_len, embed_dim) with batch_first, or (q_len, embed_dim).
            key: likewise, of kv_len and kdim.
            value: likewise, of kv_len and vdim.
            key_padding_mask: (batch, kv_len) or (kv_len,), bool (true = a key to ignore) or added to the scores.
            need_weights: return the probabilities too; they cost (batch, num_heads, q_len, kv_len) numbers.
            attn_mask: (q_len, kv_len) or (batch * num_heads, q_len, kv_len), bool (true = not allowed) or added.
            average_attn_weights: mean of the probabilities over the heads in place of all of them.
            is_causal: a promise that attn_mask is the causal one, which must be given too.

        Returns:
            The output, shaped as `query`, and the probabilities (batch, q_len, kv_len), or
                (batch, num_heads, q_len, kv_len), or None.

        Raises:
            AssertionError, RuntimeError: shapes or types that do not fit, as in nn.MultiheadAttention.
            UsageError: no tensors.
        """
        check_tensors(
            {"query": query, "key": key, "value": value}, {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        )
        arguments = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        if self.quantum_backend == "classical":
            return super().forward(query, key, value, *arguments)
        if query.is_nested:
            return self._forward_nested(query, key, value, *arguments[:3])
        batched = nn.functional._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint, as nn.MultiheadAttention does")
        self._check_sizes(query, key, value)
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        check_masks(attn_mask, key_padding_mask, query.shape[0], self.num_heads, query.shape[1], key.shape[1])
        q, k, v = self._project(query, key, value)
        k, v, added = self._add_keys(k, v)
        # Keys that are added come last, where a causal query must see them: then the mask itself is used, and no means of
        # values, which hold later ones.
        causal = is_causal and not added
        order = {"is_causal": 1} if causal else {"control_variate": 0} if is_causal else {}
        mask = merged_mask(None if causal else attn_mask, key_padding_mask, q, self.num_heads, added)
        output, weights = self._attend(q, k, v, mask, order, need_weights)
        output = self.out_proj(output)
        if need_weights and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), weights.squeeze(0) if need_weights else None
        return output if self.batch_first else output.transpose(0, 1), weights

    def _forward_nested(self, query, key, value, key_padding_mask, need_weights, attn_mask):
        """Self-attention on the nested tensors that nn.TransformerEncoder makes of a padded batch."""
        if not (query is key and key is value) or key_padding_mask is not None or attn_mask is not None or need_weights:
            raise AssertionError("nested tensors are for self-attention without masks and with need_weights=False")
        padded = query.to_padded_tensor(0.0)
        lengths = torch.tensor([len(rows) for rows in query.unbind()], device=query.device)
        padding = torch.arange(padded.shape[1], device=query.device) >= lengths[:, None]
        if not self.batch_first:
            padded = padded.transpose(0, 1)
        output, _ = self.forward(padded, padded, padded, padding, need_weights=False)
        output = output if self.batch_first else output.transpose(0, 1)
        return torch._nested_tensor_from_mask(output, ~padding), None

    def _check_sizes(self, query, key, value):
        """Raise what nn.MultiheadAttention raises for sizes that do not fit, naming the argument."""
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"query: was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        compared = slice(None) if self._packed else slice(-1)
        if key.shape[compared] != value.shape[compared]:
            raise AssertionError(f"key shape {tuple(key.shape)} does not match value shape {tuple(value.shape)}")
        for name, tensor, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            if tensor.shape[-1] != size:
                kind = RuntimeError if self._packed else AssertionError
                raise kind(f"{name}: was expecting embedding dimension of {size}, but got {tensor.shape[-1]}")
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            got = query.shape[batch], key.shape[batch]
            raise RuntimeError(f"query and key must have the same batch size, got {got[0]} and {got[1]}")

    def _project(self, query, key, value):
        """q, k, v of (batch, length, embed_dim)."""
        if not self._packed:
            biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            return [nn.functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        if query is key and key is value:
            return nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        weights = self.in_proj_weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [nn.functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _add_keys(self, k, v):
        """k and v with the learnt key and the zero key behind them, and how many those are."""
        batch = k.shape[0]
        pairs = []
        if self.bias_k is not None:
            pairs.append([b.to(k.dtype).expand(batch, 1, -1) for b in (self.bias_k, self.bias_v)])
        if self.add_zero_attn:
            pairs.append([x.new_zeros(batch, 1, self.embed_dim) for x in (k, v)])
        if not pairs:
            return k, v, 0
        return torch.cat([k, *(a for a, _ in pairs)], 1), torch.cat([v, *(b for _, b in pairs)], 1), len(pairs)

    def _attend(self, q, k, v, mask, order, need_weights):
        seed = torch.randint(2**63 - 1, (), device=self.seed.device) if self.training else self.seed
        dropout_p = self.dropout if self.training else 0.0
        outputs, weights = [None] * self.num_heads, [None] * self.num_heads
        for number, (attributes, members) in enumerate(self.head_groups):
            rows = [columns_of(x, members, self.num_heads) for x in (q, k, v)]
            per_head = mask is not None and mask.shape[1] > 1
            Y, p = attend(
                *rows,
                mask[:, members] if per_head and len(members) < self.num_heads else mask,
                seed,
                self.backend,
                dropout_p,
                need_weights,
                attributes
                | order
                | {
                    "layer": self.layer + GROUP_STRIDE * number,
                    "q_num_heads": len(members),
                    "kv_num_heads": len(members),
                },
            )
            if len(members) == self.num_heads:
                return Y, p
            for place, head in enumerate(members):
                outputs[head] = Y[..., place * self.head_dim : (place + 1) * self.head_dim]
                weights[head] = p[:, place] if need_weights else None
        return torch.cat(outputs, -1), torch.stack(weights, 1) if need_weights else None


def is_plain(module) -> bool:
    """Whether a module computes what nn.MultiheadAttention does; a subclass, as parametrizations make one, may do more."""
    return type(module) in (nn.MultiheadAttention, QuantumMultiheadAttention)


def check_module(model) -> None:
    """Check that a model is a torch module.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def number_layers(model: nn.Module) -> None:
    """Number the QuantumMultiheadAttention modules of a model in their order, so that no two draw alike at one seed.

    `replace_attention` does so by itself; call this after building a model out of such modules.
    """
    check_module(model)
    modules = (m for m in model.modules() if isinstance(m, QuantumMultiheadAttention))
    for layer, module in enumerate(modules):
        module.layer = layer
