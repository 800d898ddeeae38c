"""Settings of heads: which heads of a module are computed in one call, and with which attributes of the op."""

from qexport.arguments import whole
from qexport.errors import UsageError
from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.strategies import STRATEGIES, check_read

# The arguments of QuantumMultiheadAttention that heads may have of their own.
PER_HEAD = (
    "quantum_backend",
    "num_samples",
    "adaptive_samples",
    "control_variate",
    "precision",
    "error_tolerance",
    "residual",
)


def head_groups(shared: dict, heads: list[dict] | None, num_heads: int) -> list[tuple[dict, list[int]]]:
    """(attributes of the op, heads that have them): heads that differ in num_samples alone are one call."""
    name = shared["quantum_backend"]
    if name not in ("classical", *STRATEGIES):
        raise UsageError(f"quantum_backend must be one of classical, {', '.join(STRATEGIES)}, got {name!r}")
    if heads is None:
        return [(_attributes(shared), list(range(num_heads)))] if name != "classical" else []
    if name == "classical":
        raise UsageError("heads needs a quantum_backend that samples, got classical; name one, or leave heads out")
    if not isinstance(heads, (list, tuple)) or not all(isinstance(own, dict) for own in heads):
        raise UsageError(f"heads must be a list with one dict per head, got {heads!r}")
    if len(heads) != num_heads:
        raise UsageError(f"heads must have one entry for each of the {num_heads} heads, got {len(heads)}")
    groups = {}
    for head, own in enumerate(heads):
        if unknown := set(own) - set(PER_HEAD):
            raise UsageError(f"heads[{head}] has no key {min(unknown)!r}; known: {', '.join(PER_HEAD)}")
        attributes = _attributes(shared | own, f"heads[{head}]: ", own)
        samples = attributes.pop("num_samples")
        _, members, counts = groups.setdefault(tuple(attributes.items()), (attributes, [], []))
        members.append(head)
        counts.extend(samples)
    return [(attributes | {"num_samples": counts}, members) for attributes, members, counts in groups.values()]


def _attributes(settings: dict, where: str = "", own: dict | None = None) -> dict:
    """All attributes of the op, as the settings of a module, or of one head, mean them.

    Those that somebody named must be read: the keys of `own`, or where it is None, as nobody can tell who named what, the
    settings that are not the defaults.

    Raises:
        UsageError: a value outside its limits, or settings that do not fit each other.
    """
    name = settings["quantum_backend"]
    if name not in STRATEGIES:
        raise UsageError(f"{where}quantum_backend must be one of {', '.join(STRATEGIES)}, got {name!r}")
    try:
        samples = whole("num_samples", settings["num_samples"])
    except UsageError as error:
        raise UsageError(f"{where}{error}; heads takes one per head") from None
    attributes = {key: settings[key] for key in ("precision", "error_tolerance", "residual")}
    attributes["strategy"] = "adaptive" if name == "stratified" and settings["adaptive_samples"] else name
    attributes |= {"num_samples": [samples], "control_variate": settings["control_variate"]}
    try:
        resolved, unnamed = QUANTUM_ATTENTION.resolve(attributes), QUANTUM_ATTENTION.resolve({})
    except UsageError as error:
        raise UsageError(where + str(error).removeprefix(f"[{QUANTUM_ATTENTION.name}] ")) from None
    named = [key for key in attributes if (resolved[key] != unnamed[key] if own is None else key in own)]
    check_read(resolved["strategy"], {key: resolved[key] for key in named}, where)
    return resolved


def columns_of(x, members, num_heads):
    """The columns of some heads of (batch, length, heads * size)."""
    if len(members) == num_heads:
        return x
    size = x.shape[-1] // num_heads
    if members == list(range(members[0], members[-1] + 1)):
        return x[..., members[0] * size : (members[-1] + 1) * size]
    return x.unflatten(-1, (num_heads, size))[:, :, members].flatten(2)
