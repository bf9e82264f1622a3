"""What bounds one launch of a GPU kernel: its machine code and the makers' published rates.

A launch takes as long as its busiest resource: DRAM bytes, instruction issue, the integer pipes,
the tensor cores, or the chain of dependent tensor-core instructions, on the multiprocessor that
gets most programs, after one DRAM latency. ASSUMED holds what makers do not publish.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from vllm_bmos.kernels.triton import aot, launch

E = 4
SCALE_BYTES = 2
ACTIVATION_BYTES = 2
MMA_FLOPS = {"HMMA": 2 * 16 * 8 * 16}
ASSUMED = {
    "dram_efficiency": 0.92,  # of the published bandwidth
    "vendor_gemm_efficiency": 0.8,  # of the published tensor-core rate
    "dram_latency_us": 0.6,  # from a kernel's start to its first data
    "launch_us": 1.0,  # from one kernel's end to the next one's start, inside a CUDA graph
    "mma_latency_cycles": 33,  # of dependent tensor-core instructions
    "l2_bytes_per_cycle": 64,  # into one multiprocessor
}
# Integer instructions run on 16 lanes of a scheduler: two cycles each (CUDA programming guide).
LOGIC_PIPE = r"LOP3|ISETP|SEL|IADD|VIADD|SHF|LEA|PLOP3|PRMT|MOV"
MULTIPLY_PIPE = r"IMAD|FFMA|FMUL|FADD"
SCHEDULERS = 4


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU.

    Attributes:
        arch: compute capability without its dot.
        sms: multiprocessors.
        ghz: boost clock.
        dram_gbs: memory bandwidth in GB/s.
        tflops: dense float16 products with float32 sums, in TFLOP/s.
        shared: bytes of shared memory of a multiprocessor.
    """

    arch: int
    sms: int
    ghz: float
    dram_gbs: float
    tflops: float
    shared: int


GPUS = {
    "RTX A6000": Gpu(86, 84, 1.80, 768, 154.8, 100 << 10),
    "RTX 4090": Gpu(89, 128, 2.52, 1008, 165.2, 100 << 10),
    "A100-80 SXM": Gpu(80, 108, 1.41, 2039, 312.0, 164 << 10),
    "H100 SXM": Gpu(90, 132, 1.83, 3350, 989.4, 228 << 10),
}
# By the driver's name, also those that are only compared with a measurement.
DRIVER_NAMES = {
    "NVIDIA H100 80GB HBM3": GPUS["H100 SXM"],
    "NVIDIA H200": replace(GPUS["H100 SXM"], dram_gbs=4800),
}


@dataclass(frozen=True)
class Shape:
    """One linear layer call."""

    K: int
    N: int
    M: int

    @property
    def sign_bytes(self) -> float:
        """The packed signs."""
        return self.K * self.N / 8

    @property
    def scale_bytes(self) -> int:
        """In-scales, router and out-scales."""
        return SCALE_BYTES * E * (2 * self.K + self.N)

    @property
    def activation_bytes(self) -> int:
        """The layer's x and y."""
        return ACTIVATION_BYTES * self.M * (self.K + self.N)


def part_of(recorded: aot.Launch, shape: Shape) -> Shape:
    """The part of the layer that a launch computes: the large path goes by parts of N."""
    if recorded.name == "dequant":
        return replace(shape, N=recorded.grid[0] * recorded.options["BN"])
    if recorded.name == "finish":
        return replace(shape, N=recorded.args[8])
    return shape


def memory_roof_us(gpu: Gpu, shape: Shape) -> float:
    """The layer's bytes at the published bandwidth."""
    total = shape.sign_bytes + shape.scale_bytes + shape.activation_bytes
    return total / gpu.dram_gbs / 1e3


def flops_us(gpu: Gpu, shape: Shape, efficiency: float) -> float:
    """The product at a part of the published tensor-core rate."""
    return 2 * shape.M * shape.N * shape.K / gpu.tflops / 1e6 / efficiency


def vendor_gemm_us(gpu: Gpu, shape: Shape) -> float:
    """A dense float16 GEMM."""
    bytes_moved = 2 * shape.N * shape.K + shape.activation_bytes
    dram = bytes_moved / gpu.dram_gbs / 1e3 / ASSUMED["dram_efficiency"]
    busy = flops_us(gpu, shape, ASSUMED["vendor_gemm_efficiency"])
    return max(dram, busy) + ASSUMED["dram_latency_us"]


def predict(recorded: aot.Launch, gpu: Gpu, shape: Shape) -> dict[str, Any]:
    """The time of one launch and the resource that bounds it."""
    sass = aot.compile_sass(recorded, gpu.arch)
    warps = recorded.options.get("num_warps", 4)
    programs = math.prod(recorded.grid)
    resident = min(gpu.shared // (sass.shared + 1024), 65536 // (sass.registers * 32 * warps), 16)
    on_busiest = -(-programs // gpu.sms)
    shape = part_of(recorded, shape)
    bounds = {"DRAM": dram_bytes(recorded.name, shape) / gpu.dram_gbs / 1e3}
    bounds["DRAM"] /= ASSUMED["dram_efficiency"]
    latencies = 1.0
    facts: dict[str, Any] = {}
    if recorded.name == "gemm":
        BKW = recorded.options["BKW"]
        steps = -(-launch.round_up(shape.K, 128) // 16 // BKW)
        warps_on_scheduler = max(1, -(-on_busiest * warps // SCHEDULERS))
        cycles = warps_on_scheduler * steps
        tensor = sum(
            count * mma_cycles(opcode, gpu, recorded.options["BM"])
            for opcode, count in sass.mmas(sass.loop).items()
        )
        chain = sass.count("HMMA", sass.loop) / independent_mmas(recorded.options)
        chain *= ASSUMED["mma_latency_cycles"] * steps * -(-on_busiest // max(1, resident))
        clock = gpu.ghz * 1e3
        bounds |= {
            "issue": len(sass.loop) * cycles / clock,
            "logic": 2 * sass.count(LOGIC_PIPE, sass.loop) * cycles / clock,
            "L2": on_busiest * program_bytes(recorded.options, shape) / l2_rate(gpu),
            "multiply": 2 * sass.count(MULTIPLY_PIPE, sass.loop) * cycles / clock,
            "tensor": tensor * cycles / clock,
            "chain": chain / clock,
        }
        weights = recorded.options["BN"] * BKW * 16 / (32 * warps)
        facts["instructions_per_weight"] = sass.instructions_per_weight(weights)
        facts["registers"] = sass.registers
        facts["programs_per_sm"] = [on_busiest, resident]
    elif recorded.name == "route":
        # The gates stand between its two passes over K; each starts with nothing in flight.
        latencies = 2.0 * -(-on_busiest // max(1, resident))
        per_program = 2 * E * SCALE_BYTES * shape.K
        bounds["L2"] = on_busiest * per_program / l2_rate(gpu)
    elif recorded.name == "logits":  # a program reads its tokens' x and one expert's router
        per_program = (recorded.options["BT"] * ACTIVATION_BYTES + SCALE_BYTES) * shape.K
        bounds["L2"] = on_busiest * per_program / l2_rate(gpu)
    bound = max(bounds, key=lambda key: bounds[key])
    return {
        "kernel": recorded.name,
        "us": bounds[bound] + latencies * ASSUMED["dram_latency_us"],
        "bound": bound,
        "bounds_us": rounded(bounds),
        **rounded(facts),
    }


def dram_bytes(kernel: str, shape: Shape) -> float:
    """Bytes that a kernel moves; what one kernel leaves for the next is counted in both."""
    scaled = ACTIVATION_BYTES * shape.M * shape.K
    result = ACTIVATION_BYTES * shape.M * shape.N
    return {
        "route": 2 * scaled + 2 * E * SCALE_BYTES * shape.K,
        "logits": scaled + E * SCALE_BYTES * shape.K,
        "scale": 2 * scaled + E * SCALE_BYTES * shape.K,
        "gemm": shape.sign_bytes + scaled + result + SCALE_BYTES * E * shape.N,
        "dequant": shape.sign_bytes + 2.0 * shape.N * shape.K,
        "finish": 2.0 * result + SCALE_BYTES * E * shape.N,
    }[kernel]


def program_bytes(options: dict[str, Any], shape: Shape) -> float:
    """Bytes that one program of `gemm` reads through the L2 cache."""
    tokens = min(shape.M, options["BM"])
    return options["BN"] * shape.K / 8 + ACTIVATION_BYTES * tokens * shape.K


def l2_rate(gpu: Gpu) -> float:
    """Bytes in a microsecond from the L2 cache into one multiprocessor."""
    return ASSUMED["l2_bytes_per_cycle"] * gpu.ghz * 1e3


def mma_cycles(opcode: str, gpu: Gpu, BM: int) -> float:
    """Cycles that a tensor-core instruction of one warp occupies its scheduler's tensor core."""
    flops = MMA_FLOPS["HMMA"] if opcode.startswith("HMMA") else 2 * 64 * BM * 16 / 4
    return flops * gpu.sms * SCHEDULERS * gpu.ghz * 1e9 / (gpu.tflops * 1e12)


def independent_mmas(options: dict[str, Any]) -> int:
    """Chains of dependent MMAs in a warp: its tiles of 16 by 8, times the accumulators."""
    return options["BN"] // (16 * options["num_warps"]) * (options["BM"] // 8) * options["NACC"]


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Three decimals are more than a model has."""
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
