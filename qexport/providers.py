"""Execution providers as they are asked for: names, what may not be asked, and how reports say it. Loads no runtime."""

from qexport.arguments import several
from qexport.errors import UsageError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Names that are accepted wherever onnxruntime's are.
SHORT = {"cpu": CPU, "cuda": CUDA}


def provider_name(provider) -> str:
    """The name of a provider that is given as onnxruntime takes it: the name, or a pair of it and options."""
    return provider if isinstance(provider, str) else provider[0]


def full_names(providers) -> list:
    """`providers` as onnxruntime takes them: a list of names and of (name, options), without short names.

    Args:
        providers: one name, or names and (name, options) pairs in the order of preference; the CPU's when None.

    Raises:
        UsageError: none is named, one twice, one behind the CPU, which leaves it nothing to run, or it is no name.
    """
    if providers is None:
        return [CPU]
    found = []
    for provider in [providers] if isinstance(providers, str) else several("providers", providers):
        match provider:
            case str(name):
                found.append(SHORT.get(name, name))
            case (str(name), dict(options)):  # JSON has made a list of it
                found.append((SHORT.get(name, name), options))
            case _:
                raise UsageError(f"a provider is a name or a pair of a name and a dict of options, got {provider!r}")
    names = [provider_name(provider) for provider in found]
    if not names:
        raise UsageError("providers must name at least one, or be None for the CPU")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"provider {twice[0]} is given twice; name each once")
    if CPU in names[:-1]:
        behind = names[names.index(CPU) + 1]
        raise UsageError(f"provider {CPU} comes before {behind} and would run every node; name it last, or leave it out")
    return found


def device(providers) -> tuple[str, int]:
    """Where the first of `providers` (full names) has its tensors, as onnxruntime calls it: ("cuda", number), ("cpu", 0)."""
    if provider_name(providers[0]) != CUDA:
        return "cpu", 0
    options = {} if isinstance(providers[0], str) else providers[0][1]
    return "cuda", int(options.get("device_id", 0))


def uses_tf32(providers) -> bool:
    """Whether products of float32 may be made in TF32, which has the mantissa of float16: on CUDA, unless `use_tf32` is 0.
    Cards before compute capability 8.0 make them in full."""
    for provider in full_names(providers):
        if provider_name(provider) == CUDA:
            options = {} if isinstance(provider, str) else provider[1]
            return str(options.get("use_tf32", 1)) not in ("0", "False")
    return False


def recorded(providers, allow_fallback: bool) -> dict:
    """What the `settings` of a report say of them: the names alone, without options."""
    return {"providers": [provider_name(p) for p in full_names(providers)], "allow_fallback": bool(allow_fallback)}


def asked_for(settings: dict) -> list[str]:
    """The providers in the `settings` of a report; reports of older versions that name none are the CPU's."""
    return settings.get("providers") or [CPU]


def option_words(settings: dict) -> list[str]:
    """The options of a command that asks for what is recorded in `settings`; none for the CPU."""
    names = asked_for(settings)
    words = [] if names == [CPU] else [word for name in names for word in ("--provider", name)]
    return words + (["--allow-fallback"] if settings.get("allow_fallback") else [])
