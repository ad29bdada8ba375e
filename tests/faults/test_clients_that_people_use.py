"""The clients that applications are built on, under faults at random: what their applications see
keeps every promise. Longer with ``scripts/soak --clients``."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from tests.faults.run import Run, Shape

SECONDS = float(os.environ.get("FAULTS_CLIENT_SECONDS", "10"))
SEED = int(os.environ.get("FAULTS_SEED", "20261"))
MEMBERS = 50
NEEDS_NODE = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


@pytest.mark.parametrize("clients", ["python", pytest.param("javascript", marks=NEEDS_NODE)])
async def test_every_promise_is_kept_to_an_application_whatever_breaks(clients: str) -> None:
    run = Run(SEED, SECONDS, Shape(members=MEMBERS), every=1.5, clients=clients)
    verdict = await run.run()
    sys.stdout.write(f"{verdict}\n")

    assert not verdict.violations, str(verdict)
    assert verdict.report.outcomes["ok"] > 10 * SECONDS
    assert len(verdict.plan) > SECONDS / 4
