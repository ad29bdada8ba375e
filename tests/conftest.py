"""Fixtures of the tests that need a real store or a real worker."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from chatserver.reports import MEMORY
from tests.support import deadlines
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import Worker

ROOT = Path(__file__).parents[1]
StartWorker = Callable[..., Worker]
AMPLE = dict.fromkeys(("send_rate", "send_burst", "command_rate", "command_burst"), 1_000_000)
"""Rates that no test reaches by accident."""

# How long an example takes tells of the machine: its other work counts, and no test is about that.
# What decides about a change must decide the same twice; whoever tests by hand looks further.
settings.register_profile(
    "ours",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ours")
deadlines.lengthen()


LONGEST = (
    "tests/web/test_conformance.py",
    "tests/faults/test_random_faults.py",
    "tests/test_supervisor.py",
    "tests/faults/test_named_faults.py",
    "tests/e2e/test_rolling_restart.py",
    "tests/faults/test_partitions.py",
    "tests/test_control.py",
    "tests/loadtest/test_runs.py",
    "tests/browser/test_chat.py",
    "tests/store/test_revocations.py",
    "tests/test_scrape.py",
    "tests/faults/test_clients_that_people_use.py",
)
"""These begin first, so that none of them is waited for alone in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {ROOT / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_configure() -> None:
    """Let the processes under test hear their signals, under nohup and in a script's background.

    What is ignored stays so in every child, but a function's place is taken by the default.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def _memory() -> Path | None:
    """Where files are kept in memory, if there is room for them."""
    if not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).free < 2**30:
        return None
    return MEMORY


@pytest.fixture(scope="session")
def _short_directory() -> Iterator[Path]:
    # pytest's own temporary directories are too deep for the path of a Unix socket, and a disk that
    # is busy holds up a store that writes to it.
    directory = Path(tempfile.mkdtemp(prefix="cs", dir=_memory()))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def _started(directory: Path) -> Valkey:
    directory.mkdir()
    store = Valkey(directory)
    store.start()
    return store


@pytest.fixture(scope="session")
def valkey(_short_directory: Path) -> Iterator[Valkey]:
    """The store that tests share: use names of your own, and leave it running."""
    store = _started(_short_directory / "shared")
    yield store
    store.stop()


@pytest.fixture(scope="module")
def module_valkey(_short_directory: Path) -> Iterator[Valkey]:
    """A store that the tests of one module share, and nobody else."""
    store = _started(_short_directory / unique("m"))
    yield store
    store.stop()


@pytest.fixture
def own_valkey(_short_directory: Path) -> Iterator[Valkey]:
    """A store to be frozen, killed and emptied."""
    store = _started(_short_directory / unique("v"))
    yield store
    store.stop()


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has to answer within the real deadlines: this process, and workers it starts."""
    deadlines.restore(monkeypatch)


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture(scope="module")
def worker(
    valkey: Valkey, issuer: Issuer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """A worker that the tests of a module share."""
    started = Worker(
        tmp_path_factory.mktemp("worker") / "log",
        valkey.url,
        issuer,
        **AMPLE,
    )
    started.start()
    yield started
    started.stop()


@pytest.fixture
def start_worker(issuer: Issuer, tmp_path: Path, valkey: Valkey) -> Iterator[StartWorker]:
    """Start workers with the settings of one's choice; they end with the test."""
    with ExitStack() as running:

        def start(store: Valkey | None = None, **settings: Any) -> Worker:
            log = tmp_path / unique("log")
            started = Worker(log, (store or valkey).url, issuer, **settings)
            running.callback(started.stop)
            started.start()
            return started

        yield start


@pytest.fixture
def room() -> str:
    return unique("room")


@pytest.fixture
def user() -> str:
    return unique("user")
