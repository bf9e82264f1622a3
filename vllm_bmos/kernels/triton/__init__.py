"""The Triton kernel: NVIDIA GPUs of compute capability 8.0 and later.

Importing this package needs neither Triton nor a GPU; `can_run` says what is missing.

    signs.py      bits to floats in registers
    kernels.py    the device code
    launch.py     shapes, grids and buffers
    configs.py    the table of tile sizes, configs.json
    selfcheck.py  the first run on a real GPU
    aot.py        compile for a GPU that is not here and read the machine code
"""

from functools import cache
from importlib.util import find_spec

import torch

from vllm_bmos.kernels.base import Kernel, LinearConfig, LinearTensors

MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)


class TritonKernel(Kernel):
    """Signs stay packed until they are in registers; the activations are permuted to meet them."""

    name = "triton"

    def can_run(self, config: LinearConfig) -> tuple[bool, str]:
        """Whether the kernels fit, and, once a shape, whether they are right on this GPU.

        The first call for a shape compiles the kernels and runs the self-check.
        """
        able, reason = fits(config)
        if not able:
            return False, reason
        from vllm_bmos.kernels.triton.selfcheck import passes

        wrong = passes(self, config, _tokens_to_try(config.device))
        return wrong is None, wrong or reason

    def prepare(self, tensors: LinearTensors, config: LinearConfig) -> LinearTensors:
        """Pad to whole blocks; see `launch.prepare`."""
        from vllm_bmos.kernels.triton import launch

        return launch.prepare(tensors, config.shard_sizes, config.K)

    def router_logits(
        self, x: torch.Tensor, router_weight: torch.Tensor, shards: int
    ) -> torch.Tensor:
        """The router alone; see `launch.router_logits`."""
        from vllm_bmos.kernels.triton import launch

        return launch.router_logits(x, router_weight)

    def linear(
        self,
        x: torch.Tensor,
        logits: torch.Tensor | None,
        tensors: LinearTensors,
        bias: torch.Tensor | None,
        shard_sizes: list[int],
    ) -> torch.Tensor:
        """The layer; see `launch.linear`."""
        from vllm_bmos.kernels.triton import launch

        return launch.linear(x, logits, tensors, bias, shard_sizes)


def fits(config: LinearConfig) -> tuple[bool, str]:
    """Whether the kernels are made for such a layer on this machine, and why (or why not)."""
    if config.device != "cuda":
        return False, f"needs an NVIDIA GPU, the layer is on {config.device}"
    if torch.version.hip is not None:
        return False, "AMD GPUs: never run there, and the tiles of the table need too much LDS"
    if find_spec("triton") is None:
        return False, "Triton is not installed (pip install triton)"
    if config.dtype not in DTYPES:
        return False, f"computes with float16 or bfloat16 activations, not {config.dtype}"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return False, (
            f"needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later (the "
            f"tensor-core instructions of Triton), this GPU has {capability[0]}.{capability[1]}"
        )
    return True, f"compute capability {capability[0]}.{capability[1]}"


@cache
def _tokens_to_try(device: str) -> tuple[int, ...]:
    """One number of tokens for each variant: every tile of the table, full and ragged, and more."""
    from vllm_bmos.kernels.triton import launch
    from vllm_bmos.kernels.triton.configs import tiles_for

    limits = [tile.M for tile in tiles_for(launch.arch_of(torch.device(device)))]
    largest = max([M for M in limits if M is not None], default=launch.FEW_TOKENS)
    return (1, *(M for M in limits if M is not None), max(largest, launch.FEW_TOKENS) + 1)
