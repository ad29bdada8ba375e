"""The only reader of the environment: ``CHATSERVER_*`` variables and ``.env``, read once.

Nothing in here shows a secret: they are ``SecretStr``, and an error names the variable and what is
wrong with it but never what was in it.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "CHATSERVER_"
Network = IPv4Network | IPv6Network

# A browser leaves the default port out of Origin: with it, an entry would never match.
_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_ORIGIN = re.compile(
    r"([a-z][a-z0-9+.-]*)://([a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\])(?::(\d{1,5}))?"
)


class ConfigurationError(Exception):
    """The server cannot run as it is configured. ``reasons`` are sentences for a person."""

    def __init__(self, reasons: list[str]) -> None:
        assert reasons
        super().__init__("\n".join(reasons))
        self.reasons = reasons


def variable(field: str) -> str:
    """Name of the environment variable that a field is read from."""
    return PREFIX + field.upper()


def _split(value: object) -> object:
    """Comma-separated text as its parts; anything else is already a sequence."""
    if not isinstance(value, str):
        return value
    return tuple(part for part in (piece.strip() for piece in value.split(",")) if part)


def _origin(text: str) -> str:
    match = _ORIGIN.fullmatch(text.lower())
    port = int(match[3]) if match and match[3] else None
    if match is None or (port is not None and not 0 < port < 65536):
        raise ValueError(
            "every origin must be exactly scheme://host or scheme://host:port, as in "
            "https://chat.example: no path, no slash at the end, no wildcard, and an international "
            "name in its xn-- form"
        )
    if port is not None and _DEFAULT_PORTS.get(match[1]) == port:
        port = None
    return f"{match[1]}://{match[2]}" + ("" if port is None else f":{port}")


def _network(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return ip_network(value)
    except ValueError:
        raise ValueError(
            "every proxy must be an IP address or a network such as 10.0.0.0/8"
        ) from None


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _absolute(path: Path) -> Path:
    # The store is started in a directory of its own: what is relative must be settled before.
    try:
        return Path(os.path.abspath(path.expanduser()))
    except RuntimeError:
        raise ValueError("has a ~ that stands for nobody's home directory") from None


def _text(secret: SecretStr) -> SecretStr:
    try:
        secret.get_secret_value().encode()
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8 text") from None
    return secret


class StorePlace(NamedTuple):
    """What CHATSERVER_REDIS_URL names."""

    kind: Literal["single", "sentinel", "cluster"]
    url: str
    """Of a single store; else of none in particular, with user, password, database, options."""
    hosts: tuple[tuple[str, int], ...] = ()
    """The sentinels, or some nodes of the cluster."""
    service: str = ""
    """What the sentinels call the primary."""

    def __repr__(self) -> str:
        return f"<StorePlace {self.kind} {self.hosts} {self.service}>"


_PLACES = re.compile(
    r"(rediss?)\+(sentinel|cluster)://([^@/?#\s]*@)?([^@/?#\s]+)(/[^/?#\s]*)?(/\d{1,5})?/?(\?[^#\s]*)?"
)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]*))(?::(\d{1,5}))?")


def store_place(url: str) -> StorePlace:
    """Take a store's URL apart. Raises ValueError, which quotes nothing of it."""
    # urllib's own errors quote the URL, and with it the password.
    with suppress(ValueError):
        if match := _PLACES.fullmatch(url):
            return _place(*match.groups(""))
        parts = urlsplit(url)
        whole = parts.path if parts.scheme == "unix" else parts.hostname
        if parts.scheme in ("redis", "rediss", "unix") and whole and parts.port != 0:
            return StorePlace("single", url)
    raise ValueError(
        "must be a URL such as redis://host:6379/0, rediss://… or unix:///path, "
        "redis+sentinel://host1:26379,host2:26379/mymaster or redis+cluster://host1:6379,host2:6379"
    )


def _place(
    scheme: str, kind: str, login: str, hosts: str, path: str, database: str, options: str
) -> StorePlace:
    service = path.strip("/")
    if kind == "cluster" and (service not in ("", "0") or database):
        raise ValueError("a cluster has no databases")
    if kind == "sentinel" and not re.fullmatch(r"[A-Za-z0-9._-]+", service):
        raise ValueError("the sentinels must be told which primary is meant")
    default = 6379 if kind == "cluster" else 26379
    found = tuple(_host_and_port(text, default) for text in hosts.split(","))
    url = f"{scheme}://{login}host{database}{options}"
    return StorePlace("cluster" if kind == "cluster" else "sentinel", url, found, service)


def _host_and_port(text: str, default: int) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    port = int(match[2] or default) if match else 0
    if match is None or not 0 < port < 65536:
        raise ValueError("not a host, or not a port")
    return match[1].strip("[]"), port


def without_secrets(url: str) -> str:
    """A store's URL for a person: neither its login nor its options, which may hold one, too."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _store_url(secret: SecretStr) -> SecretStr:
    store_place(secret.get_secret_value())
    return secret


def _data_dir() -> Path:
    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    if base.is_absolute():
        return base / "chatserver"
    try:
        return Path.home() / ".local" / "share" / "chatserver"
    except RuntimeError:
        raise ConfigurationError(
            ["This user has no home directory: set CHATSERVER_DATA_DIR."]
        ) from None


Secret = Annotated[SecretStr, AfterValidator(_text)]
StoreUrl = Annotated[SecretStr, AfterValidator(_store_url)]
File = Annotated[Path, AfterValidator(_absolute)]
Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_split)
]
Networks = Annotated[
    tuple[Annotated[Network, BeforeValidator(_network)], ...], NoDecode, BeforeValidator(_split)
]
Rate = Annotated[FiniteFloat, Field(gt=0, le=1_000_000)]
Seconds = Annotated[FiniteFloat, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Settings(BaseSettings):
    """Everything the server may be told, checked. Build it with ``load()``."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    environment: Annotated[Literal["development", "production"], BeforeValidator(_lower)] = Field(
        "development",
        description="`development`, or `production`, which refuses to start half configured",
    )
    secret: Secret | None = Field(
        None,
        description="signs the tokens: at least 32 bytes that nobody can guess; in development one "
        "is made and kept in the data directory",
    )
    secret_previous: Secret | None = Field(
        None, description="the secret before this one; its tokens are still accepted"
    )
    redis_url: StoreUrl | None = Field(
        None,
        description="the Redis or Valkey that all workers and hosts share: `redis://host:6379/0`, "
        "`rediss://…`, `unix:///path`, or one of those [below](#the-store); without it development "
        "starts a private one",
    )
    host: str = Field("127.0.0.1", description="address to listen on; `0.0.0.0` is all of them")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes any free one")
    workers: int = Field(1, ge=1, le=1024, description="worker processes; one per core is best")
    data_dir: File = Field(
        default_factory=_data_dir,
        description="where the private store and the development secret live; by default "
        "`$XDG_DATA_HOME/chatserver` or `~/.local/share/chatserver`",
    )
    control_host: str = Field(
        "127.0.0.1", description="address of the control API; in production another needs TLS"
    )
    control_port: int = Field(8001, ge=0, le=65535, description="port of the control API")
    control_key: Secret | None = Field(
        None,
        description="opens the control API: at least 32 bytes that nobody can guess; without it "
        "there is no control API",
    )
    allowed_origins: Origins = Field(
        (),
        description="origins whose pages may connect, such as `https://chat.example`, "
        "comma-separated",
    )
    tls_certfile: File | None = Field(
        None, description="PEM file with the certificate and its chain"
    )
    tls_keyfile: File | None = Field(
        None, description="PEM file with the certificate's private key"
    )
    trusted_proxies: Networks = Field(
        (),
        description="addresses or networks of proxies whose `X-Forwarded-*` are believed, "
        "comma-separated",
    )
    issuer: str = Field("chatserver", max_length=256, description="the tokens' `iss`")
    audience: str = Field("chatserver", max_length=256, description="the tokens' `aud`")
    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)
    ] = Field("info", description="`debug`, `info`, `warning`, `error` or `critical`")

    # 900,000 leaves room for the rest of an event within the 1 MiB of a server frame.
    frame_bytes: int = Field(
        65536, ge=1024, le=900_000, description="largest frame a client may send, in bytes"
    )
    compression: Annotated[Literal["off", "shared"], BeforeValidator(_lower)] = Field(
        "off",
        description="`off`, or `shared`: a room's events go compressed, once for all receivers, to "
        "clients that offer `permessage-deflate` ([more](#compression))",
    )
    rooms: int = Field(256, ge=1, le=10_000, description="rooms that one connection may join")
    send_rate: Rate = Field(10.0, description="messages per second and connection")
    send_burst: Count = Field(20, description="messages a connection may send at once")
    command_rate: Rate = Field(50.0, description="commands per second and connection")
    command_burst: Count | None = Field(
        None,
        description="commands a connection may send at once; by default the rooms and 64 more, so "
        "that a client that comes back can rejoin them all",
    )
    handshake_rate: Rate = Field(200.0, description="handshakes per second and address")
    admission_rate: Rate = Field(
        2000.0,
        description="handshakes per second and worker; when more come at once they wait their "
        "turn, up to half of `CHATSERVER_HANDSHAKE_SECONDS`, and beyond that are told when to "
        "come back",
    )
    connections: Count | None = Field(
        None, description="connections per worker; by default the descriptor limit less 200"
    )
    user_connections: Count = Field(2048, description="connections per user, on all workers")
    access_seconds: int = Field(
        900, ge=10, le=900, description="how long an access token is good, in seconds"
    )
    refresh_seconds: int = Field(
        604_800,
        ge=60,
        le=604_800,
        description="how long after its login a session can be carried on, in seconds",
    )
    history: Count = Field(1000, description="events kept per room")
    history_seconds: Count = Field(604_800, description="how long a room's events are kept")
    replay: Count = Field(1000, description="events replayed at most to a client that was away")
    key_window: Count = Field(600, description="how long a message's key is remembered, in seconds")
    durability: Annotated[Literal["primary", "replica"], BeforeValidator(_lower)] = Field(
        "primary",
        description="what an `ack` promises: `primary`, the store has the message; `replica`, a "
        "replica of it has, too",
    )
    replicas: Count = Field(
        1,
        description="replicas that must have a message before its ack, where "
        "`CHATSERVER_DURABILITY` is `replica`: all that may be promoted",
    )
    token_bytes: int = Field(
        4096, ge=512, le=8000, description="longest access token that is read, in bytes"
    )
    ping_interval: Seconds = Field(25.0, description="seconds between pings")
    ping_timeout: Seconds = Field(20.0, description="seconds a pong may take")
    slow_seconds: Seconds = Field(30.0, description="seconds a reader may stay behind")
    drain_seconds: Seconds = Field(
        30.0, description="seconds over which a worker that stops sends its clients away"
    )
    handshake_seconds: Seconds = Field(5.0, description="seconds a handshake may take")

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Settings:
        if (self.tls_certfile is None) != (self.tls_keyfile is None):
            raise ValueError("CHATSERVER_TLS_CERTFILE and CHATSERVER_TLS_KEYFILE go together.")
        if self.durability == "replica" and self.redis_url is None:
            raise ValueError(
                "CHATSERVER_DURABILITY=replica needs a Redis or Valkey with a replica: set "
                "CHATSERVER_REDIS_URL."
            )
        return self

    @property
    def control_tls(self) -> bool:
        """Beyond this machine the control API is served under the same certificate."""
        return self.tls_certfile is not None and not _is_loopback(self.control_host)

    @property
    def production(self) -> bool:
        return self.environment == "production"

    def problems(self) -> list[str]:
        """Reasons why a server may not start with these settings in production; none otherwise.

        Whether a secret is good enough is for the keyring to say, and whether the TLS files are
        for ssl: see ``supervisor.refusals``, which is the whole list.
        """
        if not self.production:
            return []
        missing = {
            "CHATSERVER_SECRET is not set: production needs a secret of its own, of at least 32 "
            f"random bytes ({command()} secret makes one).": self.secret is None,
            "There is no TLS: set CHATSERVER_TLS_CERTFILE and CHATSERVER_TLS_KEYFILE, or, where a "
            "proxy terminates TLS, CHATSERVER_TRUSTED_PROXIES.": not self.tls_certfile
            and not self.trusted_proxies,
            "CHATSERVER_ALLOWED_ORIGINS is not set: name the origins whose pages may connect, such "
            "as https://chat.example.": not self.allowed_origins,
            "CHATSERVER_REDIS_URL is not set: production needs a Redis or Valkey that is run for "
            "it.": self.redis_url is None,
            "CHATSERVER_CONTROL_HOST is not this machine itself, and there is no TLS: set "
            "CHATSERVER_TLS_CERTFILE and CHATSERVER_TLS_KEYFILE.": self.control_key is not None
            and not self.tls_certfile
            and not _is_loopback(self.control_host),
        }
        return [reason for reason, is_missing in missing.items() if is_missing]


def load(*, env_file: str | None = ".env", **overrides: Any) -> Settings:
    """Read the settings; ``overrides`` (by field name, None = not given) win over the environment.

    Raises ConfigurationError with every reason at once.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    given["_env_file"] = env_file
    try:
        return Settings(**given)
    except ValidationError as error:
        raise ConfigurationError(
            [_sentence(detail) for detail in error.errors(include_url=False, include_input=False)]
        ) from None
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(
            [f"{env_file} cannot be read: it must be a readable file of UTF-8 text."]
        ) from None


def _sentence(detail: Mapping[str, Any]) -> str:
    """A pydantic error in a person's words, without the value that was wrong."""
    message = _wording(detail["type"], detail.get("ctx", {})) or detail["msg"]
    message = message.removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    return f"{variable(str(detail['loc'][0]))}: {message}."


def _wording(kind: str, context: Mapping[str, Any]) -> str | None:
    match kind:
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return "must be a whole number"
        case "float_parsing" | "float_type" | "finite_number":
            return "must be a number"
        case "greater_than":
            return f"must be more than {context['gt']:g}"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "less_than_equal":
            return f"must be at most {context['le']:_}".replace("_", ",")
        case "literal_error":
            return f"must be {context['expected']}"
        case "string_too_long":
            return f"must have at most {context['max_length']} characters"
    return None


def environ(settings: Settings) -> dict[str, str]:
    """The environment for a child process: ours, with exactly these settings, secrets included.

    The child reads it with ``load(env_file=None)`` and gets an equal value.
    """
    others = {
        name: value
        for name, value in os.environ.items()
        if name == COMMAND or not name.upper().startswith(PREFIX)
    }
    mine = {
        variable(name): _as_text(getattr(settings, name)) for name in type(settings).model_fields
    }
    return others | {name: value for name, value in mine.items() if value}


def _as_text(value: object) -> str:
    match value:
        case None:
            return ""
        case SecretStr():
            return value.get_secret_value()
        case tuple():
            return ",".join(map(str, value))
        case _:
            return str(value)


COMMAND = "CHATSERVER_COMMAND"


def command() -> str:
    """How the command line was called, for text that a person is to copy."""
    return os.environ.get(COMMAND) or "chatserver"


def unknown_variables() -> list[str]:
    """Variables with our prefix that mean nothing: most likely misspelt."""
    known = {variable(name) for name in Settings.model_fields} | {COMMAND}
    return sorted(
        name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known
    )


def development_secret(data_dir: Path) -> bytes:
    """The secret of a development server: made on first use, then the same in every terminal.

    Raises ConfigurationError if it cannot be kept, or if others can read it.
    """
    path = data_dir / "secret"
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _create(path, secrets.token_urlsafe(48).encode())
        return _read_private(path)
    except OSError as error:
        raise ConfigurationError(
            [
                f"The development secret cannot be kept in {path} ({error.strerror}): set "
                "CHATSERVER_DATA_DIR to a directory of your own, or set CHATSERVER_SECRET."
            ]
        ) from None


def _create(path: Path, content: bytes) -> None:
    """Write a file that is whole from the first moment it can be seen, unless it is there already.

    ``link`` refuses to replace: of two processes at once one wins, and both read the winner's.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=".secret-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


def _read_private(path: Path) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_mode & 0o077 or status.st_uid not in (os.geteuid(), 0):
            raise ConfigurationError(
                [
                    f"{path} can be read by others than you: it signs tokens. Make it private with "
                    f"chmod 600, or delete it and a new one is made (the old one's tokens end)."
                ]
            )
        content = file.read(4096).strip()
    if len(content) < 32:
        raise ConfigurationError([f"{path} is damaged: delete it and a new one is made."])
    return content


def describe() -> Iterable[tuple[str, str, str]]:
    """Every variable with its default and its meaning, as docs/configuration.md lists them."""
    for name, field in Settings.model_fields.items():
        default = None if field.default_factory else field.default
        yield variable(name), _as_text(default), field.description or ""
