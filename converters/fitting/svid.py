"""Sign-value-independent decomposition (OneBit, arXiv 2402.11295): the data-free stage.

    W[N,K] ~ a[N] b[K]^T * B[N,K]        B = sign(W), with sign(0) = +1
    |W|    ~ a b^T                       its first singular pair, a = u sqrt(s), b = v sqrt(s)

|W| has no negative entry, so the pair has none either and power iteration converges in a few
steps (Perron-Frobenius); a full SVD would take minutes per layer. All E experts are equal and the
router is zero: the softmax weights sum to 1, so the layer is exactly OneBit whatever E is.
"""

import torch

from vllm_bmos.checkpoint.format import IN_SCALE, OUT_SCALE, ROUTER, WEIGHT
from vllm_bmos.checkpoint.signs import pack_signs

MAX_STEPS = 100
TOLERANCE = 1e-6  # relative change of the singular value at which the iteration ends


def fit(weight: torch.Tensor, E: int) -> dict[str, torch.Tensor]:
    """Fit one layer.

    Args:
        weight: W [N, K], finite, any float dtype.
        E: number of experts.

    Returns:
        The layer's tensors by their names in the format; the scales and router are float32.
    """
    packed = pack_signs(weight >= 0)
    a, b = rank_one(weight.abs().float())
    return {
        WEIGHT: packed,
        IN_SCALE: b.repeat(E, 1),
        OUT_SCALE: a.repeat(E, 1),
        ROUTER: torch.zeros(E, weight.shape[1]),
    }


def rank_one(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best a[N], b[K] with magnitude[N,K] ~ a b^T, both of the same norm and non-negative.

    Args:
        magnitude: |W|, float32 or float64.
    """
    v = magnitude.sum(dim=0)
    norm = v.norm()
    if norm == 0:
        return magnitude.new_zeros(magnitude.shape[0]), v
    v, singular = v / norm, magnitude.new_zeros(())
    for _ in range(MAX_STEPS):
        previous = singular
        u = magnitude @ v
        u /= u.norm()
        v = u @ magnitude
        singular = v.norm()
        v /= singular
        if (singular - previous).abs() <= TOLERANCE * singular:
            break
    return u * singular.sqrt(), v * singular.sqrt()
