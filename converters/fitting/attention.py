"""Causal attention that trains fast on a CPU: torch's flash kernel forward, its own backward.

torch's fused backward pass is slower on a CPU than plain matrix products, and these keep the whole
matrix of scores in memory several times, in float32 among others. Here the forward pass keeps only
the logarithms of the softmax's sums, and the backward pass computes the probabilities again from
them, for `ROWS` queries and the keys that these may see at a time (FlashAttention,
arXiv 2205.14135, algorithm 4, without its tiles of keys).
"""

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

NAME, PLAIN = "bmos_causal", "eager"
# What transformers passes to every attention and what changes nothing where there is no mask.
HARMLESS = {"is_causal", "position_ids", "sliding_window", "use_cache", "output_hidden_states"}
ROWS = 256  # queries at a time; fewer skip more of the masked half, in more and smaller products


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T * scale, causal) v with q [B, H, T, D] and k, v [B, H_kv, T, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        # Repeated: torch does not promise that this op takes key heads that are shared.
        shared = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys, values, 0.0, True, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        B, H, T, D = q.shape
        shared = H // k.shape[1]  # query heads to a key head
        delta = (d_out.float() * out.float()).sum(-1)

        def rows(x: torch.Tensor, i: int, j: int) -> torch.Tensor:
            """Queries i to j of x [B, H, T, ...], those that share a key head below one another."""
            x = x.unflatten(1, (-1, shared))[:, :, :, i:j]
            return x.flatten(0, 1).flatten(1, 2)

        d_q = []
        d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        for i in range(0, T, ROWS):
            j = min(i + ROWS, T)
            q_i, d_i = rows(q, i, j), rows(d_out, i, j)
            k_j, v_j = k[:, :, :j].flatten(0, 1), v[:, :, :j].flatten(0, 1)
            seen = torch.ones(j - i, j, dtype=torch.bool, device=q.device).tril(i).repeat(shared, 1)
            scores = torch.bmm(q_i, k_j.mT).float() * ctx.scale
            p = torch.where(seen, (scores - rows(log_sum, i, j)[..., None]).exp(), 0.0)
            d_p = torch.bmm(d_i, v_j.mT).float()
            d_scores = (p * (d_p - rows(delta, i, j)[..., None]) * ctx.scale).to(q.dtype)
            d_q.append(torch.bmm(d_scores, k_j).view(B, -1, shared, j - i, D).flatten(1, 2))
            d_k[:, :, :j] += torch.bmm(d_scores.mT, q_i).view(B, -1, j, D)
            d_v[:, :, :j] += torch.bmm(p.to(q.dtype).mT, d_i).view(B, -1, j, D)
        return torch.cat(d_q, dim=2), d_k.to(k.dtype), d_v.to(v.dtype), None


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(q k^T * scale, causal) v on a CPU, with gradients.

    Args:
        q: queries [B, H, T, D].
        k: keys [B, H_kv, T, D]; H / H_kv heads in a row share one.
        v: values, likewise.
        scale: of the scores.

    Returns:
        [B, H, T, D].
    """
    result: torch.Tensor = _CausalAttention.apply(q, k, v, scale)
    return result


def use_fast_attention(model: Any, tokens: torch.Tensor) -> None:
    """Have a transformers model attend by `causal_attention`, in place.

    A model that needs more than that (a sliding window shorter than the text, soft-capped scores,
    sinks, position biases) attends by transformers' plain products, and the log says why.

    Args:
        model: on a CPU.
        tokens: [windows, T] to try it on, as long as any that the model will see.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # None where a mask would be causal alone
    try:
        model.set_attn_implementation(NAME)
        with torch.no_grad():
            model(tokens)
    except (NotImplementedError, ValueError) as error:
        logger.info("attention by plain products: %s", error)
        model.set_attn_implementation(PLAIN)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: q [B, H, T, D] and k, v [B, H_kv, T, D] to [B, T, H, D].

    Raises:
        NotImplementedError: if the model wants anything but causal attention to whole windows.
    """
    wants = [name for name, value in kwargs.items() if value is not None and name not in HARMLESS]
    wants += ["a mask"] if attention_mask is not None else []
    wants += ["dropout"] if dropout else []
    wants += [] if getattr(module, "is_causal", True) else ["tokens to come"]
    wants += [] if query.shape[2:] == key.shape[2:] == value.shape[2:] else ["unequal shapes"]
    if wants:
        raise NotImplementedError(f"{type(module).__name__} attends with {', '.join(wants)}")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scale).transpose(1, 2).contiguous(), None
