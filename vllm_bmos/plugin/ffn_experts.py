"""What a mixture-of-experts layer computes, as the op `vllm_bmos::ffn_experts`.

A call sorts its M * top_k slots, pairs of a token and a feed-forward expert, by expert, and runs
the kernel of a plain linear layer for each expert that got any. The op is opaque to torch.compile,
because how many tokens each expert gets is data.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional
from vllm.distributed import tensor_model_parallel_all_reduce

from vllm_bmos import ops

__all__ = ["ACTIVATIONS", "ffn_experts"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def _ffn_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    w13_kernel: str,
    w2_kernel: str,
    inner: int,
    partial_gates: int,
    activation: str,
    weights_on_input: bool,
) -> torch.Tensor:
    """The sum over a token's chosen feed-forward experts that this rank holds, weighted.

    Args:
        x: tokens [M, H].
        topk_weights: weights of the chosen experts, float32 [M, top_k].
        topk_ids: which they are, [M, top_k], numbered over all ranks; -1 is none.
        expert_map: this rank's number of each expert, or -1; None if they are the same.
        w13: weight, in-scale, out-scale and router of the experts' gate and up, each [X, ...].
        w2: the same of down.
        w13_kernel: the kernel that has prepared them.
        w2_kernel: the kernel that has prepared them.
        inner: inputs of w2 on this rank.
        partial_gates: E, if w2 is split along K, so that the ranks add up its router logits; 1 if
            there is nothing to add up.
        activation: of the gate.
        weights_on_input: whether the weights multiply x instead of the result.

    Returns:
        [M, H] in x's dtype.
    """
    M, H = x.shape
    X = len(w13[0])
    ids = topk_ids.long()
    if expert_map is not None:
        ids = expert_map[ids.clamp(min=0)].long().masked_fill(ids < 0, -1)
    weights = topk_weights.float()
    capturing = _capturing(x)
    if capturing:
        # A CUDA graph cannot ask who got which token: every expert sees every one.
        every = weights.new_zeros(M, X + 1).scatter_add_(1, ids + 1, weights)
        ids, weights = torch.arange(X, device=x.device).expand(M, X), every[:, 1:]
        counts = [M] * X
    else:
        _, *counts = torch.bincount(ids.flatten() + 1, minlength=X + 1).tolist()
    order = ids.flatten().argsort(stable=True)[ids.numel() - sum(counts) :]
    busy, sizes = [i for i in range(X) if counts[i]], [count for count in counts if count]

    tokens = x[order // ids.shape[1]]
    if weights_on_input:
        tokens = (tokens * weights.flatten()[order, None]).to(x.dtype)
    parts = [x.new_empty(0, 2 * inner)]  # there may be no others
    for i, part in zip(busy, tokens.split(sizes), strict=True):
        parts.append(ops.linear(part, None, *_of(w13, i), None, [inner, inner], w13_kernel))
    gate, up = torch.cat(parts).chunk(2, dim=1)
    hidden = ACTIVATIONS[activation](gate) * up

    own: Sequence[torch.Tensor | None] = [None] * len(busy)
    if partial_gates > 1:
        # By slot, so that it is as large on every rank.
        logits = weights.new_zeros(ids.numel(), 1, partial_gates)
        partial_logits = [weights.new_empty(0, 1, partial_gates)]
        for i, part in zip(busy, hidden.split(sizes), strict=True):
            partial_logits.append(ops.router_logits(part, w2[3][i], 1, partial_gates, w2_kernel))
        logits[order] = torch.cat(partial_logits)
        own = tensor_model_parallel_all_reduce(logits)[order].split(sizes)

    parts = [x.new_empty(0, H)]
    for i, part, mine in zip(busy, hidden.split(sizes), own, strict=True):
        parts.append(ops.linear(part, mine, *_of(w2, i), None, [H], w2_kernel))
    result = x.new_zeros(ids.numel(), H)
    result[order] = torch.cat(parts)
    result = result.view(M, ids.shape[1], H).float()
    if not weights_on_input:
        result *= weights.unsqueeze(2)
    if capturing:  # experts that a token did not choose may have overflowed on it
        result.masked_fill_(weights.unsqueeze(2) == 0, 0.0)
    return result.sum(dim=1).to(x.dtype)


def _of(
    stack: list[torch.Tensor], i: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, in_channel_scale, out_channel_scale, router_weight = stack
    return weight[i], in_channel_scale[i], out_channel_scale[i], router_weight[i]


def _capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _ffn_experts_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("vllm_bmos", "FRAGMENT")
_library.define(
    "ffn_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor[] w13, "
    "Tensor[] w2, str w13_kernel, str w2_kernel, int inner, int partial_gates, str activation, "
    "bool weights_on_input) -> Tensor"
)
_library.impl("ffn_experts", _ffn_experts, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_bmos::ffn_experts", _ffn_experts_fake, lib=_library)

ffn_experts = torch.ops.vllm_bmos.ffn_experts
