"""What can go wrong, told apart by what the caller should do."""

from __future__ import annotations


class ChatError(Exception):
    """Whatever the chat server, or the way to it, made of a request."""

    @property
    def final(self) -> bool:
        """Whether to stay away: connecting again, with a good token, would end the same way."""
        return False


class RefusedError(ChatError):
    """An HTTP request was refused: the handshake's, so that no connection was made, or another.

    ``code`` is None when the answer was not this protocol's (a proxy's, another server's).
    ``retry_after`` is in milliseconds.
    """

    def __init__(
        self, status: int, code: str | None, message: str, retry_after: int | None = None
    ) -> None:
        super().__init__(status, code, message, retry_after)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after

    @property
    def final(self) -> bool:
        # What does not come from this server is a deployment's: it passes.
        ours = self.code is not None
        # 426 is a proxy's work as well: it kept the request to upgrade for itself.
        return ours and self.status < 500 and self.status not in (401, 408, 425, 426, 429)

    def __str__(self) -> str:
        return f"refused with {self.status} {self.code or 'and no code'}: {self.message}"


class TokenRefusedError(RefusedError):
    """The server does not take this refresh token, and never will: somebody has to log in."""

    @property
    def final(self) -> bool:
        return True


class CommandError(ChatError):
    """The server answered a command with an error; the connection goes on.

    ``retry_after`` is in milliseconds. ``path`` says what was ``invalid``.
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

    @property
    def doubtful(self) -> bool:
        """Whether it may have taken effect all the same."""
        return self.code in ("unavailable", "internal")

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" ({self.path})" if self.path else "")


class UnknownOutcomeError(ChatError):
    """A message may have been stored or not, and it is too late to find out by sending it again.

    ``key`` is the message's: should it come in a room or a history, it was stored. ``why`` is what
    put an end to the tries; None when the server has forgotten the key by now.
    """

    def __init__(self, key: str, why: Exception | None = None) -> None:
        super().__init__(key, why)
        self.key = key
        self.why = why

    def __str__(self) -> str:
        reason = "the server no longer remembers its key" if self.why is None else str(self.why)
        return f"whether message {self.key} was stored is not known: {reason}"


class DisconnectedError(ChatError):
    """There is no connection, or no longer one.

    ``code`` is the close code, 1006 where none came. ``after`` is the server's wish, in
    milliseconds, for how long to stay away.
    """

    def __init__(self, code: int, reason: str, after: int | None = None) -> None:
        super().__init__(code, reason, after)
        self.code = code
        self.reason = reason
        self.after = after

    @property
    def final(self) -> bool:
        return self.code >= 4500

    def __str__(self) -> str:
        return f"disconnected with {self.code} {self.reason}".rstrip()
