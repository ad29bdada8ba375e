"""``chatserver`` as a program, but its processes give the store as long as tests want."""

from __future__ import annotations

import sys
from functools import partial

from chatserver import supervisor
from chatserver.cli import main
from tests.support import deadlines

COMMAND = (sys.executable, "-m", "tests.support.served")

if __name__ == "__main__":
    deadlines.lengthen()
    supervisor.run = partial(supervisor.run, command=(*COMMAND, "worker"))
    setattr(supervisor, "CONTROL", (*COMMAND, "control"))  # noqa: B010  It is Final.
    main(prog_name="chatserver")
