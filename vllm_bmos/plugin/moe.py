"""Mixture-of-experts layers: every feed-forward expert is two packed layers of its own.

A *feed-forward expert* is a gated MLP that vLLM's token router chooses. It has nothing to do with
the E *scaling experts* inside each packed layer. Per feed-forward expert there are w13 (gate and
up, merged: two logical shards) and w2 (down); a rank's are stacked, X of them.

- Tensor parallel: w13 is split along N and w2 along K, as in a dense MLP. The partial logits of
  w2's routers are summed over the ranks, in one all-reduce for all experts.
- Expert parallel: a rank holds whole experts, and runs only those.

In both, vLLM's own all-reduce adds up the ranks' outputs.
"""

from collections.abc import Callable

import torch
from typing_extensions import override
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
    RoutedExperts,
)
from vllm.platforms import current_platform

from vllm_bmos.checkpoint.format import REQUIRED, BinaryMosConfig
from vllm_bmos.kernels import LinearConfig, choose_kernel
from vllm_bmos.plugin.ffn_experts import ACTIVATIONS, ffn_experts
from vllm_bmos.plugin.linear import check_split
from vllm_bmos.plugin.loader import LayerLoader, Slice, suffix_of
from vllm_bmos.plugin.parameters import (
    empty_tensors,
    register_tensors,
    registered_tensors,
    replace_tensors,
)
from vllm_bmos.plugin.state import SavedLayout
from vllm_bmos.plugin.versions import unsupported_cpu_moe


class BinaryMosMoEMethod(FusedMoEMethodBase):
    """The feed-forward experts of one mixture-of-experts layer.

    Args:
        config: the checkpoint's quantization config.
        moe: what vLLM says of the layer.
        names: checkpoint names of gate, up and down of every feed-forward expert of the model.
        complete: whether a checkpoint is read, so that every tensor has to arrive.
    """

    def __init__(
        self,
        config: BinaryMosConfig,
        moe: FusedMoEConfig,
        names: list[tuple[str, str, str]],
        complete: bool,
    ) -> None:
        super().__init__(moe)
        self.config = config
        self.names = names
        self.complete = complete
        self.moe_quant_config = FusedMoEQuantConfig.make()  # vLLM asks for one; it says nothing
        self.w13: Stack
        self.w2: Stack

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Allocate this rank's part of its feed-forward experts, in the checkpoint's layout.

        Raises:
            ValueError: for a layer that cannot be served, or a K that does not split over ranks.
        """
        self._check(layer)
        tp_size, rank = self.moe.tp_size, self.moe.tp_rank
        part = intermediate_size_per_partition
        if tp_size > 1 and part % 8:
            check_split(self.names[0][2], part * tp_size, tp_size)
        hidden = Slice(0, hidden_size, hidden_size)
        inner = Slice(rank * part, part, tp_size * part)
        number = layer._map_global_expert_id_to_local_expert_id
        mine = dict(sorted((int(number(i)), n) for i, n in enumerate(self.names) if number(i) >= 0))

        def weight_loader(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            index = int(number(expert_id))
            if index >= 0:
                stack, shard = (self.w2, 0) if shard_id == "w2" else (self.w13, shard_id == "w3")
                suffix = suffix_of(param, self.names[expert_id][0])
                stack.loaders[index].load(param.data[index], suffix, loaded_weight, int(shard))
            return index >= 0 if return_success else None

        def stack(prefix: str, names: list[list[str]], K: Slice, N: list[Slice]) -> Stack:
            sizes = tuple(shard.size for shard in N)
            scale_dtype = getattr(torch, self.config.scale_dtype)
            E, device = self.config.num_experts, current_platform.device_type
            of_one = LinearConfig(K.size, sizes, E, params_dtype, scale_dtype, device)
            loaders = [LayerLoader(n, K, N, E, self.config.scale_dtype) for n in names]
            return Stack(layer, prefix, loaders, weight_loader, of_one)

        self.w13 = stack(
            "w13_", [[gate, up] for gate, up, _ in mine.values()], hidden, [inner, inner]
        )
        self.w2 = stack("w2_", [[down] for _, _, down in mine.values()], inner, [hidden])

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that everything arrived, then re-lay the tensors for the chosen kernel.

        Raises:
            FormatError: naming a tensor that is missing.
        """
        for stack in (self.w13, self.w2):
            stack.finish(layer, self.complete)

    @override
    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    @override
    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: torch.nn.Module | None = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # vLLM's runner adds the shared experts itself.
        return ffn_experts(
            x,
            topk_weights,
            topk_ids,
            layer.expert_map,
            self.w13.tensors(layer),
            self.w2.tensors(layer),
            self.w13.kernel.name,
            self.w2.kernel.name,
            self.w2.config.K,
            self.config.num_experts if self.moe.tp_size > 1 else 1,
            layer.activation.value,
            layer.apply_router_weight_on_input,
        )

    def _check(self, layer: RoutedExperts) -> None:
        reason = unsupported_cpu_moe() if current_platform.is_cpu() else None
        if reason:
            raise ValueError(f"{self.names[0][0]}: {reason}")
        activation = layer.activation.value
        wrong = None
        if activation not in ACTIVATIONS:
            wrong = f"activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        elif self.moe.has_bias:
            wrong = "biases"
        elif getattr(self.moe, "swiglu_limit", None) is not None:
            wrong = "a limit on the activation (swiglu_limit)"
        elif self.config.output_norm:
            wrong = "output_norm"
        elif self.moe.tp_size > 1 and self.moe.dp_size * self.moe.pcp_size > 1:
            # vLLM then splits an expert over ranks beyond those of tensor parallelism, and the
            # router logits are summed over these only.
            raise ValueError(
                f"{self.names[0][0]}: with several data-parallel ranks, quantized feed-forward "
                "experts have to stay whole. Add --enable-expert-parallel, or use "
                "--tensor-parallel-size instead."
            )
        if wrong:
            raise ValueError(
                f"{self.names[0][0]}: vllm-bmos does not serve quantized feed-forward experts "
                rf"with {wrong}. Convert the model again with --ignore '\.experts'."
            )


class Stack:
    """One packed layer of each of a rank's X feed-forward experts, as parameters [X, ...].

    Args:
        layer: vLLM's layer, which gets the parameters.
        prefix: what their names begin with: vLLM's w13_ or w2_.
        loaders: one of each expert.
        weight_loader: what vLLM is to call, for all of them.
        config: of one expert's layer.
    """

    def __init__(
        self,
        layer: RoutedExperts,
        prefix: str,
        loaders: list[LayerLoader],
        weight_loader: Callable[..., object],
        config: LinearConfig,
    ) -> None:
        self.prefix, self.loaders, self.config = prefix, loaders, config
        self.kernel = choose_kernel(config)
        tensors = empty_tensors(config, len(loaders))
        self.layout = SavedLayout(layer, self.kernel, loaders[0].names[0], prefix)
        if self.layout.is_loaded:
            tensors = self.kernel.prepare_stack(tensors, config)
        register_tensors(layer, tensors, weight_loader, prefix)

    def tensors(self, layer: RoutedExperts) -> list[torch.Tensor]:
        """Weight, in-scale, out-scale and router of all experts."""
        return [getattr(layer, self.prefix + suffix) for suffix in REQUIRED]

    def finish(self, layer: RoutedExperts, complete: bool) -> None:
        """Check what was loaded, and prepare it unless it was saved prepared."""
        if self.layout.is_loaded:
            self.layout.check()
            return
        if complete:
            for loader in self.loaders:
                loader.check_complete()
        tensors = registered_tensors(layer, self.prefix)
        replace_tensors(layer, self.kernel.prepare_stack(tensors, self.config), self.prefix)
