"""Runs a layer-wise method over a model, block by block, and writes the result as a dense model.

As in the code of GPTQ, PB-LLM and BiLLM, the inputs of a layer are those of the model whose
earlier layers are quantized already, and H = X^T X sums over all calibration tokens.
Memory: one block, the embeddings and the hidden states. A finished block survives a kill
(`TARGET.fit`).
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import logger
from safetensors.torch import save_file
from torch import nn

from baselines.quantized import Quantized
from converters.fitting.blocks import BlockModel, Kwargs, advance
from converters.fitting.folder import FitFolder
from converters.fitting.observe import Group, find_groups, look
from converters.fitting.precision import bfloat16_products
from converters.fitting.threads import workers
from converters.side_files import side_files
from converters.sources import Source
from vllm_bmos.checkpoint.format import TORCH_DTYPES

BATCH = 4  # windows in one forward pass
FILE_BYTES = 2**31  # of one output file, about
BITS, PUBLISHED = "bits", "published_bits"
STAGE = "blocks"

Quantize = Callable[[torch.Tensor, torch.Tensor], Quantized]  # W [N, K], H [K, K]
Tensors = dict[str, torch.Tensor]


def quantize_model(
    source: Source,
    tokens: torch.Tensor,
    quantize: Quantize,
    target: Path,
    facts: dict[str, Any],
    threads: int = 0,
) -> dict[str, float]:
    """Quantize every layer of a dense source's blocks and write the model to a directory.

    Args:
        source: a dense source.
        tokens: calibration windows [windows, T].
        quantize: the method.
        target: directory to write.
        facts: what determines the result, as JSON; a run to be resumed must have the same.
        threads: 0 takes one per core.

    Returns:
        Mean `bits` and `published_bits` of all quantized weights.
    """
    with FitFolder(target, facts, resume=True) as folder:
        pieces = _quantize_blocks(source, tokens, quantize, folder, threads)
        weights = ({n: t for n, t in _read(folder, p).items() if t.ndim} for p in pieces)
        write_dense(source, weights, target)
        scalars = {n: t for p in pieces for n, t in _read(folder, p).items() if not t.ndim}
        FitFolder.delete(folder.root)
    return _means(scalars, source.modules)


def _read(folder: FitFolder, piece: str) -> Tensors:
    tensors = folder.read(STAGE, piece)
    assert tensors is not None  # it has been written
    return tensors


@torch.inference_mode()
def _quantize_blocks(
    source: Source, tokens: torch.Tensor, quantize: Quantize, folder: FitFolder, threads: int
) -> list[str]:
    """The pieces in the folder: weights and bits of every layer by their names on disk."""
    model, pieces = BlockModel(source), []
    with workers(threads) as pool:
        hidden, calls = model.first_inputs(tokens)
        for index, kwargs in enumerate(calls):
            block, names = model.load(index), model.linears[index]
            piece = f"block-{index:04d}"
            tensors = folder.read(STAGE, piece)
            if tensors is None:
                tensors = _quantize_block(block, names, hidden, kwargs, quantize, pool)
                folder.write(STAGE, piece, tensors)
            for name, disk in names.items():
                _set(block, name, tensors[f"{disk}.weight"])
            pieces.append(piece)
            advance(block, hidden, kwargs, pool, BATCH)
            logger.info("block %d of %d", index + 1, len(calls))
    return pieces


def _quantize_block(
    block: nn.Module,
    names: dict[str, str],
    hidden: torch.Tensor,
    kwargs: Kwargs,
    quantize: Quantize,
    pool: ThreadPoolExecutor,
) -> Tensors:
    """Quantize a block's layers in the order in which it runs them."""
    tensors: Tensors = {}
    for group in find_groups(block, list(names), hidden[:1], kwargs):
        H = second_moment(block, group, hidden, kwargs, pool)

        @torch.inference_mode()
        def one(name: str, H: torch.Tensor = H) -> Quantized:
            return quantize(_weight(block, name), H)

        for name, done in zip(group.names, pool.map(one, group.names), strict=True):
            _set(block, name, done.weight)
            tensors[f"{names[name]}.weight"] = done.weight
            tensors[f"{names[name]}.{BITS}"] = torch.tensor(done.bits)
            tensors[f"{names[name]}.{PUBLISHED}"] = torch.tensor(done.published)
    return tensors


def second_moment(
    block: nn.Module, group: Group, hidden: torch.Tensor, kwargs: Kwargs, pool: ThreadPoolExecutor
) -> torch.Tensor:
    """X^T X [K, K] of the inputs that a group of layers shares."""

    @torch.inference_mode()
    def one(part: torch.Tensor) -> torch.Tensor:
        X, _ = look(block, group, [], part, kwargs)
        return X.T @ X

    K = _weight(block, group.names[0]).shape[1]
    total = torch.zeros(K, K)
    with bfloat16_products():
        for H in pool.map(one, hidden.split(BATCH)):  # in order, so that bytes do not vary
            total += H
    return total


def _weight(block: nn.Module, name: str) -> torch.Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _set(block: nn.Module, name: str, weight: torch.Tensor) -> None:
    block.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)


def _means(scalars: Tensors, modules: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Means of the bits over all weights."""
    total = sum(N * K for N, K in modules.values())
    return {
        what: sum(float(scalars[f"{m}.{what}"]) * N * K for m, (N, K) in modules.items()) / total
        for what in (BITS, PUBLISHED)
    }


def write_dense(source: Source, replaced: Iterable[Tensors], target: Path) -> None:
    """Write a dense source as a Hugging Face directory, some tensors replaced.

    The tensors keep the source's dtype, so that a replaced weight is rounded as the others were.

    Args:
        source: a dense source.
        replaced: tensors by name, in parts that fit into memory; each becomes a file.
        target: directory to write.
    """
    target.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}

    def write(tensors: Tensors) -> None:
        file = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(tensors, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    specs = source.store.specs
    for part in replaced:
        write({n: t.to(TORCH_DTYPES[specs[n].dtype]).contiguous() for n, t in part.items()})
    rest: Tensors = {}
    for name in [name for name in specs if name not in weight_map]:
        rest[name] = source.store.tensor(name).contiguous()
        if sum(tensor.nbytes for tensor in rest.values()) > FILE_BYTES:
            write(rest)
            rest = {}
    if rest:
        write(rest)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "config.json").write_text(json.dumps(source.config, indent=2))
    for name, data in side_files(source).items():
        (target / name).write_bytes(data)
