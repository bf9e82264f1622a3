"""The PTX that unpacks signs, on every word, by a small model of its three instructions."""

import re

import numpy as np
import pytest

from vllm_bmos.kernels.triton.signs import unpack_asm

FLOATS = {
    "fp16": lambda bits: bits.view(np.float16).astype(np.float32),
    "bf16": lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
}


def lop3(a, b, c, lut):
    """LOP3 as PTX defines it: bit (4a + 2b + c) of the table, for every bit position."""
    result = np.zeros_like(a)
    for index in range(8):
        if lut >> index & 1:
            a_term = a if index & 4 else ~a
            b_term = b if index & 2 else ~b
            c_term = c if index & 1 else ~c
            result |= a_term & b_term & c_term
    return result


def execute(asm, word):
    """Run the assembly on uint32 registers: $0 and $1 are outputs, $2 is the input."""
    registers = {"$2": word}

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    body = re.fullmatch(r"\{ \.reg \.b32 t; (.*) \}", asm)[1]
    for statement in filter(None, map(str.strip, body.split(";"))):
        opcode, operands = statement.split(None, 1)
        target, *sources = [operand.strip() for operand in operands.split(",")]
        values = [np.broadcast_to(value(source), word.shape) for source in sources]
        match opcode:
            case "shl.b32":
                registers[target] = values[0] << values[1]
            case "and.b32":
                registers[target] = values[0] & values[1]
            case "lop3.b32":
                registers[target] = lop3(*values[:3], int(sources[3], 0))
            case _:
                raise AssertionError(f"unknown instruction {opcode}")
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pair", range(8))
@pytest.mark.parametrize("other", [0x0000, 0xFFFF, 0x5A5A])
def test_all_words_in_both_halves(pair, dtype, other):
    """All 65,536 words, in the low and the high half, whatever the other half holds."""
    words = np.arange(2**16, dtype=np.uint32)
    want_odd = 2.0 * (words >> (2 * pair + 1) & 1) - 1.0
    want_even = 2.0 * (words >> (2 * pair) & 1)
    for half in (0, 1):
        register = words << (16 * half) | np.uint32(other << (16 * (1 - half)))
        for found, want in zip(
            execute(unpack_asm(pair, dtype), register), (want_odd, want_even), strict=True
        ):
            half_bits = (found >> (16 * half)).astype(np.uint16)
            assert np.array_equal(FLOATS[dtype](half_bits), want)
