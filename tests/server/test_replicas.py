"""Serving by several engines, or on several nodes, behind one address."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import APIError, OpenAI

from examples.server import HOST, Server, free_port
from tests.tiny import add_tokenizer, make_packed, random_model

OPTIONS = ["--served-model-name", "tiny", "--enforce-eager", "--max-model-len", "256"]
OPTIONS += ["--dtype", "float32"]


def answers(server: Server, prompts: list[str]) -> list[str]:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def complete(prompt: str) -> str:
        answer = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=16,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(complete, prompts))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_packed("llama", tmp_path_factory.mktemp("model") / "packed")
    add_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [f"question {i}: " + "word " * (i % 5) for i in range(16)]


@pytest.fixture(scope="module")
def one(model: Path, prompts: list[str]) -> list[str]:
    """What one engine answers."""
    with Server(model, OPTIONS, model.with_name("one.log"), timeout=600) as server:
        found = answers(server, prompts)
    assert len(set(found)) > 8
    return found


@pytest.mark.slow
@pytest.mark.feature("Parallelism", "data parallel, 2 engines", against="one engine")
def test_two_engines_answer_as_one(
    model: Path, prompts: list[str], one: list[str], tmp_path: Path
) -> None:
    options = [*OPTIONS, "--data-parallel-size", "2"]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with Server(model, options, tmp_path / "two.log", env=env, timeout=600) as server:
        assert answers(server, prompts) == one
        assert "EngineCore_DP1" in server.log_text()


@pytest.mark.slow
@pytest.mark.feature(
    "Parallelism",
    "tensor parallel over 2 nodes (`--nnodes 2`, both on one machine)",
    against="one engine",
)
def test_two_nodes_answer_as_one(
    model: Path, prompts: list[str], one: list[str], tmp_path: Path
) -> None:
    options = [*OPTIONS, "--tensor-parallel-size", "2", "--nnodes", "2"]
    options += ["--master-addr", HOST, "--master-port", str(free_port())]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    other = Server(model, [*options, "--node-rank", "1", "--headless"], tmp_path / "1.log", env=env)
    other.start()
    try:
        options += ["--node-rank", "0"]
        with Server(model, options, tmp_path / "0.log", env=env, timeout=600) as server:
            assert answers(server, prompts) == one
        assert "Worker_TP1" in other.log_text()
    finally:
        other.stop()


@pytest.mark.slow
@pytest.mark.feature(
    "Parallelism",
    "data parallel and expert parallel together, mixtures of experts",
    limit="vLLM's communicator for CPUs has no `all_gatherv`; a dense mixture's first request "
    "fails in the same way",
)
def test_vllm_gathers_no_tokens_of_two_engines_on_a_cpu(tmp_path: Path) -> None:
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    random_model("mixtral").save_pretrained(dense)
    make_packed("mixtral", packed)
    options = [*OPTIONS, "--data-parallel-size", "2", "--enable-expert-parallel"]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    for path in (dense, packed):
        add_tokenizer(path)
        log = tmp_path / f"{path.name}.log"
        with Server(path, options, log, env=env, timeout=600) as server:
            with pytest.raises(APIError):
                answers(server, ["one"])
        assert "all_gatherv" in server.log_text() and "NotImplementedError" in server.log_text()
