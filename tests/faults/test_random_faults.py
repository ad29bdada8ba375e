"""Any of the faults at any time, on a server under load, for a minute; longer with scripts/soak."""

from __future__ import annotations

import os
import sys

from tests.faults.nemesis import FAULTS, USUAL, plan
from tests.faults.run import Run

SECONDS = float(os.environ.get("FAULTS_SECONDS", "60"))
SEED = int(os.environ.get("FAULTS_SEED", "20261"))


def test_a_seed_is_a_plan() -> None:
    """Faults on one resource come one after the other, and all are over before the end."""
    planned = plan(SEED, 600)
    free: dict[str, float] = {}
    for each in planned:
        resource = FAULTS[each.name].resource
        assert each.at >= free.get(resource, 0.0)
        free[resource] = each.at + each.seconds

    assert planned == plan(SEED, 600) != plan(SEED + 1, 600)
    assert max(free.values()) < 600
    assert {each.name for each in planned} == set(USUAL)


async def test_every_promise_is_kept_whatever_breaks() -> None:
    verdict = await Run(SEED, SECONDS).run()
    sys.stdout.write(f"{verdict}\n")  # pytest shows it when the test fails, or with -s.

    assert not verdict.violations, str(verdict)
    assert verdict.report.outcomes["ok"] > 10 * SECONDS
    assert len(verdict.plan) > SECONDS / 8
