"""The values that a recipe may have, and what is said of others: types for pydantic."""

import math
from numbers import Integral, Real
from typing import Annotated, Any

from pydantic import BeforeValidator

from qexport.arguments import as_seed
from qexport.errors import UsageError
from qexport.noise.model import parse_noise
from qexport.ops import QUANTUM_ATTENTION, QUANTUM_MEASURE
from qexport.ops.strategies import PRECISIONS, RESIDUALS, STRATEGIES

NO_NOISE = "none"
INFINITE = "inf"


def _one_of(choices: tuple[str, ...]) -> BeforeValidator:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, got {value!r}")
        return value

    return BeforeValidator(check)


def _num_samples(value: Any) -> tuple[int, ...]:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    most = QUANTUM_ATTENTION.attribute("num_samples").maximum
    if not numbers or any(isinstance(n, bool) or not isinstance(n, Integral) for n in numbers):
        raise ValueError(f"must be a whole number, or a list with one per query head, got {value!r}")
    for n in numbers:
        if not 1 <= n <= most:
            raise ValueError(f"must be between 1 and {most}, got {n}")
    return tuple(map(int, numbers))


def _control_variate(value: Any) -> int:
    if value not in (0, 1):
        raise ValueError(f"must be true or false, got {value!r}")
    return int(value)


def _error_tolerance(value: Any) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or math.isnan(value):
        raise ValueError(f"must be a number from 0 (off) to 1, such as 0.01 for 1 %, got {value!r}")
    return float(value)


def _noise(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be {NO_NOISE} or MODEL:LEVEL[,MODEL:LEVEL...], such as depolarizing:0.01, got {value!r}")
    text = value.strip()
    if text == NO_NOISE:
        return text
    try:
        for model in parse_noise(text):
            model.check_limits()
    except UsageError as error:
        raise ValueError(f"{text!r}: {error}") from None
    return text


def _shots(value: Any) -> int | str:
    if value == INFINITE or (isinstance(value, float) and value == math.inf):
        return INFINITE
    most = QUANTUM_MEASURE.attribute("shots").maximum
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= most:
        raise ValueError(f"must be a whole number from 1 to {most}, or {INFINITE} for no measurement, got {value!r}")
    return int(value)


def _seed(value: Any) -> int:
    try:
        return as_seed(value)
    except UsageError as error:
        raise ValueError(str(error).removeprefix("seed ")) from None


Strategy = Annotated[str, _one_of(STRATEGIES)]
NumSamples = Annotated[tuple[int, ...], BeforeValidator(_num_samples)]
ControlVariate = Annotated[int, BeforeValidator(_control_variate)]
Precision = Annotated[str, _one_of(PRECISIONS)]
ErrorTolerance = Annotated[float, BeforeValidator(_error_tolerance)]
Residual = Annotated[str, _one_of(RESIDUALS)]
Noise = Annotated[str, BeforeValidator(_noise)]
Shots = Annotated[int | str, BeforeValidator(_shots)]
Seed = Annotated[int, BeforeValidator(_seed)]
