# mypy: disable-error-code="no-untyped-def"
"""Signs in registers: two bits of every packed word to two tiles for the tensor cores.

A word is 16 consecutive bits of a row; bit i of word j is the sign of weight k = 16*j + i, as in
`checkpoint.signs`. A 32-bit register holds two words, so one instruction serves two weights. A
shift brings bits 2p+1 and 2p of both words to the two top bits of a 16-bit float:

    t = words << (14 - 2*p)
    odd  = (t & 0x8000) ^ 0xBC00   the sign bit of a constant:    1 -> +1.0, 0 -> -1.0
    even =  t & 0x4000             the top bit of the exponent:   1 ->  2.0, 0 ->  0.0

Both float formats give 0x4000 the value 2.0 (-1.0 is 0xBC00 in float16, 0xBF80 in bfloat16). So an
even tile is one more than its signs, and `kernels.gemm` subtracts the sum of the inputs that even
bits meet. This costs 23 instructions for 32 weights where a shift for every bit costs 31, and
Triton's own 16-bit operations cost almost twice as many.
"""

import triton
import triton.language as tl

NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)
"""False under TRITON_INTERPRET=1, which has no inline assembly and no bfloat16 arithmetic."""

SIGN_BIT = 0x8000
TWO = tl.constexpr(0x4000)
LUT_AND_XOR = 0x6A  # (a & b) ^ c, as LOP3 spells it
MINUS_ONE = {"fp16": 0xBC00, "bf16": 0xBF80}


@triton.constexpr_function
def unpack_asm(pair: int, dtype_name: str) -> str:
    """PTX that turns two words ($2) into two odd ($0) and two even ($1) floats."""
    both_words = 0x1_0001
    sign_bits, minus_ones = SIGN_BIT * both_words, MINUS_ONE[dtype_name] * both_words
    return (
        "{ .reg .b32 t; "
        f"shl.b32 t, $2, {14 - 2 * pair}; "
        f"lop3.b32 $0, t, {sign_bits:#x}, {minus_ones:#x}, {LUT_AND_XOR:#x}; "
        f"and.b32 $1, t, {TWO.value * both_words:#x}; }}"
    )


@triton.constexpr_function
def minus_one(dtype_name: str) -> int:
    """The bit pattern of -1.0 as a signed 16-bit integer."""
    return MINUS_ONE[dtype_name] - 0x1_0000


@triton.jit
def unpack_pair(words, PAIR: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Int16 words of any shape to (odd, even) in DTYPE.

    Returns:
        odd: +1 where bit 2*PAIR+1 of a word is set, else -1.
        even: 2 where bit 2*PAIR is set, else 0.
    """
    if ASM:
        # Triton does not unwrap a constexpr inside a tuple of dtypes: hence two calls.
        if DTYPE == tl.float16:
            return tl.inline_asm_elementwise(
                unpack_asm(PAIR, "fp16"),
                "=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                unpack_asm(PAIR, "bf16"),
                "=r,=r,r",
                [words],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
    else:
        t = words << (14 - 2 * PAIR)
        odd = ((t & -0x8000) ^ minus_one(DTYPE.name)).to(tl.int16)
        even = (t & TWO).to(tl.int16)
        return odd.to(DTYPE, bitcast=True), even.to(DTYPE, bitcast=True)


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
