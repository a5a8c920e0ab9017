"""Exact arithmetic on the bits of fp16, bf16 and f32, with Python's own numbers alone."""

import struct
from fractions import Fraction

F32 = (24, -149)  # digits of a significand; exponent of the least subnormal
F16 = (11, -24)
LEAST = 2.0**-149
NORMAL = 2.0**-126  # the least f32 that is not subnormal


def unpack(form, data):
    """`unpack("I", ...)`: every number of that form, little-endian."""
    return struct.unpack("<%d%s" % (len(data) // struct.calcsize("<" + form), form), data)


def pack(form, values):
    values = list(values)
    return struct.pack("<%d%s" % (len(values), form), *values)


def f32(bits):
    """The f32 of these bits, as Python's float; exact."""
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def f32_bits(value):
    """Bits of a float that an f32 holds exactly."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def f16(bits):
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def nearest(value, form, negative=None):
    """Bits of the f32 or fp16 nearest to an exact number, ties to even; what overflows becomes infinity."""
    digits, least = form
    value = Fraction(value)
    negative = value < 0 if negative is None else negative
    top = 1 << (16 if form is F16 else 32) - 1  # the sign's bit
    size, bits = abs(value), 0
    if size:
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        exponent -= size < Fraction(2) ** exponent
        unit = max(exponent - digits + 1, least)
        whole = round(size / Fraction(2) ** unit)  # Python rounds ties to even
        bits = (unit - least << digits - 1) + whole  # a carry runs into the exponent, as it should
    infinity = top - (1 << digits - 1)
    return min(bits, infinity) | (top if negative else 0)


def is_nan(bits, form):
    digits = form[0]
    top = 1 << (16 if form is F16 else 32) - 1
    return bits & top - 1 > top - (1 << digits - 1)


def ulp(value):
    """The distance between f32 numbers at this size."""
    bits = f32_bits(abs(value)) if abs(value) < 3.4e38 else 0x7F7FFFFF
    return max(f32(bits + 1) - f32(bits), LEAST) if bits < 0x7F7FFFFF else 2.0**104


class Noise:
    """SplitMix64: the same numbers on every machine and Python."""

    def __init__(self, seed):
        self.state = seed

    def bits(self, count=64):
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return (z ^ z >> 31) >> 64 - count

    def below(self, count):
        return self.bits(32) * count >> 32

    def uniform(self, low, high):
        return low + (high - low) * self.bits(53) * 2.0**-53

    def words(self, count):
        return [self.bits(32) for _ in range(count)]

    def bytes(self, count):
        return pack("Q", (self.bits() for _ in range(-(-count // 8))))[:count]
