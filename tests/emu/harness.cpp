// harness.cpp: see harness.h.
#include "harness.h"

namespace emu {

Memory &harness_memory() {
    static Memory memory(0, std::size_t{4} << 30, true);
    return memory;
}

namespace {
const Before *before = nullptr;
}
Before::Before() { before = this; }
Before::~Before() { before = nullptr; }

Fault harness_launch(const Kernel &kernel, const void *const *parameters, Dim grid, Dim block,
                     std::size_t shared_bytes, std::uint64_t seed, unsigned cluster) {
    static Executor executor;
    std::vector<unsigned char> packed(kernel.packed_bytes + 1);
    for (int i = 0; i < kernel.parameters; i++) {
        std::memcpy(packed.data() + kernel.offsets[i], parameters[i], kernel.sizes[i]);
    }
    Launch launch{&kernel, packed.data(), grid, block, shared_bytes, seed, 1, {&harness_memory()}, {}, {}};
    launch.cluster = cluster;
    const std::string wrong = check_launch(launch);
    if (!wrong.empty()) {
        Fault fault;
        fault.code = 1;
        fault.kind = "bad launch";
        fault.report = std::string("emulated device: bad launch of ") + kernel.name + ": " + wrong + "\n";
        return fault;
    }
    if (before != nullptr) { // it touches what it touches now, in an epoch of its own
        const std::uint32_t epoch = ++executor.epoch;
        const Shadow &shadow = harness_memory().shadow();
        for (const Before::Range &range : before->ranges_) {
            const std::size_t from = range.address - shadow.base;
            for (std::size_t cell = from / CELL; cell * CELL < from + range.bytes; cell++) {
                Trace &trace = shadow.traces[cell];
                (range.write ? trace.write_epoch : trace.read_epoch) = epoch;
                (range.write ? trace.writer : trace.reader) = UNTRACKED;
            }
        }
        launch.unordered.push_back(Unordered{epoch, epoch, "the launch before", true});
        launch.programmatic = true;
    }
    executor.run(launch);
    return executor.fault;
}

std::vector<std::uint64_t> harness_seeds() {
    std::vector<std::uint64_t> seeds;
    std::uint64_t from = 0, to = 8;
    if (const char *text = std::getenv("EMU_SEED")) {
        char *end = nullptr;
        from = std::strtoull(text, &end, 10);
        to = end[0] == '.' && end[1] == '.' ? std::strtoull(end + 2, nullptr, 10) : from + 1;
    }
    for (; from < to; from++) {
        seeds.push_back(from);
    }
    return seeds;
}

void harness_demand(const Fault &fault) {
    if (fault.code != 0) {
        std::fputs(fault.report.c_str(), stderr);
        std::exit(1);
    }
}

} // namespace emu
