"""Tiny sources in every layout, made without the converter's code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.make_official import make as make_official
from tests.tiny import linear_names, random_model

__all__ = ["make_dense", "make_gguf", "make_official", "make_onebit", "sign_bits"]


def make_dense(path: Path, arch: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A dense model directory of one architecture."""
    random_model(arch).to(dtype).save_pretrained(path)
    return path


def make_onebit(path: Path, packed: bool, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as the OneBit authors' scripts save it, for training or for inference."""
    model = random_model("llama")
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for module in linear_names(model):
        weight = tensors[f"{module}.weight"]
        weight[0, 0] = 0  # the authors' packing makes it +1
        N, K = weight.shape
        tensors[f"{module}.input_factor"] = torch.rand(K, generator=generator) + 0.5
        tensors[f"{module}.weight_scale"] = torch.rand(N, generator=generator) + 0.5
        if packed:
            ones = ((1 - torch.sign(weight)) / 2).to(torch.uint8).view(N, K // 8, 8)
            value = (ones * 2 ** torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
            tensors[f"{module}.weight"] = value.view(torch.int8)
        else:
            tensors[f"{module}.weight"] = (torch.sign(weight) * 0.01).to(dtype)
    tensors = {n: t if t.dtype == torch.int8 else t.to(dtype) for n, t in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    names = "BitLlamaForCausalLMInf" if packed else "BitLlamaForCausalLM"
    config |= {"model_type": "bitllama", "architectures": [names]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_gguf(
    path: Path, kv_heads_said: bool = True, more: Callable[[Any], None] = lambda writer: None
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Llama GGUF file with F32 and Q8_0 tensors; also what it holds, in Hugging Face layout.

    `more` may add to it with gguf's writer.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    hidden, ffn, heads, kv_heads, vocab, layers = 64, 96, 4, 2, 300, 2
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    if kv_heads_said:
        writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    letters = [chr(0x100 + i) for i in range(vocab - 1)]
    writer.add_token_list([*letters, letters[0] + letters[1]])
    writer.add_token_types([1] * vocab)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    expected: dict[str, torch.Tensor] = {}

    def add(gguf_name: str, hf_name: str, *shape: int, permute: int = 0) -> None:
        values = random.standard_normal(shape, np.float32)
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else GGMLQuantizationType.Q8_0
        stored = quants.quantize(values, kind)
        dense = quants.dequantize(stored, kind)
        # llama.cpp interleaves the two halves of each head of q and k for its rotary embedding.
        expected[hf_name] = torch.from_numpy(
            dense.reshape(permute, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape).copy()
            if permute
            else dense.copy()
        )
        writer.add_tensor(gguf_name, stored, raw_dtype=kind)

    head = hidden // heads
    add("token_embd.weight", "model.embed_tokens.weight", vocab, hidden)
    add("output_norm.weight", "model.norm.weight", hidden)
    for i in range(layers):
        gguf, hf = f"blk.{i}", f"model.layers.{i}"
        add(f"{gguf}.attn_norm.weight", f"{hf}.input_layernorm.weight", hidden)
        add(f"{gguf}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", hidden)
        for letter, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            hf_name = f"{hf}.self_attn.{letter}_proj.weight"
            permute = 0 if letter == "v" else n
            add(f"{gguf}.attn_{letter}.weight", hf_name, n * head, hidden, permute=permute)
        add(f"{gguf}.attn_output.weight", f"{hf}.self_attn.o_proj.weight", hidden, hidden)
        add(f"{gguf}.ffn_gate.weight", f"{hf}.mlp.gate_proj.weight", ffn, hidden)
        add(f"{gguf}.ffn_up.weight", f"{hf}.mlp.up_proj.weight", ffn, hidden)
        add(f"{gguf}.ffn_down.weight", f"{hf}.mlp.down_proj.weight", hidden, ffn)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected


def sign_bits(weight: torch.Tensor) -> torch.Tensor:
    """Packed signs by docs/FORMAT.md, without the project's code: uint8 [N, ceil(K/8)]."""
    positive = (weight.float() >= 0).numpy()
    return torch.from_numpy(np.packbits(positive, axis=1, bitorder="little"))
