"""A dense model whose decoder blocks are in memory one at a time.

The model is built on the meta device. Only what lies before and behind the blocks is loaded at
once, and the head never; a block is loaded when it is asked for. One pass through stand-ins tells
what every block is called with (masks, rotary embeddings), so no architecture's forward code is
repeated here.
"""

import copy
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from converters.fitting.precision import bfloat16_products
from converters.sources import Source
from converters.structure import IN_BLOCK, meta_model, name_on_disk
from vllm_bmos.checkpoint.format import FormatError

Kwargs = dict[str, Any]


class BlockModel:
    """The blocks of a dense source.

    Args:
        source: a dense source.
        dtype: dtype of all weights.

    Attributes:
        names: the names of the blocks, in order.
        linears: by block, the layers to pack: module name behind the block's -> name on disk.
    """

    def __init__(self, source: Source, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.dtype = source, dtype
        self.model = meta_model(source.config, len(source.store.specs), buffers=True).eval()
        self.model.tie_weights()  # so that a tied head is not looked for in the source
        self._disk = disk_names(self.model, source)
        self.names = block_names(self.model, self._disk, source)
        decoder = self.model.get_decoder()  # no stage by blocks uses the head: it stays unloaded
        (prefix,) = (name for name, module in self.model.named_modules() if module is decoder)
        inside = tuple(f"{name}." for name in self.names)
        for name in self._parameters(self.model):
            if name.startswith(f"{prefix}." * bool(prefix)) and not name.startswith(inside):
                self._load(self.model, "", name)
        self.linears = [
            {
                name.removeprefix(f"{block}."): disk
                for name, disk in self._disk.items()
                if name.startswith(f"{block}.") and disk in source.modules
            }
            for block in self.names
        ]

    def load(self, index: int) -> nn.Module:
        """A new copy of one block, in evaluation mode and without gradients."""
        name = self.names[index]
        block = copy.deepcopy(self.model.get_submodule(name))
        for parameter in self._parameters(block):
            self._load(block, f"{name}.", parameter)
        return block.eval().requires_grad_(False)

    @torch.no_grad()
    def first_inputs(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[Kwargs]]:
        """What the blocks are called with.

        Args:
            tokens: [windows, T].

        Returns:
            The first block's input [windows, T, hidden], and for each block the keyword arguments
            that do not depend on the tokens, made for one window.
        """
        hidden: list[torch.Tensor] = []
        calls: list[Kwargs] = []
        with self._stand_ins(hidden, calls):
            for window in tokens:
                calls.clear()
                self.model.get_decoder()(window[None], use_cache=False)  # without the head
        return torch.cat(hidden), calls

    @contextmanager
    def _stand_ins(self, hidden: list[torch.Tensor], calls: list[Kwargs]) -> Iterator[None]:
        """Replace every block by one that notes its arguments and returns its input."""
        real = {name: self.model.get_submodule(name) for name in self.names}
        try:
            for index, name in enumerate(self.names):
                self.model.set_submodule(name, _StandIn(real[name], index == 0, hidden, calls))
            yield
        finally:
            for name, block in real.items():
                self.model.set_submodule(name, block)

    def _parameters(self, module: nn.Module) -> list[str]:
        return [name for name, _ in module.named_parameters()]

    def _load(self, module: nn.Module, prefix: str, name: str) -> None:
        """Give a parameter of `module` its value; `prefix` is the module's place in the model."""
        owner, _, leaf = name.rpartition(".")
        disk = self._disk.get((prefix + name).removesuffix(f".{leaf}"), "")
        value = self.source.store.tensor(f"{disk}.{leaf}").to(self.dtype)
        parameter = nn.Parameter(value, requires_grad=False)
        setattr(module.get_submodule(owner), leaf, parameter)


class _StandIn(nn.Module):
    """Notes what a block is called with and passes its input on."""

    def __init__(
        self, block: nn.Module, first: bool, hidden: list[torch.Tensor], calls: list[Kwargs]
    ) -> None:
        super().__init__()
        self._first, self._hidden, self._calls = first, hidden, calls
        for name, value in vars(block).items():  # such as Gemma's attention_type
            if isinstance(value, str | int | float | bool) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            raise FormatError(
                "this model's blocks are called with positional arguments, which the stages that "
                "fit on text do not support. Use --stage svid."
            )
        if self._first:
            self._hidden.append(hidden)
        self._calls.append(kwargs)
        return hidden


def run_block(block: nn.Module, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
    """One block on hidden states [windows, T, hidden]."""
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def advance(
    block: nn.Module, hidden: torch.Tensor, kwargs: Kwargs, pool: ThreadPoolExecutor, batch: int
) -> None:
    """Replace hidden states [windows, T, hidden] by the block's outputs, in place.

    Each thread takes `batch` windows at a time.
    """

    @torch.inference_mode()
    def one(part: torch.Tensor) -> None:
        part.copy_(run_block(block, part, kwargs))

    with bfloat16_products():
        list(pool.map(one, hidden.split(batch)))


def disk_names(model: Any, source: Source) -> dict[str, str]:
    """The name on disk of every module that has parameters (some files lack the prefix)."""
    stored = {name.rpartition(".")[0] for name in source.store.specs}
    found = {}
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        disk = name_on_disk(module, model.base_model_prefix, stored)
        if disk is None:
            raise FormatError(f"{name} is missing. The source is incomplete; download it again.")
        found[module] = disk
    return found


def block_names(model: Any, disk: dict[str, str], source: Source) -> list[str]:
    """The decoder blocks that hold the source's packed layers, in order."""
    names: dict[str, None] = {}
    for module, on_disk in disk.items():
        if on_disk in source.modules:
            match = IN_BLOCK.search(module)
            assert match is not None  # every packed layer lies in a numbered block
            names[module[: match.end() - 1]] = None
    stem = {re.sub(r"\d+$", "", name) for name in names}
    if len(stem) != 1:
        raise FormatError(f"the packed layers lie in several stacks of blocks: {sorted(stem)}.")
    count = len(model.get_submodule(next(iter(stem)).removesuffix(".")))
    return [f"{next(iter(stem))}{index}" for index in range(count)]
