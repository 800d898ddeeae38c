"""How an op is described. One frozen table (`qexport.ops.OPS`) drives the schemas, the translation, the
checks, the tests, `qexport ops` and docs/ops.md. Standard library only."""

from dataclasses import dataclass, field

DOMAIN = "com.qexport"
VERSION = 1


@dataclass(frozen=True)
class Attr:
    """An attribute of an op.

    `kind` is one of "int", "ints", "float", "string". `default` is written on every node; an attribute whose
    default is None is optional and may be absent (as `scale` of ai.onnx Attention). `choices` lists the allowed
    values, `minimum` the smallest allowed one.
    """

    name: str
    kind: str
    doc: str
    default: object = None
    choices: tuple = ()
    minimum: float | None = None


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
    """An op of the domain `com.qexport`: what it computes, takes, returns, and what its fallback is."""

    name: str
    stem: str
    summary: str
    inputs: tuple[Param, ...]
    outputs: tuple[Param, ...]
    attributes: tuple[Attr, ...]
    type_vars: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fallback: str = ""

    def attribute(self, name: str) -> Attr:
        """The attribute called `name`; KeyError when the op has none."""
        for attr in self.attributes:
            if attr.name == name:
                return attr
        raise KeyError(name)
