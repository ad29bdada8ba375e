"""Names of what sessions keep in the store, all in one slot: ``{auth}``.

``revoked:`` and ``ended:`` are a contract with other services: docs/tokens.md.
"""

from __future__ import annotations

STREAM = "chat:{auth}:revocations"
INCARNATION = "chat:{auth}:incarnation"
WORKERS = "chat:{auth}:workers"
CHANNEL = "chat:{auth}:live"
"""Says that there is something new in the stream; the message itself says nothing reliable."""


def record(kind: str, value: str) -> str:
    return f"chat:{{auth}}:revoked:{kind}:{value}"


def family(session: str) -> str:
    return f"chat:{{auth}}:family:{session}"


def ended(user: str) -> str:
    return f"chat:{{auth}}:ended:{user}"


def connections(user: str) -> str:
    return f"chat:{{auth}}:user:{user}"


def closed(entry: str) -> str:
    return f"chat:{{auth}}:closed:{entry}"
