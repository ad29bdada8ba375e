"""What can go wrong with a connection, told apart by what the caller should do."""

from __future__ import annotations


class ChatError(Exception):
    """Whatever the chat server, or the way to it, made of a request."""


class RefusedError(ChatError):
    """The handshake was refused before the upgrade; no connection was made.

    ``code`` is None when the answer was not this protocol's (a proxy's, another server's).
    ``retry_after`` is in milliseconds; without it, the same attempt will fail again.
    """

    def __init__(
        self, status: int, code: str | None, message: str, retry_after: int | None = None
    ) -> None:
        super().__init__(status, code, message, retry_after)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"refused with {self.status} {self.code or 'and no code'}: {self.message}"


class CommandError(ChatError):
    """The server answered a command with an error; the connection goes on.

    ``retry_after`` is in milliseconds. ``path`` says what was ``invalid``. After ``unavailable``
    a message may have been stored all the same: send it again with the same key.
    """

    def __init__(
        self, code: str, message: str, retry_after: int | None = None, path: str | None = None
    ) -> None:
        super().__init__(code, message, retry_after, path)
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.path = path

    @property
    def temporary(self) -> bool:
        """Whether the same command may succeed a little later."""
        return self.code in ("rate_limited", "unavailable", "internal", "token_expired")

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" ({self.path})" if self.path else "")


class DisconnectedError(ChatError):
    """There is no connection, or no longer one.

    ``code`` is the close code, 1006 where none came. ``after`` is the server's wish, in
    milliseconds, for how long to stay away. What became of a message whose `send` raised this is
    unknown: send it again with the same key.
    """

    def __init__(self, code: int, reason: str, after: int | None = None) -> None:
        super().__init__(code, reason, after)
        self.code = code
        self.reason = reason
        self.after = after

    @property
    def final(self) -> bool:
        """Whether to stay away: connecting again would end the same way."""
        return self.code >= 4500

    def __str__(self) -> str:
        return f"disconnected with {self.code} {self.reason}".rstrip()
