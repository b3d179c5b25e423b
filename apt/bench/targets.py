"""Budgets and regression policies from a TOML file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from apt.bench.gate import Budget, RegressionPolicy
from apt.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The targets of measurements.

    Attributes:
        budgets: figures to reach, each for a class of devices.
        policies: how much slower counts as a regression, by kind of device.
    """

    budgets: tuple[Budget, ...]
    policies: dict[str, RegressionPolicy]


def read_targets(path: Path) -> Targets:
    """Read tables `devices` (classes: patterns), `regression` (kind: policy) and `budget`.

    Raises ConfigError for a file that cannot be read, or a field that is unknown or missing.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        unknown = set(data) - {"devices", "regression", "budget"}
        if unknown:
            raise ConfigError(f"{path.name} has unknown tables: {', '.join(sorted(unknown))}")
        classes: dict[str, list[str]] = data["devices"]
        budgets = tuple(
            Budget(**entry | {"devices": tuple(classes[entry["devices"]])})
            for entry in data["budget"]
        )
        policies = {kind: RegressionPolicy(**entry) for kind, entry in data["regression"].items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path.name} is not a file of targets: {type(error).__name__}: {error}"
        ) from error
    return Targets(budgets=budgets, policies=policies)
