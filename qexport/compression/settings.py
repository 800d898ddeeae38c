"""What the caller asked for, from arguments and from the key `compress` of a recipe."""

from pathlib import Path

from qexport.recipe import Recipe, make_recipe
from qexport.recipe_compression import FLOAT_PRODUCTS, Compression

MAX_DROP = 0.01


def resolve(recipe, **overrides) -> tuple[Recipe | None, Compression]:
    """(how attention is sampled, None for not at all; how weights are compressed).

    Args:
        recipe: a Recipe, a dict, the path of a YAML file, or None.
        overrides: keys of `compress`; None leaves the recipe's own.

    Raises:
        UsageError: a wrong value, or both a ratio and a largest drop.
    """
    where = str(recipe) if isinstance(recipe, (str, Path)) else "recipe"
    resolved = make_recipe(recipe, where=where)
    given = {key: value for key, value in overrides.items() if value is not None}
    present = resolved.compress.model_dump(exclude_none=True) if resolved.compress else {}
    if (present | given).get("products", FLOAT_PRODUCTS) == FLOAT_PRODUCTS:  # which may have one of the two
        for one, other in (("ratio", "max_drop"), ("max_drop", "ratio")):
            if one in given:
                present.pop(other, None)
    settings = make_recipe({"compress": present | given}, where="arguments").compress
    if settings.ratio is None and settings.max_drop is None:
        settings = settings.model_copy(update={"max_drop": MAX_DROP})
    samples = bool(resolved.named() or resolved.layers)
    return resolved if samples else None, settings
