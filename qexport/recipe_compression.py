"""The key `compress` of a recipe: how weights are stored."""

import math
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# From the most exact to the coarsest.
METHODS = ("fp16", "int8", "trellis", "int4", "low-rank", "mpo")
FLOAT_PRODUCTS, INT8_PRODUCTS = PRODUCTS = ("float", "int8")


def _ratio(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 < value < math.inf:
        raise ValueError(f"must be a number above 1, such as 8 for a file of an eighth, got {value!r}")
    return float(value)


def _max_drop(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"must lie between 0 and 1, such as 0.01 for 1 %, got {value!r}")
    return float(value)


def _methods(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or any(name not in METHODS for name in names):
        raise ValueError(f"must be a list of {', '.join(METHODS)}, got {value!r}")
    return tuple(name for name in METHODS if name in names)


def _products(value: Any) -> str:
    if value not in PRODUCTS:
        raise ValueError(f"must be {' or '.join(PRODUCTS)}, got {value!r}")
    return value


def _heal(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"must be a number of steps >= 0, got {value!r}")
    return value


Methods = Annotated[tuple[str, ...], BeforeValidator(_methods)]
Products = Annotated[str, BeforeValidator(_products)]


class LayerCompression(BaseModel):
    """The methods of the weights whose module or name the glob `match` fits; none leaves them as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str = Field(min_length=1)
    methods: Methods

    def fits(self, label: str, name: str) -> bool:
        """Whether a weight is meant."""
        return fnmatchcase(label, self.match) or fnmatchcase(name, self.match)


class Compression(BaseModel):
    """How the weights of a model are stored; docs/compression.md has the keys.

    Attributes:
        ratio: bytes of the classical model's file over those of the compressed one.
        max_drop: largest loss of the metric.
        methods: those that may be used.
        products: what products with weights are computed in: float, or int8 where the model bears it.
        heal: steps of distillation behind it.
        layers: overrides of the methods; the last one that fits a weight wins.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: Annotated[float, BeforeValidator(_ratio)] | None = None
    max_drop: Annotated[float, BeforeValidator(_max_drop)] | None = None
    methods: Methods = METHODS
    products: Products = FLOAT_PRODUCTS
    heal: Annotated[int, BeforeValidator(_heal)] = 0
    layers: tuple[LayerCompression, ...] = ()

    @model_validator(mode="after")
    def _one_goal(self):
        if self.ratio is not None and self.max_drop is not None and self.products == FLOAT_PRODUCTS:
            raise ValueError(
                f"ratio and max_drop exclude each other, got {self.ratio:g} and {self.max_drop:g}: give the one that must "
                "hold, the other is what it comes to"
            )
        return self

    def without(self, method: str) -> "Compression":
        """The same with one method less."""
        layers = tuple(
            layer.model_copy(update={"methods": tuple(m for m in layer.methods if m != method)}) for layer in self.layers
        )
        return self.model_copy(update={"methods": tuple(m for m in self.methods if m != method), "layers": layers})

    def methods_of(self, label: str, name: str) -> tuple[str, ...]:
        """The methods that a weight may have."""
        methods = self.methods
        for layer in self.layers:
            if layer.fits(label, name):
                methods = layer.methods
        return methods
