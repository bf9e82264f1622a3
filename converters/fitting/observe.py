"""What goes into the linear layers of a block, and which of them write the residual stream."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from converters.fitting.blocks import Kwargs, run_block


@dataclass(frozen=True)
class Group:
    """Layers that share one input, such as q, k and v.

    Attributes:
        names: behind the block's name.
        writes_residual: whether the block adds this (one) layer's output to its stream as it is.
    """

    names: tuple[str, ...]
    writes_residual: bool


class _Stop(Exception):
    """Ends a forward pass when all that is wanted has been seen."""


@torch.inference_mode()
def find_groups(
    block: nn.Module, names: Sequence[str], hidden: torch.Tensor, kwargs: Kwargs
) -> list[Group]:
    """The groups of a block in the order in which it runs them.

    Args:
        block: the block.
        names: its layers to pack.
        hidden: an input [1, T, hidden].
        kwargs: the rest of the call.
    """
    groups: list[tuple[torch.Tensor, list[str]]] = []

    def note(name: str, x: torch.Tensor) -> None:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))

    with _before(block, names, note):
        run_block(block, hidden, kwargs)
    return [
        Group(tuple(group), len(group) == 1 and _writes(block, names, group[0], hidden, kwargs))
        for _, group in groups
    ]


def _writes(
    block: nn.Module, names: Sequence[str], one: str, hidden: torch.Tensor, kwargs: Kwargs
) -> bool:
    """Whether the block returns hidden + y if `one` returns y and every other layer zeros."""
    y: list[torch.Tensor] = []

    def replace(name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if name != one:
            return torch.zeros_like(output)
        y.append(torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view_as(output))
        return y[-1]

    with _after(block, names, replace):
        result = run_block(block, hidden, kwargs)
    if y[0].numel() != hidden.numel():
        return False
    return torch.allclose(result, hidden + y[0].view_as(hidden), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def look(
    block: nn.Module,
    group: Group,
    writers: Sequence[str],
    hidden: torch.Tensor,
    kwargs: Kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a block up to a group. Threads may do this at the same time.

    Args:
        block: the block.
        group: where to stop.
        writers: layers before it that write the residual stream.
        hidden: [windows, T, hidden].
        kwargs: the rest of the call.

    Returns:
        The group's input [tokens, K], and the residual stream there [tokens, hidden].
    """
    seen: list[torch.Tensor] = []
    stream = [hidden]
    block = _own_hooks(block)

    def add(name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        stream.append(output.view_as(hidden))

    def stop(name: str, x: torch.Tensor) -> None:
        seen.append(x)
        raise _Stop

    with _after(block, writers, add), _before(block, group.names[:1], stop), suppress(_Stop):
        run_block(block, hidden, kwargs)
    residual = torch.stack(stream).sum(dim=0)
    return seen[0].reshape(-1, seen[0].shape[-1]), residual.reshape(-1, residual.shape[-1])


def _own_hooks(block: nn.Module) -> nn.Module:
    """A copy with hooks of its own that shares the block's tensors."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})


@contextmanager
def _before(
    block: nn.Module, names: Sequence[str], call: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Call `call(name, x)` before each of the layers runs."""
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: call(name, inputs[0])
        )
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _after(
    block: nn.Module,
    names: Sequence[str],
    call: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor | None],
) -> Iterator[None]:
    """Call `call(name, x, output)` after each of the layers; what it returns is the new output."""
    handles = [
        block.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: call(name, inputs[0], output)
        )
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
