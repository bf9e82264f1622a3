"""Starts `vllm serve` on this machine as a child process, waits until it answers, and stops it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

HOST = "127.0.0.1"
GRACE_SECONDS = 3  # for processes that end by themselves when the front process has ended


class ServerError(RuntimeError):
    """The server ended or did not become ready; the message holds the end of its log."""


class Server:
    """A context manager around one `vllm serve`.

    Args:
        model: the checkpoint directory.
        options: further command line options of `vllm serve`.
        log: file that takes the server's output.
        port: a free one is picked if None.
        env: additions to the environment.
        timeout: seconds to wait until it is ready.
        progress: called about twice a second while waiting, with the seconds waited.
    """

    def __init__(
        self,
        model: Path,
        options: list[str],
        log: Path,
        port: int | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 300,
        progress: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        reach_ourselves()
        self.port = port if port is not None else free_port()
        self.log = log
        self.timeout = timeout
        self.progress = progress
        self.command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
        self.command += ["--host", HOST, "--port", str(self.port), *options]
        # vLLM's CPU worker leaves a core idle by default, which is half of a small machine.
        self.env = {**os.environ, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **(env or {})}
        self.env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # On a CPU vLLM 0.32 cannot read back the compiled model that it saves ("Compiling model
        # again due to a load failure"); without that, torch's own cache is used.
        self.env.setdefault("VLLM_USE_AOT_COMPILE", "0")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the server listens."""
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        """Start the process, and do not wait for it."""
        with self.log.open("wb") as log:
            # A session of its own, so that a Ctrl-C in the terminal reaches us alone.
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.env, start_new_session=True
            )

    def __enter__(self) -> "Server":
        self.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask the server to end, and end it and its workers if it does not within 30 seconds."""
        if self.process is None:
            return
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(30)
            end = time.monotonic() + GRACE_SECONDS
            while session_pids(self.process.pid) and time.monotonic() < end:
                time.sleep(0.1)
        finally:  # also if a second Ctrl-C ends the patience
            if session_pids(self.process.pid):  # the front process, or workers that outlive it
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def log_text(self) -> str:
        """All that the server has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        start = time.monotonic()
        while True:
            waited = time.monotonic() - start
            if self.process.poll() is not None:
                raise ServerError(
                    f"vllm serve ended with code {self.process.returncode} after {waited:.0f} s. "
                    f"The end of {self.log}:\n{tail(self.log_text())}"
                )
            if waited > self.timeout:
                raise ServerError(
                    f"vllm serve was not ready after {waited:.0f} s. The end of {self.log}:\n"
                    f"{tail(self.log_text())}"
                )
            if answers(f"{self.url}/health"):
                return
            self.progress(waited)
            time.sleep(0.5)


def exit_by_exception() -> None:
    """Have SIGTERM and SIGHUP raise SystemExit, so that `Server`s are stopped before the end."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda found, _: sys.exit(128 + found))


def reach_ourselves() -> None:
    """Have HTTP clients of this process, and of those that it starts, ask no proxy for `HOST`."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = os.environ.get(name, "")
        if not {HOST, "*"} & set(hosts.split(",")):
            os.environ[name] = f"{hosts},{HOST}".lstrip(",")


def answers(url: str) -> bool:
    """Whether an HTTP GET of `url` succeeds now."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def session_pids(leader: int) -> list[int]:
    """Every process of the session that `leader` began."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                pids.append(int(entry.name))
        except ProcessLookupError:
            continue
    return pids


def free_port(wanted: int = 0) -> int:
    """`wanted` if nothing listens there, else any free port of the loopback address."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ServerError(f"no free port on {HOST}")


def tail(text: str, lines: int = 15) -> str:
    """The last lines of a text."""
    return "\n".join(text.splitlines()[-lines:])
