// tensor_map.h: what the emulated driver writes into the 128 bytes of a CUtensorMap, and bulk copies read there.
#pragma once

#include <cstdint>

namespace emu {

constexpr std::uint32_t TENSOR_MAP_MAGIC = 0x7e4a6d00;

struct EncodedMap {
    std::uint32_t magic, rank, swizzle_128, element_bytes;
    std::uint64_t address;
    std::uint64_t strides[4]; // bytes, of dimensions 1..5
    std::uint32_t last[5];    // the last coordinate of each dimension
    std::uint16_t box[5];
    unsigned char rest[42];
};
static_assert(sizeof(EncodedMap) == 128, "the driver's size");

// Of fp16, each element, zeros outside (bulk.cpp). Null, or in words what the driver would want instead.
const char *encode_tensor_map(void *to, int rank, std::uint64_t address, const std::uint64_t *dims,
                              const std::uint64_t *strides, const std::uint32_t *box, bool swizzle_128);

} // namespace emu
