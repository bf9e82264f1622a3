"""A server whose parts are killed, stopped or damaged: every fault has a bounded outcome."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from openai import APIError, APITimeoutError, OpenAI

from examples.server import Server, ServerError, session_pids
from tests.tiny import add_tokenizer, make_packed

pytestmark = pytest.mark.slow

OPTIONS = ["--served-model-name", "tiny", "--max-model-len", "256", "--dtype", "float32"]
EAGER = [*OPTIONS, "--enforce-eager"]
BOUND_SECONDS = 120
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_packed("llama", tmp_path_factory.mktemp("packed"))
    add_tokenizer(path)
    return path


def ask(server: Server, tokens: int = 16) -> str:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    answer = client.completions.create(
        model="tiny",
        prompt="one two",
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return answer.choices[0].text


def session(server: Server) -> dict[int, str]:
    """The names of the server's processes."""
    assert server.process is not None
    found = {}
    for pid in session_pids(server.process.pid):
        with suppress(ProcessLookupError, FileNotFoundError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    return found


def pid_of(server: Server, name: str) -> int:
    (pid,) = [pid for pid, command in session(server).items() if name in command]
    return pid


def running(server: Server) -> int:
    """Requests in the engine."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=BOUND_SECONDS) as response:
        text = response.read().decode()
    found = re.search(r"^vllm:num_requests_running\{.*\} (\S+)", text, re.MULTILINE)
    assert found, text
    return int(float(found[1]))


def assert_gone(server: Server) -> None:
    """The server ends within the bound, and so does every process that it started."""
    assert server.process is not None
    server.process.wait(BOUND_SECONDS)
    end = time.monotonic() + BOUND_SECONDS
    while session(server):
        assert time.monotonic() < end, session(server)
        time.sleep(0.2)


@pytest.mark.feature(
    "Faults",
    "engine process killed in the middle of a request",
    against="the request fails, the server ends, no process is left",
)
def test_a_killed_engine_ends_the_server(packed: Path, tmp_path: Path) -> None:
    with Server(packed, EAGER, tmp_path / "log") as server:
        assert ask(server)
        killer = threading.Timer(0.3, os.kill, (pid_of(server, "EngineCore"), signal.SIGKILL))
        killer.start()
        with pytest.raises(APIError) as failure:
            while True:
                ask(server, tokens=200)
        assert not isinstance(failure.value, APITimeoutError)
        assert_gone(server)


@pytest.mark.feature(
    "Faults",
    "a tensor-parallel rank stopped (SIGSTOP)",
    against="requests fail after VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS, and the server ends",
)
def test_a_stopped_rank_does_not_hang_for_ever(packed: Path, tmp_path: Path) -> None:
    env = TWO_RANKS | {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "10"}
    options = [*EAGER, "--tensor-parallel-size", "2"]
    with Server(packed, options, tmp_path / "log", env=env) as server:
        assert ask(server)
        stopped = pid_of(server, "Worker_TP1")
        os.kill(stopped, signal.SIGSTOP)
        begin = time.monotonic()
        try:
            with pytest.raises(APIError):
                ask(server)
            assert time.monotonic() - begin < BOUND_SECONDS
            assert_gone(server)
        finally:
            with suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGKILL)


@pytest.mark.feature(
    "Faults",
    "SIGTERM in the middle of requests, `--shutdown-timeout 30`",
    against="requests are answered, the server ends, no process is left; without the option vLLM "
    "loses the end of requests in half of its stops, a dense model's too, and waits for clients",
)
def test_sigterm_in_the_middle_of_requests(packed: Path, tmp_path: Path) -> None:
    with Server(packed, [*EAGER, "--shutdown-timeout", "30"], tmp_path / "log") as server:
        assert ask(server)
        ended = []

        def one() -> None:
            ended.append(ask(server, tokens=200))

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + BOUND_SECONDS
        while running(server) < 4:
            assert time.monotonic() < end and not ended
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(BOUND_SECONDS)
        for thread in threads:
            thread.join(BOUND_SECONDS)
        assert len(ended) == 4 and len(set(ended)) == 1
        assert_gone(server)


FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), Path("/nowhere"))
DAY = 24 * 3600


@pytest.mark.feature(
    "Faults",
    "the clock jumps by a day, forward and back, before and in the middle of requests",
    against="equal answers; answers are dated by the new clock",
)
@pytest.mark.skipif(not FAKETIME.exists(), reason="needs Debian's package faketime")
def test_clock_jumps(packed: Path, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    env = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        # A real clock jumps, too, while the monotonic one goes on.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    with Server(packed, EAGER, tmp_path / "log", env=env) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
        expected = ask(server, tokens=200)
        for days in (1, -1, 0):
            jump = threading.Timer(0.1, clock.write_text, (f"{days * DAY:+d}",))
            jump.start()
            assert ask(server, tokens=200) == expected
            jump.join()
            assert ask(server, tokens=200) == expected
            dated = client.completions.create(model="tiny", prompt="one", max_tokens=1).created
            assert abs(dated - time.time() - days * DAY) < 60


@pytest.mark.feature(
    "Faults",
    "checkpoint file truncated under a running server",
    against="it goes on answering rightly; a new start is refused, naming the file",
)
def test_a_truncated_checkpoint_matters_at_the_next_start(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "served"
    shutil.copytree(packed, path)
    file = path / "model.safetensors"
    with Server(path, EAGER, tmp_path / "log") as server:
        before = ask(server)
        os.truncate(file, file.stat().st_size // 2)
        assert ask(server) == before
    with pytest.raises(ServerError, match=r"model\.safetensors.*truncated"):
        with Server(path, EAGER, tmp_path / "log"):
            pass


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "full"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.feature(
    "Faults",
    "disk full in the compile cache",
    against="the start fails with `No space left on device`, or the server answers rightly",
)
def test_a_full_compile_cache(packed: Path, tmp_path: Path, full_disk: Path) -> None:
    env = {"VLLM_CACHE_ROOT": str(full_disk), "TORCHINDUCTOR_CACHE_DIR": str(full_disk / "i")}
    try:
        with Server(packed, OPTIONS, tmp_path / "log", env=env) as server:
            found = ask(server)
    except ServerError:
        assert "No space left on device" in (tmp_path / "log").read_text()
        return
    with Server(packed, EAGER, tmp_path / "log") as server:
        assert found == ask(server)
