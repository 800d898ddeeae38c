"""What `map_attention` returns: the attention of both models and what is computed from it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from qexport.documents import make_document


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """H = -sum p ln p over the last axis, in nats; 0 where all probability is on one key."""
    p = probabilities.astype(np.float64)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return -(p * logs).sum(axis=-1) + 0.0  # + 0.0: no negative zero


@dataclass
class SiteMap:
    """One attention on one input item; padding is left out.

    `heads` are the numbers of the query heads in the arrays. `classical` and `sampled` are the attention probabilities
    (heads, queries, keys), float32, in the classical model and in the sampled one. The op samples values, never
    probabilities, so these differ only by what sampling in earlier layers did to the queries and keys; at the first site
    they are equal.
    `own_error` and `propagated_error` (heads,) are the relative Frobenius errors of the heads' outputs for one seed: of the
    site alone, fed with the classical model's values, and as it runs through the sampled model.
    """

    name: str
    layer: int
    module: str | None
    strategy: str
    heads: list[int]
    queries: list[str]
    keys: list[str]
    classical: np.ndarray = field(repr=False)
    sampled: np.ndarray = field(repr=False)
    own_error: np.ndarray = field(repr=False)
    propagated_error: np.ndarray = field(repr=False)

    @cached_property
    def entropy(self) -> np.ndarray:
        """Entropy of each row of the classical attention in nats, (heads, queries)."""
        return entropy(self.classical)

    @property
    def support(self) -> np.ndarray:
        """exp(entropy), (heads, queries): how many keys a query looks at, as many equal ones would have that entropy."""
        return np.exp(self.entropy)

    @property
    def difference(self) -> np.ndarray:
        """sampled - classical, (heads, queries, keys)."""
        return self.sampled - self.classical

    @property
    def moved(self) -> np.ndarray:
        """Total variation distance of the sampled model's attention to the classical one, half the sum of |difference| over
        the keys, mean over the queries, (heads,): the share of a row that looks elsewhere, 0 to 1."""
        return 0.5 * np.abs(self.difference).sum(axis=-1, dtype=np.float64).mean(axis=-1)

    @property
    def top(self) -> float:
        """The largest probability of both models."""
        return float(max(self.classical.max(), self.sampled.max()))

    @property
    def top_difference(self) -> float:
        """The largest difference, of either sign; 0 where both models are equal."""
        return float(np.abs(self.difference).max())

    def measures(self) -> dict[str, np.ndarray]:
        """The figures of each head, (heads,), by their key in MEASURES."""
        return {
            "entropy": self.entropy.mean(axis=-1),
            "support": self.support.mean(axis=-1),
            "moved": self.moved,
            "own_error": self.own_error,
            "propagated_error": self.propagated_error,
        }


def largest_in_blocks(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A matrix in blocks of rows x columns cells, each as its entry of the largest size: what a mean would fade is kept."""
    down, across = -(-values.shape[0] // rows), -(-values.shape[1] // columns)
    room = np.zeros((down * rows, across * columns), values.dtype)
    room[: values.shape[0], : values.shape[1]] = values
    cells = room.reshape(down, rows, across, columns).transpose(0, 2, 1, 3).reshape(down, across, -1)
    return np.take_along_axis(cells, np.abs(cells).argmax(axis=-1)[..., None], axis=-1)[..., 0]


# What there is to say of a head: key -> title, shown in the figures and on the page. Shares are shown in percent.
MEASURES = {
    "entropy": "entropy of the attention (nats)",
    "support": "effective support exp(H) (keys)",
    "moved": "attention that looks elsewhere (% of a row)",
    "own_error": "error of the output, own (%)",
    "propagated_error": "error of the output, in the model (%)",
}
SHARES = ("moved", "own_error", "propagated_error")


@dataclass
class AttentionMaps:
    """The attention of a bundle's sites on some input items: `items[i]` has one `SiteMap` per site, in the order in which
    the model computes them. `settings` hold the providers; `files` were written. `to_dict()` is the documented JSON, without
    the maps themselves.
    """

    bundle: str
    data: dict
    seed: int
    items: list[list[SiteMap]] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The figures of every head as plain data; those that are not finite are None."""
        items = []
        for maps in self.items:
            sites = []
            for site in maps:
                keys = ("name", "layer", "module", "strategy", "heads", "queries", "keys")
                figures = {key: [float(x) for x in values] for key, values in site.measures().items()}
                sites.append({key: getattr(site, key) for key in keys} | figures)
            items.append({"sites": sites})
        written = {"items": items, "files": [str(file) for file in self.files]}
        return make_document("attention", self.__dict__ | written)


def site_labels(maps: list[SiteMap]) -> list[str]:
    """Short names of sites: what differs between their modules ("3", "0.encoder_attn"), else the layer's number."""
    parts = [site.module.split(".") if site.module else [] for site in maps]
    if len(maps) < 2 or not all(parts) or len({tuple(part) for part in parts}) < len(parts):
        return [str(site.layer) for site in maps]
    for end, rest in ((0, slice(1, None)), (-1, slice(-1))):
        while all(len(part) > 1 for part in parts) and len({part[end] for part in parts}) == 1:
            parts = [part[rest] for part in parts]
    return [".".join(part) for part in parts]
