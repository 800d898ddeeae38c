"""The strategies of QuantumAttention, and which of its attributes each reads. Standard library only."""

from qexport.errors import UsageError

STRATEGIES = ("exact", "naive", "stratified", "adaptive", "hybrid", "tree")
# `exact` and `tree` work in blocks of keys: low precision and an estimate of the error are theirs alone. The others draw
# keys for each query by itself.
BLOCKWISE = ("exact", "tree")
DRAWING = ("naive", "stratified", "adaptive", "hybrid")
PRECISIONS = ("fp32", "bf16", "int8", "auto")
RESIDUALS = ("none", "verify_only", "unbiased", "james_stein")

# Attribute: the strategies that read it, and the values that say of the others what they do anyway.
_READERS = {
    "num_samples": ((*DRAWING, "tree"), ()),
    "control_variate": (DRAWING, (0,)),
    "precision": (BLOCKWISE, ("fp32", "auto")),
    "error_tolerance": (("tree",), (0,)),
    "residual": (("tree",), ("none",)),
}


def reads(strategy: str, key: str, value) -> bool:
    """Whether a strategy reads an attribute, or does without it what the value says."""
    readers, idle = _READERS.get(key, (STRATEGIES, ()))
    return strategy in readers or value in idle


def read_by(strategy: str, attributes: dict) -> dict:
    """Those of the attributes that a strategy `reads`."""
    return {key: value for key, value in attributes.items() if reads(strategy, key, value)}


def check_read(strategy: str, named: dict, where: str = "[QuantumAttention] ") -> None:
    """Check that a strategy reads the attributes that somebody named: ignored ones would be no more than a wish.

    Raises:
        UsageError: it does not read one of them; the message begins with `where`.
    """
    for key, value in named.items():
        if not reads(strategy, key, value):
            *others, last = _READERS[key][0]
            wanted = f"{', '.join(others)} or {last}" if others else last
            raise UsageError(f"{where}{key} needs strategy {wanted}, got {strategy}; leave {key} out")
