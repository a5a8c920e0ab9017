// bulk.cpp: maps of tensors, and the copies that follow them. See async.h and tensor_map.h.
#include <algorithm>
#include <cstring>
#include <string>

#include "async.h"
#include "memory.h"
#include "tensor_map.h"

#define CALLER __builtin_return_address(0)

namespace emu {

const char *encode_tensor_map(void *to, int rank, std::uint64_t address, const std::uint64_t *dims,
                              const std::uint64_t *strides, const std::uint32_t *box, bool swizzle_128) {
    if (rank < 1 || rank > 5) {
        return "a rank of 1 to 5";
    }
    if (reinterpret_cast<std::uintptr_t>(to) % 64 != 0) {
        return "a map at a multiple of 64";
    }
    if (address % 16 != 0) {
        return "an address that is a multiple of 16";
    }
    EncodedMap map{};
    map.magic = TENSOR_MAP_MAGIC;
    map.rank = static_cast<std::uint32_t>(rank);
    map.swizzle_128 = swizzle_128;
    map.element_bytes = 2;
    map.address = address;
    for (int i = 0; i < rank; i++) {
        if (dims[i] == 0 || dims[i] > std::uint64_t{1} << 32) {
            return "sizes of 1 to 2^32";
        }
        if (box[i] == 0 || box[i] > 256) {
            return "box sizes of 1 to 256";
        }
        if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= std::uint64_t{1} << 40)) {
            return "strides that are multiples of 16 below 2^40";
        }
        if (i > 1 && (strides[i - 2] == 0 ? strides[i - 1] != 0 : strides[i - 1] % strides[i - 2] != 0)) {
            return "strides that are multiples of the one before";
        }
        map.last[i] = static_cast<std::uint32_t>(dims[i] - 1);
        map.box[i] = static_cast<std::uint16_t>(box[i]);
        if (i > 0) {
            map.strides[i - 1] = strides[i - 1];
        }
    }
    if (box[0] * 2 % 16 != 0) {
        return "rows of the box that are multiples of 16 bytes";
    }
    if (swizzle_128 && box[0] * 2 > 128) {
        return "rows of the box of at most 128 bytes with the 128-byte swizzle";
    }
    std::memcpy(to, &map, sizeof map);
    return nullptr;
}

void tma_prefetch(const void *map) {
    if (reinterpret_cast<std::uintptr_t>(map) % 64 != 0) {
        hot.executor->fail(716, "misaligned address", "a tensor map at no multiple of 64", CALLER);
    }
}

namespace {

// A copy of a box whose first element is at `corner`, of as many dimensions as the call names.
// Into the blocks whose bits are in the mask.
void load_box(void *to_shared, const void *opaque, const std::int64_t (&corner)[3], unsigned rank, void *mbarrier,
              const void *pc, unsigned mask) {
    Async &a = async();
    Executor &ex = a.ex;
    Async *blocks[MAX_CLUSTER];
    unsigned count = 0;
    for (unsigned r = 0; mask >> r != 0; r++) {
        if ((mask >> r & 1) != 0) {
            blocks[count] = &block_of_cluster(r, "a bulk copy goes to", pc);
            count++;
        }
    }
    EncodedMap map;
    std::memcpy(&map, opaque, sizeof map);
    if (map.magic != TENSOR_MAP_MAGIC || reinterpret_cast<std::uintptr_t>(opaque) % 64 != 0) {
        ex.fail(719, "no tensor map", "what is no map of the driver's, or at no multiple of 64", pc);
    }
    if (map.rank != rank) {
        ex.fail(719, "no tensor map",
                "a map of " + std::to_string(map.rank) + " dimensions for a copy of " + std::to_string(rank), pc);
    }
    const auto to = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(to_shared) - hot.shared);
    if (shared_address(to_shared) % (map.swizzle_128 ? 1024 : 128) != 0) {
        ex.fail(716, "misaligned address",
                "a bulk copy to " + byte(to) + ": tiles begin at multiples of 128, of 1024 with the swizzle", pc);
    }
    unsigned counters[MAX_CLUSTER];
    for (unsigned i = 0; i < count; i++) {
        if (!blocks[i]->find(mbarrier, pc, &counters[i]).fenced) {
            ex.fail(719, "missing proxy fence",
                    "a bulk copy counts at an mbarrier" + blocks[i]->ex.whose() +
                        " that no fence_mbarrier_init followed",
                    pc);
        }
    }
    BulkCopy copy{{}, to, 0, hot.self->waited, pc};
    const unsigned row_bytes = map.box[0] * 2u, planes = rank > 2 ? map.box[2] : 1, rows = map.box[1] * planes;
    copy.bytes.resize(row_bytes * rows);
    if (map.swizzle_128 && copy.bytes.size() % 128 != 0) {
        ex.fail(719, "no tensor map", "the emulated device swizzles boxes of whole 128 bytes", pc);
    }
    for (unsigned i = 0; i < count; i++) {
        for (unsigned g = to / 16; g < (to + copy.bytes.size()) / 16; g++) {
            blocks[i]->check_write(g, pc);
        }
    }
    const std::int64_t x = corner[0], width = std::int64_t{map.last[0]} + 1;
    const std::int64_t from = std::max<std::int64_t>(x, 0), end = std::min(x + map.box[0], width);
    for (unsigned r = 0; r < rows; r++) {
        const std::int64_t y = corner[1] + r % map.box[1], z = corner[2] + r / map.box[1];
        if (y < 0 || y > std::int64_t{map.last[1]} || z < 0 || (rank > 2 && z > std::int64_t{map.last[2]}) ||
            from >= end) {
            continue; // zeros
        }
        const auto row = static_cast<std::uint64_t>(y) * map.strides[0] +
                         (rank > 2 ? static_cast<std::uint64_t>(z) * map.strides[1] : 0);
        const auto *source = reinterpret_cast<const unsigned char *>(map.address) + row + from * 2;
        const std::size_t bytes = static_cast<std::size_t>(end - from) * 2;
        check_global(source, static_cast<int>(bytes), 2, Access::Read, pc);
        std::memcpy(&copy.bytes[r * row_bytes + static_cast<std::size_t>(from - x) * 2], source, bytes);
    }
    if (map.swizzle_128) { // the 16 bytes c of a row of 128 lie at c ^ row % 8, by the address's own bits
        std::vector<unsigned char> plain = copy.bytes;
        for (unsigned at = 0; at < copy.bytes.size(); at += 16) {
            std::memcpy(&copy.bytes[at ^ (at >> 7 & 7) << 4], &plain[at], 16);
        }
    }
    for (unsigned i = 0; i < count; i++) {
        Async &there = *blocks[i];
        for (unsigned g = to / 16; g < (to + copy.bytes.size()) / 16; g++) {
            there.flags(g) |= BULK;
        }
        poison(there.ex.shared + to, copy.bytes.size());
        there.last_copy = pc;
        copy.mbarrier = counters[i];
        there.copies.push_back(i + 1 < count ? copy : std::move(copy));
    }
    a.maybe_progress();
}

} // namespace

void tma_load_2d(void *to_shared, const void *map, int x, int y, void *mbarrier) {
    load_box(to_shared, map, {x, y, 0}, 2, mbarrier, CALLER, 1u << hot.executor->rank);
}
void tma_load_3d(void *to_shared, const void *map, int x, int y, int z, void *mbarrier) {
    load_box(to_shared, map, {x, y, z}, 3, mbarrier, CALLER, 1u << hot.executor->rank);
}
void tma_load_2d_multicast(void *to_shared, const void *map, int x, int y, void *mbarrier, unsigned mask) {
    load_box(to_shared, map, {x, y, 0}, 2, mbarrier, CALLER, mask);
}

bool Async::progress() {
    const unsigned from = ex.cluster > 1 ? ex.random.below(ex.cluster) : 0;
    for (unsigned i = 0; i < ex.cluster; i++) {
        if (ex.blocks[(from + i) % ex.cluster]->async->land()) {
            return true;
        }
    }
    return false;
}

bool Async::land() {
    if (!used || copies.empty()) {
        return false;
    }
    const std::size_t which = ex.random.below(static_cast<unsigned>(copies.size()));
    BulkCopy &copy = copies[which];
    Phases &b = mbarriers[copy.mbarrier];
    std::memcpy(ex.shared + copy.to, copy.bytes.data(), copy.bytes.size());
    for (unsigned g = copy.to / 16; g < (copy.to + copy.bytes.size()) / 16; g++) {
        flags(g) = static_cast<unsigned char>((flags(g) & ~BULK) | LANDED);
        landed_by[g] = copy.mbarrier;
        landed_phase[g] = b.phase;
    }
    b.bytes -= static_cast<std::int64_t>(copy.bytes.size());
    b.filled = b.phase + 1;
    b.coming_waited |= copy.waited;
    copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(which));
    turn(b);
    return true;
}

void Async::maybe_progress() {
    if (ex.random.below(4) == 0) {
        progress();
    }
}

} // namespace emu
