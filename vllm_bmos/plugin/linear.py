"""The LinearMethod: allocates a layer's parameters, loads, prepares and runs them.

Tensor parallelism, by vLLM's layer class:

- column parallel (q/k/v, gate/up): rows of the signs and columns of the out-scale are split;
  router and in-scale are replicated, and nothing is communicated.
- row parallel (o_proj, down_proj): x, signs, router and in-scale are split along K. Each rank's
  router logits are partial, so they are all-reduced before the softmax; the out-scale is applied
  to the partial product, which is linear, and vLLM's own all-reduce adds the results up.
"""

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.platforms import current_platform

from vllm_bmos import ops
from vllm_bmos.checkpoint.format import BIAS, BinaryMosConfig, FormatError
from vllm_bmos.kernels import Kernel, LinearConfig, choose_kernel
from vllm_bmos.output_norm import output_layer_norm
from vllm_bmos.plugin.loader import LayerLoader, Slice
from vllm_bmos.plugin.parameters import (
    empty_tensors,
    register_tensors,
    registered_tensors,
    replace_tensors,
)
from vllm_bmos.plugin.state import SavedLayout


class BinaryMosLinearMethod(LinearMethodBase):
    """One quantized layer of a vLLM model, merged or not.

    Args:
        config: the checkpoint's quantization config.
        names: checkpoint names of the layer's logical shards.
        biases: whether each shard has a bias in the checkpoint; None if that was not read.
        complete: whether a checkpoint is read, so that every tensor has to arrive.
    """

    def __init__(
        self,
        config: BinaryMosConfig,
        names: list[str],
        biases: list[bool] | None,
        complete: bool,
    ) -> None:
        self.config = config
        self.names = names
        self.biases = biases
        self.complete = complete
        # Set by create_weights.
        self.loader: LayerLoader
        self.layer_config: LinearConfig
        self.kernel: Kernel
        self.layout: SavedLayout
        self.reduce_logits = False

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Allocate this rank's part of the layer, in the checkpoint's layout.

        Raises:
            ValueError: if K does not split into whole bytes of signs over the ranks, or it is not
                known which parts of the layer are which on the disk.
        """
        E, K = self.config.num_experts, input_size_per_partition
        scale_dtype = getattr(torch, self.config.scale_dtype)
        if self.config.output_norm and layer.tp_size > 1:
            raise ValueError(
                f"{self.names[0]}: layers with output_norm need all their outputs on one rank. Use "
                "--tensor-parallel-size 1."
            )
        if 1 < len(self.names) != len(output_partition_sizes):
            leaves = "|".join(name.rpartition(".")[2] for name in self.names)
            raise ValueError(
                f"{', '.join(self.names)}: vLLM serves these as one layer of "
                f"{len(output_partition_sizes)} parts, and vllm-bmos cannot tell which are whose. "
                rf"Convert the model again with --ignore '\.({leaves})$'."
            )
        split_K = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        if split_K and K % 8:
            check_split(self.names[0], input_size, layer.tp_size)
        inputs = Slice(layer.tp_rank * K if split_K else 0, K, input_size)
        outputs = output_slices(layer, output_partition_sizes)
        self.loader = LayerLoader(self.names, inputs, outputs, E, self.config.scale_dtype)
        self.reduce_logits = split_K and E > 1
        self.layer_config = LinearConfig(
            K=K,
            shard_sizes=tuple(output_partition_sizes),
            E=E,
            dtype=params_dtype,
            scale_dtype=scale_dtype,
            device=current_platform.device_type,
        )
        self.kernel = choose_kernel(self.layer_config)

        tensors = empty_tensors(self.layer_config)
        self.layout = SavedLayout(layer, self.kernel, self.names[0])
        if self.layout.is_loaded:
            tensors = self.kernel.prepare(tensors, self.layer_config)
        register_tensors(layer, tensors, self.loader.weight_loader)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that everything arrived, then re-lay the tensors for the chosen kernel.

        Raises:
            FormatError: naming a tensor that is missing, or a bias that does not fit the model.
        """
        if self.layout.is_loaded:
            self.layout.check()
            return
        if self.complete:  # not with load_format dummy, say
            self.loader.check_complete()
        if self.biases is not None:
            self._check_bias(layer)
        replace_tensors(layer, self.kernel.prepare(registered_tensors(layer), self.layer_config))

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y[..., N] of x[..., K] on this rank."""
        config = self.layer_config
        tokens = x.reshape(-1, config.K)
        logits = None
        if self.reduce_logits:
            logits = ops.router_logits(
                tokens, layer.router_weight, len(config.shard_sizes), config.E, self.kernel.name
            )
            logits = tensor_model_parallel_all_reduce(logits)
        y = ops.linear(
            tokens,
            logits,
            layer.weight_packed,
            layer.in_channel_scale,
            layer.out_channel_scale,
            layer.router_weight,
            None if self.config.output_norm else bias,
            config.shard_sizes,
            self.kernel.name,
        )
        if self.config.output_norm:
            # The norm is over all outputs of a layer on the disk, which vLLM may serve as several.
            sizes = [config.N] if self.loader.fused_on_disk else config.shard_sizes
            y = output_layer_norm(y, bias, sizes)
        return y.view(*x.shape[:-1], config.N)

    def _check_bias(self, layer: LinearBase) -> None:
        """Refuse a bias that vLLM would leave uninitialised, or drop, without a word."""
        assert self.biases is not None
        wants = getattr(layer, BIAS, None) is not None
        for name, has in zip(self.names, self.biases, strict=True):
            if wants and not has:
                raise FormatError(
                    f"{name}.{BIAS} is missing from the checkpoint, and the model of config.json "
                    "has one. Convert the model again."
                )
            if has and not wants:
                raise FormatError(
                    f"{name}.{BIAS} is in the checkpoint, but the model of config.json has no "
                    "bias there. Convert the model again."
                )


def output_slices(layer: LinearBase, sizes: list[int]) -> list[Slice]:
    """This rank's part of N of each logical shard of a vLLM layer.

    Args:
        layer: the layer being built, with its tp_rank and tp_size set.
        sizes: the size of each part on this rank.
    """
    if not isinstance(layer, ColumnParallelLinear):
        return [Slice(0, size, size) for size in sizes]
    rank, tp = layer.tp_rank, layer.tp_size
    # With fewer KV heads than ranks, several ranks hold the same k and v head.
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) else 1
    slices = []
    for shard, size in enumerate(sizes):
        copies = replicas if shard > 0 else 1
        slices.append(Slice(rank // copies * size, size, size * tp // copies))
    return slices


def check_split(name: str, K: int, tp_size: int) -> None:
    """Raise ValueError, naming the sizes that work, unless K/tp_size is a whole number of bytes."""
    if K % (8 * tp_size) == 0:
        return
    works = [str(tp) for tp in range(1, 65) if K % (8 * tp) == 0] or ["1"]
    raise ValueError(
        f"{name}: K={K} cannot be split over --tensor-parallel-size {tp_size}: each rank needs a "
        f"whole number of bytes of packed signs, a multiple of 8 inputs. Sizes that work for this "
        f"layer: {', '.join(works)}."
    )
