"""The engine's answers beside those of transformers with the reference op."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PROMPTS = [[5, 17, 301, 44, 9, 250, 77], [400, 3, 3, 90, 12], [7] * 40, [11]]
NEW_TOKENS = 24
# Environments for `subprocess_answers`.
COMPILED = {"TORCH_COMPILE_DISABLE": "0"}
TWO_RANKS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    # Without a core for each rank, two spinning ranks starve one another.
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
}


@dataclass
class Answer:
    """Greedy tokens of one prompt and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


@contextmanager
def engine(path: Path, dtype: str, **options: Any) -> Iterator[Any]:
    """An LLM in this process, freed at the end, whether or not it could be built."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"max_model_len": 128, "enforce_eager": True, "skip_tokenizer_init": True}
    llm = None
    try:
        llm = LLM(str(path), dtype=dtype, **{**settings, **options})
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def save_state(source: Path, path: Path) -> None:
    """Have an engine of `source` write its sharded state into the directory `path`."""
    with engine(source, "float32") as llm:
        llm.llm_engine.engine_core.save_sharded_state(path=str(path))
    shutil.copy(source / "config.json", path)


def generate(llm: Any, prompts: list[list[int]], **options: Any) -> list[Answer]:
    """Greedy answers to the prompts as one batch; `options` go to `LLM.generate`."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False
        ),
        use_tqdm=False,
        **options,
    )
    return [answer_of(output.outputs[0]) for output in outputs]


def vllm_answers(
    path: Path, dtype: str, adapter: str | None = None, **options: Any
) -> list[Answer]:
    """The answers of an engine in this process to the comparison prompts, with a LoRA or none."""
    from vllm.lora.request import LoRARequest

    request = None if adapter is None else LoRARequest("adapter", 1, adapter)
    with engine(path, dtype, **options) as llm:
        return generate(llm, PROMPTS, lora_request=request)


def answers_after_swap(path: Path, other: Path) -> list[Answer]:
    """What an engine of `path` answers when `other` lies there and its weights are reloaded."""
    with engine(path, "float32") as llm:
        shutil.rmtree(path)
        shutil.copytree(other, path)
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        return generate(llm, PROMPTS)


def answer_of(completion: Any) -> Answer:
    """The tokens and their log-probabilities of a vLLM completion."""
    tokens = list(completion.token_ids)
    logprobs = [
        step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)
    ]
    return Answer(tokens, logprobs)


def reference_answers(
    path: Path, dtype: torch.dtype, answers: list[Answer] | None = None
) -> list[Answer]:
    """Greedy answers of transformers, or its log-probabilities of given ones (teacher forced)."""
    return model_answers(reference_model(path, dtype), answers)


def reference_model(path: Path, dtype: torch.dtype) -> Any:
    """A packed or dense checkpoint in transformers; packed layers run the reference op."""
    from transformers import AutoModelForCausalLM

    import vllm_bmos.integrations.transformers  # noqa: F401 (registers the quantizer)

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")


def model_answers(
    model: Any, answers: list[Answer] | None = None, prompts: list[list[int]] = PROMPTS
) -> list[Answer]:
    """`reference_answers` of a model that is loaded, to any prompts."""
    results = []
    for i, prompt in enumerate(prompts):
        tokens = list(prompt)
        forced = answers[i].tokens if answers else [None] * NEW_TOKENS
        logprobs = []
        for token in forced:
            with torch.inference_mode():
                logits = model(torch.tensor([tokens])).logits[0, -1].float()
            chosen = int(logits.argmax()) if token is None else token
            logprobs.append(float(logits.log_softmax(-1)[chosen]))
            tokens.append(chosen)
        results.append(Answer(tokens[len(prompt) :], logprobs))
    return results


def assert_varied(answers: list[Answer]) -> None:
    """A model that repeats one token with probability 1 passes any comparison: refuse it."""
    tokens = [token for answer in answers for token in answer.tokens]
    logprobs = [p for answer in answers for p in answer.logprobs]
    assert len(set(tokens)) >= len(tokens) // 5, f"{len(set(tokens))} distinct of {len(tokens)}"
    assert sorted(logprobs)[len(logprobs) // 2] < -0.2, "the model is saturated"


def assert_same(found: list[Answer], expected: list[Answer], tolerance: float) -> None:
    """Equal tokens and close log-probabilities."""
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        torch.testing.assert_close(
            torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=tolerance, rtol=0
        )


def assert_equals_transformers(path: Path) -> None:
    """vLLM's tokens in float32 are those of transformers, of a model whose answers vary."""
    # Some models run as transformers' in vLLM, which changes the class in this process.
    expected = reference_answers(path, torch.float32)
    assert_varied(expected)
    assert_same(vllm_answers(path, "float32"), expected, tolerance=2e-3)


def subprocess_answers(
    path: Path, dtype: str, env: dict[str, str], **options: Any
) -> tuple[list[Answer], str]:
    """`vllm_answers` in a fresh process with its own environment; also what it logged."""
    done = run_engine(path, dtype, env, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = [Answer(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]
    return answers, done.stdout + done.stderr


def run_engine(
    path: Path, dtype: str, env: dict[str, str], **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run tests.engine.run_engine and return what it printed, whether or not it succeeded."""
    arguments = json.dumps({"path": str(path), "dtype": dtype, **options})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.run_engine", arguments],
        env={**os.environ, **env},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=560)
    finally:  # ranks outlive a parent that was killed
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def errors_beside_transformers(
    path: Path, dtype: torch.dtype, answers: list[Answer]
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far log-probabilities in 16 bits are from float32's: those of answers, transformers'."""
    found, truth, peer = (
        torch.tensor([p for answer in some for p in answer.logprobs])
        for some in (
            answers,
            reference_answers(path, torch.float32, answers=answers),
            reference_answers(path, dtype, answers=answers),
        )
    )
    return (found - truth).abs(), (peer - truth).abs()
