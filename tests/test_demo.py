"""The demo's command lines are what the converter takes today, its layers are whole, and its
server is found and ended."""

import json
import signal
import sys
import threading
import time
import urllib.request
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from safetensors import safe_open

from converters.arguments import COMMANDS, parse
from examples.demo import LAYERS, RECIPES
from examples.server import HOST, Server, answers, reach_ourselves, session_pids
from vllm_bmos.checkpoint import BinaryMosConfig
from vllm_bmos.checkpoint.format import REQUIRED


@pytest.mark.parametrize("fit", RECIPES)
def test_the_demo_s_recipes(fit: str) -> None:
    line = ["model.gguf", "packed", *RECIPES[fit].flags, "--resume", "--eval-text", "x.txt"]
    args = parse(line, dict.fromkeys(COMMANDS, lambda _: 0))
    assert args.src == Path("model.gguf")


def test_the_shipped_layers_are_whole() -> None:
    with safe_open(LAYERS, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    config = BinaryMosConfig.from_dict(json.loads(metadata["quantization_config"]))
    assert len(config.modules) == 30 * 7
    assert names == {f"{module}.{suffix}" for module in config.modules for suffix in REQUIRED}


def test_a_second_ctrl_c_leaves_no_server_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")  # which stays as it is
    monkeypatch.setenv("NO_PROXY", "*")
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    server = Server(tmp_path, [], tmp_path / "log")
    server.command = [sys.executable, "-c", f"{stubborn}; print('up', flush=True); time.sleep(600)"]
    server.start()
    assert server.process is not None and server.env["no_proxy"] == "*"
    wait = server.process.wait

    def interrupted(timeout: float | None = None) -> int:
        if timeout is not None:
            raise KeyboardInterrupt
        return wait()

    monkeypatch.setattr(server.process, "wait", interrupted)
    try:
        while "up" not in server.log_text():
            assert server.process.poll() is None
            time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            server.stop()
        assert server.process.returncode == -signal.SIGKILL
        assert not session_pids(server.process.pid)
    finally:
        server.process.kill()
        wait()


def test_no_proxy_is_asked_for_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{HOST}:9")  # nobody is there
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of its first call
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with HTTPServer((HOST, 0), handler) as here:
        thread = threading.Thread(target=here.serve_forever)
        thread.start()
        try:
            url = f"http://{HOST}:{here.server_port}/"
            assert not answers(url)
            reach_ourselves()
            assert answers(url)
        finally:
            here.shutdown()
            thread.join()
