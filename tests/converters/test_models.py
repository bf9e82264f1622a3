"""Every architecture: converted, verified, loaded by transformers, against a dense oracle.

The oracle is the dense model with each packed layer's weight replaced by what the layer means. For
a OneBit or equal-expert layer that is a b^T * sign(W); for others the layer's formula is run.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import vllm_bmos.integrations.transformers  # noqa: F401 (registers the quantizer)
from converters.options import Options
from converters.pipeline import convert
from converters.plan import make_plan
from tests.converters.models import make_dense, make_official, make_onebit
from tests.tiny import CONFIGS
from vllm_bmos.checkpoint import Checkpoint
from vllm_bmos.checkpoint.verify import verify

TOKENS = torch.tensor([[1, 5, 9, 33, 7, 60, 2, 44, 80, 17, 3, 3]])


@torch.inference_mode()
def logits(model):
    result = model(TOKENS).logits
    assert torch.isfinite(result).all() and len(set(result[0].argmax(-1).tolist())) > 2
    return result


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_dense_architectures(tmp_path, arch):
    source = make_dense(tmp_path / "source", arch)
    convert(make_plan(source, Options(experts=3)), tmp_path / "target")
    checkpoint = verify(tmp_path / "target")
    oracle = load(source)
    for module in checkpoint.config.modules:
        weight = oracle.get_submodule(module).weight
        a = checkpoint.tensor(f"{module}.out_channel_scale")[0].float()
        b = checkpoint.tensor(f"{module}.in_channel_scale")[0].float()
        signs = torch.where(weight >= 0, 1.0, -1.0)
        weight.data = signs * torch.outer(a, b)
    torch.testing.assert_close(
        logits(load(tmp_path / "target")), logits(oracle), rtol=1e-4, atol=1e-3
    )


class OfficialLayer(torch.nn.Module):
    """The authors' layer, from its description: G is cast to x's dtype after a float softmax."""

    def __init__(self, weight, gate, s_in, s_out):
        super().__init__()
        self.signs, self.gate, self.s_in, self.s_out = weight.sign(), gate, s_in, s_out

    def forward(self, x):
        G = (x @ self.gate.T).float().softmax(-1).to(x.dtype)
        return ((x * (G @ self.s_in)) @ self.signs.T) * (G @ self.s_out)


def test_official(tmp_path):
    source = make_official(tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    for name in stored:  # experts far apart, and routers that choose among them
        if "channel_scale" in name:
            stored[name] = (4 * torch.rand(stored[name].shape)).half()
        elif name.endswith("proj.weight"):
            stored[name] = torch.randn(stored[name].shape).half()
        elif "embed" in name or "lm_head" in name:
            stored[name] = torch.randn(stored[name].shape).half()
    save_file(stored, source / "model.safetensors")
    convert(make_plan(source, Options()), tmp_path / "target")
    oracle = load(source)
    for module in Checkpoint(tmp_path / "target").config.modules:
        names = ("weight", "gate_linear.weight", "in_channel_scale", "out_channel_scale")
        layer = OfficialLayer(*(stored[f"{module}.{name}"].float() for name in names))
        oracle.set_submodule(module, layer)
    torch.testing.assert_close(
        logits(load(tmp_path / "target")), logits(oracle), rtol=1e-4, atol=1e-4
    )


class OneBitLayer(torch.nn.Module):
    """The OneBit authors' layer, from its description."""

    def __init__(self, signs, factor, scale):
        super().__init__()
        self.signs, self.factor, self.scale = signs, factor, scale

    def forward(self, x):
        y = ((x * self.factor) @ self.signs.T) * self.scale
        mean, variance = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False)
        return (y - mean) / (variance + 1e-5).sqrt()


@pytest.mark.parametrize("packed", [False, True])
def test_onebit(tmp_path, packed):
    source = make_onebit(tmp_path / "source", packed)
    latent = load_file(make_onebit(tmp_path / "latent", False) / "model.safetensors")
    convert(make_plan(source, Options()), tmp_path / "target")
    oracle = load(make_dense(tmp_path / "dense"))
    for module in Checkpoint(tmp_path / "target").config.modules:
        weight, factor, scale = (
            latent[f"{module}.{name}"] for name in ("weight", "input_factor", "weight_scale")
        )
        signs = torch.where(weight >= 0, 1.0, -1.0)
        oracle.set_submodule(module, OneBitLayer(signs, factor, scale))
    torch.testing.assert_close(
        logits(load(tmp_path / "target")), logits(oracle), rtol=1e-4, atol=1e-3
    )
