"""What a run must reach: ``delivery_p99<200``, ``lost==0``, ``sends_per_second>=1000``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import NamedTuple

from .tally import COUNTS, FAMILIES, Measure

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_EXPRESSION = re.compile(r"\s*([\w.]+)\s*(<=|>=|==|!=|<|>)\s*(\d+(?:\.\d+)?)\s*")
_MEASURES = "|".join(sorted(Measure, key=len, reverse=True))
_STATISTIC = re.compile(rf"({_MEASURES})_(p\d{{1,2}}(?:\.\d+)?|max|mean|count)")
PER_SECOND = "_per_second"


class Requirement(NamedTuple):
    name: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{self.bound:g}"

    def met_by(self, value: float | None) -> bool:
        """What was not measured meets nothing."""
        return value is not None and COMPARISONS[self.comparison](value, self.bound)


def parse_requirement(text: str) -> Requirement:
    """Raises ValueError, with what there is to choose from."""
    match = _EXPRESSION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not like 'delivery_p99<200' (in ms) or 'lost==0'")
    name = match[1]
    if statistic_of(name) is None and not _is_count(name.removesuffix(PER_SECOND)):
        raise ValueError(
            f"there is no {name!r}. There are times in ms, as in delivery_p99, delivery_p99.9, "
            f"delivery_max, delivery_mean and delivery_count, of {', '.join(Measure)}; counts, "
            f"each also with {PER_SECOND}: {', '.join(COUNTS)}; their parts, such as refused_429, "
            "error_rate_limited and closed_4430; and cpu, the busiest process in % of a core"
        )
    return Requirement(name, match[2], float(match[3]))


def statistic_of(name: str) -> tuple[Measure, str] | None:
    """``delivery_p99`` as its measure and statistic; None if it is something else."""
    match = _STATISTIC.fullmatch(name)
    return (Measure(match[1]), match[2]) if match else None


def _is_count(name: str) -> bool:
    families = tuple(f"{family}_" for family in FAMILIES)
    return name in COUNTS or name == "cpu" or name.startswith(families)
