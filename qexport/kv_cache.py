"""A KV cache for a causal language model: the rewrite, what the manifest says of it, and example inputs that have a past."""

from dataclasses import dataclass, field

import numpy as np

from qexport.errors import QexportError, UsageError
from qexport.sources.source import InputSpec, Source

OPSET = 24  # TensorScatter, and nonpad_kv_seqlen of Attention
# 1.24 has no TensorScatter, and up to 1.27 a query of Attention that has nonpad_kv_seqlen sees as if there were no past.
MIN_ONNXRUNTIME = (1, 28)


@dataclass
class KVCache:
    """The cache of a converted model.

    `length` is how many tokens fit; the names are those of graph inputs and outputs, `caches` (past, present) pairs;
    `summaries` are the same for what strategy tree keeps of the caches, where the recipe has it (see
    `qexport.rewrite.summarize_cache`). `stop_tokens` end a text. `prefill` is the feed of the first piece of the example
    text, None when nothing precedes.
    """

    length: int
    token_ids: str
    past_length: str
    logits: str
    caches: list[tuple[str, str]]
    summaries: list[tuple[str, str]]
    stop_tokens: list[int]
    prefill: dict[str, np.ndarray] | None = field(default=None, repr=False)

    def to_dict(self) -> dict:
        """The manifest's `kv_cache`."""
        keys = ("length", "token_ids", "past_length", "logits", "stop_tokens")
        pairs = {key: [list(pair) for pair in getattr(self, key)] for key in ("caches", "summaries")}
        return {key: getattr(self, key) for key in keys} | pairs

    def fill(self, examples: dict[str, np.ndarray], runner) -> None:
        """Put the caches that the first piece of the example text leaves behind into the examples.

        Args:
            runner: the classical model, a `qexport.conversion_checks.Runner`.
        """
        if self.prefill is not None:
            outputs = runner(self.prefill)
            examples |= {past: outputs[present] for past, present in self.caches}


def add_cache(source: Source, length: int, recipe, left_alone: list) -> None:
    """Give every attention of `source`, which is in its classical form, a cache; its inputs and examples follow.

    Args:
        length: positions of the cache.
        recipe: decides which attentions get a summary of their cache.
        left_alone: attentions that are not in the classical form, which have no cache.

    Raises:
        UsageError: `length` is longer than the model takes.
        QexportError: it is no model of token ids and positions to logits, or one of its attentions cannot have a cache.
    """
    from qexport.rewrite.cache_attention import PAST_LENGTH, cache_attention
    from qexport.rewrite.summarize_cache import add_summaries

    by_kind = {spec.kind: spec for spec in source.inputs}
    if len(source.inputs) != 2 or set(by_kind) != {"token_ids", "position_ids"}:
        listed = ", ".join(f"{spec.name} ({spec.kind})" for spec in source.inputs)
        raise QexportError(
            f"{source.name}: a KV cache needs a model whose inputs are token ids and position ids, both (batch, sequence); "
            f"it has {listed}"
        )
    ids, positions = by_kind["token_ids"], by_kind["position_ids"]
    if len(ids.shape) != 2 or ids.shape != positions.shape or not all(isinstance(dim, str) for dim in ids.shape):
        raise QexportError(
            f"{source.name}: a KV cache needs token ids and position ids of the same dynamic shape (batch, sequence), "
            f"got {ids.shape} and {positions.shape}"
        )
    limit = source.limits.get(ids.shape[1])
    if limit is not None and length > limit:
        raise UsageError(f"kv_cache must be at most {limit}, the longest text that {source.name} takes, got {length}")
    logits = source.model.graph.outputs[0].name
    pairs = []
    if not left_alone:
        pairs, left_alone = cache_attention(source.model, length, ids.name, positions.name)
    if left_alone:
        site = left_alone[0]
        raise QexportError(f"{source.name}: {site.module or site.name} cannot have a KV cache: {site.reason}")
    if not pairs:
        raise QexportError(f"{source.name}: no attention found that could have a KV cache")
    summaries, reason = add_summaries(source.model, recipe)
    if reason:
        source.notes.append(f"a step of decoding reads the whole cache: {reason}")
    pasts = {past for past, _ in (*pairs, *summaries)}
    source.inputs = [ids, InputSpec(PAST_LENGTH, "int64", [ids.shape[0]], "past_length", length)]
    for value in source.model.graph.inputs:
        if value.name in pasts:
            shape = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            source.inputs.append(InputSpec(value.name, value.dtype.numpy().name, shape, "cache"))
    source.limits[ids.shape[1]] = length
    source.cache = KVCache(length, ids.name, PAST_LENGTH, logits, pairs, summaries, source.stop_tokens)
    _split_examples(source)


def _split_examples(source: Source) -> None:
    """Cut the example text in two: a first piece that fills the caches, and a second one whose logits are known.

    The rows get pasts of different lengths, as texts in one batch have them.
    """
    cache = source.cache
    ids = source.examples[cache.token_ids][:, : cache.length]
    batch, total = ids.shape
    step = max(1, total // 4)
    past = np.array([max(0, total - step - 2 * row) for row in range(batch)], np.int64)
    empty = {spec.name: _empty(spec, batch) for spec in source.inputs if spec.kind == "cache"}
    if "bfloat16" in {spec.dtype for spec in source.inputs}:  # no onnxruntime runs these on the CPU, so nothing fills them
        past[:] = 0
    if past.max() > 0:
        cache.prefill = {cache.token_ids: ids[:, : past.max()], cache.past_length: np.zeros_like(past), **empty}
    rows = past[:, None] + np.arange(step)
    source.examples = {cache.token_ids: np.take_along_axis(ids, rows, 1), cache.past_length: past, **empty}
    if source.expected is not None:
        logits = source.expected[cache.logits]
        source.expected = {cache.logits: np.take_along_axis(logits, rows[:, :, None], 1)}


def _empty(spec: InputSpec, batch: int) -> np.ndarray:
    import ml_dtypes  # noqa: F401  numpy knows bfloat16 by it

    return np.zeros([batch, *spec.shape[1:]], spec.dtype)
