"""How an op is described. One frozen table (`qexport.ops.OPS`) drives the schemas, the translation, the
checks, the tests, `qexport ops` and docs/ops.md. Standard library only."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from operator import index

from qexport.errors import UsageError

DOMAIN = "com.qexport"
VERSION = 1


@dataclass(frozen=True)
class Attr:
    """An attribute of an op.

    `kind` is one of "int", "ints", "float", "string". `default` is written on every node; an attribute whose
    default is None is optional and may be absent (as `scale` of ai.onnx Attention). `choices` lists the allowed
    values, `minimum` and `maximum` the smallest and the largest allowed one.
    """

    name: str
    kind: str
    doc: str
    default: object = None
    choices: tuple = ()
    minimum: float | None = None
    maximum: float | None = None

    def check(self, value: object, where: str) -> object:
        """`value` in the form that a node stores.

        Raises:
            UsageError: the wrong kind, or outside the limits; the message begins with `where`.
        """
        where = f"[{where}] {self.name}"
        try:
            if isinstance(value, str) and self.kind != "string":
                raise TypeError
            if self.kind == "ints":
                value = [index(v) for v in (value if hasattr(value, "__len__") else [value])]
            else:
                value = {"int": index, "float": float, "string": str}[self.kind](value)
        except (TypeError, ValueError):
            raise UsageError(f"{where} must be of kind {self.kind}, got {value!r}") from None
        for v in value if self.kind == "ints" else [value]:
            if self.choices and v not in self.choices:
                raise UsageError(f"{where} must be one of {', '.join(map(str, self.choices))}, got {v!r}")
            if self.minimum is not None and not v >= self.minimum:
                raise UsageError(f"{where} must be >= {self.minimum}, got {v}")
            if self.maximum is not None and not v <= self.maximum:
                raise UsageError(f"{where} must be <= {self.maximum}, got {v}")
        if self.kind == "ints" and not value:
            raise UsageError(f"{where} must hold at least one number, got an empty list")
        return value


@dataclass(frozen=True)
class Param:
    """An input or output. `types` are ONNX type strings; params that share a `type_var` share their type."""

    name: str
    type_var: str
    shape: str
    doc: str
    optional: bool = False


@dataclass(frozen=True)
class OpSpec:
    """An op of the domain `com.qexport`: what it computes, takes, returns, and what its fallback is; "" where standard ONNX
    cannot do it.

    `check` takes the values of all attributes and raises UsageError where they do not fit each other.
    """

    name: str
    stem: str
    summary: str
    inputs: tuple[Param, ...]
    outputs: tuple[Param, ...]
    attributes: tuple[Attr, ...]
    type_vars: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fallback: str = ""
    check: Callable[[dict], None] = lambda values: None

    def to_dict(self) -> dict:
        """Plain data: everything but `check`."""
        return {key: value for key, value in asdict(self).items() if key != "check"}

    def attribute(self, name: str) -> Attr:
        """The attribute called `name`; KeyError when the op has none."""
        for attr in self.attributes:
            if attr.name == name:
                return attr
        raise KeyError(name)

    def resolve(self, attributes: dict) -> dict:
        """Every attribute of the op: `attributes` checked, the defaults filled in, None where an optional one is absent.

        Raises:
            UsageError: an unknown attribute, a value outside its limits, or values that do not fit each other.
        """
        known = [attr.name for attr in self.attributes]
        for key in attributes:
            if key not in known:
                raise UsageError(f"[{self.name}] has no attribute {key!r}; known: {', '.join(known)}")
        values = {}
        for attr in self.attributes:
            value = attributes.get(attr.name)
            value = attr.default if value is None else value
            values[attr.name] = None if value is None else attr.check(value, self.name)
        self.check(values)
        return values
