"""Runs a bundle's two models on a few inputs and takes the attention probabilities and the outputs of chosen sites.

The probabilities are queries x keys for each head, so their size is found first, by a run without them, and held against
`MEMORY_LIMIT`. Positions that count for nothing are left out, input by input: queries that the mask pads or that see no key,
and keys at either end that no query sees (padding, the free room of a cache).
"""

from dataclasses import dataclass

import numpy as np

from qexport import runtime
from qexport.attention.maps import SiteMap
from qexport.bundle import Bundle
from qexport.data import Inputs, open_tokenizer
from qexport.errors import QexportError, UsageError
from qexport.external_data import load_structure
from qexport.validation.comparison import seeded_feed
from qexport.validation.probes import add_probabilities, beside, open_probe, ordered_sites, sized, watch
from qexport.validation.unpadded import by_head, keep_masks, padded_axis

# Bytes of the probabilities that are held at once: float32, of both models.
MEMORY_LIMIT = 2**30


@dataclass
class _Size:
    """Sizes of a site's probabilities on one feed, and the name of the keys' axis."""

    batch: int
    heads: int
    queries: int
    keys: int
    key_axis: object

    def bytes(self, heads: int | None = None) -> int:
        return 4 * self.batch * (self.heads if heads is None else heads) * self.queries * self.keys


def capture(
    bundle: Bundle, inputs: Inputs, *, layers=None, heads=None, seed: int, library, providers, progress
) -> tuple[list[list[SiteMap]], int]:
    """The maps of each input item, and how many of the chosen sites could not be observed.

    Args:
        layers, heads: numbers of the sites and of their query heads; all when None.

    Raises:
        UsageError: a layer or head that is not there.
        QexportError: no site can be observed, or the maps are larger than MEMORY_LIMIT.
    """
    structure, classical = load_structure(bundle.model_path), load_structure(bundle.classical_path)
    sites = ordered_sites(structure, ordered_sites(classical, bundle.manifest["sites"]))
    sites, asked = _chosen(bundle, sites, layers)
    hybrid, local, _ = beside(bundle.classical_path, structure, sites, bundle.seed_input)
    sites = [site for site in sites if site["name"] in local]
    if not sites:
        raise QexportError(f"{bundle.path}: has no attention that can be observed, outside of subgraphs; map another bundle")
    progress("measuring how large the maps are")
    sizes, cached = _sizes(bundle, inputs, hybrid, local, providers)
    _check_heads(sites, sizes, heads)
    _check_memory(sites, sizes, heads)

    progress("running the classical model")
    probabilities = add_probabilities(hybrid, local, heads)
    names = [name for site in sites for name in (site["output"], local[site["name"]], probabilities[site["name"]])]
    base = _run(bundle, inputs, hybrid, bundle.classical_path, names, seed, library, providers)
    progress("running the converted model")
    model, outputs = watch(bundle.model_path, sites), {site["name"]: site["output"] for site in sites}
    probabilities = add_probabilities(model, outputs, heads)
    names = [name for site in sites for name in (site["output"], probabilities[site["name"]])]
    sampled = _run(bundle, inputs, model, bundle.model_path, names, seed, library, providers)

    tokens = _Tokens(bundle)
    items = []
    for i, feed in enumerate(inputs.feeds):
        masks = keep_masks(bundle.manifest, feed)
        for item in range(sizes[i][sites[0]["name"]].batch):
            maps = []
            for k, site in enumerate(sites):
                size = sizes[i][site["name"]]
                values = (*(base[i][3 * k + j] for j in range(3)), *(sampled[i][2 * k + j] for j in range(2)))
                padded = padded_axis(values[0][0].shape, values[0][1], masks)
                arrays = [array[item] for array, _ in values]
                shown = list(range(size.heads)) if heads is None else heads
                rows = None if padded is None else padded[1][item]
                labels = tokens.of(feed, item, size, site["name"] in cached)
                maps.append(_site_map(site, shown, size.heads, arrays, rows, labels))
            items.append(maps)
    return items, asked - len(sites)


def _chosen(bundle: Bundle, sites: list[dict], layers) -> tuple[list[dict], int]:
    """The sites of the layers asked for, and how many were asked for."""
    known = [site["layer"] for site in bundle.manifest["sites"]]
    if layers is None:
        return sites, len(known)
    for layer in layers:
        if layer not in known:
            raise UsageError(f"layers: {layer} is not there; {bundle.path} has the attentions {_span(known)}")
    return [site for site in sites if site["layer"] in layers], len(layers)


def _span(numbers: list[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}" if numbers else "of no layer"


def _sizes(bundle, inputs, hybrid, local, providers) -> tuple[list[dict[str, _Size]], set[str]]:
    """For each feed the sizes by site name, and the names of the sites that read keys of earlier steps."""
    model, sites = sized(hybrid, local)
    names = sorted({entry[key] for entry in sites.values() for key in ("Q", "K", "past_key") if entry[key]})
    found = []
    with open_probe(model, bundle.classical_path, library=False, providers=providers) as opened:
        symbols = {value.name: value.shape for value in opened.get_outputs()}
        for feed in inputs.feeds:
            shapes = dict(zip(names, runtime.run(opened, names, feed), strict=True))
            found.append({name: _size(entry, shapes, symbols) for name, entry in sites.items()})
    return found, {name for name, entry in sites.items() if entry["is_cached"]}


def _size(entry: dict, shapes: dict, symbols: dict) -> _Size:
    q, k = shapes[entry["Q"]], shapes[entry["K"]]
    past = shapes[entry["past_key"]][2] if entry["past_key"] else 0
    heads = q[1] if len(q) == 4 else entry["q_num_heads"]
    names = symbols.get(entry["key"]) or []
    axis = names[-2] if len(names) == len(k) and not past else None
    return _Size(int(q[0]), int(heads), int(q[-2]), int(k[-2] + past), axis)


def _check_heads(sites, sizes, heads) -> None:
    for site in sites:
        count = sizes[0][site["name"]].heads
        for head in heads or []:
            if head >= count:
                raise UsageError(f"heads: {head} is not there; layer {site['layer']} has the heads 0 to {count - 1}")


def _check_memory(sites, sizes, heads) -> None:
    """Both models' maps of all sites are held, and one site's of all heads while it is computed."""
    shown = len(heads) if heads is not None else None
    held = 2 * sum(size.bytes(shown) for by_site in sizes for size in by_site.values())
    largest = max((size for by_site in sizes for size in by_site.values()), key=_Size.bytes)
    need = max(held, largest.bytes())
    if need <= MEMORY_LIMIT:
        return
    count = shown or largest.heads
    what = f"{len(sites)} layers x {count} heads x {largest.queries} queries x {largest.keys} keys"
    inputs = sum(by_site[sites[0]["name"]].batch for by_site in sizes)
    mend = "shorten the input (--seq)" + (", give fewer" if inputs > 1 else "")
    mend += " or choose with --layers and --heads" if held > largest.bytes() else ""
    raise QexportError(
        f"maps of {inputs} inputs x {what} need {need / 2**30:.1f} GiB, the limit is {MEMORY_LIMIT / 2**30:g} GiB; {mend}"
    )


def _run(bundle, inputs, model, path, names, seed, library, providers) -> list[list[tuple[np.ndarray, list]]]:
    """For each feed the values `names`, each with its symbolic shape."""
    with open_probe(model, path, library=library, providers=providers) as opened:
        symbols = {value.name: value.shape for value in opened.get_outputs()}
        runs = [runtime.run(opened, names, seeded_feed(feed, bundle.seed_input, seed)) for feed in inputs.feeds]
    return [[(array, symbols[name]) for name, array in zip(names, values, strict=True)] for values in runs]


def _site_map(site: dict, heads: list[int], all_heads: int, arrays, rows, labels) -> SiteMap:
    """One site on one item.

    Args:
        arrays: classical output, the output of the site sampled alone, classical probabilities, output in the sampled model
            and probabilities there, of the item.
        rows: which queries the mask keeps, all when None.
        labels: called with the queries kept and the keys kept; the tokens of both.
    """
    exact, alone, classical, run_through, sampled = arrays
    queries = classical.any(axis=(0, 2)) if rows is None else rows & classical.any(axis=(0, 2))
    classical, sampled = (p[:, queries].astype(np.float32) for p in (classical, sampled))
    if not queries.any():
        raise QexportError(f"no query of attention {site['name']} sees a key; the mask of this input hides every position")
    seen = np.flatnonzero(classical.any(axis=(0, 1)) | sampled.any(axis=(0, 1)))
    keys = np.arange(seen[0], seen[-1] + 1)
    padded = (1, queries[None])
    exact, alone, run_through = (
        by_head(y[None], all_heads, (2, queries[None]) if y.ndim == 3 else padded)[heads].astype(np.float64)
        for y in (exact, alone, run_through)
    )
    query_tokens, key_tokens = labels(np.flatnonzero(queries), keys)
    return SiteMap(
        **{key: site[key] for key in ("name", "layer", "module", "strategy")},
        heads=heads,
        queries=query_tokens,
        keys=key_tokens,
        classical=classical[:, :, keys],
        sampled=sampled[:, :, keys],
        own_error=_relative_error(alone, exact),
        propagated_error=_relative_error(run_through, exact),
    )


def _relative_error(value: np.ndarray, base: np.ndarray) -> np.ndarray:
    """|value - base| / |base| of each row (relative Frobenius error of a head); 0 where both vanish."""
    norm, error = np.linalg.norm(base, axis=1), np.linalg.norm(value - base, axis=1)
    return np.divide(error, norm, out=np.where(error > 0, np.inf, 0.0), where=norm > 0)


class _Tokens:
    """Names of positions: tokens where they are known, else numbers."""

    def __init__(self, bundle: Bundle):
        self.specs = [s for s in bundle.manifest["inputs"] if s["kind"] == "token_ids" and len(s["shape"]) == 2]
        self.axes = {dim for spec in bundle.manifest["inputs"] for dim in spec["shape"] if isinstance(dim, str)}
        self.tokenizer = None
        if bundle.tokenizer_path.is_file():
            try:
                self.tokenizer, _ = open_tokenizer(bundle)
            except QexportError:  # the package tokenizers is absent: ids are shown
                self.tokenizer = None

    def of(self, feed: dict, item: int, size: _Size, is_cached: bool):
        """A function from the positions of queries and keys that are kept to the names of both."""
        rows = [(spec["shape"][1], feed[spec["name"]][item]) for spec in self.specs]
        queries = next((ids for _, ids in rows if len(ids) == size.queries), None)
        if size.key_axis in self.axes:  # cross attention may have as many keys as queries by chance
            keys = next((ids for axis, ids in rows if axis == size.key_axis), None)
        else:
            keys = queries if size.queries == size.keys else None

        def names(kept_queries, kept_keys):
            first = [self._name(queries, i) for i in kept_queries]
            if is_cached and len(kept_keys) >= len(first):  # the last keys are those of the queries
                return first, [str(j) for j in kept_keys[: len(kept_keys) - len(first)]] + first
            return first, [self._name(keys, j) for j in kept_keys]

        return names

    def _name(self, ids, position: int) -> str:
        if ids is None:
            return str(position)
        token = int(ids[position])
        if self.tokenizer is None:
            return str(token)
        # decoded alone a piece loses its marks of bytes and spaces; what is no text alone keeps the vocabulary's name
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        piece = self.tokenizer.id_to_token(token)
        return text.strip() if text.strip() and "\ufffd" not in text else piece or str(token)
