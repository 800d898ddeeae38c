"""The settings that a site is tried with: how its keys are read, at which precision, and with how many of them."""

from dataclasses import dataclass, replace

from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.strategies import BLOCKWISE

# Share of a query's keys that is read, from coarse to fine.
DENSITIES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
# Tolerances that `tree` is given, as multiples of the error wanted at the outputs: many sites' errors meet there.
TOLERANCES = (0.5, 1.0, 2.0, 4.0, 8.0)
LARGEST_TOLERANCE = 0.5
KEY_BLOCK = 16  # keys that a block holds: finer budgets are the same one


@dataclass(frozen=True)
class Setting:
    """Attributes of one QuantumAttention; those that are left out here have the op table's defaults."""

    strategy: str = "exact"
    num_samples: tuple[int, ...] = (32,)
    precision: str = "fp32"
    error_tolerance: float = 0.0
    residual: str = "verify_only"

    def named(self) -> dict:
        """The keys that a recipe has to name, in plain data: those that the strategy reads."""
        keys = {"strategy": self.strategy}
        if self.strategy in BLOCKWISE:
            keys["precision"] = self.precision
        if self.strategy != "exact":
            numbers = list(self.num_samples)
            keys["num_samples"] = numbers[0] if len(numbers) == 1 else numbers
        if self.strategy == "tree":
            keys |= {"error_tolerance": self.error_tolerance, "residual": self.residual}
        return keys

    def attributes(self) -> dict:
        """The attributes of the node."""
        default = QUANTUM_ATTENTION.attribute("control_variate").default
        return {**self.__dict__, "num_samples": list(self.num_samples), "control_variate": default}

    @property
    def draws(self) -> bool:
        """Whether the error is noise without a bias; that of `exact`, of a `tree` of centroids and of `hybrid` is not."""
        if self.strategy == "tree":
            return self.residual in ("unbiased", "james_stein")
        return self.strategy not in ("exact", "hybrid")

    @property
    def family(self) -> tuple | None:
        """Settings of one family may be mixed head by head, since they differ in num_samples alone; None: it may not be."""
        if self.strategy not in ("tree", "stratified", "hybrid") or self.error_tolerance:
            return None
        return (self.strategy, self.precision, self.residual)


EXACT = Setting()


def grid(keys: int, max_error: float) -> list[Setting]:
    """The settings worth a try for a site whose queries see up to `keys` keys, EXACT first.

    Args:
        max_error: relative error wanted at the model's outputs.
    """
    budgets = [n for n in dict.fromkeys(_blocks(density * keys) for density in DENSITIES) if n < keys]
    tree = Setting("tree", precision="bf16")
    found = [EXACT, replace(EXACT, precision="bf16"), replace(EXACT, precision="int8")]
    found += [replace(tree, num_samples=(n,)) for n in budgets]
    found += [replace(tree, num_samples=(n,), precision="int8") for n in budgets[2:]]
    found += [replace(tree, num_samples=(n,), residual=r) for r in ("unbiased", "james_stein") for n in budgets[1:3]]
    tolerances = [factor * max_error for factor in TOLERANCES if factor * max_error <= LARGEST_TOLERANCE]
    found += [replace(tree, num_samples=(_blocks(keys / 16),), error_tolerance=_rounded(t)) for t in tolerances]
    drawn = [n for n in (32, *budgets[2:3]) if n < keys]
    found += [Setting(strategy, (n,)) for strategy in ("stratified", "adaptive") for n in dict.fromkeys(drawn)]
    return found


def _blocks(keys: float) -> int:
    return max(1, round(keys / KEY_BLOCK)) * KEY_BLOCK


def _rounded(value: float) -> float:
    """Three digits, so that a recipe reads well."""
    return float(f"{value:.3g}")
