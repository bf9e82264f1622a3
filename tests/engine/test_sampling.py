"""Log-probabilities, several answers, beams and structured output, against transformers.

One engine answers everything here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.compare import (
    PROMPTS,
    answer_of,
    engine,
    model_answers,
    reference_model,
)
from tests.tiny import add_tokenizer, make_packed

TOKENS = 8


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_packed("llama", tmp_path_factory.mktemp("packed"))
    add_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(packed: Path) -> Any:
    return reference_model(packed, torch.float32)


@pytest.fixture(scope="module")
def llm(packed: Path) -> Iterator[Any]:
    with engine(packed, "float32", skip_tokenizer_init=False) as llm:
        yield llm


def sample(llm: Any, prompts: list[list[int]], **options: Any) -> Any:
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=TOKENS, ignore_eos=True, detokenize=False, **{"temperature": 0, **options}
    )
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def logprobs_after(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


@pytest.mark.feature("Sampling", "log-probabilities of answers, top 5", against="transformers")
def test_top_logprobs_equal_transformers(llm: Any, model: Any) -> None:
    for prompt, output in zip(PROMPTS, sample(llm, PROMPTS, logprobs=5), strict=True):
        completion = output.outputs[0]
        truth = logprobs_after(model, prompt + list(completion.token_ids))[len(prompt) - 1 :]
        for step, row in zip(completion.logprobs, truth[:-1], strict=True):
            assert set(row.topk(5).indices.tolist()) == set(step)
            for token, logprob in step.items():
                assert logprob.logprob == pytest.approx(float(row[token]), abs=2e-3)


@pytest.mark.feature("Sampling", "log-probabilities of prompts", against="transformers")
def test_prompt_logprobs_equal_transformers(llm: Any, model: Any) -> None:
    for prompt, output in zip(PROMPTS, sample(llm, PROMPTS, prompt_logprobs=0), strict=True):
        truth = logprobs_after(model, prompt)
        assert output.prompt_logprobs[0] is None
        for i, step in enumerate(output.prompt_logprobs[1:], start=1):
            expected = float(truth[i - 1, prompt[i]])
            assert step[prompt[i]].logprob == pytest.approx(expected, abs=2e-3)


@pytest.mark.feature(
    "Sampling", "several sampled answers to one prompt", against="log-probabilities of transformers"
)
def test_parallel_samples_differ_and_have_the_right_logprobs(llm: Any, model: Any) -> None:
    options = {"n": 3, "temperature": 1.0, "seed": 5, "logprobs": 0}
    outputs = sample(llm, PROMPTS, **options)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answers = [answer_of(completion) for completion in output.outputs]
        assert len({tuple(answer.tokens) for answer in answers}) == 3
        truth = model_answers(model, answers, [prompt] * 3)
        for found, expected in zip(answers, truth, strict=True):
            assert found.logprobs == pytest.approx(expected.logprobs, abs=2e-3)
    again = sample(llm, PROMPTS, **options)
    assert [[c.token_ids for c in o.outputs] for o in outputs] == [
        [c.token_ids for c in o.outputs] for o in again
    ]


@pytest.mark.feature("Sampling", "beam search", against="a search over transformers' logits")
def test_beam_search_equals_a_search_over_transformers(llm: Any, model: Any) -> None:
    from vllm.sampling_params import BeamSearchParams

    width, steps = 3, 5
    found = llm.beam_search(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS[:2]],
        BeamSearchParams(beam_width=width, max_tokens=steps, ignore_eos=True),
    )
    for prompt, output in zip(PROMPTS[:2], found, strict=True):
        beams = [(0.0, list(prompt))]
        for _ in range(steps):
            grown = []
            for score, tokens in beams:
                best = logprobs_after(model, tokens)[-1].topk(width)
                grown += [
                    (score + float(p), [*tokens, int(t)])
                    for p, t in zip(best.values, best.indices, strict=True)
                ]
            beams = sorted(grown, reverse=True)[:width]
        assert [beam.tokens for beam in output.sequences] == [tokens for _, tokens in beams]
        scores = [beam.cum_logprob for beam in output.sequences]
        assert scores == pytest.approx([score for score, _ in beams], abs=5e-3)


@pytest.mark.feature(
    "Sampling", "structured output", against="transformers, choosing among the permitted tokens"
)
def test_structured_output_is_the_best_of_the_permitted_tokens(llm: Any, model: Any) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    constraint = StructuredOutputsParams(regex=f"[a-h]{{{TOKENS}}}")
    tokenizer = llm.get_tokenizer()
    permitted = torch.tensor(tokenizer.convert_tokens_to_ids(list("abcdefgh")))
    outputs = sample(llm, PROMPTS, structured_outputs=constraint)
    answers = set()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = list(prompt)
        for _ in range(TOKENS):
            row = logprobs_after(model, tokens)[-1, permitted]
            tokens.append(int(permitted[row.argmax()]))
        assert list(output.outputs[0].token_ids) == tokens[len(prompt) :]
        answers.add(tuple(tokens[len(prompt) :]))
    assert len(answers) > 1
