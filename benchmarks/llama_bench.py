"""llama.cpp end to end on a random GGUF model, in a process of its own; prints JSON.

    python benchmarks/llama_bench.py --shape llama-7b --type q1_0 --work DIR

It does what llama-bench does: prompts of random tokens, then decode steps of one token for each
sequence, through llama_decode of the llama-cpp-python package.
"""

import argparse
import ctypes
import faulthandler
import json
import random
import statistics
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from harness import add_threads, positive_int, resident_bytes
from make_model import SHAPES, Shape, with_layers
from peers import Weights
from peers.ggml import TYPES, load_ggml
from peers.llama_cpp_linear import quantized_rows

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
DECODE_PROMPT = 32
LAYOUT = 2  # of the files that `make_gguf` writes: another number makes them anew


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=positive_int)
    parser.add_argument("--type", choices=TYPES, default="q1_0")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--batch", nargs="+", type=positive_int, default=[1, 4, 16])
    parser.add_argument("--prompt", type=positive_int, default=512)
    parser.add_argument("--output", type=positive_int, default=32)
    add_threads(parser, "CPU threads of llama.cpp")
    args = parser.parse_args()
    shape = with_layers(SHAPES[args.shape], args.layers)
    path = args.work / f"{args.shape}-{shape.num_hidden_layers}-{args.type}.{LAYOUT}.gguf"
    if not path.exists():
        make_gguf(path, shape, args.type)
    print(json.dumps(measure(path, args)))


def make_gguf(path: Path, shape: Shape, type_name: str) -> None:
    """Write a LLaMA GGUF with random weights: quantized linears, F16 embeddings and lm_head."""
    ggml, number = load_ggml(), TYPES[type_name]
    partial = path.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden_size // shape.num_attention_heads)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    table = np.random.default_rng(0).standard_normal(
        (shape.vocab_size, shape.hidden_size), dtype=np.float32
    )
    half = (table * shape.hidden_size**-0.5).astype(np.float16)
    ones = np.ones(shape.hidden_size, dtype=np.float32)
    writer.add_tensor("token_embd.weight", half)
    writer.add_tensor("output.weight", half)
    writer.add_tensor("output_norm.weight", ones)
    rows = {
        (N, K): quantized_rows(ggml, type_name, Weights.random(K, N, torch.float32, "cpu")).numpy()
        for N, K in set(shape.linears.values())
    }
    for layer in range(shape.num_hidden_layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        for name, size in shape.linears.items():
            writer.add_tensor(
                f"blk.{layer}.{GGUF_NAMES[name]}.weight",
                rows[size],
                raw_dtype=gguf.GGMLQuantizationType(number),
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def measure(path: Path, args: argparse.Namespace) -> dict[str, float | dict[str, float]]:
    """Load time, prefill and decode rates, and resident memory of this process."""
    import llama_cpp

    said: list[str] = []
    collect = llama_cpp.llama_log_callback(
        lambda _, text, __: said.append(text.decode(errors="replace"))
    )
    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    faulthandler.enable()
    llama_cpp.llama_backend_init()
    before = resident_bytes([])
    begin = time.perf_counter()
    model_params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    load_seconds = time.perf_counter() - begin
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}: {''.join(said[-9:])}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = max(args.prompt, max(args.batch) * (DECODE_PROMPT + args.output))
    params.n_batch = params.n_ubatch = args.prompt
    params.n_seq_max = max(args.batch)
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = args.threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot make a context: {''.join(said[-9:])}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def decode(items: list[tuple[int, int]]) -> float:
        """Run random tokens at (sequence, position) in one batch; return its seconds."""
        batch.n_tokens = len(items)
        for index, (sequence, position) in enumerate(items):
            batch.token[index] = random.randrange(vocabulary)
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = index == len(items) - 1 or len(items) <= max(args.batch)
        begin = time.perf_counter()
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_synchronize(context)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return time.perf_counter() - begin

    def clear() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    decode([(0, 0)])
    clear()
    prefill = decode([(0, position) for position in range(args.prompt)])
    decode_rates = {}
    for B in args.batch:
        clear()
        for sequence in range(B):
            decode([(sequence, position) for position in range(DECODE_PROMPT)])
        steps = [
            decode([(sequence, DECODE_PROMPT + step) for sequence in range(B)])
            for step in range(args.output)
        ]
        decode_rates[str(B)] = round(B / statistics.median(steps), 2)
    return {
        "load_seconds": round(load_seconds, 2),
        "prefill_tokens_per_s": round(args.prompt / prefill, 2),
        "decode_tokens_per_s": decode_rates,
        "resident_gb": round((resident_bytes([]) - before) / 1e9, 3),
    }


if __name__ == "__main__":
    main()
