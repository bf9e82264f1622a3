"""What outlives a process must name its kernel, as another would read the tensors as garbage.

That is vLLM's sharded state, each rank's tensors as they are in memory: in the layout of the
kernel that prepared them, so that layers are allocated in that layout, and its name lies beside
them. And it is vLLM's cache of compiled graphs, which call the kernel by name.
"""

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none

from vllm_bmos.kernels import KERNEL_ENV, Kernel

STATE_FORMATS = {"sharded_state", "runai_streamer_sharded"}
LAYOUT = "bmos_layout"
LAYOUT_BYTES = 32
COMPILE_KEY = "vllm_bmos_kernels"


class SavedLayout:
    """The name of a layer's kernel as a tensor of the layer's state dict, and of nothing else.

    A buffer would have to come from every checkpoint that vLLM reloads.

    Args:
        layer: the layer whose state dict gets the tensor.
        kernel: the kernel that prepares the layer here.
        name: checkpoint name of the layer, for errors.
        prefix: what the tensor's name begins with, where a module has several layers.

    Attributes:
        is_loaded: whether vLLM is about to load a sharded state, and this tensor with it.
    """

    def __init__(self, layer: torch.nn.Module, kernel: Kernel, name: str, prefix: str = "") -> None:
        self.name = name
        self.kernel = kernel
        config = get_current_vllm_config_or_none()
        if config is not None:
            _add_to_compile_key(config, kernel)
        self.is_loaded = config is not None and config.load_config.load_format in STATE_FORMATS
        text = kernel.name.encode().ljust(LAYOUT_BYTES, b"\0")
        self.expected = torch.tensor(list(text), dtype=torch.uint8)
        # vLLM copies what it loads into the tensors of the state dict.
        self.tensor = torch.zeros_like(self.expected) if self.is_loaded else self.expected

        def add(_module: torch.nn.Module, state: dict[str, Any], path: str, _: Any) -> None:
            state[path + prefix + LAYOUT] = self.tensor

        layer.register_state_dict_post_hook(add)

    def check(self) -> None:
        """Raise ValueError unless the loaded state was prepared for the same kernel."""
        if torch.equal(self.tensor, self.expected):
            return
        found = bytes(self.tensor.tolist()).rstrip(b"\0").decode(errors="replace")
        raise ValueError(
            f"{self.name}: this sharded state was saved by kernel {found!r}, and kernel "
            f"{self.kernel.name!r} is to run here. Set {KERNEL_ENV}={found}, or save the state "
            "again on such a machine."
        )


def _add_to_compile_key(config: VllmConfig, kernel: Kernel) -> None:
    """Have compiled graphs looked up by the kernels in use: vLLM hashes this dict when it looks."""
    if isinstance(config.additional_config, dict):
        kernels = {kernel.name, *config.additional_config.get(COMPILE_KEY, ())}
        config.additional_config[COMPILE_KEY] = sorted(kernels)
