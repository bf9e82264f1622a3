"""vLLM's own embedding and lm_head, without the memory that they and the warm-up keep on a CPU.

vLLM packs the weight of every embedding layer for oneDNN, also of one that is only looked up, and
keeps the packed weight of an lm_head beside the plain one. Beside 1-bit layers each such copy is
a fifth of the model. Where oneDNN has no fast product of the weight's dtype (narrow.py), the plain
weight is all there is.
"""

from weakref import WeakSet

import torch
from typing_extensions import override
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.platforms import current_platform

from vllm_bmos.plugin.memory import give_back_freed
from vllm_bmos.plugin.narrow import lacks_products
from vllm_bmos.plugin.narrow import linear as narrow_linear

# Layers whose packed weight stands beside the plain one. vLLM reloads the table of a tied head, and
# not the head.
_packed_of_plain: "WeakSet[torch.nn.Module]" = WeakSet()


class AfterWarmUp:
    """Gives back what vLLM's warm-up freed, on a CPU.

    malloc keeps some of the activations of that step, which is as long as a server's longest: 70 to
    220 MB for a 7B model. The head comes last in it.
    """

    def __init__(self) -> None:
        self.done = not current_platform.is_cpu()

    def __call__(self) -> None:
        """Do so if it was not done yet; to be called with every head's product."""
        if not self.done:
            self.done = True
            give_back_freed()


class LeanEmbeddingMethod(UnquantizedEmbeddingMethod):
    """The unquantized method, with one copy of the weight wherever one is enough."""

    def __init__(self) -> None:
        super().__init__()
        self.after_warm_up = AfterWarmUp()
        config = get_current_vllm_config_or_none()
        model = None if config is None else config.model_config
        # Tied, the head's weight is also the table that is looked up; in another dtype than the
        # model's, vLLM multiplies by the plain weight. Unknown counts as both.
        self.keep_weight = (
            model is None
            or getattr(model.hf_text_config, "tie_word_embeddings", True)
            or model.head_dtype != model.dtype
        )

    @override
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if not current_platform.is_cpu():
            return
        if isinstance(layer, ParallelLMHead):
            _choose_product(layer, self.keep_weight)
            return
        # New weights of a table, which heads may share: `apply` packs them anew.
        for stale in (layer, *_packed_of_plain):
            if hasattr(stale, "cpu_linear"):
                del stale.cpu_linear
        _packed_of_plain.clear()

    @override
    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if current_platform.is_cpu() and not hasattr(layer, "cpu_linear"):
            # Models without an lm_head of their own use the embedding as one.
            _choose_product(layer, keep_weight=True)
        self.after_warm_up()
        return super().apply(layer, x, bias)


def _choose_product(layer: torch.nn.Module, keep_weight: bool) -> None:
    """Give a head the product that its logits are made by."""
    if lacks_products(layer.get_parameter("weight").dtype):
        layer.cpu_linear = narrow_linear  # type: ignore[assignment]
        return
    dispatch_cpu_unquantized_gemm(layer, remove_weight=not keep_weight)
    if keep_weight:
        _packed_of_plain.add(layer)
