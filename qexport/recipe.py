"""Recipes: how every attention site of a model is sampled, with overrides per layer, in YAML or keyword arguments.

strategy: stratified
num_samples: 32
layers:
  - match: "encoder.layer.0.*"     # glob on the torch module name or the node name; the last match wins
    strategy: exact
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qexport.errors import UsageError
from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.quantum_attention import STRATEGIES

SAMPLING = ("strategy", "num_samples", "control_variate")


def _strategy(value: Any) -> str:
    if value not in STRATEGIES:
        raise ValueError(f"must be one of {', '.join(STRATEGIES)}, got {value!r}")
    return value


def _num_samples(value: Any) -> tuple[int, ...]:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise ValueError(f"must be a whole number, or a list with one per query head, got {value!r}")
    for n in numbers:
        if not 1 <= n < 2**31:
            raise ValueError(f"must be between 1 and {2**31 - 1}, got {n}")
    return tuple(numbers)


def _control_variate(value: Any) -> int:
    if value not in (0, 1):
        raise ValueError(f"must be true or false, got {value!r}")
    return int(value)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise ValueError(f"must be a whole number of 64 bits, got {value!r}")
    return value


Strategy = Annotated[str, BeforeValidator(_strategy)]
NumSamples = Annotated[tuple[int, ...], BeforeValidator(_num_samples)]
ControlVariate = Annotated[int, BeforeValidator(_control_variate)]
Seed = Annotated[int, BeforeValidator(_seed)]


def _default(name: str):
    return QUANTUM_ATTENTION.attribute(name).default


class LayerRecipe(BaseModel):
    """An override for the sites whose module or node name the glob `match` fits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str = Field(min_length=1)
    strategy: Strategy | None = None
    num_samples: NumSamples | None = None
    control_variate: ControlVariate | None = None


class Recipe(BaseModel):
    """Sampling of a whole model; the defaults are the op table's. `seed` is the default of the model's seed input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Strategy = _default("strategy")
    num_samples: NumSamples = tuple(_default("num_samples"))
    control_variate: ControlVariate = _default("control_variate")
    seed: Seed = 0
    layers: tuple[LayerRecipe, ...] = ()

    def resolve(self, module: str, name: str, q_heads: int | None = None) -> dict:
        """The sampling attributes of one site: strategy, num_samples, control_variate.

        Args:
            module: torch module name of the site, may be empty.
            name: node name of the site.
            q_heads: number of query heads when known; `num_samples` must then hold one number or as many.

        Raises:
            UsageError: `num_samples` has another length than the site has heads.
        """
        values = {key: getattr(self, key) for key in SAMPLING}
        for layer in self.layers:
            if _fits(layer.match, module, name):
                values |= {key: getattr(layer, key) for key in SAMPLING if getattr(layer, key) is not None}
        count = len(values["num_samples"])
        if count > 1 and q_heads is not None and count != q_heads:
            raise UsageError(
                f"num_samples lists {count} numbers, but {module or name} has {q_heads} query heads; give 1 or {q_heads}"
            )
        return values

    def check_matches(self, sites: list[tuple[str, str]]) -> None:
        """Check that every `match` fits at least one of the (module, name) pairs, so that a typo is no silent no-op."""
        for index, layer in enumerate(self.layers):
            if not any(_fits(layer.match, *site) for site in sites):
                known = ", ".join(module or name for module, name in sites[:4])
                raise UsageError(f"layers[{index}].match: {layer.match!r} fits no attention site; sites are {known}, ...")

    def to_dict(self) -> dict:
        """Plain data for the manifest; overrides that were not given are left out."""
        return self.model_dump(mode="json", exclude_none=True)


def _fits(pattern: str, module: str, name: str) -> bool:
    return any(fnmatchcase(text, pattern) for text in (module, name) if text)


def make_recipe(recipe=None, *, where: str = "recipe", **overrides) -> Recipe:
    """A checked recipe.

    Args:
        recipe: a Recipe, a dict, the path of a YAML file, or None for the defaults.
        overrides: keys that replace the recipe's own top-level ones; None leaves them.

    Raises:
        UsageError: one line that names the file, the key, the value and what is allowed.
    """
    if isinstance(recipe, Recipe):
        data = recipe.model_dump(exclude_unset=True)
    elif isinstance(recipe, (str, Path)):
        data = load_recipe(recipe).model_dump(exclude_unset=True)
    else:
        data = dict(recipe or {})
    given = {key: value for key, value in overrides.items() if value is not None}
    _checked({**given}, "convert")
    return _checked({**data, **given}, where)


def load_recipe(path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        UsageError: the file is missing or no YAML, or a key or value is wrong; one line that names file, key and value.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = Path(path)
    try:
        data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}:{place} not YAML: {getattr(error, 'problem', None) or 'cannot be parsed'}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"{path}: cannot read the recipe: {reason}") from error
    if data is None:
        return Recipe()
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys such as 'strategy: stratified', got {type(data).__name__}")
    return _checked(data, str(path))


def _checked(data: dict, where: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as `key: what is allowed, got what`."""
    problem = error.errors()[0]
    loc = problem["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if problem["type"] == "extra_forbidden":
        model = LayerRecipe if loc[0] == "layers" else Recipe
        return f"{key}: no such key; known: {', '.join(model.model_fields)}"
    if problem["type"] == "missing":
        return f"{key}: missing; every entry of layers needs a match"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"
