"""A BinaryMoS model as an embedding model."""

from pathlib import Path

import pytest
import torch

from tests.engine.compare import PROMPTS, engine, reference_model
from tests.tiny import add_tokenizer, make_packed


@pytest.mark.slow
@pytest.mark.feature("Pooling", "embeddings (`--runner pooling`)", against="transformers")
def test_embeddings_equal_the_last_hidden_states_of_transformers(tmp_path: Path) -> None:
    path = make_packed("llama", tmp_path)
    add_tokenizer(path)
    with engine(path, "float32", runner="pooling", skip_tokenizer_init=False) as llm:
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.encode(prompts, pooling_task="embed", use_tqdm=False)
    model = reference_model(path, torch.float32).model
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            last = model(torch.tensor([prompt])).last_hidden_state[0, -1]
        expected = last / last.norm()
        torch.testing.assert_close(output.outputs.data.float(), expected, atol=1e-4, rtol=0)
