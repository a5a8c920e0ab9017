// api_memory.cpp: allocation, copies and fills.
//
// Ranges are checked when a copy is enqueued: INVALID_VALUE as from the driver, and on stderr which range and
// why. An asynchronous copy from pageable memory reads it at once (the driver may, or may later: do not rely
// on either); to pageable memory it waits, as the driver does; from and to page-locked memory it happens when
// its turn comes.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "plant.h"
#include "state.h"

using namespace emu;

namespace {

CUresult refuse(const std::string &why) {
    say("emulated device: bad copy or fill: " + why + "\n");
    log_line("refused", "\"why\":" + json(why));
    return INVALID_VALUE;
}

// Looks at both ends; rows of `bytes`. Fills in whose memory they are.
CUresult check(Driver &d, Place &place, std::size_t bytes, std::size_t rows, bool device, const char *end) {
    const std::size_t span = rows == 0 || bytes == 0 ? 0 : (rows - 1) * place.pitch + bytes;
    Memory *memory = d.memory_of(place.address);
    if (span == 0) {
        place.memory = memory;
        return SUCCESS;
    }
    if (!device) {
        if (memory != nullptr) {
            return refuse(std::string(end) + " is device memory, host memory was promised");
        }
        place.memory = nullptr;
        return place.address == 0 ? refuse(std::string(end) + " is a null host pointer") : SUCCESS;
    }
    if (memory == nullptr) {
        return refuse(std::string(end) + " is not device memory");
    }
    if (rows > 1 && place.pitch < bytes) {
        return refuse(std::string(end) + ": a pitch of " + std::to_string(place.pitch) + " for rows of " +
                      std::to_string(bytes));
    }
    if (memory->holding(place.address, span) == nullptr) {
        return refuse(std::string(end) + ": " + std::to_string(span) + " bytes from " +
                      memory->describe(place.address));
    }
    place.memory = memory;
    return SUCCESS;
}

CUresult copy(Driver &d, Stream *stream, Place to, bool to_device, Place from, bool from_device,
              std::size_t bytes, std::size_t rows, bool wait) {
    if (stream == nullptr) {
        return INVALID_HANDLE;
    }
    if (bytes == 0 || rows == 0) {
        return SUCCESS;
    }
    if (const CUresult code = check(d, to, bytes, rows, to_device, "the target")) {
        return code;
    }
    if (const CUresult code = check(d, from, bytes, rows, from_device, "the source")) {
        return code;
    }
    if (wait) {
        if (const CUresult code = d.forbid_in_capture()) {
            return code;
        }
    }
    Command c;
    c.kind = Command::Copy;
    c.to = to;
    c.from = from;
    c.bytes = bytes;
    c.rows = rows;
    if (!planted_upload(c)) {
        return SUCCESS;
    }
    if (!stream->capture) {
        const std::size_t from_span = (rows - 1) * from.pitch + bytes,
                          to_span = (rows - 1) * to.pitch + bytes;
        if (from.memory == nullptr && !c.staged && !wait && !d.is_pinned(from.address, from_span)) {
            c.staged = std::make_shared<std::vector<unsigned char>>(bytes * rows);
            for (std::size_t row = 0; row < rows; row++) {
                std::memcpy(c.staged->data() + row * bytes,
                            reinterpret_cast<void *>(from.address + row * from.pitch), bytes);
            }
        }
        wait = wait || (to.memory == nullptr && !d.is_pinned(to.address, to_span));
    }
    const bool lent = !stream->capture && !wait && from.memory == nullptr && !c.staged;
    if (lent) {
        d.lend(stream, c);
    }
    if (!stream->capture && !wait && to.memory == nullptr) {
        // What is there before the copy's turn is anything.
        for (std::size_t row = 0; row < rows; row++) {
            poison(reinterpret_cast<void *>(to.address + row * to.pitch), bytes);
        }
    }
    const CUresult code = d.enqueue(stream, std::move(c));
    if (code == SUCCESS && wait && !stream->capture) {
        d.finish(stream->last);
        d.waited(stream->clock);
        return stream->device->sticky;
    }
    return code;
}

Place at(CUdeviceptr address) { return Place{static_cast<std::uintptr_t>(address), 0, nullptr}; }
Place at(const void *address) { return Place{reinterpret_cast<std::uintptr_t>(address), 0, nullptr}; }

CUresult fill(Driver &d, Stream *stream, CUdeviceptr to, std::size_t pitch, unsigned value, unsigned unit,
              std::size_t count, std::size_t rows) {
    if (stream == nullptr) {
        return INVALID_HANDLE;
    }
    if (count == 0 || rows == 0) {
        return SUCCESS;
    }
    Place place{static_cast<std::uintptr_t>(to), pitch, nullptr};
    if (to % unit != 0) {
        return refuse("a fill of " + std::to_string(unit) +
                      "-byte values at an address that is no multiple of that");
    }
    if (const CUresult code = check(d, place, count * unit, rows, true, "the target")) {
        return code;
    }
    Command c;
    c.kind = Command::Fill;
    c.to = place;
    c.bytes = count * unit;
    c.rows = rows;
    c.value = value;
    c.unit = unit;
    return d.enqueue(stream, std::move(c));
}

} // namespace

// ---- allocation
// ---------------------------------------------------------------------------------------------

CUAPI cuMemGetInfo_v2(std::size_t *available, std::size_t *total) {
    ENTER();
    *total = device->memory.limit();
    *available = device->memory.limit() - device->memory.used();
    return SUCCESS;
}

static CUresult allocate(Driver &d, Device *device, CUdeviceptr *out, std::size_t bytes, bool pooled) {
    if (const CUresult code = d.forbid_in_capture()) {
        return code;
    }
    if (bytes == 0) {
        return INVALID_VALUE;
    }
    *out = planted_allocation_failure() ? 0 : device->memory.allocate(planted_bytes(bytes), pooled);
    log_line("alloc", "\"device\":" + std::to_string(device->index) + ",\"bytes\":" + std::to_string(bytes) +
                          ",\"address\":" + std::to_string(*out));
    return *out != 0 ? SUCCESS : OUT_OF_MEMORY;
}
CUAPI cuMemAlloc_v2(CUdeviceptr *out, std::size_t bytes) {
    ENTER();
    return allocate(d, device, out, bytes, false);
}
// From the device's pool, whose memory other devices cannot reach unless it says so (it never does here). Not
// ordered by the stream: it is there at once.
CUAPI cuMemAllocAsync(CUdeviceptr *out, std::size_t bytes, void *stream) {
    ENTER();
    return d.stream_of(stream) == nullptr ? INVALID_HANDLE : allocate(d, device, out, bytes, true);
}

// Waits for the whole device first, as the driver does.
CUAPI cuMemFree_v2(CUdeviceptr address) {
    ENTER();
    if (address == 0) {
        return SUCCESS;
    }
    if (const CUresult code = d.forbid_in_capture()) {
        return code;
    }
    d.finish_device(device);
    if (device->sticky != SUCCESS) {
        return device->sticky;
    }
    Memory *memory = d.memory_of(address);
    log_line("free", "\"address\":" + std::to_string(address));
    if (memory == nullptr || !memory->release(address)) {
        say("emulated device: free of an address that is not the start of a live allocation" +
            (memory != nullptr ? ": " + memory->describe(address) : std::string()) + "\n");
        return INVALID_VALUE;
    }
    return SUCCESS;
}

CUAPI cuMemHostAlloc(void **out, std::size_t bytes, unsigned flags) {
    (void)flags;
    ENTER();
    if (bytes == 0) {
        return INVALID_VALUE;
    }
    *out = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (*out == nullptr) {
        return OUT_OF_MEMORY;
    }
    poison(*out, bytes);
    d.pinned[reinterpret_cast<std::uintptr_t>(*out)] = bytes;
    log_line("host_alloc", "\"bytes\":" + std::to_string(bytes));
    return SUCCESS;
}
CUAPI cuMemAllocHost_v2(void **out, std::size_t bytes) { return cuMemHostAlloc(out, bytes, 0); }

CUAPI cuMemFreeHost(void *address) {
    ENTER();
    const auto found = d.pinned.find(reinterpret_cast<std::uintptr_t>(address));
    if (found == d.pinned.end()) {
        return INVALID_VALUE;
    }
    d.finish_device(device);
    poison(address, found->second);
    d.pinned.erase(found);
    std::free(address);
    return SUCCESS;
}

CUAPI cuMemHostRegister_v2(void *address, std::size_t bytes, unsigned flags) {
    (void)flags;
    ENTER();
    if (address == nullptr || bytes == 0) {
        return INVALID_VALUE;
    }
    const bool fresh = d.pinned.emplace(reinterpret_cast<std::uintptr_t>(address), bytes).second;
    return fresh ? SUCCESS : HOST_MEMORY_ALREADY_REGISTERED;
}
CUAPI cuMemHostRegister(void *address, std::size_t bytes, unsigned flags) {
    return cuMemHostRegister_v2(address, bytes, flags);
}

CUAPI cuMemHostUnregister(void *address) {
    ENTER();
    d.finish_device(device);
    return d.pinned.erase(reinterpret_cast<std::uintptr_t>(address)) != 0 ? SUCCESS
                                                                          : HOST_MEMORY_NOT_REGISTERED;
}

CUAPI cuPointerGetAttribute(void *value, int attribute, CUdeviceptr pointer) {
    ENTER();
    Memory *memory = d.memory_of(pointer);
    const Allocation *a = memory != nullptr ? memory->holding(pointer, 1) : nullptr;
    if (a == nullptr) {
        if (!d.is_pinned(pointer, 1)) {
            return INVALID_VALUE;
        }
        if (attribute == 2) {
            *static_cast<unsigned *>(value) = 1;
            return SUCCESS;
        }
        return attribute == 4 ? (*static_cast<void **>(value) = reinterpret_cast<void *>(pointer), SUCCESS)
                              : NOT_SUPPORTED;
    }
    switch (attribute) {
    case 1: // context
        *static_cast<void **>(value) = d.devices[memory->device()].get();
        return SUCCESS;
    case 2: // memory type: device
        *static_cast<unsigned *>(value) = 2;
        return SUCCESS;
    case 3: // device pointer
        *static_cast<CUdeviceptr *>(value) = pointer;
        return SUCCESS;
    case 7: // id of the allocation
        *static_cast<std::uint64_t *>(value) = static_cast<std::uint64_t>(a->number);
        return SUCCESS;
    case 8: // managed
        *static_cast<unsigned *>(value) = 0;
        return SUCCESS;
    case 9: // device
        *static_cast<int *>(value) = memory->device();
        return SUCCESS;
    case 11: // start of the allocation
        *static_cast<CUdeviceptr *>(value) = a->base;
        return SUCCESS;
    case 12: // its bytes
        *static_cast<std::size_t *>(value) = a->bytes;
        return SUCCESS;
    case 16: { // what the current device may do there: read and write, or nothing
        Device *owner = d.devices[memory->device()].get();
        const bool reached = device->peers.count(owner) != 0 && !a->pooled;
        *static_cast<unsigned *>(value) = owner == device || reached ? 3 : 0;
        return SUCCESS;
    }
    default:
        return NOT_SUPPORTED;
    }
}

// ---- copies
// -------------------------------------------------------------------------------------------------

CUAPI cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, std::size_t bytes) {
    ENTER();
    return copy(d, &device->legacy, at(to), true, at(from), false, bytes, 1, true);
}
CUAPI cuMemcpyDtoH_v2(void *to, CUdeviceptr from, std::size_t bytes) {
    ENTER();
    return copy(d, &device->legacy, at(to), false, at(from), true, bytes, 1, true);
}
CUAPI cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, std::size_t bytes) {
    ENTER();
    return copy(d, &device->legacy, at(to), true, at(from), true, bytes, 1, false);
}
CUAPI cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, std::size_t bytes, void *stream) {
    ENTER();
    return copy(d, d.stream_of(stream), at(to), true, at(from), false, bytes, 1, false);
}
CUAPI cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, std::size_t bytes, void *stream) {
    ENTER();
    return copy(d, d.stream_of(stream), at(to), false, at(from), true, bytes, 1, false);
}
CUAPI cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, void *stream) {
    ENTER();
    return copy(d, d.stream_of(stream), at(to), true, at(from), true, bytes, 1, false);
}
static CUresult copy_to_peer(Driver &d, Place to, void *to_context, Place from, void *from_context,
                             std::size_t bytes, std::size_t rows, void *stream) {
    for (const auto &[place, context] : {std::pair{to, to_context}, std::pair{from, from_context}}) {
        const Memory *memory = d.memory_of(place.address);
        if (memory != nullptr && d.devices[memory->device()].get() != context) {
            return refuse("a peer copy names another device's context for its address");
        }
    }
    return copy(d, d.stream_of(stream), to, true, from, true, bytes, rows, false);
}
CUAPI cuMemcpyPeerAsync(CUdeviceptr to, void *to_context, CUdeviceptr from, void *from_context,
                        std::size_t bytes, void *stream) {
    ENTER();
    return copy_to_peer(d, at(to), to_context, at(from), from_context, bytes, 1, stream);
}
CUAPI cuMemcpy3DPeerAsync(const CUDA_MEMCPY3D_PEER *c, void *stream) {
    ENTER();
    const bool plain = c->srcZ == 0 && c->dstZ == 0 && c->srcLOD == 0 && c->dstLOD == 0 && c->Depth == 1;
    if (!plain || c->srcMemoryType != 2 || c->dstMemoryType != 2) {
        return NOT_SUPPORTED;
    }
    if (c->srcPitch < c->WidthInBytes || c->dstPitch < c->WidthInBytes) {
        return refuse("a pitch below the width of a row");
    }
    Place from = at(c->srcDevice), to = at(c->dstDevice);
    from.pitch = c->srcPitch;
    to.pitch = c->dstPitch;
    from.address += c->srcY * from.pitch + c->srcXInBytes;
    to.address += c->dstY * to.pitch + c->dstXInBytes;
    return copy_to_peer(d, to, c->dstContext, from, c->srcContext, c->WidthInBytes, c->Height, stream);
}

static CUresult copy_2d(const CUDA_MEMCPY2D *c, void *handle, bool wait) {
    ENTER();
    for (const int type : {c->srcMemoryType, c->dstMemoryType}) {
        if (type != 1 && type != 2) {
            return NOT_SUPPORTED;
        }
    }
    Place from = c->srcMemoryType == 2 ? at(c->srcDevice) : at(c->srcHost);
    Place to = c->dstMemoryType == 2 ? at(c->dstDevice) : at(c->dstHost);
    from.pitch = c->srcPitch != 0 ? c->srcPitch : c->WidthInBytes;
    to.pitch = c->dstPitch != 0 ? c->dstPitch : c->WidthInBytes;
    from.address += c->srcY * from.pitch + c->srcXInBytes;
    to.address += c->dstY * to.pitch + c->dstXInBytes;
    Stream *stream = wait ? &device->legacy : d.stream_of(handle);
    return copy(d, stream, to, c->dstMemoryType == 2, from, c->srcMemoryType == 2, c->WidthInBytes, c->Height,
                wait);
}
CUAPI cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *c, void *stream) { return copy_2d(c, stream, false); }
CUAPI cuMemcpy2D_v2(const CUDA_MEMCPY2D *c) { return copy_2d(c, nullptr, true); }

// ---- fills
// --------------------------------------------------------------------------------------------------

CUAPI cuMemsetD8Async(CUdeviceptr to, unsigned char value, std::size_t count, void *stream) {
    ENTER();
    return fill(d, d.stream_of(stream), to, 0, value, 1, count, 1);
}
CUAPI cuMemsetD16Async(CUdeviceptr to, unsigned short value, std::size_t count, void *stream) {
    ENTER();
    return fill(d, d.stream_of(stream), to, 0, value, 2, count, 1);
}
CUAPI cuMemsetD32Async(CUdeviceptr to, unsigned value, std::size_t count, void *stream) {
    ENTER();
    return fill(d, d.stream_of(stream), to, 0, value, 4, count, 1);
}
CUAPI cuMemsetD8_v2(CUdeviceptr to, unsigned char value, std::size_t count) {
    ENTER();
    return fill(d, &device->legacy, to, 0, value, 1, count, 1);
}
CUAPI cuMemsetD16_v2(CUdeviceptr to, unsigned short value, std::size_t count) {
    ENTER();
    return fill(d, &device->legacy, to, 0, value, 2, count, 1);
}
CUAPI cuMemsetD32_v2(CUdeviceptr to, unsigned value, std::size_t count) {
    ENTER();
    return fill(d, &device->legacy, to, 0, value, 4, count, 1);
}
CUAPI cuMemsetD2D8Async(CUdeviceptr to, std::size_t pitch, unsigned char value, std::size_t width,
                        std::size_t rows, void *stream) {
    ENTER();
    return fill(d, d.stream_of(stream), to, pitch, value, 1, width, rows);
}
CUAPI cuMemsetD2D16Async(CUdeviceptr to, std::size_t pitch, unsigned short value, std::size_t width,
                         std::size_t rows, void *stream) {
    ENTER();
    return fill(d, d.stream_of(stream), to, pitch, value, 2, width, rows);
}
