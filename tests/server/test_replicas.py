"""Data parallel serving: two engines behind one address."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI

from examples.server import Server
from tests.tiny import add_tokenizer, make_packed

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


@pytest.mark.slow
@pytest.mark.feature("Parallelism", "data parallel, 2 engines", against="one engine")
def test_two_engines_answer_as_one(tmp_path: Path) -> None:
    path = make_packed("llama", tmp_path / "packed")
    add_tokenizer(path)
    prompts = [f"question {i}: " + "word " * (i % 5) for i in range(16)]
    with Server(path, OPTIONS, tmp_path / "one.log") as server:
        one = answers(server, prompts)
    assert len(set(one)) > 8
    options = [*OPTIONS, "--data-parallel-size", "2"]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with Server(path, options, tmp_path / "two.log", env=env) as server:
        assert answers(server, prompts) == one
        assert "EngineCore_DP1" in server.log_text()
