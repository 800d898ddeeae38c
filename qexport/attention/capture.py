"""Runs a bundle's two models on a few inputs and takes the attention probabilities and the outputs of chosen sites.

Positions that count for nothing are left out, input by input: queries that the mask pads or that see no key, and keys at
either end that no query sees (padding, the free room of a cache).
"""

import numpy as np

from qexport import runtime
from qexport.attention.maps import SiteMap
from qexport.attention.sizes import check_heads, check_memory, measure_sizes
from qexport.attention.tokens import Tokens
from qexport.bundle import Bundle
from qexport.errors import QexportError, UsageError
from qexport.external_data import load_structure
from qexport.feeds import Inputs
from qexport.validation.comparison import seeded_feed
from qexport.validation.probes import add_probabilities, beside, open_probe, ordered_sites, watch
from qexport.validation.unpadded import by_head, keep_masks, padded_axis


def capture(
    bundle: Bundle, inputs: Inputs, *, layers=None, heads=None, seed: int, library, where: dict, progress
) -> tuple[list[list[SiteMap]], int]:
    """The maps of each input item, and how many of the chosen sites could not be observed.

    Args:
        layers, heads: numbers of the sites and of their query heads; all when None.
        where: the arguments `providers` and `allow_fallback` of the sessions.

    Raises:
        UsageError: a layer or head that is not there.
        QexportError: no site can be observed, or the maps are larger than `sizes.MEMORY_LIMIT`.
    """
    structure, classical = load_structure(bundle.model_path), load_structure(bundle.classical_path)
    chosen = _chosen(bundle, layers)
    sites = ordered_sites(structure, ordered_sites(classical, chosen))
    hybrid, local, _ = beside(bundle.classical_path, structure, sites)
    sites = [site for site in sites if site["name"] in local]
    if not sites:
        raise QexportError(f"{bundle.path}: has no attention that can be observed, outside of subgraphs; map another bundle")
    progress("measuring how large the maps are", 0.0)
    sizes = measure_sizes(bundle, inputs, hybrid, local, where["providers"])
    check_heads(sites, sizes, heads)
    check_memory(sizes, heads)

    outputs = {site["name"]: site["output"] for site in sites}
    model = watch(bundle.model_path, sites)
    of_classical, of_model = add_probabilities(hybrid, local, heads), add_probabilities(model, outputs, heads)
    tokens, items = Tokens(bundle), []
    with (
        open_probe(hybrid, bundle.classical_path, library=library, **where) as base,
        open_probe(model, bundle.model_path, library=library, **where) as sampled,
    ):
        for number, (feed, by_site) in enumerate(zip(inputs.feeds, sizes, strict=True), 1):
            progress(f"running both models, {number} of {len(inputs.feeds)}", number / (len(inputs.feeds) + 1))
            masks, batch = keep_masks(bundle.manifest, feed), by_site[sites[0]["name"]].batch
            seeded = seeded_feed(feed, bundle.seed_input, seed)
            exact = _run(base, [*outputs.values(), *local.values(), *of_classical.values()], seeded)
            drawn = _run(sampled, [*outputs.values(), *of_model.values()], seeded)
            symbols = {value.name: value.shape for value in base.get_outputs()}
            maps = [[] for _ in range(batch)]
            for site in sites:
                name, size, output = site["name"], by_site[site["name"]], outputs[site["name"]]
                padded = padded_axis(exact[output].shape, symbols[output], masks)
                values = exact[output], exact[local[name]], drawn[output]
                probabilities = exact.pop(of_classical[name]), drawn.pop(of_model[name])
                for item in range(batch):
                    found = _site_map(
                        site,
                        heads=list(range(size.heads)) if heads is None else heads,
                        all_heads=size.heads,
                        rows=None if padded is None else padded[1][item],
                        values=[array[item : item + 1] for array in values],
                        probabilities=[array[item] for array in probabilities],
                        names=lambda *kept, size=size, item=item, feed=feed: tokens.names(feed, item, size, *kept),
                    )
                    maps[item].append(found)
            items += maps
    return items, len(chosen) - len(sites)


def _chosen(bundle: Bundle, layers: list[int] | None) -> list[dict]:
    """The sites of the layers asked for."""
    sites = bundle.manifest["sites"]
    known = [site["layer"] for site in sites]
    for layer in layers or []:
        if layer not in known:
            there = f"the layers {min(known)} to {max(known)}" if known else "no attention"
            raise UsageError(f"layers: {layer} is not there; {bundle.path} has {there}")
    return [site for site in sites if layers is None or site["layer"] in layers]


def _run(opened, names: list[str], feed: dict) -> dict[str, np.ndarray]:
    return dict(zip(names, runtime.run(opened, names, feed), strict=True))


def _site_map(site: dict, *, heads: list[int], all_heads: int, rows, values, probabilities, names) -> SiteMap:
    """One site on one item.

    Args:
        rows: which queries the mask keeps, all when None.
        values: outputs of the classical attention, of the site sampled alone and of the site in the sampled model, with a
            batch of one.
        probabilities: (heads, queries, keys), in the classical model and in the sampled one.
        names: called with the queries and the keys that are kept; the tokens of both.
    """
    classical, sampled = probabilities
    if not (np.isfinite(classical).all() and np.isfinite(sampled).all()):
        raise QexportError(f"the probabilities of attention {site['name']} are not finite; clean the input or the model")
    queries = classical.any(axis=(0, 2)) if rows is None else rows & classical.any(axis=(0, 2))
    if not queries.any():
        raise QexportError(f"no query of attention {site['name']} sees a key; the mask of this input hides every position")
    classical, sampled = (p[:, queries].astype(np.float32) for p in probabilities)
    seen = np.flatnonzero(classical.any(axis=(0, 1)) | sampled.any(axis=(0, 1)))
    keys = slice(seen[0], seen[-1] + 1)
    exact, alone, run = (by_head(y, all_heads, (y.ndim - 2, queries[None]))[heads].astype(np.float64) for y in values)
    query_names, key_names = names(np.flatnonzero(queries), range(keys.start, keys.stop))
    return SiteMap(
        **{key: site[key] for key in ("name", "layer", "module", "strategy")},
        heads=heads,
        queries=query_names,
        keys=key_names,
        classical=classical[:, :, keys],
        sampled=sampled[:, :, keys],
        own_error=_relative_error(alone, exact),
        propagated_error=_relative_error(run, exact),
    )


def _relative_error(value: np.ndarray, base: np.ndarray) -> np.ndarray:
    """|value - base| / |base| of each row (relative Frobenius error of a head); 0 where both vanish."""
    norm, error = np.linalg.norm(base, axis=1), np.linalg.norm(value - base, axis=1)
    return np.divide(error, norm, out=np.where(error > 0, np.inf, 0.0), where=norm > 0)
