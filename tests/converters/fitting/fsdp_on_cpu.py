"""The converter where accelerate takes a CPU for a device that FSDP serves, as torch's FSDP does.

torchrun ... fsdp_on_cpu.py SRC DST --fsdp ...
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from converters import arguments, hf_to_bmos

as_released = AcceleratorState.__init__


def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **rest: Any) -> None:
    """What accelerate does with the plugin on a GPU."""
    as_released(self, *args, fsdp_plugin=fsdp_plugin, **rest)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = with_fsdp
    arguments.has_gpu = lambda: True
    sys.exit(hf_to_bmos.main())
