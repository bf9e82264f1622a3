"""Requests that come and go: prefill of one in the same step as decoding of another."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.compare import (
    NEW_TOKENS,
    PROMPTS,
    Answer,
    answer_of,
    assert_same,
    engine,
    generate,
    vllm_answers,
)

pytestmark = pytest.mark.slow


@pytest.mark.feature(
    "Batching", "prefill of new requests beside decoding ones; aborts", against="transformers"
)
def test_requests_that_arrive_in_the_middle_do_not_disturb(
    packed: Path, expected: list[Answer]
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    params.detokenize = False
    finished: dict[str, Any] = {}
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    with engine(packed, "float32", **options) as llm:
        core = llm.llm_engine
        arrivals = {0: 0, 3: 2, 5: 1, 6: 3}  # step: prompt; the third has 40 tokens, in chunks
        steps = 0
        while steps < 7 or core.has_unfinished_requests():
            if steps in arrivals:
                index = arrivals[steps]
                core.add_request(str(index), {"prompt_token_ids": PROMPTS[index]}, params)
            if steps == 4:
                core.add_request("aborted", {"prompt_token_ids": PROMPTS[1]}, params)
            if steps == 8:
                core.abort_request(["aborted"])
            for output in core.step():
                if output.finished:
                    assert output.request_id != "aborted"
                    finished[output.request_id] = output
            steps += 1
            assert steps < 200
    found = [answer_of(finished[str(i)].outputs[0]) for i in range(len(PROMPTS))]
    assert_same(found, expected, tolerance=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"max_num_batched_tokens": 16, "max_num_seqs": 4},
            marks=pytest.mark.feature("Batching", "chunked prefill", against="transformers"),
            id="chunked-prefill",
        ),
        pytest.param(
            {"max_num_seqs": 2},
            marks=pytest.mark.feature(
                "Batching", "more requests than slots", against="transformers"
            ),
            id="more-requests-than-slots",
        ),
    ],
)
def test_scheduling_does_not_change_the_answers(
    packed: Path, expected: list[Answer], options: dict[str, Any]
) -> None:
    assert_same(vllm_answers(packed, "float32", **options), expected, tolerance=2e-3)


@pytest.mark.feature("Batching", "prefix caching", against="the same engine without it")
def test_prefix_caching_does_not_change_the_answers(packed: Path) -> None:
    shared = [(7 * i + 3) % 500 + 3 for i in range(160)]
    prompts = [[*shared, 5], [*shared, 9]]

    answers = {}
    for caching in (True, False):
        options = {"enable_prefix_caching": caching, "block_size": 32, "max_model_len": 256}
        with engine(packed, "float32", disable_log_stats=False, **options) as llm:
            one_by_one = [generate(llm, [prompt])[0] for prompt in prompts]
            answers[caching] = one_by_one + generate(llm, prompts)
            hits = sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
            assert (hits > 0) == caching
    assert_same(answers[True], answers[False], tolerance=2e-3)
