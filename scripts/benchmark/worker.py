"""One worker of the server for the benchmark: ``worker.py LISTENING_FD REPORT_FD``.

The real thing, built from the environment's settings, and one thing more: it writes a line to
REPORT_FD when it is ready, and again whenever it has collected its garbage, for SIGUSR1.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys

from chatserver import app, settings, telemetry


def main(listening: int, report: int) -> int:
    def tell(*_: object) -> None:
        os.write(report, b"\n")

    def collect(*_: object) -> None:
        gc.collect()
        tell()

    signal.signal(signal.SIGUSR1, collect)
    loaded = settings.load(env_file=None)
    telemetry.configure(loaded.log_level)
    return app.run(loaded, socket.socket(fileno=listening), tell)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
