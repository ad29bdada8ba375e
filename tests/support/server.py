"""A whole server: ``chatserver serve``, its workers and its control process."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import served
from tests.support.tokens import Issuer
from tests.support.worker import PATIENCE

KEY = secrets.token_urlsafe(48)


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def code(self) -> str:
        assert set(self.body) == {"error"}, self
        assert set(self.body["error"]) - {"path"} == {"code", "message"}, self
        return str(self.body["error"]["code"])


class Server:
    """``chatserver serve`` with these variables; its log says on which ports it is."""

    def __init__(self, log: Path, issuer: Issuer, **variables: object) -> None:
        self.issuer = issuer
        self._path = log
        others = {k: v for k, v in os.environ.items() if not k.startswith("CHATSERVER_")}
        mine = {
            "SECRET": issuer.secret,
            "PORT": 0,
            "CONTROL_PORT": 0,
            "DRAIN_SECONDS": 1,
            "HANDSHAKE_RATE": 100_000,
        } | variables
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*served.COMMAND, "serve"],
                env=others | {f"CHATSERVER_{k}": str(v) for k, v in mine.items()},
                stdout=output,
                stderr=output,
            )

    def log(self) -> str:
        return self._path.read_text(errors="replace")

    def lines(self, event: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in found if line["event"] == event]

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        deadline = time.monotonic() + 2 * PATIENCE
        while len(self.lines(event)) < count:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)
        return self.lines(event)[count - 1]

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.wait_for('ready')['port']}/v1/ws"

    @property
    def control_port(self) -> int:
        return int(self.wait_for("control_bound")["port"])

    def ask(
        self, method: str, path: str, body: object = None, *, key: str | None = KEY, **headers: str
    ) -> Reply:
        """One request; ``body`` is JSON unless it is bytes."""
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
        link = http.client.HTTPConnection("127.0.0.1", self.control_port, timeout=PATIENCE)
        try:
            link.request(method, path, data, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = link.getresponse()
            payload = answer.read()
        finally:
            link.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        is_json = found.get("content-type") == "application/json"
        return Reply(answer.status, found, json.loads(payload) if is_json else payload)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(2 * PATIENCE)
        log = self.log()
        assert "Traceback" not in log, log[-8000:]
        assert self.issuer.secrets_in(log) == []
        assert KEY not in log
        assert code == 0, log[-4000:]
