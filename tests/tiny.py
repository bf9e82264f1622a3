"""Tiny random packed models of every architecture that the engine tests serve.

The writer here is independent of the project's own: it follows docs/FORMAT.md with numpy and
safetensors alone, so that a mistake in one of them shows.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Ernie4_5Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

VOCAB = 512
# Head size 32 is the smallest that vLLM's CPU attention runs.
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {**SHAPE, "intermediate_size": 160, "num_key_value_heads": 2, "tie_word_embeddings": False}
HEADS = {**GQA, "head_dim": 32}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GQA),
    "llama-tied": lambda: LlamaConfig(**{**GQA, "tie_word_embeddings": True}),
    "llama-mqa": lambda: LlamaConfig(**{**GQA, "num_key_value_heads": 1}),
    "mistral": lambda: MistralConfig(**HEADS, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**GQA),
    "qwen3": lambda: Qwen3Config(**HEADS),
    "phi3": lambda: Phi3Config(**GQA),
    "gemma": lambda: GemmaConfig(**{**HEADS, "tie_word_embeddings": True}),
    "gemma2": lambda: Gemma2Config(**{**HEADS, "tie_word_embeddings": True}, sliding_window=64),
    "gemma3": lambda: Gemma3TextConfig(
        **{**HEADS, "tie_word_embeddings": True},
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "opt": lambda: OPTConfig(**SHAPE, ffn_dim=160, word_embed_proj_dim=128),
    "opt-350m": lambda: OPTConfig(
        **SHAPE, ffn_dim=160, word_embed_proj_dim=64, do_layer_norm_before=False
    ),
}


# Mixtures of experts. The routers choose 2 of 5 feed-forward experts, and weights differ from 1/2.
MOE_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**GQA, num_local_experts=5, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **HEADS,
        moe_intermediate_size=96,
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        mlp_only_layers=[0],
    ),
}
TIED = {**GQA, "tie_word_embeddings": True}
# What is served as well, each tried once by a slow test.
MORE_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "arcee": lambda: ArceeConfig(**HEADS),
    "cohere": lambda: CohereConfig(**TIED),
    "cohere2": lambda: Cohere2Config(**TIED),
    "ernie4.5": lambda: Ernie4_5Config(**HEADS),
    "exaone4": lambda: Exaone4Config(**HEADS),
    "falcon": lambda: FalconConfig(  # q, k and v of each group lie together on the disk
        **SHAPE, num_kv_heads=2, new_decoder_architecture=True
    ),
    "falcon-mha": lambda: FalconConfig(**SHAPE, multi_query=False, parallel_attn=False, bias=True),
    "glm": lambda: GlmConfig(**HEADS),
    "glm4": lambda: Glm4Config(**HEADS),
    "gpt-j": lambda: GPTJConfig(
        vocab_size=VOCAB, n_positions=256, n_embd=128, n_layer=2, n_head=4, rotary_dim=16
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**SHAPE, intermediate_size=160),
    "granite": lambda: GraniteConfig(**GQA),
    "granite-hybrid": lambda: GraniteMoeHybridConfig(  # state spaces and attention
        **GQA,
        layer_types=["mamba", "attention"],
        num_local_experts=0,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=16,
    ),
    "helium": lambda: HeliumConfig(**HEADS),
    "hunyuan": lambda: HunYuanDenseV1Config(**HEADS),
    "ministral": lambda: MinistralConfig(**HEADS),
    "nemotron": lambda: NemotronConfig(**HEADS),
    "olmo": lambda: OlmoConfig(**GQA),
    "olmo2": lambda: Olmo2Config(**GQA),
    "olmo3": lambda: Olmo3Config(**GQA),
    "phi": lambda: PhiConfig(**GQA),
    "seed-oss": lambda: SeedOssConfig(**HEADS),
    "smollm3": lambda: SmolLM3Config(**GQA),
    "stablelm": lambda: StableLmConfig(**GQA, use_qkv_bias=True),
    "starcoder2": lambda: Starcoder2Config(**GQA),
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
MORE_MOE_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "glm4-moe": lambda: Glm4MoeConfig(**HEADS, **MOE, n_routed_experts=5),
    "granite-moe": lambda: GraniteMoeConfig(**GQA, num_local_experts=5, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**GQA, num_experts=5, num_experts_per_tok=2),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **GQA, **MOE, num_experts=5, shared_expert_intermediate_size=96
    ),
}
ALL_CONFIGS = CONFIGS | MOE_CONFIGS | MORE_CONFIGS | MORE_MOE_CONFIGS


def random_model(arch: str, seed: int = 0) -> PreTrainedModel:
    """A dense fp32 model whose greedy continuations vary: tests assert that they do."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ALL_CONFIGS[arch](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Biases and norms of an untrained model are zeros and ones, which hide mistakes.
                parameter.add_(0.2 * torch.randn_like(parameter))
                if arch in ("gemma2", "gemma3") and "post_" in name:
                    # These norms scale what a layer adds; at 1 the (tied, scaled) embedding
                    # drowns it and the model repeats its input.
                    parameter.add_(25)
            elif "embed" in name or "lm_head" in name:
                parameter.mul_(12)
            elif name.endswith("mlp.gate.weight"):
                parameter.mul_(4)
    return model.eval()


def linear_names(model: PreTrainedModel) -> list[str]:
    """Every linear layer of the decoder that is packed; the output embeddings stay dense."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not name.endswith("shared_expert_gate")
    ]


def expert_names(tensors: Iterable[str]) -> list[str]:
    """Every layer of a feed-forward expert, of the names of a checkpoint's tensors."""
    return [
        name.removesuffix(".weight") for name in tensors if re.search(r"\.experts\.\d+\.", name)
    ]


def make_packed(
    arch: str,
    path: Path,
    E: int = 4,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Path:
    """Write a packed checkpoint with random signs, distinct experts and live routers."""
    model = random_model(arch, seed)
    # transformers decides how the model's own tensors are named on disk.
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    modules = linear_names(model) + expert_names(tensors)
    for name in modules:
        N, K = tensors.pop(f"{name}.weight").shape
        expert = map(int, re.findall(r"\.experts\.(\d+)", name))
        random = np.random.default_rng([seed, len(name), N, K, *expert])
        signs = random.integers(0, 2, (N, K), np.uint8)
        tensors[f"{name}.weight_packed"] = torch.from_numpy(
            np.packbits(signs, axis=1, bitorder="little")
        )
        tensors[f"{name}.in_channel_scale"] = (torch.rand(E, K) + 0.5).to(scale_dtype)
        gain = 3 / K**0.5
        tensors[f"{name}.out_channel_scale"] = (gain * (torch.rand(E, N) + 0.5)).to(scale_dtype)
        tensors[f"{name}.router_weight"] = (torch.randn(E, K) / K**0.5).to(scale_dtype)
    write_packed(path, tensors, modules, E, scale_dtype)
    return path


def write_packed(
    path: Path,
    tensors: dict[str, torch.Tensor],
    modules: list[str],
    E: int,
    scale_dtype: torch.dtype,
) -> None:
    """Write tensors, config.json's quantization_config and the manifest."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "binarymos",
        "format_version": 1,
        "num_experts": E,
        "modules": modules,
        "scale_dtype": str(scale_dtype).removeprefix("torch."),
    }
    (path / "config.json").write_text(json.dumps(config))
    names = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    raw = {name: tensor.flatten().view(torch.uint8).numpy() for name, tensor in tensors.items()}
    manifest = {
        name: {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(raw[name].tobytes()).hexdigest(),
        }
        for name, tensor in tensors.items()
    }
    (path / "bmos_manifest.json").write_text(json.dumps({"format_version": 1, "tensors": manifest}))


def add_tokenizer(path: Path, begins: bool = False) -> None:
    """A byte-level tokenizer with a chat template, as small as one can be.

    It begins every text with BOS if `begins`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(path)
