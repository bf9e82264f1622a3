"""The vLLM versions this plugin is made for, and what happens with another one."""

from typing import Any

from packaging.version import Version

# vLLM's quantization API is not frozen, so a version that was never run is refused, not tried.
MIN_VLLM = "0.28.0"
MAX_VLLM = "0.33.0"  # exclusive
MIN_VLLM_CPU_MOE = "0.30.0"  # the first with a token router (CPURouter) that a plugin can use there


def _installed() -> str:
    import vllm

    return str(vllm.__version__)


def _release(version: str) -> Version:
    """Without what marks a candidate or a build."""
    return Version(Version(version).base_version)


def unsupported_vllm(found: str | None = None) -> str | None:
    """Why the installed vLLM cannot be used, in one sentence, or None if it can."""
    found = found or _installed()
    if Version(MIN_VLLM) <= _release(found) < Version(MAX_VLLM):
        return None
    return (
        f"vllm-bmos supports vLLM >={MIN_VLLM},<{MAX_VLLM} and found vLLM {found}; install a "
        "vLLM of that range, or a vllm-bmos made for yours."
    )


def unsupported_cpu_moe(found: str | None = None) -> str | None:
    """Why the installed vLLM cannot run packed feed-forward experts on a CPU, or None if it can."""
    found = found or _installed()
    if _release(found) >= Version(MIN_VLLM_CPU_MOE):
        return None
    return (
        f"on a CPU, quantized feed-forward experts need vLLM >={MIN_VLLM_CPU_MOE}, whose token "
        f"router a plugin can use, and found vLLM {found}; install a newer vLLM."
    )


def refusing_config(reason: str) -> type:
    """A quantization config class that raises `reason` when a model asks for it."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class UnsupportedVllm(QuantizationConfig):
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
            raise ValueError(reason)

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @classmethod
        def get_supported_act_dtypes(cls) -> list[Any]:
            return []

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def get_name(cls) -> Any:
            raise ValueError(reason)

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            raise ValueError(reason)

    return UnsupportedVllm
