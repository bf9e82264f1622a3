"""One real `vllm serve` of a tiny model, used as its users would, over HTTP."""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI
from safetensors.torch import load_file, save_file

from examples.server import Server, ServerError, answers
from tests.tiny import add_tokenizer, make_packed

OPTIONS = ["--served-model-name", "tiny", "--enforce-eager", "--max-model-len", "256"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_packed("llama", tmp_path_factory.mktemp("packed"))
    add_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def server(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    options = [*OPTIONS, "--dtype", "float32", "--quantization", "binarymos"]
    with Server(packed, options, log) as running:
        yield running
    assert not answers(f"{running.url}/health")


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client: OpenAI, prompt: str) -> str:
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    return answer.choices[0].text


def test_the_log_names_the_kernel_and_why(server: Server) -> None:
    assert "BinaryMoS: kernel cpu for torch.float32 on cpu" in server.log_text()


@pytest.mark.feature("Server", "completions, whole and streamed", against="one another")
def test_streamed_and_whole_completions_agree(client: OpenAI) -> None:
    stream = client.completions.create(
        model="tiny",
        prompt="one two",
        max_tokens=16,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces = [chunk.choices[0].text for chunk in stream]
    assert len(pieces) > 4
    assert "".join(pieces) == complete(client, "one two")


@pytest.mark.feature("Server", "chat, streamed", against="the number of chunks")
def test_chat_streams(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert len([chunk for chunk in stream if chunk.choices]) > 4


@pytest.mark.feature("Server", "16 requests at once", against="the same one at a time")
def test_sixteen_at_once_answer_as_one_at_a_time(client: OpenAI) -> None:
    prompts = [f"question {i}: " + "word " * (i % 5) for i in range(16)]
    alone = [complete(client, prompt) for prompt in prompts]
    assert len(set(alone)) > 8
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt), prompts))
    assert together == alone


@pytest.mark.feature("Server", "structured output by a JSON schema", against="the schema")
def test_structured_output_follows_its_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
        "required": ["colour", "sure"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a colour"}],
        max_tokens=64,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "colour", "schema": schema, "strict": True},
        },
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert value["colour"] in ("red", "green")
    assert isinstance(value["sure"], bool)


@pytest.mark.feature("Server", "log-probabilities", against="present and negative")
def test_logprobs_are_returned(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="abc", max_tokens=4, temperature=0, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert all(p is not None and p < 0 for p in logprobs.token_logprobs)


@pytest.mark.feature(
    "Server", "a prompt that is too long", against="refused, and the server goes on"
)
def test_a_request_that_is_too_long_is_refused_and_the_server_goes_on(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="256"):
        complete(client, "x" * 1000)
    complete(client, "still there")


@pytest.mark.feature("Server", "`/metrics`", against="the tokens asked for")
def test_metrics_count_the_tokens(server: Server, client: OpenAI) -> None:
    def generated() -> float:
        with urllib.request.urlopen(f"{server.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        counts = [line for line in lines if line.startswith("vllm:generation_tokens_total")]
        return sum(float(line.split()[-1]) for line in counts)

    before = generated()
    complete(client, "count me")
    assert generated() == before + 16


def start_and_fail(path: Path, options: list[str], log: Path) -> str:
    with pytest.raises(ServerError) as error, Server(path, [*OPTIONS, *options], log):
        pass
    return str(error.value)


@pytest.mark.feature("Server", "a checkpoint with a tensor missing", against="refused by its name")
def test_an_incomplete_checkpoint_is_refused_by_name(packed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in packed.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(packed / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight_packed"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    message = start_and_fail(broken, [], tmp_path / "server.log")
    assert "model.layers.1.self_attn.k_proj.weight_packed is listed in" in message


@pytest.mark.feature("Server", "another `--quantization`", against="refused")
def test_another_quantization_is_refused(packed: Path, tmp_path: Path) -> None:
    message = start_and_fail(packed, ["--quantization", "fp8"], tmp_path / "server.log")
    assert "(binarymos) does not match" in message
