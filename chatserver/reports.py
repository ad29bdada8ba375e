"""How a host's workers tell what they count: a file each, in a directory of this run of the host.

A worker writes its file anew once a second, whole or not at all. The control process reads them
when it is asked. So nobody waits for anybody: of a worker that hangs there is what it said last,
and when.

What a process has counted outlives it. The supervisor, who starts them and knows who has ended,
adds the counters of one that has to those of its slot and takes its file away, and its gauges with
it. A slot's counters therefore never go back, neither after a crash nor in a rolling restart, when
two processes share a slot and the one that goes would take its part of the sum along: Prometheus
would take that for a reset, and count the other one's part twice. What is lost is what a killed
process had counted since its last report.

A supervisor lives through releases that its workers do not. So what it adds up is numbers of
whatever name, and what it cannot read it passes over.

The directory goes with the host. One that is killed leaves it behind: nobody reads it again, and
the next host of the same user that starts an hour later takes it away.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from chatserver import __version__, telemetry
from chatserver.metrics import Metrics

MEMORY = Path("/dev/shm")
"""Files in memory, where there is such a place: a busy disk must not stop a worker's event loop."""
DIRECTORY = "chatserver-metrics-"
"""How the name of such a directory begins."""
LEFT_SECONDS = 3600.0
"""In a directory that is in use, something is written every second."""
ENDED = "ended"
REMEMBERED = 1000
"""Files of which it is known that they are in the sums: far more than end during one reading."""
_UNFINISHED = ".new"

Counts = dict[str, Any]

log = telemetry.logger(__name__)


class Report:
    """A worker's own file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed = False

    def write(self, metrics: Metrics) -> None:
        """What cannot be written is missing, and no more than that."""
        about = {"pid": os.getpid(), "at": time.time(), "version": __version__}
        try:
            _write(self._path, about | metrics.report())
        except OSError as error:
            if not self._failed:
                log.warning("metrics not written", reason=error.strerror)
            self._failed = True


class Reports:
    """The supervisor's part: whose files there are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._count = 0
        self._sums: dict[str, Counts] = {}
        self._retired: deque[str] = deque(maxlen=REMEMBERED)

    def begin(self, slot: int) -> Path:
        """The file of a new process in this slot."""
        self._count += 1
        return self.directory / f"{slot}-{self._count}"

    def retire(self, path: Path) -> None:
        """Its process has ended."""
        report = _read(path)
        if report is not None:
            slot = path.name.partition("-")[0]
            self._sums[slot] = add(self._sums.get(slot, {}), report.get("counts", {}))
            self._retired.append(path.name)
            try:
                # First: whoever reads in between finds both, and is told that one is in the other.
                _write(
                    self.directory / ENDED, {"slots": self._sums, "retired": list(self._retired)}
                )
            except OSError as error:
                log.warning("metrics not written", reason=error.strerror)
        for left in (path, _unfinished(path)):
            left.unlink(missing_ok=True)


@contextmanager
def kept() -> Iterator[Reports | None]:
    """Reports in a directory of their own, for as long as this host runs.

    None where no directory can be made: a server without metrics is better than none.
    """
    _remove_left()
    for parent in (MEMORY, None):
        try:
            directory = tempfile.TemporaryDirectory(
                prefix=DIRECTORY, dir=parent, ignore_cleanup_errors=True
            )
        except OSError as error:
            reason = error.strerror
            continue
        with directory as name:
            yield Reports(Path(name))
        return
    log.error("no metrics: there is no directory for them", reason=reason)
    yield None


def _remove_left() -> None:
    """What hosts that were killed have left in memory, where nobody else ever clears up."""
    for directory in MEMORY.glob(DIRECTORY + "*"):
        with suppress(FileNotFoundError):
            status = directory.lstat()
            mine = status.st_uid == os.geteuid()
            if mine and time.time() - status.st_mtime > LEFT_SECONDS:
                shutil.rmtree(directory, ignore_errors=True)


# --- reading ---------------------------------------------------------------------------------


class Living(NamedTuple):
    """A process that serves, or hangs."""

    pid: int
    at: float
    """When it said so, in Unix time."""
    version: str
    gauges: Mapping[str, Any]


class Slot(NamedTuple):
    """One worker's place: all that was ever counted in it, and who is there."""

    counts: Counts
    living: list[Living]


def read(directory: Path) -> dict[int, Slot]:
    """By number, those slots that anything is known of."""
    # In this order: who ends in between was read here, and is found among the retired there.
    found = {path.name: _read(path) for path in directory.iterdir() if _is_report(path)}
    ended = _read(directory / ENDED) or {"slots": {}, "retired": []}
    slots = {int(slot): Slot(counts, []) for slot, counts in ended["slots"].items()}
    for name in found.keys() - set(ended["retired"]):
        report = found[name]
        if report is None:
            continue
        number = int(name.partition("-")[0])
        slot = slots.get(number, Slot({}, []))
        counts = add(slot.counts, report.get("counts", {}))
        living = Living(report["pid"], report["at"], report["version"], report["gauges"])
        slots[number] = Slot(counts, [*slot.living, living])
    return slots


def add(one: Any, other: Any) -> Any:
    """The sum of what two processes have counted, number by number."""
    match one, other:
        case dict(), dict():
            return one | {
                name: add(one[name], value) if name in one else value
                for name, value in other.items()
            }
        case list(), list() if len(one) == len(other):
            return [add(*pair) for pair in zip(one, other, strict=True)]
        case ((int() | float()), (int() | float())):
            return one + other
        case _:
            return other  # Another release counts in another way: it begins anew.


def _is_report(path: Path) -> bool:
    return path.name != ENDED and path.suffix != _UNFINISHED


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + _UNFINISHED)


def _read(path: Path) -> dict[str, Any] | None:
    """None: its process has not reported yet, or has ended meanwhile; or it is no report."""
    try:
        report = orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    return report if isinstance(report, dict) else None


def _write(path: Path, content: object) -> None:
    unfinished = _unfinished(path)
    unfinished.write_bytes(orjson.dumps(content))
    unfinished.rename(path)
