"""What the compiler makes of the kernels for six GPU generations, read from the machine code.

Each launch that the real launcher makes on fake CUDA tensors is compiled as Triton's JIT would
compile it there. Two processes compile; a module's worth of results is shared by the tests.
"""

import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from vllm_bmos.kernels.triton import aot, configs

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiling needs a process without it"
)

PLAIN = (4096, 4096)  # K, and the outputs of each shard
LONG = (11008, 4096)  # where the router's tiles are as long as they get
MERGED = (4096, 4096, 1024, 1024)
ONE_BLOCK = (77, 1, 5)  # a single step over K, which must stay a loop
DTYPES = (torch.float16, torch.bfloat16)
WIDER = "wider"  # the slow part: bfloat16 beyond decode, other shapes
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
REGISTER_FILE = 65_536
TMEM_COLUMNS = 512
DECODE_LIMIT = 1.45  # instructions per weight and lane


def compiled(job):
    """(job, [(launch name, options, grid, Sass)]) in a worker process."""
    arch, M, dtype, (K, *shard_sizes), only, *scales = job
    E, scale_dtype = scales or (4, dtype)
    sizes = tuple(shard_sizes)
    launches = aot.layer_launches(arch, M, K, sizes, E, dtype, scale_dtype, biased=True)
    assert set(only) <= {recorded.name for recorded in launches}, (job, launches)
    return job, [
        (recorded.name, recorded.options, aot.compile_sass(recorded, arch))
        for recorded in launches
        if recorded.name in only
    ]


def jobs(wider: bool):
    gemm, large = ("gemm",), ("logits", "scale", "dequant", "finish")
    for arch in aot.ARCHS:
        tiles = configs.tiles_for(arch)
        for dtype in DTYPES:
            for tile in tiles:
                if wider == (tile.M > 16 and dtype == torch.bfloat16):
                    yield arch, tile.M, dtype, MERGED, gemm
                if wider or (arch == 86 and tile is tiles[-1]):
                    yield arch, tile.M, dtype, ONE_BLOCK, gemm
            if wider:
                yield arch, 3, dtype, (4096, 300), gemm
                yield arch, 1000, dtype, PLAIN, large
        if wider:
            yield arch, 1, torch.bfloat16, PLAIN, ("route",)
        else:
            yield arch, 1, torch.float16, PLAIN, ("route",)
            yield arch, tiles[-1].M + 500, torch.float16, PLAIN, large
    for E, scale_dtype in ((1, torch.float32), (2, torch.float32), (16, torch.float16)):
        if not wider or E == 2:
            yield 86, 1, torch.float16, LONG, ("route",), E, scale_dtype
            yield 86, 1000, torch.float16, LONG, ("logits", "scale"), E, scale_dtype


@pytest.fixture(scope="module")
def results(request):
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(compiled, jobs(wider=request.param == WIDER)))
    return [
        (f"sm_{arch} {dtype} M={M} {shape} {name}", arch, name, options, sass)
        for (arch, M, dtype, shape, *_), compiled_launches in found
        for name, options, sass in compiled_launches
    ]


both = pytest.mark.parametrize(
    "results",
    ["narrow", pytest.param(WIDER, marks=pytest.mark.slow)],
    indirect=True,
    scope="module",
)


@both
def test_every_kernel_fits_and_nothing_spills(results):
    for label, arch, _, options, sass in results:
        assert sass.spills == 0, label
        assert sass.registers <= options.get("maxnreg", 255), label
        assert sass.registers * 32 * options.get("num_warps", 4) <= REGISTER_FILE, label
        assert sass.shared <= SHARED_LIMIT[arch], label
        assert sass.tmem <= TMEM_COLUMNS, label


@both
def test_no_kernel_is_emptied_and_none_uses_atomics(results):
    """Triton 3.9 turns a kernel that needs too much tensor memory into 16 instructions."""
    for label, _, _, _, sass in results:
        assert len(sass.code) > 100, label
        assert not sass.count("BPT|TRAP"), label
        assert not sass.count("ATOM|RED"), label
        assert not re.search(r"\b(atom|red)\.", sass.ptx), label
        assert sass.count("STG") > 0, label


@both
def test_loads_are_16_bytes_wide(results):
    for label, _, name, options, sass in results:
        if name == "gemm":
            assert set(sass.loads(sass.loop)) == {"LDGSTS.E.BYPASS.128"}, label
        elif name == "route" and options["E"] <= 4:  # a thread has fewer inputs of more experts
            assert set(sass.loads()) == {"LDGSTS.E.BYPASS.128"}, label
        elif name == "dequant":
            assert set(sass.loads()) == {"LDG.E.128"}, label


@both
def test_the_tensor_cores_do_the_arithmetic(results):
    """One m16n8k16 for 256 weights and 8 tokens, fp32 sums: no more, no fewer, no others."""
    seen = set()
    for label, arch, name, options, sass in results:
        if name != "gemm":
            continue
        suffix = ".BF16" if "bfloat16" in label else ""
        BN, BM, inputs = options["BN"], options["BM"], options["BKW"] * 16
        if arch == 90 and options["num_warps"] >= 4:
            want = {f"HGMMA.64x{BM}x16.F32{suffix}": BN // 64 * inputs // 16}
        else:
            rows = BN // 16 // options["num_warps"]
            want = {f"HMMA.16816.F32{suffix}": rows * (BM // 8) * inputs // 16}
        assert dict(sass.mmas(sass.loop)) == want, label
        seen.add((arch, BM))
    assert len(seen) >= 6 * 2


@both
def test_instructions_per_weight(results):
    for label, _, name, options, sass in results:
        if name != "gemm":
            continue
        weights = options["BN"] * options["BKW"] * 16 // (32 * options["num_warps"])
        per_weight = sass.instructions_per_weight(weights)
        logic = sass.count("LOP3", sass.loop) / weights
        shifts = sass.count(r"IMAD\.SHL|SHF|USHF|SHL", sass.loop) / weights
        assert per_weight <= (DECODE_LIMIT if options["BM"] <= 16 else 2.5), (label, per_weight)
        # 16 LOP3 and 7 shifts for 32 weights, and a few for addresses.
        assert logic <= 0.52, (label, logic)
        assert shifts <= 0.36, (label, shifts)
