// api_kernel.cpp: modules, functions, launches, maps of tensors.
//
// A module is any image that looks like one; its functions are found by name among the kernels compiled into
// this library.
#include <cstring>

#include "../tensor_map.h"
#include "plant.h"
#include "state.h"

using namespace emu;

namespace emu {
int shared_opt_in();
int blocks_at_once(int threads, std::size_t shared);
} // namespace emu

namespace {

constexpr std::size_t WITHOUT_OPT_IN = 49152; // bytes of dynamic shared memory

Function *function_of(Driver &d, void *handle) {
    for (Module *module : d.modules) {
        for (const auto &entry : module->functions) {
            if (entry.second.get() == handle) {
                return entry.second.get();
            }
        }
    }
    return nullptr;
}

CUresult refuse(const std::string &why, CUresult code = INVALID_VALUE) {
    say("emulated device: bad launch: " + why + "\n");
    log_line("refused", "\"why\":" + json(why));
    return code;
}

struct Attributes {
    bool programmatic = false;
    Dim cluster;
};

// What a launch asks for beside its sizes; what the emulated device does not know is refused.
CUresult read_attributes(const Driver &d, const CUlaunchConfig &config, Attributes &to) {
    if (config.attrs == nullptr && config.numAttrs != 0) {
        return refuse("attributes that are a null pointer");
    }
    for (unsigned i = 0; i < config.numAttrs; i++) {
        const CUlaunchAttribute &attribute = config.attrs[i];
        const auto &[x, y, z] = attribute.value.clusterDim;
        switch (attribute.id) {
        case 0:
            break;
        case 4:
            if (x == 0 || y == 0 || z == 0 || config.gridDimX % x != 0 || config.gridDimY % y != 0 ||
                config.gridDimZ % z != 0) {
                return refuse("clusters that do not divide the grid");
            }
            to.cluster = Dim{x, y, z};
            break;
        case 6:
            to.programmatic = attribute.value.programmaticStreamSerializationAllowed != 0;
            break;
        default:
            return refuse("launch attribute " + std::to_string(attribute.id));
        }
    }
    if (to.programmatic && d.settings.cc < 90) {
        return refuse("a programmatic launch, which needs compute capability 9.0", NOT_SUPPORTED);
    }
    return SUCCESS;
}

CUresult launch(Driver &d, Device *device, void *handle, Dim grid, Dim block, unsigned shared,
                void *stream_handle, void **parameters, void **extra, const Attributes &attributes = {}) {
    Function *function = function_of(d, handle);
    Stream *stream = d.stream_of(stream_handle);
    if (function == nullptr || stream == nullptr) {
        return INVALID_HANDLE;
    }
    const Kernel &kernel = *function->kernel;
    if (extra != nullptr || (parameters == nullptr && kernel.parameters != 0)) {
        return refuse(std::string(kernel.name) + ": parameters must come as kernelParams");
    }
    Command c;
    c.kind = Command::Launch;
    c.kernel = &kernel;
    c.grid = grid;
    c.block = block;
    c.shared_bytes = shared;
    c.programmatic = attributes.programmatic;
    c.cluster = attributes.cluster;
    if (c.cluster.x * c.cluster.y * c.cluster.z != 1) {
        return refuse(std::string(kernel.name) + ": clusters of more than one block", NOT_SUPPORTED);
    }
    const emu::Launch probe{&kernel, nullptr, grid, block, shared, 0, 0, {}, {}, {}};
    const std::string wrong = check_launch(probe);
    if (!wrong.empty()) {
        return refuse(std::string(kernel.name) + ": " + wrong);
    }
    if (kernel.max_threads != 0 && block.x > static_cast<unsigned>(kernel.max_threads)) {
        return refuse(std::string(kernel.name) + ": " + std::to_string(block.x) +
                      " threads, its launch bounds say " + std::to_string(kernel.max_threads));
    }
    const auto allowed = function->dynamic_shared.find(device->index);
    const std::size_t most = allowed == function->dynamic_shared.end() ? WITHOUT_OPT_IN : allowed->second;
    if (shared > std::max(most, WITHOUT_OPT_IN)) {
        return refuse(std::string(kernel.name) + ": " + std::to_string(shared) +
                      " bytes of dynamic shared memory, " + std::to_string(most) +
                      " allowed by cuFuncSetAttribute");
    }
    c.packed.resize(kernel.packed_bytes + 1);
    for (int i = 0; i < kernel.parameters; i++) {
        if (parameters[i] == nullptr) {
            return refuse(std::string(kernel.name) + ": parameter " + std::to_string(i) +
                          " is a null pointer");
        }
        std::memcpy(c.packed.data() + kernel.offsets[i], parameters[i], kernel.sizes[i]);
    }
    return planted_launch(c, stream, device) ? d.enqueue(stream, std::move(c)) : SUCCESS;
}

} // namespace

CUAPI cuModuleLoadData(void **out, const void *image) {
    ENTER();
    unsigned magic;
    std::memcpy(&magic, image, 4);
    // A fatbin, its wrapper, an ELF file, or PTX text.
    if (magic != 0xba55ed50u && magic != 0x466243b1u && magic != 0x464c457fu &&
        std::memcmp(image, "//", 2) != 0 && std::memcmp(image, ".ver", 4) != 0) {
        return INVALID_IMAGE;
    }
    auto *module = new Module;
    d.modules.insert(module);
    *out = module;
    return SUCCESS;
}
CUAPI cuModuleLoadDataEx(void **out, const void *image, unsigned, int *, void **) {
    return cuModuleLoadData(out, image);
}

CUAPI cuModuleUnload(void *handle) {
    ENTER();
    auto *module = static_cast<Module *>(handle);
    if (d.modules.erase(module) == 0) {
        return INVALID_HANDLE;
    }
    d.finish_device(device);
    delete module;
    return SUCCESS;
}

CUAPI cuModuleGetFunction(void **out, void *handle, const char *name) {
    ENTER();
    auto *module = static_cast<Module *>(handle);
    if (d.modules.count(module) == 0) {
        return INVALID_HANDLE;
    }
    const Kernel *kernel = find_kernel(name);
    if (kernel == nullptr) {
        return NOT_FOUND;
    }
    auto &function = module->functions[name];
    if (!function) {
        function = std::make_unique<Function>(Function{kernel, {}});
    }
    *out = function.get();
    return SUCCESS;
}

CUAPI cuFuncGetParamInfo(void *handle, std::size_t index, std::size_t *offset, std::size_t *size) {
    ENTER();
    Function *function = function_of(d, handle);
    if (function == nullptr) {
        return INVALID_HANDLE;
    }
    if (index >= static_cast<std::size_t>(function->kernel->parameters)) {
        return INVALID_VALUE;
    }
    *offset = function->kernel->offsets[index];
    if (size != nullptr) {
        *size = function->kernel->sizes[index];
    }
    return SUCCESS;
}

CUAPI cuFuncGetAttribute(int *value, int attribute, void *handle) {
    ENTER();
    Function *function = function_of(d, handle);
    if (function == nullptr) {
        return INVALID_HANDLE;
    }
    switch (attribute) {
    case 0: // threads per block
        *value = function->kernel->max_threads != 0 ? function->kernel->max_threads : 1024;
        return SUCCESS;
    case 1: // static shared, constant, local bytes
    case 2:
    case 3:
        *value = 0;
        return SUCCESS;
    case 4: // registers: not modelled
        *value = 32;
        return SUCCESS;
    case 5: // PTX and binary version
    case 6:
        *value = d.settings.cc;
        return SUCCESS;
    case 8: {
        const auto allowed = function->dynamic_shared.find(device->index);
        *value =
            static_cast<int>(allowed == function->dynamic_shared.end() ? WITHOUT_OPT_IN : allowed->second);
        return SUCCESS;
    }
    default:
        *value = 0;
        return SUCCESS;
    }
}

CUAPI cuFuncSetAttribute(void *handle, int attribute, int value) {
    ENTER();
    Function *function = function_of(d, handle);
    if (function == nullptr) {
        return INVALID_HANDLE;
    }
    if (attribute == 8) {
        if (value < 0 || value > shared_opt_in()) {
            return INVALID_VALUE;
        }
        function->dynamic_shared[device->index] = static_cast<std::size_t>(value);
        return SUCCESS;
    }
    return attribute == 9 ? SUCCESS : INVALID_VALUE;
}

CUAPI cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                     unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
    ENTER();
    return launch(d, device, function, Dim{gx, gy, gz}, Dim{bx, by, bz}, shared, stream, parameters, extra);
}

CUAPI cuLaunchKernelEx(const CUlaunchConfig *c, void *function, void **parameters, void **extra) {
    ENTER();
    Attributes attributes;
    if (const CUresult code = read_attributes(d, *c, attributes)) {
        return code;
    }
    return launch(d, device, function, Dim{c->gridDimX, c->gridDimY, c->gridDimZ},
                  Dim{c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes, c->hStream, parameters,
                  extra, attributes);
}

// Of what the driver takes: fp16, whole strides, swizzles of 0 or 128 bytes, zeros outside. What it refuses is refused;
// what the emulated device lacks is too.
CUAPI cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, const std::uint64_t *sizes,
                             const std::uint64_t *strides, const unsigned *box, const unsigned *element_strides,
                             int interleave, int swizzle, int promotion, int fill) {
    ENTER();
    if (d.settings.cc < 90) {
        return NOT_SUPPORTED;
    }
    const char *wants = nullptr;
    if (map == nullptr || sizes == nullptr || box == nullptr || element_strides == nullptr ||
        (rank > 1 && strides == nullptr)) {
        wants = "pointers that are not null";
    } else if (type != 6 || interleave != 0 || (swizzle != 0 && swizzle != 3) || promotion < 0 || promotion > 3 ||
               fill != 0) {
        wants = "fp16, no interleave, a swizzle of none or 128 bytes, a fill of zeros";
    } else {
        for (unsigned i = 0; i < rank && i < 5; i++) {
            wants = element_strides[i] != 1 ? "element strides of 1" : wants;
        }
    }
    if (wants == nullptr) {
        wants = encode_tensor_map(map, static_cast<int>(rank), reinterpret_cast<std::uint64_t>(address), sizes, strides,
                                  box, swizzle == 3);
    }
    if (wants != nullptr) {
        say(std::string("emulated device: cuTensorMapEncodeTiled wants ") + wants + "\n");
        return INVALID_VALUE;
    }
    return SUCCESS;
}

CUAPI cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *handle, int threads,
                                                  std::size_t shared) {
    ENTER();
    if (function_of(d, handle) == nullptr || threads <= 0) {
        return threads <= 0 ? INVALID_VALUE : INVALID_HANDLE;
    }
    *blocks = blocks_at_once(threads, shared);
    return SUCCESS;
}
CUAPI cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, void *function, int threads,
                                                           std::size_t shared, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}
