"""What commands need of a server without asking it: its address, its keys, its store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from pydantic import SecretStr

from chatserver import supervisor
from chatserver.core.errors import StoreRefused, StoreUnavailable
from chatserver.settings import ConfigurationError, Settings, development_secret, without_secrets
from chatserver.store.embedded import socket_url
from chatserver.store.keyring import Keyring

if TYPE_CHECKING:  # It takes a while to load, and --help needs none of it.
    from chatserver.store.link import Call, Store
    from chatserver.store.refresh import RefreshTokens
    from chatserver.store.sessions import Sessions

T = TypeVar("T")

STORE_TRIES = 3


def authority(host: str, port: int) -> str:
    """Where this machine reaches what listens there, as a URL has it."""
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def url_of(settings: Settings, port: int) -> str:
    """Where a client on this machine connects."""
    scheme = "wss" if settings.tls_certfile else "ws"
    return f"{scheme}://{authority(settings.host, port)}/v1/ws"


def keyring_of(settings: Settings) -> Keyring:
    """The keys that the server has. Raises ConfigurationError when it would refuse them."""
    return Keyring.of(with_secret(settings))


def refresh_tokens_of(settings: Settings) -> RefreshTokens:
    """What makes and reads the server's refresh tokens. Raises as ``keyring_of``."""
    from chatserver.store.refresh import RefreshTokens

    return RefreshTokens.of(with_secret(settings))


def sessions_of(settings: Settings, call: Call) -> Sessions:
    """Sessions as the server has them. Raises as ``keyring_of``."""
    from chatserver.store.sessions import Sessions

    return Sessions.of(with_secret(settings), call)


def with_secret(settings: Settings) -> Settings:
    """The settings as the server completes them in development."""
    wrong = [
        reason
        for reason in supervisor.refusals(settings)
        if reason.startswith(("CHATSERVER_SECRET ", "CHATSERVER_SECRET_PREVIOUS "))
    ]
    if wrong:
        raise ConfigurationError(wrong)
    if settings.secret is not None:
        return settings
    secret = SecretStr(development_secret(settings.data_dir).decode())
    return settings.model_copy(update={"secret": secret})


def store_url(settings: Settings) -> str:
    if settings.redis_url is None:
        return socket_url(settings.data_dir)
    return settings.redis_url.get_secret_value()


async def ask(settings: Settings, question: Callable[[Store], Awaitable[T]]) -> T:
    """Ask the store something that may be asked twice. Raises StoreUnavailable, for a person.

    The server's short deadlines are not a person's: it is tried again before it is called away.
    """
    from chatserver.store.cluster import store_at

    why = StoreUnavailable()
    for _ in range(STORE_TRIES):
        try:
            async with store_at(store_url(settings)) as store:
                return await question(store)
        except StoreUnavailable as error:
            why = error
    raise StoreUnavailable(_explained(settings, why))


def _explained(settings: Settings, error: StoreUnavailable) -> str:
    if isinstance(error, StoreRefused):
        return f"The store refuses: {str(error).rstrip('.')}."
    if settings.redis_url is None:
        return f"The private store in {settings.data_dir} is not running: start the server first."
    url = without_secrets(settings.redis_url.get_secret_value())
    why = str(error).rstrip(".")
    return f"The store at {url} cannot be reached: {why}. Is CHATSERVER_REDIS_URL right?"
