"""A checkpoint in the authors' layout: their formula, our converter, vLLM's greedy tokens.

`OfficialLinear` is written from the paper's equations and the published layout, not from this
project's code.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from converters.hf_to_bmos import main
from tests.engine.compare import (
    NEW_TOKENS,
    PROMPTS,
    Answer,
    assert_same,
    assert_varied,
    vllm_answers,
)
from tests.tiny import linear_names, random_model

E = 4


class OfficialLinear(nn.Module):
    """Latent fp16 weights, whose signs are used, with a softmax router over scaling experts."""

    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K) * 0.02)
        self.gate_linear = nn.Linear(K, E, bias=False)
        self.in_channel_scale = nn.Parameter(torch.rand(E, K) + 0.5)
        self.out_channel_scale = nn.Parameter((torch.rand(E, N) + 0.5) * 3 / K**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_linear(x).softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        scaled = x * (gate @ self.in_channel_scale)
        return (scaled @ self.weight.sign().T) * (gate @ self.out_channel_scale)


def test_official_checkpoint_serves_the_official_formula(tmp_path: Path) -> None:
    model = random_model("llama")
    for name in linear_names(model):
        linear = model.get_submodule(name)
        model.set_submodule(name, OfficialLinear(linear.in_features, linear.out_features))
    for parameter in model.parameters():  # the published checkpoints are fp16
        parameter.data = parameter.data.half().float()

    source = tmp_path / "official"
    source.mkdir()
    tensors = {name: t.half().contiguous() for name, t in model.state_dict().items()}
    assert "model.layers.0.mlp.up_proj.gate_linear.weight" in tensors
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": ["LlamaForCausalLM"], "num_expert": E, "dtype": "float16"}
    (source / "config.json").write_text(json.dumps(config))

    packed = tmp_path / "packed"
    assert main([str(source), str(packed)]) == 0
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    assert_varied(expected)
    assert_same(vllm_answers(packed, "float32"), expected, tolerance=2e-3)


def greedy(model: nn.Module, prompt: list[int]) -> Answer:
    tokens, logprobs = list(prompt), []
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            step = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        tokens.append(int(step.argmax()))
        logprobs.append(float(step.max()))
    return Answer(tokens[len(prompt) :], logprobs)
