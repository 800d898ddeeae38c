"""How large the maps of a bundle's sites are on given inputs, found by a run without them, and whether that is too large."""

from dataclasses import dataclass

from qexport import runtime
from qexport.errors import QexportError, UsageError
from qexport.validation.probes import open_probe, sized

# Bytes of the probabilities that are held at once: float32, of both models. The process takes up to three times as much, as
# long as the runtime holds its own.
MEMORY_LIMIT = 2**30


@dataclass
class Size:
    """Sizes of a site's probabilities on one feed. `query_sources` and `key_sources` are the model's inputs that both are
    computed from; `is_cached` says that keys of earlier steps are among them."""

    batch: int
    heads: int
    queries: int
    keys: int
    query_sources: set[str]
    key_sources: set[str]
    is_cached: bool

    def bytes(self, heads: int) -> int:
        """Bytes of the probabilities of so many heads."""
        return 4 * self.batch * heads * self.queries * self.keys


def measure_sizes(bundle, inputs, hybrid, local, providers) -> list[dict[str, Size]]:
    """For each feed the sizes by site name; `hybrid` and `local` are from `probes.beside`."""
    model, sites = sized(hybrid, local)
    names = sorted({entry[key] for entry in sites.values() for key in ("Q", "K", "past_key") if entry[key]})
    found = []
    with open_probe(model, bundle.classical_path, library=False, providers=providers) as opened:
        for feed in inputs.feeds:
            shapes = dict(zip(names, runtime.run(opened, names, feed), strict=True))
            found.append({name: _size(entry, shapes) for name, entry in sites.items()})
    return found


def _size(entry: dict, shapes: dict) -> Size:
    q, k = shapes[entry["Q"]], shapes[entry["K"]]
    past = shapes[entry["past_key"]][2] if entry["past_key"] else 0
    heads = q[1] if len(q) == 4 else entry["q_num_heads"]
    rest = {key: entry[key] for key in ("query_sources", "key_sources", "is_cached")}
    return Size(int(q[0]), int(heads), int(q[-2]), int(k[-2] + past), **rest)


def check_heads(sites: list[dict], sizes: list[dict[str, Size]], heads: list[int] | None) -> None:
    """Raise UsageError for a head that one of the sites has not."""
    for site in sites:
        count = sizes[0][site["name"]].heads
        for head in heads or []:
            if not 0 <= head < count:
                raise UsageError(f"heads: {head} is not there; layer {site['layer']} has the heads 0 to {count - 1}")


def check_memory(sizes: list[dict[str, Size]], heads: list[int] | None) -> None:
    """Raise QexportError where the maps of both models, or those of all heads of a site, which are computed together, are
    larger than MEMORY_LIMIT."""
    every = [size for by_site in sizes for size in by_site.values()]
    held = 2 * sum(size.bytes(size.heads if heads is None else len(heads)) for size in every)
    largest = max(every, key=lambda size: size.bytes(size.heads))
    computed = largest.bytes(largest.heads)
    if max(held, computed) <= MEMORY_LIMIT:
        return
    fewer = "shorten the input (--seq)" + (", give fewer inputs" if len(every) > len(sizes[0]) else "")
    if held > computed:
        what = f"the maps ({len(every)}, the largest of"
        fewer += " or choose with --layers and --heads"
    else:
        what = f"an attention ({largest.heads} heads,"
    raise QexportError(
        f"{what} {largest.queries} queries x {largest.keys} keys) needs {max(held, computed) / 2**30:.2g} GiB, "
        f"the limit is {MEMORY_LIMIT / 2**30:.2g} GiB; {fewer}"
    )
