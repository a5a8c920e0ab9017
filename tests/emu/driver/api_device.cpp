// api_device.cpp: initialisation, devices, contexts, errors, and the look-up of entry points by name.
//
// A context handle is the Device itself: only primary contexts exist.
#include <cstdio>
#include <cstring>
#include <dlfcn.h>

#include "state.h"

using namespace emu;

namespace {

struct Card {
    int cc;
    const char *name;
    int processors, threads_per_processor, blocks_per_processor;
    int shared_per_block, shared_per_processor; // bytes; per block: with opt-in
};
// Numbers of the cards whose architecture is asked for; sizes of memory are EMU_MEMORY's.
constexpr Card CARDS[] = {
    {80, "emulated A100", 108, 2048, 32, 166912, 167936},
    {86, "emulated RTX A6000", 84, 1536, 16, 101376, 102400},
    {89, "emulated L40S", 142, 1536, 24, 101376, 102400},
    {90, "emulated H100", 132, 2048, 32, 232448, 233472},
};

const Card &card() {
    for (const Card &c : CARDS) {
        if (c.cc == driver().settings.cc) {
            return c;
        }
    }
    return CARDS[0];
}

struct Named {
    CUresult code;
    const char *name, *text;
};
constexpr Named ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {PEER_ACCESS_UNSUPPORTED, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch"},
    {PEER_ACCESS_ALREADY_ENABLED, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"},
    {PEER_ACCESS_NOT_ENABLED, "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", "peer access has not been enabled"},
    {HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "memory is already page-locked"},
    {HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "memory is not page-locked"},
    {MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "not permitted while a stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "the capture was spoilt by an earlier error"},
    {CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "two captures would be merged"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "the capture did not begin in this stream"},
    {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "the capture has work that was not joined"},
    {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "a dependency would cross into the capture"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "the capture began in another thread"},
};

Device *device_at(CUdevice ordinal) {
    Driver &d = driver();
    return ordinal >= 0 && static_cast<std::size_t>(ordinal) < d.devices.size() ? d.devices[ordinal].get()
                                                                                : nullptr;
}

} // namespace

namespace emu {
int shared_opt_in() { return card().shared_per_block; }
int blocks_at_once(int threads, std::size_t shared) {
    const Card &c = card();
    int blocks =
        std::min(c.blocks_per_processor, c.threads_per_processor / std::max(32, (threads + 31) / 32 * 32));
    return std::min<int>(blocks, static_cast<int>(c.shared_per_processor / (shared + 1024)));
}
} // namespace emu

CUAPI cuInit(unsigned flags) {
    Driver &d = driver();
    const std::lock_guard<std::mutex> held(d.lock);
    if (flags != 0) {
        return INVALID_VALUE;
    }
    if (!d.initialised) {
        read_settings();
        d.random.state = d.settings.seed;
        for (int i = 0; i < d.settings.devices; i++) {
            d.devices.push_back(std::make_unique<Device>(i, d.settings.memory, d.settings.races));
        }
        install_fault_handler();
        d.initialised = true;
    }
    return d.devices.empty() ? NO_DEVICE : SUCCESS;
}

CUAPI cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}

CUAPI cuGetErrorName(CUresult error, const char **name) {
    for (const Named &e : ERRORS) {
        if (e.code == error) {
            *name = e.name;
            return SUCCESS;
        }
    }
    *name = nullptr;
    return INVALID_VALUE;
}

CUAPI cuGetErrorString(CUresult error, const char **text) {
    for (const Named &e : ERRORS) {
        if (e.code == error) {
            *text = e.text;
            return SUCCESS;
        }
    }
    *text = nullptr;
    return INVALID_VALUE;
}

#define KNOW()                                      \
    Driver &d = driver();                           \
    const std::lock_guard<std::mutex> held(d.lock); \
    if (!d.initialised)                             \
    return NOT_INITIALIZED

CUAPI cuDeviceGetCount(int *count) {
    KNOW();
    *count = static_cast<int>(d.devices.size());
    return SUCCESS;
}

CUAPI cuDeviceGet(CUdevice *out, int ordinal) {
    KNOW();
    if (device_at(ordinal) == nullptr) {
        return INVALID_DEVICE;
    }
    *out = ordinal;
    return SUCCESS;
}

CUAPI cuDeviceGetName(char *name, int room, CUdevice ordinal) {
    KNOW();
    if (device_at(ordinal) == nullptr || room <= 0) {
        return INVALID_DEVICE;
    }
    std::snprintf(name, static_cast<std::size_t>(room), "%s", card().name);
    return SUCCESS;
}

CUAPI cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice ordinal) {
    KNOW();
    if (device_at(ordinal) == nullptr) {
        return INVALID_DEVICE;
    }
    std::memset(uuid, 0, sizeof *uuid);
    std::memcpy(uuid->bytes, "emulated device", 15);
    uuid->bytes[15] = static_cast<char>(ordinal);
    return SUCCESS;
}
CUAPI cuDeviceGetUuid(CUuuid *uuid, CUdevice ordinal) { return cuDeviceGetUuid_v2(uuid, ordinal); }

CUAPI cuDeviceTotalMem_v2(std::size_t *bytes, CUdevice ordinal) {
    KNOW();
    Device *device = device_at(ordinal);
    if (device == nullptr) {
        return INVALID_DEVICE;
    }
    *bytes = device->memory.limit();
    return SUCCESS;
}

CUAPI cuDeviceGetAttribute(int *value, int attribute, CUdevice ordinal) {
    KNOW();
    if (device_at(ordinal) == nullptr) {
        return INVALID_DEVICE;
    }
    const Card &c = card();
    const std::map<int, int> known = {
        {1, 1024}, // threads per block
        {2, 1024},
        {3, 1024},
        {4, 64}, // block x, y, z
        {5, 0x7fffffff},
        {6, 65535},
        {7, 65535},    // grid x, y, z
        {8, 49152},    // shared bytes per block without opt-in
        {10, 32},      // warp
        {12, 65536},   // registers per block
        {13, 1410000}, // kHz
        {16, c.processors},
        {33, 0x10},
        {34, ordinal},
        {50, 0},        // PCI bus, device, domain
        {36, 1215000},  // memory, kHz
        {37, 5120},     // memory bus, bits
        {38, 40 << 20}, // L2 bytes
        {39, c.threads_per_processor},
        {40, 2}, // copy engines
        {41, 1}, // unified addressing
        {75, c.cc / 10},
        {76, c.cc % 10},
        {81, c.shared_per_processor},
        {82, 65536}, // registers per multiprocessor
        {97, c.shared_per_block},
        {106, c.blocks_per_processor},
        {111, 1024}, // shared bytes that the system keeps per block
        {120, c.cc >= 90}, // clusters of blocks
    };
    const auto found = known.find(attribute);
    *value = found == known.end() ? 0 : found->second; // what is not modelled is not supported
    return SUCCESS;
}

CUAPI cuDevicePrimaryCtxRetain(void **context, CUdevice ordinal) {
    KNOW();
    Device *device = device_at(ordinal);
    if (device == nullptr) {
        return INVALID_DEVICE;
    }
    device->retained++;
    *context = device;
    return device->sticky;
}

CUAPI cuDevicePrimaryCtxRelease_v2(CUdevice ordinal) {
    KNOW();
    Device *device = device_at(ordinal);
    if (device == nullptr || device->retained == 0) {
        return device == nullptr ? INVALID_DEVICE : INVALID_CONTEXT;
    }
    device->retained--;
    return SUCCESS;
}

CUAPI cuDevicePrimaryCtxGetState(CUdevice ordinal, unsigned *flags, int *active) {
    KNOW();
    Device *device = device_at(ordinal);
    if (device == nullptr) {
        return INVALID_DEVICE;
    }
    *flags = 0;
    *active = device->retained > 0;
    return SUCCESS;
}

CUAPI cuCtxSetCurrent(void *context) {
    KNOW();
    for (const auto &device : d.devices) {
        if (context == nullptr || device.get() == context) {
            current_device = static_cast<Device *>(context);
            return SUCCESS;
        }
    }
    return INVALID_CONTEXT;
}

CUAPI cuCtxGetCurrent(void **context) {
    KNOW();
    *context = current_device;
    return SUCCESS;
}

CUAPI cuCtxGetDevice(CUdevice *ordinal) {
    KNOW();
    if (current_device == nullptr) {
        return INVALID_CONTEXT;
    }
    *ordinal = current_device->index;
    return SUCCESS;
}

CUAPI cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER();
    if (least != nullptr) {
        *least = 0;
    }
    if (greatest != nullptr) {
        *greatest = -5;
    }
    return SUCCESS;
}

CUAPI cuCtxSynchronize() {
    ENTER();
    if (const CUresult code = d.forbid_in_capture()) {
        return code;
    }
    d.finish_device(device);
    return device->sticky;
}

CUAPI cuDeviceCanAccessPeer(int *can, CUdevice from, CUdevice to) {
    KNOW();
    if (device_at(from) == nullptr || device_at(to) == nullptr) {
        return INVALID_DEVICE;
    }
    *can = from != to && !d.settings.no_peer;
    return SUCCESS;
}

CUAPI cuCtxEnablePeerAccess(void *peer, unsigned flags) {
    ENTER();
    for (const auto &other : d.devices) {
        if (other.get() == peer && other.get() != device && flags == 0) {
            if (d.settings.no_peer) {
                return PEER_ACCESS_UNSUPPORTED;
            }
            return device->peers.insert(other.get()).second ? SUCCESS : PEER_ACCESS_ALREADY_ENABLED;
        }
    }
    return flags != 0 || peer == device ? INVALID_VALUE : INVALID_CONTEXT;
}

CUAPI cuCtxDisablePeerAccess(void *peer) {
    ENTER();
    d.finish_device(device);
    return device->peers.erase(static_cast<Device *>(peer)) != 0 ? SUCCESS : PEER_ACCESS_NOT_ENABLED;
}

// status: 0 found, 1 not found.
CUAPI cuGetProcAddress_v2(const char *symbol, void **function, int version, std::uint64_t flags,
                          int *status) {
    (void)version, (void)flags;
    Dl_info self;
    dladdr(reinterpret_cast<const void *>(&cuInit), &self);
    void *library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = nullptr;
    if (library != nullptr) {
        for (const char *suffix : {"_v2", ""}) {
            if (*function == nullptr) {
                *function = dlsym(library, (std::string(symbol) + suffix).c_str());
            }
        }
        dlclose(library);
    }
    if (status != nullptr) {
        *status = *function == nullptr;
    }
    return *function != nullptr ? SUCCESS : NOT_FOUND;
}
