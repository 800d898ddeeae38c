"""A noise model: a channel with its parameters, as users name it and as the op, the simulator and circuits take it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from qexport.arguments import real
from qexport.errors import UsageError
from qexport.ops.quantum_noise import CHANNELS, SPEC

if TYPE_CHECKING:  # the command line parses noise without torch
    import torch

# Those that numbers describe.
MODELS = tuple(channel for channel in CHANNELS if channel != "kraus")


@dataclass(frozen=True)
class NoiseModel:
    """A channel of docs/noise.md on every qubit of a register.

    Attributes:
        channel, scope, convention: as the attributes of QuantumNoise.
        level: number, or tensor () or (qubits,); readout also (1, 2) or (qubits, 2).
        T1, T2, excited_population: numbers or tensors () or (qubits,). thermal_relaxation takes T1 = T2 = 1 where they are
            not given: `level` is then the time in units of T1.

    Raises:
        UsageError: an unknown channel, what is no number, or settings that its channel does not have.
    """

    channel: str = "depolarizing"
    level: float | torch.Tensor = 0.0
    T1: float | torch.Tensor | None = None
    T2: float | torch.Tensor | None = None
    excited_population: float | torch.Tensor | None = None
    scope: str = "local"
    convention: str = "replace"

    def __post_init__(self):
        if self.channel not in MODELS:
            raise UsageError(f"[QuantumNoise] channel must be one of {', '.join(MODELS)}, got {self.channel!r}")
        SPEC.resolve(self.attributes)
        for name, value in {"level": self.level, **self.inputs}.items():
            if not isinstance(value, (list, tuple)) and not hasattr(value, "__array__"):
                real(f"noise {name}", value)
        if self.channel == "thermal_relaxation":
            for name in ("T1", "T2"):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, 1.0)
            return
        for name in ("T1", "T2", "excited_population"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"[QuantumNoise] {name} is for channel thermal_relaxation, got {self.channel}; leave it out"
                )

    @property
    def attributes(self) -> dict:
        """Those attributes of QuantumNoise that a model decides."""
        return {"channel": self.channel, "scope": self.scope, "convention": self.convention}

    @property
    def inputs(self) -> dict:
        """Those inputs of QuantumNoise that are given, `level` first."""
        names = ("level", "T1", "T2", "excited_population")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def check_limits(self) -> None:
        """Check numbers of the model against the limits of its channel (docs/noise.md), by the op itself; needs no torch.

        With scope global the limit of convention replace depends on the qubits; what is checked holds up to ten.

        Raises:
            UsageError: one is outside.
        """
        from qexport import _core

        nothing = np.zeros((1, 1 << 10))  # a row that attends to nothing: limits are checked, nothing is computed
        parameters = [self.inputs.get(param.name) for param in SPEC.inputs[1:]]
        try:
            _core.quantum_noise(nothing, *parameters, **SPEC.resolve(self.attributes), threads=1)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def at(self, level) -> NoiseModel:
        """The same model at another level."""
        return replace(self, level=level)

    def __str__(self):
        given = {**self.attributes, **self.inputs}
        plain = {field.name: field.default for field in fields(self)}
        more = [
            f"{name}={_text(value)}"
            for name, value in given.items()
            if name not in ("channel", "level") and _text(value) != _text(plain[name])
        ]
        return ":".join([self.channel, _text(self.level), *more])


def as_models(noise, wanted: str = "noise must be one or several NoiseModels, as parse_noise makes them") -> tuple:
    """The models of a NoiseModel or of several.

    Raises:
        UsageError: there is something else among them; the message begins with `wanted`.
    """
    models = (noise,) if isinstance(noise, (NoiseModel, str)) or not isinstance(noise, Iterable) else tuple(noise)
    for model in models:
        if not isinstance(model, NoiseModel):
            raise UsageError(f"{wanted}, got {model!r}")
    return models


def parse_noise(text: str) -> tuple[NoiseModel, ...]:
    """The models of a text such as `depolarizing:0.01,thermal_relaxation:0.1:T1=1:T2=0.8`, in the order they act.

    Args:
        text: MODEL:LEVEL, each with NAME=VALUE settings behind further colons, separated by commas.

    Raises:
        UsageError: the text has another form, or a model is refused.
    """
    if not isinstance(text, str):
        raise UsageError(f"noise must be a text such as depolarizing:0.01, got {text!r}")
    return tuple(_parse_one(part.strip()) for part in text.split(","))


def parse_channels(text: str) -> tuple[NoiseModel, ...]:
    """The models, at level 0, of a text without levels, such as `depolarizing,thermal_relaxation:T1=1:T2=0.8`.

    Args:
        text: MODEL, each with NAME=VALUE settings behind colons, separated by commas.

    Raises:
        UsageError: as `parse_noise`, or a model has a level.
    """
    return tuple(_without_level(part.strip()) for part in text.split(","))


def _without_level(text: str) -> NoiseModel:
    channel, *settings = text.split(":")
    if settings and _is_number(settings[0]):
        mend = f"write --noise {':'.join([channel, *settings[1:]])} --levels {settings[0]}"
        raise UsageError(f"noise has its levels from --levels here, got {text!r}; {mend}")
    return _with_settings(channel, *settings, level=0.0, text=text)


def _parse_one(text: str) -> NoiseModel:
    channel, *rest = text.split(":")
    if not rest:
        raise UsageError(f"noise must be MODEL:LEVEL, such as depolarizing:0.01, got {text!r}")
    return _with_settings(channel, *rest[1:], level=_number("level", rest[0], text), text=text)


def _with_settings(channel: str, *rest: str, level: float, text: str) -> NoiseModel:
    settings = {"channel": channel, "level": level}
    known = {field.name for field in fields(NoiseModel)} - set(settings)
    for setting in rest:
        name, equals, value = setting.partition("=")
        if not equals or name not in known:
            raise UsageError(f"noise settings must be NAME=VALUE of {', '.join(sorted(known))}, got {setting!r} in {text!r}")
        settings[name] = value if name in ("scope", "convention") else _number(name, value, text)
    return NoiseModel(**settings)


def _text(value) -> str:
    """A number, one for each qubit, or a word."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(name: str, value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"noise {name} must be a number, got {value!r} in {text!r}") from None
