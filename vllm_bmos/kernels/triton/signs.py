# mypy: disable-error-code="no-untyped-def"
"""Signs in registers: one bit plane of packed words to a tile of -1 and +1 for the tensor cores.

A word is 16 consecutive bits of a row, bit i of word j being the sign of weight k = 16*j + i, as in
`checkpoint.signs`. Two instructions unpack two weights: a 32-bit register holds two words, a shift
brings bit i of both to the sign position of two 16-bit floats, and one LOP3 keeps those two bits
and flips them into a constant -1.0:

    t = words << (15 - i);  floats = (t & 0x80008000) ^ MINUS_ONE_TWICE

so that a set bit flips -1.0 to +1.0. Bits that the shift moves from the low word into the high one
are masked away. Triton's own 16-bit operations cost 1.8 times the instructions.
"""

import triton
import triton.language as tl

NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)
"""False under TRITON_INTERPRET=1, which has no inline assembly and no bfloat16 arithmetic."""

KEEP_SIGNS = 0x8000_8000
LUT_AND_XOR = 0x6A  # (a & b) ^ c, as LOP3 spells it
MINUS_ONE = {"fp16": 0xBC00, "bf16": 0xBF80}


@triton.constexpr_function
def unpack_asm(bit: int, dtype_name: str) -> str:
    """PTX that turns two packed words ($1) into two floats ($0), each the sign of bit `bit`."""
    twice = MINUS_ONE[dtype_name] * 0x1_0001
    return (
        "{ .reg .b32 t; "
        f"shl.b32 t, $1, {15 - bit}; "
        f"lop3.b32 $0, t, {KEEP_SIGNS:#x}, {twice:#x}, {LUT_AND_XOR:#x}; }}"
    )


@triton.constexpr_function
def minus_one(dtype_name: str) -> int:
    """The bit pattern of -1.0 as a signed 16-bit integer."""
    return MINUS_ONE[dtype_name] - 0x1_0000


@triton.jit
def unpack(words, BIT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Int16 words of any shape to DTYPE: +1 where bit BIT is set, else -1."""
    if ASM:
        # A dtype argument that is itself a constexpr is not unwrapped by Triton: hence two calls.
        if DTYPE == tl.float16:
            return tl.inline_asm_elementwise(
                unpack_asm(BIT, "fp16"), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                unpack_asm(BIT, "bf16"), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
            )
    else:
        signs = (words << (15 - BIT)) & -0x8000
        return (signs ^ minus_one(DTYPE.name)).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def dot(a, b, accumulator):
    """Add a @ b to a float32 accumulator, with exact products."""
    if NATIVE:
        return tl.dot(a, b, accumulator)
    else:  # the interpreter multiplies bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """Float32 to DTYPE, to nearest even."""
    if NATIVE or DTYPE != tl.bfloat16:
        return value.to(DTYPE)
    else:  # the interpreter truncates
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
