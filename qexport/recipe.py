"""Recipes: how every attention site of a model is computed, with overrides per layer, in YAML or keyword arguments.

strategy: tree
error_tolerance: 0.01
layers:
  - match: "encoder.layer.0.*"     # glob on the torch module name or the node name; the last match wins
    strategy: exact

`defaults` below says what keys that are left out mean.
"""

from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qexport.arguments import as_path
from qexport.errors import QexportError, UsageError
from qexport.ops import QUANTUM_ATTENTION, QUANTUM_MEASURE
from qexport.ops.strategies import check_read, read_by
from qexport.recipe_compression import Compression, LayerCompression
from qexport.recipe_values import (
    NO_NOISE,
    ControlVariate,
    ErrorTolerance,
    Noise,
    NumSamples,
    Precision,
    Residual,
    Seed,
    Shots,
    Strategy,
)

SAMPLING = ("strategy", "num_samples", "control_variate", "precision", "error_tolerance", "residual")
NOISE = ("noise", "shots")
DEFAULT_STRATEGY = "tree"
# What a model converted without a word promises: at most so much relative error at each attention.
DEFAULT_TOLERANCE = 0.01
# Keys per query that `tree` begins with; the op itself reads more where the tolerance asks for it.
STARTING_BUDGET = 64


def defaults(named: dict) -> dict:
    """The values of the keys that are not in `named`.

    Nobody named anything: `tree` with a tolerance, at the precision that pays on the processor. A named budget for `tree` is
    taken at its word: no tolerance raises it. The other strategies have what the op table says.
    """
    values = {key: QUANTUM_ATTENTION.attribute(key).default for key in SAMPLING} | {"strategy": DEFAULT_STRATEGY}
    if named.get("strategy", DEFAULT_STRATEGY) == "tree":
        tolerance = 0.0 if "num_samples" in named else DEFAULT_TOLERANCE
        values |= {"num_samples": (STARTING_BUDGET,), "precision": "auto", "error_tolerance": tolerance}
    return {key: value for key, value in values.items() if key not in named}


class _Entry(BaseModel):
    """The keys of SAMPLING and NOISE that somebody named; the others are None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Strategy | None = None
    num_samples: NumSamples | None = None
    control_variate: ControlVariate | None = None
    precision: Precision | None = None
    error_tolerance: ErrorTolerance | None = None
    residual: Residual | None = None
    noise: Noise | None = None
    shots: Shots | None = None

    def named(self) -> dict:
        """The keys with a value."""
        return {key: getattr(self, key) for key in (*SAMPLING, *NOISE) if getattr(self, key) is not None}


class LayerRecipe(_Entry):
    """An override for the sites whose module or node name the glob `match` fits; keys that are None stay as they were."""

    match: str = Field(min_length=1)


class Recipe(_Entry):
    """How a whole model is computed; docs/converting.md has the keys, and what those that are None mean.

    `make_recipe` makes one whose values fit each other, and says in one line what is wrong; here pydantic does, key by key.

    Attributes:
        seed: default of the model's seed input, of 64 bits.
        layers: overrides; the last one that fits a site wins.
        compress: how `qexport compress` stores the weights.
    """

    seed: Seed = 0
    layers: tuple[LayerRecipe, ...] = ()
    compress: Compression | None = None

    def resolve(self, module: str, name: str, q_heads: int | None = None, own: dict | None = None) -> dict:
        """How one site is computed: a dict of the keys in SAMPLING and, where there is noise, in NOISE.

        A layer that names another strategy inherits what that strategy reads: a tolerance or a low precision from above
        ends at a layer that draws, a budget at an exact one. Noise acts on exact probabilities, so it takes the place of a
        strategy from above, and ends at a layer that says how to sample.

        Args:
            module: torch module name of the site, may be empty.
            name: node name of the site.
            q_heads: number of query heads when known; `num_samples` must then hold one number or as many.
            own: how the site samples where the recipe does not say otherwise: modules of qexport.nn bring that along.

        Raises:
            UsageError: the values do not fit each other, or `num_samples` has another length than the site has heads.
        """
        values = read_by(own["strategy"], own) if own else {}
        for entry in (self, *(layer for layer in self.layers if _fits(layer.match, module, name))):
            named = entry.named()
            strategy = named.get("strategy")
            inherited = read_by(strategy, values) if strategy else values
            if any(key != "shots" for key in named):
                inherited = {k: v for k, v in inherited.items() if k not in NOISE}
            values = inherited | named
        noise, shots = (values.pop(key, None) for key in NOISE)
        _check_shots(noise, shots, module or name)
        if noise not in (None, NO_NOISE):
            shots = QUANTUM_MEASURE.attribute("shots").default if shots is None else shots
            return {"strategy": "exact", **defaults({"strategy": "exact"}), "noise": noise, "shots": shots}
        values = _check_together(values, module or name)
        count = len(values["num_samples"])
        if count > 1 and q_heads is not None and count != q_heads:
            raise UsageError(
                f"num_samples lists {count} numbers, but {module or name} has {q_heads} query heads; give 1 or {q_heads}"
            )
        return values

    @property
    def has_noise(self) -> bool:
        """Whether any entry names noise."""
        return any(entry.noise not in (None, NO_NOISE) for entry in (self, *self.layers))

    def check_matches(self, sites: list[tuple[str, str]]) -> None:
        """Check that every `match` fits at least one of the (module, name) pairs, so that a typo is no silent no-op.

        Raises:
            UsageError: one fits none; the message names some of the sites.
        """
        for index, layer in enumerate(self.layers):
            if not any(_fits(layer.match, *site) for site in sites):
                known = ", ".join(module or name for module, name in sites[:4])
                raise UsageError(f"layers[{index}].match: {layer.match!r} fits no attention site; sites are {known}, ...")

    def to_dict(self) -> dict:
        """Plain data for the manifest: what was named."""
        return self.model_dump(mode="json", exclude_none=True)


def _check_shots(noise: str | None, shots, where: str) -> None:
    """Check that shots come with noise; `where` names the layer."""
    if shots is not None and noise in (None, NO_NOISE):
        raise UsageError(
            f"{where}: shots {shots} need noise, such as depolarizing:0.01; shots alone are strategy naive with num_samples"
        )


def _check_noise(named: dict, where: str) -> None:
    """Check that an entry with noise does not say how to sample, too."""
    if named.get("noise", NO_NOISE) == NO_NOISE:
        return
    for key, value in named.items():
        if key in SAMPLING and (key, value) != ("strategy", "exact"):
            raise UsageError(f"{where}: noise acts on exact probabilities; leave {key} out, got {value!r} beside noise")


def _check_together(named: dict, where: str) -> dict:
    """All values of SAMPLING, those that were named checked against each other by the op table; `where` names the layer."""
    named = {key: value for key, value in named.items() if key not in NOISE}
    values = named | defaults(named)
    try:
        QUANTUM_ATTENTION.resolve(values)
    except UsageError as error:
        raise UsageError(f"{where}: {str(error).removeprefix(f'[{QUANTUM_ATTENTION.name}] ')}") from None
    check_read(values["strategy"], named, f"{where}: ")
    return values


def _fits(pattern: str, module: str, name: str) -> bool:
    return any(fnmatchcase(text, pattern) for text in (module, name) if text)


def make_recipe(recipe=None, *, where: str = "recipe", **overrides) -> Recipe:
    """A checked recipe.

    Args:
        recipe: a Recipe, a dict, the path of a YAML file, or None for the defaults.
        where: what an error names as the source of a value.
        overrides: keys that replace the recipe's own top-level ones; None leaves them.

    Raises:
        UsageError: one line that names the file, the key, the value and what is allowed.
        QexportError: the file cannot be read.
    """
    if isinstance(recipe, (str, Path)):
        recipe = load_recipe(recipe)
    elif recipe is None or isinstance(recipe, dict):
        recipe = _checked(dict(recipe or {}), where)
    elif not isinstance(recipe, Recipe):
        raise UsageError(f"{where} must be a dict or a file, got {recipe!r}")
    given = {key: value for key, value in overrides.items() if value is not None}
    kept = recipe.model_dump(exclude_unset=True)
    if strategy := given.get("strategy"):
        kept = read_by(strategy, kept)
    if given.get("noise", NO_NOISE) != NO_NOISE:
        kept = {key: value for key, value in kept.items() if key not in SAMPLING}
    elif any(key in given for key in (*SAMPLING, "noise")):
        kept = {key: value for key, value in kept.items() if key not in NOISE}
    # first beside nothing but the strategy, which decides whether they are read, so that the file is not blamed for them
    _checked({"strategy": kept.get("strategy")} | given, "convert")
    recipe = _checked({**kept, **given}, where)
    _check_shots(recipe.noise, recipe.shots, where)
    return recipe


def load_recipe(path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        UsageError: it is no YAML or empty, or a key or value is wrong; one line that names file, key and value.
        QexportError: it cannot be read.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = as_path("path", path)
    try:
        data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}:{place} not YAML: {getattr(error, 'problem', None) or 'cannot be parsed'}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise QexportError(f"{path}: cannot read the recipe: {reason}; give a YAML file") from error
    if data is None:
        raise UsageError(f"{path}: holds no recipe; write a key such as 'strategy: exact', or leave the file out")
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys such as 'strategy: exact', got {type(data).__name__}")
    return _checked(data, str(path))


def _checked(data: dict, where: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{where}: {_first_problem(error)}") from None
    # what an entry says by itself is checked before a model is read
    _check_together(recipe.named(), where)
    _check_noise(recipe.named(), where)
    for index, layer in enumerate(recipe.layers):
        _check_noise(layer.named(), f"{where}: layers[{index}] ({layer.match})")
        if layer.strategy:
            _check_together(layer.named(), f"{where}: layers[{index}] ({layer.match})")
    return recipe


def _first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as `key: what is allowed, got what`."""
    problem = error.errors()[0]
    loc = problem["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if problem["type"] == "extra_forbidden":
        attention, weights = (LayerRecipe, Recipe), (LayerCompression, Compression)
        in_list, on_top = weights if loc[0] == "compress" and len(loc) > 1 else attention
        model = in_list if "layers" in loc[:-1] else on_top
        return f"{key}: no such key; known: {', '.join(model.model_fields)}"
    if problem["type"] == "missing":
        return f"{key}: missing; every entry of layers needs it"
    if problem["type"] == "tuple_type":
        return f"{key}: must be a list of entries with match (- match: 'encoder.*'), got {problem['input']!r}"
    if problem["type"] == "model_type":
        such = "match: 'encoder.*'" if isinstance(loc[-1], int) else "ratio: 8"
        return f"{key}: must hold keys, such as {such}, got {problem['input']!r}"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"
