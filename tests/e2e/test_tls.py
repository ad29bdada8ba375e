"""The same server under TLS: handshakes, logout and the token routes; nothing before TLS 1.2."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from chatserver.client import DisconnectedError, TokenKeeper, TokenPair, connect
from tests.conftest import StartWorker
from tests.support.client import Client
from tests.support.sessions import office
from tests.support.tokens import Issuer
from tests.support.valkey import Valkey
from tests.support.worker import Worker


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEM file of a key and a certificate for 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=30))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def secure(start_worker: StartWorker, certificate: Path) -> Worker:
    return start_worker(tls_certfile=certificate, tls_keyfile=certificate)


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def test_many_connect_and_talk_over_tls(secure: Worker, issuer: Issuer, room: str) -> None:
    url = secure.url.replace("ws:", "wss:")
    context = trusting()  # One for all: it takes longer to make than a handshake.

    async def visit(number: int) -> tuple[str, int | None]:
        token = issuer.token(f"user {number}", session=f"{room} {number}")
        async with await Client.connect(url, token, ssl=context) as client:
            await client.join(room)
            ack = await client.ask("logout")
            _, code = await client.until_closed()
        return ack["type"], code

    assert set(await asyncio.gather(*(visit(n) for n in range(40)))) == {("ack", 4503)}


async def test_the_python_client_and_its_keeper_do_so_as_well(
    secure: Worker, issuer: Issuer, valkey: Valkey, room: str
) -> None:
    url, saved = secure.url.replace("ws:", "wss:"), []

    async def save(pair: TokenPair) -> None:
        saved.append(pair)

    async with office(valkey.url, issuer) as login:
        pair = TokenPair(**(await login.begin())._asdict())
    keeper = TokenKeeper(url, pair, save=save, tls=trusting())
    async with connect(url, token=keeper, tls=trusting()) as client:
        await client.refresh()
        joined = await client.join(room)
        position = await joined.send("hello")
        assert (await anext(joined)).position == position  # type: ignore[union-attr]
    with pytest.raises(DisconnectedError, match="CERTIFICATE_VERIFY_FAILED"):
        async with connect(url, token=pair.access_token, patience=0):
            pass

    assert saved == [keeper.pair]


async def test_the_token_routes_are_under_tls_too(secure: Worker) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", secure.port, ssl=trusting())
    writer.write(
        b"POST /v1/tokens/refresh HTTP/1.1\r\nHost: localhost\r\n"
        b"Authorization: Bearer nonsense\r\n\r\n"
    )
    answer = await reader.read()
    writer.close()

    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b'"token_invalid"' in answer


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_what_is_older_than_tls_1_2_is_refused(secure: Worker) -> None:
    old = trusting()
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1

    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", secure.port, ssl=old)
