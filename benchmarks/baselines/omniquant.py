"""A 2-bit method of OmniQuant's class, by the library auto-round.

OmniQuant (arXiv 2308.13137) learns the clipping of each group's min-max grid by gradient, block by
block, against the dense block's output. SignRound (arXiv 2309.05516), which Intel's auto-round
implements, learns the same two clipping factors of each group and, beyond that, the rounding of
every weight. It stands for the class here, with the grid of the papers' 2-bit tables: asymmetric,
in groups of 128.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from baselines.sequential import BITS, PUBLISHED, write_dense
from baselines.uniform import stored_bits
from converters.fitting.models import module_names
from converters.sources import Source

CODE_BITS, GROUP = 2, 128
STEPS, BATCH = 200, 8  # auto-round's defaults: steps for each block, windows in a step


def quantize_model(
    source: Source, dense: Path, tokens: torch.Tensor, target: Path, steps: int, batch: int
) -> dict[str, float]:
    """Quantize every layer of a dense source's blocks and write the model to a directory.

    Args:
        source: a dense source.
        dense: the same model as a Hugging Face directory.
        tokens: calibration windows [windows, T].
        target: directory to write.
        steps: of training for each block.
        batch: windows in a step.

    Returns:
        Mean `bits` and `published_bits` of all quantized weights.
    """
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    names = module_names(model, source)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(dense),
        bits=CODE_BITS,
        group_size=GROUP,
        sym=False,
        iters=steps,
        batch_size=batch,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=[_example(window) for window in tokens],
        device_map=0 if torch.cuda.is_available() else "cpu",
        enable_torch_compile=False,
    )
    model, _ = rounding.quantize()
    weights = {}
    for disk, name in names.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weights[f"{disk}.weight"] = layer.weight.detach().float()
    write_dense(source, [weights], target)
    total = sum(N * K for N, K in source.modules.values())
    shapes = source.modules.values()
    bits = sum(stored_bits(K, CODE_BITS, GROUP) * N * K for N, K in shapes) / total
    return {BITS: bits, PUBLISHED: bits}


def _example(window: torch.Tensor) -> dict[str, Any]:
    return {"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]}
