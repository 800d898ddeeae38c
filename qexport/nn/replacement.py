"""replace_attention: sampled attention in the place of a model's own, in place and on the same weights."""

from dataclasses import dataclass

import torch
from torch import nn

from qexport.errors import QexportError, UsageError
from qexport.nn.backends import get_backend
from qexport.nn.functional import attend
from qexport.nn.multihead import QuantumMultiheadAttention, check_module, is_plain
from qexport.ops import QUANTUM_ATTENTION

# The name under which the attention function stands in transformers' registry.
INTERFACE = "qexport"


@dataclass(frozen=True)
class Site:
    """How one attention module computes: `attributes` of the op table, `layer` among them."""

    name: str
    attributes: dict
    backend: str
    seed: int


def replace_attention(model: nn.Module, recipe=None, *, backend: str = "auto") -> list[str]:
    """Let the attention of a model be sampled.

    Modules of type nn.MultiheadAttention are exchanged for QuantumMultiheadAttention; its subclasses, modules with a
    parametrization among them, do more than it and stay as they are. Models of transformers are switched to
    an attention function of ours through transformers' registry (`model.set_attn_implementation("sdpa")` switches back). In
    training each call draws with a new seed from torch's generator, in evaluation with the recipe's.

    Args:
        model: changed in place; parameters and state dict stay as they are.
        recipe: a `qexport.recipe.Recipe`, a dict or the path of a YAML file; `match` is for module names. None: at most 1 %
            error per attention.
        backend: who computes: see `qexport.nn.backend_names`.

    Returns:
        The names of the modules whose attention is sampled now.

    Raises:
        UsageError: a wrong recipe or backend, a recipe with noise or compression, or a model that has neither kind of
            attention.
    """
    from qexport.recipe import make_recipe

    check_module(model)
    recipe = make_recipe(recipe)
    if recipe.compress is not None:
        raise UsageError("compress is for converted models: leave it out here and give it to qexport.compress")
    if recipe.has_noise:
        raise UsageError("noise is for converted models: leave it out here and give it to qexport.convert")
    if backend != "auto":
        get_backend(backend)
    modules = [(name, m) for name, m in model.named_modules() if is_plain(m)]
    hosts = _transformers_models(model)
    functional = [(name, m) for name, m in model.named_modules() if _is_attention(m)] if hosts else []
    names = [name for name, _ in (*modules, *functional)]
    if not names:
        raise UsageError(
            f"{type(model).__name__} has no attention that can be replaced: neither nn.MultiheadAttention itself "
            "nor a transformers model with a choice of attention functions"
        )
    if isinstance(model, nn.MultiheadAttention):
        raise UsageError(
            "the model itself is an nn.MultiheadAttention: make it with QuantumMultiheadAttention.from_classical"
        )
    recipe.check_matches([(name, "") for name in names])
    found = enumerate((*modules, *functional))
    sites = {name: _site(name, layer, recipe, backend, _head_count(module)) for layer, (name, module) in found}
    for name, module in modules:
        _exchange(model, module, sites[name])
    for name, module in functional:
        module.qexport_site = sites[name]
    if hosts:
        _register()
    for host in hosts:
        host.set_attn_implementation(INTERFACE)
    return names


def _head_count(module: nn.Module) -> int | None:
    """How many query heads an attention has, where it or its config tells."""
    return getattr(module, "num_heads", None) or getattr(getattr(module, "config", None), "num_attention_heads", None)


def _site(name: str, layer: int, recipe, backend: str, heads: int | None) -> Site:
    attributes = recipe.resolve(name, "", heads)
    return Site(name, attributes | {"num_samples": list(attributes["num_samples"]), "layer": layer}, backend, recipe.seed)


def _exchange(model: nn.Module, module: nn.MultiheadAttention, site: Site) -> None:
    from qexport.recipe import SAMPLING

    settings = {key: site.attributes[key] for key in SAMPLING}
    samples = settings.pop("num_samples")
    settings["quantum_backend"] = settings.pop("strategy")
    new = QuantumMultiheadAttention.from_classical(
        module,
        **settings,
        num_samples=samples[0],
        adaptive_samples=False,
        heads=[{"num_samples": n} for n in samples] if len(samples) > 1 else None,
        backend=site.backend,
        seed=site.seed,
        layer=site.attributes["layer"],
    )
    # under all its names, where several share it
    for name in [name for name, found in model.named_modules(remove_duplicate=False) if found is module]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)


def _transformers_models(model: nn.Module) -> list[nn.Module]:
    """The outermost transformers models in `model` whose attention function can be chosen."""
    hosts = []
    for module in model.modules():
        inside = any(module is part for host in hosts for part in host.modules())
        if not inside and hasattr(module, "set_attn_implementation") and module._can_set_attn_implementation():
            hosts.append(module)
    return hosts


def _is_attention(module: nn.Module) -> bool:
    """Whether a module of transformers calls an attention function: those do have a config and their kind in their name."""
    return hasattr(module, "config") and "attention" in type(module).__name__.lower()


def _register() -> None:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise QexportError(
            f"transformers has no registry of attention functions ({error}): install 4.56 or newer"
        ) from error
    AttentionInterface.register(INTERFACE, _attention_function)
    AttentionMaskInterface.register(INTERFACE, sdpa_mask)


def _attention_function(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, position_bias=None, **more
):
    """Attention as transformers calls it: 4-D query, key, value; returns (batch, q_len, heads, size) and the weights."""
    site = getattr(module, "qexport_site", None)
    if site is None:
        raise QexportError(f"{type(module).__name__} was not there when replace_attention was called; call it again")
    if more.get("s_aux") is not None:
        raise QexportError(f"{site.name}: attention with learnt sinks cannot be sampled; keep its own attention function")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # An order that comes as a mask is not known to the op, but means of values hold later ones all the same.
    attributes = site.attributes | ({"control_variate": 0} if causal else {})
    causal = causal and query.shape[2] > 1 and attention_mask is None
    if position_bias is not None:
        attention_mask, causal = _with_bias(attention_mask, position_bias, causal, query, key), False
    attributes |= {"is_causal": int(causal), "scale": scaling, "softcap": more.get("softcap") or 0.0}
    output, weights = attend(
        query,
        key,
        value,
        attention_mask,
        torch.randint(2**63 - 1, ()) if module.training else site.seed,
        site.backend,
        float(dropout),
        bool(more.get("output_attentions")),
        QUANTUM_ATTENTION.resolve(attributes),
    )
    return output.transpose(1, 2).contiguous(), weights


def _with_bias(mask, bias, causal, query, key):
    """A bias of positions with the mask in it, as floats."""
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
