"""Names of the positions of queries and keys: tokens where they are known, else numbers."""

from collections.abc import Sequence

from qexport.attention.sizes import Size
from qexport.bundle import Bundle
from qexport.data import open_tokenizer
from qexport.errors import QexportError


class Tokens:
    """Names positions by the token ids of a feed; ids are shown as they are where the tokenizer or its package is absent."""

    def __init__(self, bundle: Bundle):
        self.inputs = [s["name"] for s in bundle.manifest["inputs"] if s["kind"] == "token_ids" and len(s["shape"]) == 2]
        try:
            self.tokenizer, _ = open_tokenizer(bundle)
        except QexportError:
            self.tokenizer = None

    def names(self, feed: dict, item: int, size: Size, queries: Sequence[int], keys: Sequence[int]) -> tuple[list, list]:
        """The names of the positions `queries` and `keys` of a site."""
        of_queries = self._ids(feed, item, size.query_sources, size.queries)
        of_keys = self._ids(feed, item, size.key_sources, size.keys)
        first = [self._name(of_queries, i) for i in queries]
        if size.is_cached and len(keys) >= len(first):  # the last keys are those of the queries
            return first, [str(j) for j in keys[: len(keys) - len(first)]] + first
        return first, [self._name(of_keys, j) for j in keys]

    def _ids(self, feed: dict, item: int, sources: set[str], length: int):
        """The token ids behind queries or keys. Cross attention may have as many keys as queries by chance: the sources tell
        them apart. A decoder hangs on the tokens of its encoder too, and takes its own ones after those."""
        known = [feed[name][item] for name in self.inputs if name in sources and feed[name].shape[1] == length]
        return known[-1] if known else None

    def _name(self, ids, position: int) -> str:
        if ids is None:
            return str(position)
        token = int(ids[position])
        if self.tokenizer is None:
            return str(token)
        # decoded alone a piece loses its marks of bytes and spaces; what is no text alone keeps the vocabulary's name
        text = self.tokenizer.decode([token], skip_special_tokens=False).strip()
        return text if text and "\ufffd" not in text else self.tokenizer.id_to_token(token) or str(token)
