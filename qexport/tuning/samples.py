"""Error against samples: each attention of a bundle alone, under every strategy that has a budget and a range of budgets."""

from dataclasses import dataclass

from qexport.bundle import Bundle
from qexport.data import load_inputs
from qexport.documents import make_document
from qexport.feeds import Inputs
from qexport.installed import onnxruntime
from qexport.manifest import package_version
from qexport.progress import listener
from qexport.providers import recorded
from qexport.tuning import MOST_FEEDS, check_measurable, site_entry, watched_sites
from qexport.tuning.measurement import key_counts, measure
from qexport.tuning.settings import Setting

STRATEGIES = ("tree", "hybrid", "stratified", "adaptive", "naive")
LEAST, MOST = 4, 1024  # samples; they double


@dataclass
class SamplesReport:
    """What `error_by_samples` measured; the attributes are the keys of its JSON, which docs/json_schema.md describes.

    Attributes:
        sites: one dict per attention: its `keys`, and under `measured` the error of each strategy and number of samples.
        settings: the providers.
    """

    bundle: str
    data: dict
    sites: list[dict]
    versions: dict
    settings: dict

    def to_dict(self) -> dict:
        """The report as plain data; figures that are not finite are None."""
        return make_document("samples", self.__dict__)


def budgets(keys: int) -> list[int]:
    """LEAST, twice that and so on, up to MOST and below the number of keys: from there on nothing is sampled."""
    found, n = [], LEAST
    while n < keys and n <= MOST:
        found.append(n)
        n *= 2
    return found


def error_by_samples(
    bundle,
    data=None,
    *,
    seq: int | None = None,
    threads: int | None = None,
    providers=None,
    allow_fallback=False,
    progress=None,
) -> SamplesReport:
    """Measure how the error of a bundle's attentions falls with the number of samples, whatever its recipe says.

    Every attention is fed with the classical model's values, so the error is its own: relative
    Frobenius, one draw per batch.

    Args:
        bundle: a folder, or a `Bundle`.
        data, seq: inputs, as for `qexport.validate`; the first batches are enough.
        threads: intra-op threads; the runtime's choice when None.
        providers, allow_fallback: where it runs, as in `qexport.session`; the CPU when None.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: `providers` as in `qexport.session`.
        QexportError: the bundle, the data, the op library, the runtime or its providers are at fault, or no attention has
            keys to sample.
    """
    say = listener(progress)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    check_measurable(opened)
    inputs = load_inputs(opened, data, seq=seq)
    inputs = Inputs(inputs.feeds[:MOST_FEEDS], inputs.source, inputs.notes)
    timed = max(inputs.feeds, key=lambda feed: sum(array.size for array in feed.values()))
    sites = watched_sites(opened)
    where = {"providers": providers, "allow_fallback": allow_fallback}
    keys = key_counts(opened, sites, timed, providers)
    settings = [[Setting(strategy, (n,)) for strategy in STRATEGIES for n in budgets(count)] for count in keys]
    words = f"measuring {sum(map(len, settings))} budgets of {len(sites)} attentions"
    tables = measure(opened, inputs, timed, sites, settings, threads, lambda done: say(words, done), where)
    return SamplesReport(
        str(opened.path),
        {"source": inputs.source, "samples": inputs.samples, "batches": len(inputs.feeds), "notes": inputs.notes},
        [site_entry(table, count) for table, count in zip(tables, keys, strict=True)],
        {"qexport": package_version("qexport"), "onnxruntime": onnxruntime().__version__},
        recorded(**where),
    )
