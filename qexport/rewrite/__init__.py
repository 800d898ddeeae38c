"""Rewrite passes on onnx_ir models: to the classical form (one ai.onnx Attention per site), then to QuantumAttention."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class LeftAlone:
    """An attention-like site that a pass did not convert, and why."""

    name: str
    module: str
    reason: str

    def to_dict(self) -> dict:
        """The entry of manifest["left_alone"]."""
        return {"name": self.name, "module": self.module, "reason": self.reason}


@dataclass(frozen=True)
class Site:
    """A converted attention. `layer` numbers the sites in graph order; `output` names the value both models share.

    Head counts and size are None where the graph does not tell them, `noise` and `shots` where there is none.
    """

    name: str
    layer: int
    module: str
    strategy: str
    num_samples: list[int]
    control_variate: int
    precision: str
    error_tolerance: float
    residual: str
    noise: str | None
    shots: int | str | None
    q_heads: int | None
    kv_heads: int | None
    head_size: int | None
    output: str
    node: object = field(repr=False, compare=False, default=None)

    def to_dict(self) -> dict:
        """The entry of manifest["sites"]."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "node"}


class DeclinedError(Exception):
    """Raised by a rule's check: the text says why a site does not fit."""
