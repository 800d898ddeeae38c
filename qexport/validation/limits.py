"""What errors the recipe of a bundle and the element types of its values allow."""

import math
from collections.abc import Iterable

from qexport.bundle import Bundle
from qexport.ops.strategies import BLOCKWISE

# Relative Frobenius error end to end of a model that samples without a tolerance, unless the caller says otherwise. An
# unbiased error e leaves a cosine of about 1 - e^2 / 2 to the classical output: 0.999 here.
DEFAULT_MAX_ERROR = 0.05
# Relative error that rounding alone may cause, by the element type of the value. Two orders of the same float32 sums differ
# by about 1e-6 after a dozen layers; a half-precision model rounds at every layer.
ROUNDING = {"float32": 1e-5, "float64": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
# Relative error that products in low precision may cause at an attention, and at the outputs behind several of them. On
# trained activations bfloat16 costs 0.2 %, at the worst head 0.6 %, int8 scores 0.5 and 1.2 %. `auto` is bfloat16 where the
# processor has instructions for it; the limit does not depend on the processor.
LOW_PRECISION = {"bf16": 1e-2, "auto": 1e-2, "int8": 2.5e-2}
# Rounding in models that quantise their activations as they run: one step that flips, or so many times what two ulps in the
# attentions were seen to do to an output.
QUANTISED = 5e-3
SENSITIVITY_FACTOR = 3
# A compressed model may err so many times what it did on the data that it was judged on.
COMPRESSED = 1.5


def rounding_of(dtype: str, tf32: bool = False) -> float:
    """Relative error that rounding to an element type may cause; `tf32`: where products of float32 may be made in TF32,
    which keeps as many bits as float16."""
    rounding = ROUNDING.get(dtype, ROUNDING["float32"])
    return max(rounding, ROUNDING["float16"]) if tf32 and dtype != "float64" else rounding


def low_precision(site: dict) -> float:
    """Relative error that the precision of a site's products may cause; 0 for float32."""
    return LOW_PRECISION.get(site.get("precision"), 0) if site["strategy"] in BLOCKWISE else 0


def allowed(site: dict, rounding: float) -> float:
    """The error that a site's recipe allows: rounding, its tolerance, DEFAULT_MAX_ERROR where it samples without one, or any
    where it is noisy: what noise does is to be measured, not promised."""
    if site.get("noise"):
        return math.inf
    rounding = max(rounding, low_precision(site))
    return rounding if site["strategy"] == "exact" else max(rounding, site.get("error_tolerance") or DEFAULT_MAX_ERROR)


def limits_of(
    bundle: Bundle,
    dtypes: Iterable[str],
    sensitivity: dict | None,
    max_error: float | None,
    library: bool,
    tf32: bool = False,
) -> dict:
    """The report's `max_error`: the limit for outputs with the library, for those without it, for a site's own bias, and
    for a site without the library, which behind compressed weights has none.

    Args:
        dtypes: element types of the values compared.
        sensitivity: how far rounding alone moves the outputs of a model that quantises as it runs, else None.
        max_error: the caller's limit, or None for what the recipe allows.
        tf32: whether products of float32 may be made in TF32.
    """
    rounding = max((rounding_of(dtype, tf32) for dtype in dtypes), default=rounding_of("float32", tf32))
    recipe = max((allowed(site, rounding) for site in bundle.manifest["sites"]), default=rounding)
    own = max_error if max_error is not None else recipe
    sites, compression = rounding, bundle.manifest.get("compression")
    if compression:
        sites = math.inf
        rounding = max(rounding, COMPRESSED * max(compression["output_errors"].values(), default=0))
    if sensitivity is not None:
        rounding = max(rounding, QUANTISED, SENSITIVITY_FACTOR * max(sensitivity.values(), default=0))
        sites = max(sites, rounding)
    outputs = max_error if max_error is not None else max(rounding, own)
    return {"library": outputs if library else None, "fallback": rounding, "local": own if library else None, "sites": sites}
