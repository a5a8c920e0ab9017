// driver.cpp: the library as a program sees it: opened by path, called by name, nothing else known.
//
//     driver LIBRARY [PART]      without PART: all of them, each in a process of its own
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "../driver/abi.h"

namespace {

void *library;

template <class... A> CUresult call(const char *name, A... arguments) {
    auto *function = reinterpret_cast<CUresult (*)(A...)>(dlsym(library, name));
    if (function == nullptr) {
        std::printf("no symbol %s\n", name);
        std::exit(1);
    }
    return function(arguments...);
}

#define CHECK(condition)                                                  \
    do {                                                                  \
        if (!(condition)) {                                               \
            std::printf("line %d: %s is not so\n", __LINE__, #condition); \
            std::exit(1);                                                 \
        }                                                                 \
    } while (0)
#define OK(...) CHECK(call(__VA_ARGS__) == SUCCESS)

using Pointer = CUdeviceptr;
using Size = std::size_t;

void *context;

void start() {
    int version = 0, count = 0, major = 0;
    OK("cuDriverGetVersion", &version);
    CHECK(version == 13000);
    CHECK(call("cuCtxSynchronize") == NOT_INITIALIZED);
    OK("cuInit", 0u);
    OK("cuDeviceGetCount", &count);
    OK("cuDeviceGetAttribute", &major, 75, 0);
    CHECK(count >= 1 && major >= 8);
    CHECK(call("cuCtxSynchronize") == INVALID_CONTEXT);
    OK("cuDevicePrimaryCtxRetain", &context, 0);
    OK("cuCtxSetCurrent", context);
}

Pointer allocate(Size bytes) {
    Pointer p = 0;
    OK("cuMemAlloc_v2", &p, bytes);
    return p;
}

void *kernel(const char *name) {
    static std::mutex lock;
    static void *module = nullptr;
    static std::map<std::string, void *> functions;
    const std::lock_guard<std::mutex> held(lock);
    if (module == nullptr) {
        const unsigned image[4] = {0xba55ed50u};
        OK("cuModuleLoadData", &module, static_cast<const void *>(image));
    }
    void *&function = functions[name];
    if (function == nullptr) {
        OK("cuModuleGetFunction", &function, module, name);
    }
    return function;
}

void *stream(unsigned flags = 1) {
    void *s = nullptr;
    OK("cuStreamCreate", &s, flags);
    return s;
}

// A kernel (float *out, const float *in, int n).
CUresult launch(const char *name, Pointer out, Pointer in, int n, void *s, unsigned blocks = 1,
                unsigned threads = 64, unsigned shared = 1024) {
    void *parameters[] = {&out, &in, &n};
    return call("cuLaunchKernel", kernel(name), blocks, 1u, 1u, threads, 1u, 1u, shared, s,
                static_cast<void **>(parameters), static_cast<void **>(nullptr));
}

std::vector<float> peek(Pointer from, Size n) {
    std::vector<float> values(n);
    CHECK(call("emu_peek", static_cast<void *>(values.data()), from, n * sizeof(float)) == 0);
    return values;
}

std::vector<float> numbers(Size n, float first = 1.0f) {
    std::vector<float> v(n);
    for (Size i = 0; i < n; i++) {
        v[i] = first + static_cast<float>(i);
    }
    return v;
}

Pointer uploaded(const std::vector<float> &v) {
    const Pointer p = allocate(v.size() * 4);
    OK("cuMemcpyHtoD_v2", p, static_cast<const void *>(v.data()), Size(v.size() * 4));
    return p;
}

std::string report() {
    char text[4000] = "";
    auto *f = reinterpret_cast<Size (*)(char *, Size)>(dlsym(library, "emu_last_report"));
    f(text, sizeof text);
    return text;
}

bool holds(const std::string &text, const char *part) { return text.find(part) != std::string::npos; }
bool is_nan(float x) { return x != x; }

// ---- parts
// --------------------------------------------------------------------------------------------------

void round_trip() {
    start();
    const auto in = numbers(64);
    const Pointer a = uploaded(in), b = allocate(256);
    CHECK(is_nan(peek(b, 1)[0])); // poisoned
    OK("cuMemsetD32Async", b, 0u, Size(64), static_cast<void *>(nullptr));
    CHECK(launch("micro_reverse", b, a, 64, nullptr) == SUCCESS);
    std::vector<float> out(64);
    OK("cuMemcpyDtoH_v2", static_cast<void *>(out.data()), b, Size(256));
    for (int i = 0; i < 64; i++) {
        CHECK(out[i] == in[63 - i]);
    }
    Size offset = 9, size = 9;
    OK("cuFuncGetParamInfo", kernel("micro_reverse"), Size(2), &offset, &size);
    CHECK(offset == 16 && size == 4);
    CHECK(call("cuFuncGetParamInfo", kernel("micro_reverse"), Size(3), &offset, &size) == INVALID_VALUE);
    OK("cuFuncGetParamInfo", kernel("micro_sum"), Size(0), &offset, &size);
    CHECK(offset == 0 && size == 32);
    int most = 0;
    OK("cuFuncGetAttribute", &most, 0, kernel("micro_copy"));
    CHECK(most == 128);
    void *found = nullptr;
    int status = 9;
    OK("cuGetProcAddress_v2", "cuMemAlloc", &found, 13000, std::uint64_t(0), &status);
    CHECK(found == dlsym(library, "cuMemAlloc_v2") && status == 0);
    int type = 0;
    OK("cuPointerGetAttribute", static_cast<void *>(&type), 2, a + 8);
    CHECK(type == 2);
    CHECK(call("cuPointerGetAttribute", static_cast<void *>(&type), 2, Pointer(out.data() == nullptr)) ==
          INVALID_VALUE);
}

// Nothing happens until something waits, and then only what that needs.
void laziness() {
    start();
    const Pointer a = uploaded(numbers(64)), b = allocate(256), c = allocate(256), d = allocate(256);
    void *s = stream(), *t = stream(), *done = nullptr;
    OK("cuEventCreate", &done, 2u);
    CHECK(launch("micro_copy", b, a, 64, s) == SUCCESS);
    OK("cuEventRecord", done, s);
    CHECK(launch("micro_copy", d, a, 64, s) == SUCCESS);
    CHECK(is_nan(peek(b, 1)[0]));
    OK("cuStreamWaitEvent", t, done, 0u);
    CHECK(launch("micro_copy", c, b, 64, t) == SUCCESS);
    OK("cuStreamSynchronize", t);
    CHECK(peek(b, 1)[0] == 1.0f && peek(c, 1)[0] == 1.0f);
    CHECK(is_nan(peek(d, 1)[0])); // after the event: nobody waited for it
    int polls = 0;
    while (call("cuStreamQuery", s) == NOT_READY) {
        CHECK(++polls < 1000);
    }
    CHECK(polls > 0 && peek(d, 1)[0] == 1.0f);
}

// The host's mistakes, under every temper: work that nothing orders, an upload slot that is filled again too early.
void missing_waits() {
    start();
    const Pointer a = uploaded(numbers(64)), b = allocate(256), c = allocate(256);
    void *s = stream(), *t = stream(), *done = nullptr, *pinned = nullptr;
    OK("cuEventCreate", &done, 2u);
    OK("cuMemAllocHost_v2", &pinned, Size(256));
    auto *slot = static_cast<float *>(pinned);
    // Where all is done at once, the call that is a mistake may say so itself.
    const auto async = [&](Pointer to, void *on) {
        call("cuMemcpyHtoDAsync_v2", to, static_cast<const void *>(pinned), Size(256), on);
    };
    const auto device_copy = [](Pointer to, Pointer from, void *on) {
        call("cuMemcpyDtoDAsync_v2", to, from, Size(256), on);
    };
    const auto record = [&](void *on) { OK("cuEventRecord", done, on); };
    const auto wait = [&](void *on) { OK("cuStreamWaitEvent", on, done, 0u); };
    const std::vector<std::pair<const char *, std::function<void()>>> mistakes = {
        {"micro_copy", [&] { // a copy reads what a kernel of another stream writes
             CHECK(launch("micro_copy", b, a, 64, s) == SUCCESS);
             device_copy(c, b, t);
         }},
        {"micro_copy", [&] { // a kernel reads what a copy of another stream writes
             async(b, s);
             launch("micro_copy", c, b, 64, t);
         }},
        {"micro_copy", [&] { // what a kernel reads is written over
             CHECK(launch("micro_copy", c, a, 64, s) == SUCCESS);
             launch("micro_reverse", a, b, 64, t);
         }},
        {"fill", [&] { // two write the same
             CHECK(launch("micro_copy", c, a, 64, s) == SUCCESS);
             call("cuMemsetD32Async", c, 0u, Size(64), t);
         }},
        {"micro_copy", [&] { // the event was recorded too early
             record(s);
             CHECK(launch("micro_copy", b, a, 64, s) == SUCCESS);
             wait(t);
             device_copy(c, b, t);
         }},
        {"micro_copy", [&] { // the host waits for the other stream
             CHECK(launch("micro_copy", b, a, 64, s) == SUCCESS);
             OK("cuStreamSynchronize", t);
             device_copy(c, b, t);
         }},
        {"page-locked", [&] {
             async(c, t);
             slot[63] += 1.0f;
         }},
        {"page-locked", [&] { // waited for another upload
             async(c, t);
             OK("cuStreamSynchronize", s);
             slot[0] += 1.0f;
         }},
    };
    for (int seed = 0; seed < 12; seed++) {
        CHECK(call("emu_set", "SEED", std::to_string(seed).c_str()) == 0);
        for (const auto &[what, mistake] : mistakes) {
            const auto fresh = numbers(64); // a mistake may have written over them
            OK("cuMemcpyHtoD_v2", a, static_cast<const void *>(fresh.data()), Size(256));
            OK("cuMemcpyDtoD_v2", b, a, Size(256));
            OK("cuCtxSynchronize");
            for (int i = 0; i < 64; i++) {
                slot[i] = static_cast<float>(seed);
            }
            mistake();
            call("cuStreamSynchronize", t);
            CHECK(call("cuCtxSynchronize") == LAUNCH_FAILED && holds(report(), what));
            CHECK(holds(report(), ("seed " + std::to_string(seed)).c_str()));
            call("emu_heal");
        }
        // The same done right.
        for (int round = 0; round < 3; round++) {
            OK("cuEventSynchronize", done);
            slot[0] = static_cast<float>(round);
            async(b, s);
            record(s);
            wait(t);
            CHECK(launch("micro_copy", c, b, 64, t) == SUCCESS);
            OK("cuStreamSynchronize", t);
            CHECK(peek(c, 1)[0] == static_cast<float>(round));
        }
    }
    CHECK(call("emu_set", "SEED", "0") == 0);
    const auto fresh = numbers(64);
    OK("cuMemcpyHtoD_v2", a, static_cast<const void *>(fresh.data()), Size(256));
    // What a copy to page-locked memory brings is not there before it is waited for.
    OK("cuMemcpyDtoHAsync_v2", pinned, a, Size(256), t);
    CHECK(is_nan(slot[0]));
    OK("cuStreamSynchronize", t);
    CHECK(slot[0] == 1.0f);
    // From pageable memory the bytes are taken at once.
    auto pageable = numbers(64, 7.0f);
    OK("cuMemcpyHtoDAsync_v2", c, static_cast<const void *>(pageable.data()), Size(256), t);
    pageable[0] = 8.0f;
    OK("cuStreamSynchronize", t);
    CHECK(peek(c, 1)[0] == 7.0f);
    // The legacy default stream is ordered with blocking streams and not with others.
    void *blocking = stream(0);
    CHECK(launch("micro_copy", b, a, 64, blocking) == SUCCESS);
    OK("cuMemcpyDtoD_v2", c, b, Size(256));
    OK("cuStreamSynchronize", static_cast<void *>(nullptr));
    CHECK(peek(c, 1)[0] == 1.0f);
}

// Eager: everything at once, so that it is done before it is waited for.
void eagerness() {
    setenv("EMU_SEED", "2", 1);
    start();
    const Pointer a = uploaded(numbers(64)), b = allocate(256);
    CHECK(launch("micro_copy", b, a, 64, stream()) == SUCCESS);
    CHECK(peek(b, 1)[0] == 1.0f);
}

void graphs() {
    start();
    const Pointer a = uploaded(numbers(64)), b = allocate(256), c = allocate(256);
    void *s = stream(), *t = stream(), *fork = nullptr, *join = nullptr, *graph = nullptr, *exec = nullptr;
    OK("cuEventCreate", &fork, 2u);
    OK("cuEventCreate", &join, 2u);
    OK("cuStreamBeginCapture_v2", s, 1);
    int status = 0;
    OK("cuStreamIsCapturing", s, &status);
    CHECK(status == 1);
    OK("cuEventRecord", fork, s);
    OK("cuStreamWaitEvent", t, fork, 0u);
    CHECK(launch("micro_copy", b, a, 64, s) == SUCCESS);
    CHECK(launch("micro_copy", c, a, 64, t) == SUCCESS);
    OK("cuEventRecord", join, t);
    OK("cuStreamWaitEvent", s, join, 0u);
    CHECK(launch("micro_reverse", c, b, 64, s) == SUCCESS);
    OK("cuStreamEndCapture", s, &graph);
    OK("cuGraphInstantiateWithFlags", &exec, graph, 0ull);
    OK("cuGraphDestroy", graph);
    OK("cuCtxSynchronize");
    CHECK(is_nan(peek(b, 1)[0]));
    for (int i = 0; i < 5; i++) {
        const auto in = numbers(64, static_cast<float>(i));
        OK("cuMemcpyHtoDAsync_v2", a, static_cast<const void *>(in.data()), Size(256), s);
        OK("cuGraphLaunch", exec, s);
        OK("cuStreamSynchronize", s);
        CHECK(peek(c, 64)[0] == in[63] && peek(b, 64)[63] == in[63]);
    }
    // What spoils a capture.
    Pointer p;
    OK("cuStreamBeginCapture_v2", s, 0);
    CHECK(call("cuMemAlloc_v2", &p, Size(16)) == CAPTURE_UNSUPPORTED);
    CHECK(call("cuStreamEndCapture", s, &graph) == CAPTURE_INVALIDATED);
    OK("cuStreamBeginCapture_v2", s, 1);
    OK("cuEventRecord", fork, s);
    OK("cuStreamWaitEvent", t, fork, 0u);
    CHECK(launch("micro_copy", c, a, 64, t) == SUCCESS);
    CHECK(call("cuStreamEndCapture", s, &graph) == CAPTURE_UNJOINED);
    OK("cuStreamBeginCapture_v2", s, 1);
    CHECK(call("cuStreamSynchronize", s) == CAPTURE_UNSUPPORTED);
    CHECK(call("cuStreamEndCapture", s, &graph) == CAPTURE_INVALIDATED);
}

void sticky() {
    start();
    for (const char *name : {"micro_copy", "micro_misaligned_16", "micro_early_return"}) {
        kernel(name);
    }
    const Pointer a = uploaded(numbers(64)), b = allocate(256), gone = allocate(256);
    OK("cuMemFree_v2", gone);
    CHECK(launch("micro_copy", b, gone, 64, nullptr) == SUCCESS);
    CHECK(call("cuCtxSynchronize") == ILLEGAL_ADDRESS);
    CHECK(holds(report(), "use after free") && holds(report(), "kernel micro_copy, block (0, 0, 0)"));
    CHECK(holds(report(), "micro.cu:"));
    CHECK(call("cuCtxSynchronize") == ILLEGAL_ADDRESS &&
          launch("micro_copy", b, a, 64, nullptr) == ILLEGAL_ADDRESS);
    call("emu_heal");
    CHECK(launch("micro_copy", a, b, 64, nullptr) == SUCCESS); // nothing ever wrote b
    CHECK(call("cuCtxSynchronize") == LAUNCH_FAILED && holds(report(), "uninitialised memory"));
    call("emu_heal");
    CHECK(launch("micro_misaligned_16", b, a, 64, nullptr) == SUCCESS);
    CHECK(call("cuCtxSynchronize") == MISALIGNED_ADDRESS);
    call("emu_heal");
    CHECK(launch("micro_early_return", b, a, 64, nullptr) == SUCCESS);
    CHECK(call("cuCtxSynchronize") == LAUNCH_FAILED);
}

void refusals() {
    setenv("EMU_MEMORY", "65536", 1);
    start();
    const Pointer a = uploaded(numbers(64)), b = allocate(256);
    std::vector<float> host(64);
    Pointer p;
    CHECK(call("cuMemAlloc_v2", &p, Size(65536)) == OUT_OF_MEMORY);
    CHECK(call("cuMemcpyDtoH_v2", static_cast<void *>(host.data()), a + 4, Size(256)) == INVALID_VALUE);
    CHECK(holds(report(), "byte 4 of allocation 1 (256 bytes, live)"));
    CHECK(call("cuMemcpyDtoD_v2", a, Pointer(16), Size(4)) == INVALID_VALUE);
    CHECK(call("cuMemFree_v2", a + 4) == INVALID_VALUE);
    CHECK(launch("micro_copy", b, a, 64, nullptr, 1, 256) == INVALID_VALUE); // launch bounds: 128
    CHECK(launch("micro_copy", b, a, 64, nullptr, 0) == INVALID_VALUE);
    CHECK(launch("micro_copy", b, a, 64, nullptr, 1, 64, 60000) == INVALID_VALUE);
    CHECK(call("cuFuncSetAttribute", kernel("micro_copy"), 8, 166913) == INVALID_VALUE);
    OK("cuFuncSetAttribute", kernel("micro_copy"), 8, 60000);
    CHECK(launch("micro_copy", b, a, 64, nullptr, 1, 64, 60000) == SUCCESS);
    OK("cuCtxSynchronize");
    void *module = nullptr, *function = nullptr;
    CHECK(call("cuModuleLoadData", &module, static_cast<const void *>("hello")) == INVALID_IMAGE);
    const unsigned image[4] = {0xba55ed50u};
    OK("cuModuleLoadData", &module, static_cast<const void *>(image));
    CHECK(call("cuModuleGetFunction", &function, module, "no_such_kernel") == NOT_FOUND);
    CHECK(call("cuStreamSynchronize", static_cast<void *>(&host)) == INVALID_HANDLE);
}

void planted() {
    setenv("EMU_FAIL", "launch:micro_copy:719,alloc:2", 1);
    start();
    const Pointer a = uploaded(numbers(64));
    Pointer p;
    CHECK(call("cuMemAlloc_v2", &p, Size(16)) == OUT_OF_MEMORY);
    CHECK(launch("micro_copy", allocate(256), a, 64, nullptr) == SUCCESS);
    CHECK(call("cuCtxSynchronize") == LAUNCH_FAILED);
}

void log() {
    char path[] = "/tmp/emulated-log-XXXXXX";
    CHECK(mkstemp(path) >= 0);
    setenv("EMU_LOG", path, 1);
    start();
    const Pointer a = uploaded(numbers(64));
    CHECK(launch("micro_copy", allocate(256), a, 64, nullptr, 2, 32) == SUCCESS);
    OK("cuCtxSynchronize");
    std::stringstream text;
    text << std::ifstream(path).rdbuf();
    std::remove(path);
    CHECK(holds(text.str(), "\"event\":\"run\"") && holds(text.str(), "\"kind\":\"HtoD\",\"bytes\":256"));
    CHECK(holds(text.str(),
                "\"what\":\"launch\",\"kernel\":\"micro_copy\",\"grid\":[2,1,1],\"block\":[32,1,1]"));
}

void two_devices() {
    setenv("EMU_DEVICES", "2", 1);
    start();
    const Pointer a = uploaded(numbers(64));
    void *other = nullptr, *s = stream();
    OK("cuDevicePrimaryCtxRetain", &other, 1);
    OK("cuCtxSetCurrent", other);
    const Pointer there = allocate(256);
    OK("cuCtxSetCurrent", context);
    OK("cuMemcpyPeerAsync", there, other, a, context, Size(256), s);
    OK("cuStreamSynchronize", s);
    CHECK(peek(there, 1)[0] == 1.0f);
    unsigned flags = 9;
    OK("cuPointerGetAttribute", &flags, 16, there);
    CHECK(flags == 0);
    OK("cuPointerGetAttribute", &flags, 16, a);
    CHECK(flags == 3);
    CHECK(launch("micro_reverse", there, a, 64, s) == SUCCESS);
    CHECK(call("cuStreamSynchronize", s) == ILLEGAL_ADDRESS);
    CHECK(holds(report(), "not enabled"));
    call("emu_heal");
    OK("cuCtxEnablePeerAccess", other, 0u);
    CHECK(launch("micro_reverse", there, a, 64, s) == SUCCESS);
    OK("cuStreamSynchronize", s);
    CHECK(peek(there, 1)[0] == 64.0f);
    OK("cuPointerGetAttribute", &flags, 16, there);
    CHECK(flags == 3);

    // Rows of 4 floats, 5 apart there.
    CUDA_MEMCPY3D_PEER rows{};
    rows.srcMemoryType = rows.dstMemoryType = 2;
    rows.srcDevice = a, rows.srcContext = context, rows.srcPitch = 16;
    rows.dstDevice = there, rows.dstContext = other, rows.dstPitch = 20;
    rows.WidthInBytes = 16, rows.Height = 3, rows.Depth = 1;
    OK("cuMemcpy3DPeerAsync", &rows, s);
    OK("cuStreamSynchronize", s);
    const auto copied = peek(there, 15);
    CHECK(copied[5] == 5.0f && copied[8] == 8.0f && copied[9] == 55.0f && copied[10] == 9.0f);
    rows.Height = 14;
    CHECK(call("cuMemcpy3DPeerAsync", &rows, s) == INVALID_VALUE);

    // Peer access to the device is not access to its pool.
    OK("cuCtxSetCurrent", other);
    Pointer pooled = 0;
    OK("cuMemAllocAsync", &pooled, Size(256), nullptr);
    OK("cuCtxSetCurrent", context);
    OK("cuPointerGetAttribute", &flags, 16, pooled);
    CHECK(flags == 0);
    CHECK(launch("micro_reverse", pooled, a, 64, s) == SUCCESS);
    CHECK(call("cuStreamSynchronize", s) == ILLEGAL_ADDRESS);
    CHECK(holds(report(), "from a pool"));
    call("emu_heal");
}

void threads() {
    setenv("EMU_SEED", "1", 1);
    start();
    std::vector<std::thread> all;
    for (int i = 0; i < 4; i++) {
        all.emplace_back([i] {
            OK("cuCtxSetCurrent", context);
            const auto in = numbers(64, static_cast<float>(i));
            const Pointer a = uploaded(in), b = allocate(256);
            void *s = stream();
            for (int j = 0; j < 50; j++) {
                CHECK(launch("micro_reverse", b, a, 64, s) == SUCCESS);
                OK("cuStreamSynchronize", s);
            }
            CHECK(peek(b, 1)[0] == in[63]);
        });
    }
    for (auto &t : all) {
        t.join();
    }
}

#include "dependents.h"
#include "clusters.h"
#include "tensor_maps.h"

// Ends by a signal; the parent looks at what it said.
void host_touches() {
    start();
    const Pointer a = allocate(256);
    std::printf("%f\n", static_cast<double>(*reinterpret_cast<volatile float *>(a + 8)));
}

const std::vector<std::pair<const char *, void (*)()>> PARTS = {
    {"round_trip", round_trip},   {"laziness", laziness}, {"missing_waits", missing_waits},
    {"eagerness", eagerness},     {"graphs", graphs},     {"sticky", sticky},
    {"refusals", refusals},       {"planted", planted},   {"log", log},
    {"two_devices", two_devices}, {"threads", threads},   {"host_touches", host_touches},
    {"tensor_maps", tensor_maps}, {"no_tensor_maps", no_tensor_maps},
    {"attributes", attributes},   {"dependents", dependents},
    {"bulk_dependents", bulk_dependents}, {"clusters", clusters},
};

// Runs one part in a child; its output and status.
int run(const char *program, const char *path, const char *part, std::string &output) {
    FILE *pipe = popen((std::string(program) + " '" + path + "' " + part + " 2>&1").c_str(), "r");
    char line[1000];
    while (std::fgets(line, sizeof line, pipe)) {
        output += line;
    }
    return pclose(pipe);
}

} // namespace

int main(int count, char **arguments) {
    if (count == 3) {
        setenv("EMU_CC", "8.0", 1); // what is true before Hopper; parts about Hopper ask for it
        library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            std::printf("%s\n", dlerror());
            return 1;
        }
        for (const auto &part : PARTS) {
            if (std::strcmp(part.first, arguments[2]) == 0) {
                part.second();
            }
        }
        return 0;
    }
    bool good = true;
    for (const auto &part : PARTS) {
        std::string output;
        const int status = run(arguments[0], arguments[1], part.first, output);
        const bool dies = std::strcmp(part.first, "host_touches") == 0;
        const bool right = dies ? status != 0 && holds(output, "host code touched device memory") &&
                                      holds(output, "byte 8 of allocation 1 (256 bytes, live)")
                                : status == 0;
        if (!right) {
            std::printf("FAILED %s:\n%s", part.first, output.c_str());
            good = false;
        }
    }
    std::printf("driver: %s\n", good ? "all good" : "FAILED");
    return good ? 0 : 1;
}
