"""Names of the positions of queries and keys: tokens where they are known, else numbers."""

from collections.abc import Sequence

from qexport.attention.sizes import Size
from qexport.bundle import Bundle
from qexport.data import open_tokenizer
from qexport.errors import QexportError


class Tokens:
    """Names positions by the token ids of a feed; ids are shown as they are where the tokenizer or its package is absent."""

    def __init__(self, bundle: Bundle):
        self.specs = [s for s in bundle.manifest["inputs"] if s["kind"] == "token_ids" and len(s["shape"]) == 2]
        self.axes = {dim for spec in bundle.manifest["inputs"] for dim in spec["shape"] if isinstance(dim, str)}
        try:
            self.tokenizer, _ = open_tokenizer(bundle)
        except QexportError:
            self.tokenizer = None

    def names(self, feed: dict, item: int, size: Size, queries: Sequence[int], keys: Sequence[int]) -> tuple[list, list]:
        """The names of the positions `queries` and `keys` of a site."""
        rows = [(spec["shape"][1], feed[spec["name"]][item]) for spec in self.specs]
        of_queries = next((ids for _, ids in rows if len(ids) == size.queries), None)
        if size.key_axis in self.axes:  # cross attention may have as many keys as queries by chance
            of_keys = next((ids for axis, ids in rows if axis == size.key_axis), None)
        else:
            of_keys = of_queries if size.queries == size.keys else None
        first = [self._name(of_queries, i) for i in queries]
        if size.is_cached and len(keys) >= len(first):  # the last keys are those of the queries
            return first, [str(j) for j in keys[: len(keys) - len(first)]] + first
        return first, [self._name(of_keys, j) for j in keys]

    def _name(self, ids, position: int) -> str:
        if ids is None:
            return str(position)
        token = int(ids[position])
        if self.tokenizer is None:
            return str(token)
        # decoded alone a piece loses its marks of bytes and spaces; what is no text alone keeps the vocabulary's name
        text = self.tokenizer.decode([token], skip_special_tokens=False).strip()
        return text if text and "\ufffd" not in text else self.tokenizer.id_to_token(token) or str(token)
