"""Perplexity of the dense source and of the packed result on a text, through transformers."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from converters.calibration import CalibrationError, bos_of, with_bos
from converters.sources import Source
from converters.sources.gguf import GgufSource

WINDOW = 2048  # tokens, or the model's own limit if that is smaller


def evaluate(source: Source, target: Path, text: str) -> dict[str, float]:
    """Perplexities by name: "packed", and "dense" if the source is a dense model.

    Protocol: the text is tokenised whole without special tokens and cut into non-overlapping
    windows, each behind BOS if the tokenizer begins texts with it; the mean negative
    log-likelihood is over every token but the first of each window.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import vllm_bmos.integrations.transformers  # noqa: F401 (registers the quantizer)

    tokenizer = AutoTokenizer.from_pretrained(target)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    if len(tokens) < 2:
        raise CalibrationError("--eval-text: expected two tokens of text or more, found fewer.")
    result, bos = {}, bos_of(tokenizer)
    if source.stage is not None:
        gguf = {"gguf_file": source.path.name} if isinstance(source, GgufSource) else {}
        dense = AutoModelForCausalLM.from_pretrained(source.files, dtype=torch.float32, **gguf)
        result["dense"] = perplexity(dense, tokens, bos)
        del dense
    packed = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    result["packed"] = perplexity(packed, tokens, bos)
    return result


def gate_entropy(G: torch.Tensor) -> float:
    """Mean entropy of the gates G[M,E] over the tokens, in bits; at most log2(E)."""
    return float(-(G * G.clamp_min(1e-30).log2()).sum(dim=-1).mean())


@torch.inference_mode()
def router_entropy(path: Path, text: str) -> dict[str, float]:
    """`gate_entropy` of each layer, by its checkpoint name, on the first window of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_bmos.integrations.transformers import own_names

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    entropy: dict[str, float] = {}

    def watch(name: str, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel():  # a feed-forward expert may have got no token
            entropy[name] = gate_entropy(layer.gates(inputs[0]))

    modules = model.config.quantization_config.config.modules
    for name, own in zip(modules, own_names(model, modules), strict=True):
        model.get_submodule(own).register_forward_pre_hook(partial(watch, name))
    model(tokens[:, : min(WINDOW, model.config.max_position_embeddings)])
    return entropy


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor, bos: int | None = None) -> float:
    """Perplexity of a causal language model on tokens [T], each window behind BOS if given."""
    window = min(WINDOW, model.config.max_position_embeddings)
    loss, count = 0.0, 0
    for tail in tokens.split(window - (bos is not None)):
        (part,) = with_bos(tail[None], bos)
        if len(part) < 2:
            continue
        logits = model(part[None]).logits[0, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
        count += len(part) - 1
    return math.exp(min(loss / count, 700.0))
