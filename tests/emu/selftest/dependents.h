// dependents.h: launches that may begin before the one before them is over, a part of driver.cpp: included there, among
// its functions.
#pragma once

// As in kernels/dependent_sm90.cu.
enum Way {
    ALL_WAIT,
    BLOCK_BARRIER,
    WARP_BARRIER,
    NAMED_BARRIER,
    MBARRIER,
    COUNTER,
    NO_WAIT,
    ONE_WAITS,
    LANE_WAITS,
    NAMED_ARRIVE,
    TOLD_EARLY,
    NOT_TOLD,
    EARLY_READ,
    EARLY_WRITE,
    EARLY_UPDATE,
    EARLY_COPY,
    EARLY_COUNT,
    ONE_BLOCK,
};

CUlaunchAttribute programmatic(int allowed = 1) {
    CUlaunchAttribute attribute{};
    attribute.id = 6;
    attribute.value.programmaticStreamSerializationAllowed = allowed;
    return attribute;
}
CUlaunchAttribute cluster(unsigned x, unsigned y = 1, unsigned z = 1) {
    CUlaunchAttribute attribute{};
    attribute.id = 4;
    attribute.value.clusterDim = {x, y, z};
    return attribute;
}

CUresult launch_ex(const char *name, void **parameters, unsigned blocks, unsigned shared, void *s,
                   std::vector<CUlaunchAttribute> attributes) {
    const CUlaunchConfig config{blocks,           1, 1, 64, 1, 1, shared, s, attributes.data(),
                                static_cast<unsigned>(attributes.size())};
    return call("cuLaunchKernelEx", &config, kernel(name), parameters, static_cast<void **>(nullptr));
}

// Devices before Hopper, and what is not known.
void attributes() {
    char path[] = "/tmp/emulated-log-XXXXXX";
    CHECK(mkstemp(path) >= 0);
    setenv("EMU_LOG", path, 1);
    start();
    Pointer a = uploaded(numbers(128)), b = allocate(512);
    int n = 128;
    void *parameters[] = {&b, &a, &n};
    const auto with = [&](std::vector<CUlaunchAttribute> all) {
        return launch_ex("micro_copy", parameters, 2, 0, nullptr, std::move(all));
    };
    CUlaunchAttribute other{};
    CHECK(with({}) == SUCCESS && with({other}) == SUCCESS && with({programmatic(0)}) == SUCCESS);
    CHECK(with({programmatic()}) == NOT_SUPPORTED && with({cluster(1)}) == SUCCESS);
    CHECK(with({cluster(2)}) == NOT_SUPPORTED && with({cluster(3)}) == INVALID_VALUE);
    CHECK(with({cluster(0)}) == INVALID_VALUE && with({cluster(1, 2)}) == INVALID_VALUE);
    for (const unsigned id : {1u, 2u, 3u, 5u, 7u, 8u, 9u, 11u, 99u}) {
        other.id = id;
        CHECK(with({cluster(1), other}) == INVALID_VALUE);
    }
    OK("cuCtxSynchronize");
    std::stringstream text;
    text << std::ifstream(path).rdbuf();
    std::remove(path);
    CHECK(!holds(text.str(), "programmatic\":"));
}

struct Chain {
    static constexpr int N = 128;
    void *s = stream();
    Pointer weights = uploaded(numbers(N)), in = filled(), x = filled(), y = filled(), z = filled();
    bool captured = false;

    static Pointer filled() { return uploaded(std::vector<float>(N + 1)); } // zeros
    CUresult plain(const char *name, Pointer out, Pointer from, int way = ALL_WAIT) {
        return enqueue(name, out, from, way, {});
    }
    CUresult early(const char *name, Pointer out, Pointer from, int way = ALL_WAIT) {
        return enqueue(name, out, from, way, {programmatic()});
    }
    CUresult enqueue(const char *name, Pointer out, Pointer from, int way, std::vector<CUlaunchAttribute> with) {
        int n = N;
        void *parameters[] = {&out, &from, &weights, &n, &way};
        return launch_ex(name, parameters, N / 64, 2048, s, std::move(with));
    }
    // Does what `enqueues` says, as it is or from a graph; the code of the wait for it.
    CUresult run(bool in_a_graph, const std::function<void()> &enqueues) {
        for (const Pointer p : {in, x, y, z}) {
            OK("cuMemsetD32Async", p, 0u, Size(N + 1), static_cast<void *>(nullptr));
        }
        OK("cuCtxSynchronize");
        if (!in_a_graph) {
            enqueues();
            return call("cuStreamSynchronize", s);
        }
        void *graph = nullptr, *exec = nullptr;
        OK("cuStreamBeginCapture_v2", s, 1);
        enqueues();
        OK("cuStreamEndCapture", s, &graph);
        OK("cuGraphInstantiateWithFlags", &exec, graph, 0ull);
        OK("cuGraphDestroy", graph);
        call("cuGraphLaunch", exec, s);
        const CUresult code = call("cuStreamSynchronize", s);
        CHECK(code != SUCCESS || call("cuGraphExecDestroy", exec) == SUCCESS);
        return code;
    }
    void right(bool in_a_graph, const std::function<void()> &enqueues) {
        const CUresult code = run(in_a_graph, enqueues);
        if (code != SUCCESS) {
            std::printf("a false alarm:\n%s", report().c_str());
            std::exit(1);
        }
    }
    // A fault of this kind in `who`, whose report has all of `parts`.
    void wrong(bool in_a_graph, const char *kind, const char *who, std::vector<std::string> parts,
               const std::function<void()> &enqueues) {
        parts.push_back(kind);
        parts.push_back(std::string("kernel ") + who + ", block (");
        parts.push_back("at tests/emu/selftest/kernels/dependent_sm90.cu:");
        const CUresult code = run(in_a_graph, enqueues);
        for (const std::string &part : parts) {
            if (code != LAUNCH_FAILED || !holds(report(), part.c_str())) {
                std::printf("no \"%s\" in:\n%s", part.c_str(), report().c_str());
                std::exit(1);
            }
        }
        call("emu_heal");
    }
};

void dependents() {
    setenv("EMU_CC", "9.0", 1);
    start();
    Chain c;
    const char *const missing = "dependency wait missing or late", *const never = "dependency never waited for";
    const auto expect = [&](Pointer p, float factor) {
        const auto got = peek(p, Chain::N);
        for (int i = 0; i < Chain::N; i++) {
            CHECK(got[i] == factor * static_cast<float>(i + 1));
        }
    };
    for (int seed = 0; seed < 12; seed++) {
        CHECK(call("emu_set", "SEED", std::to_string(seed).c_str()) == 0);
        const std::vector<std::string> named = {"which dependent_before (launch ",
                                                "seed " + std::to_string(seed) + "\n"};
        for (const bool graph : {false, true}) {
            for (const int way : {ALL_WAIT, BLOCK_BARRIER, WARP_BARRIER, NAMED_BARRIER, MBARRIER, COUNTER}) {
                c.right(graph, [&] { // x is written again under its reader's eyes: that one is over by then
                    c.plain("dependent_before", c.x, c.in, way);
                    c.early("dependent", c.y, c.x, way);
                    c.early("dependent", c.x, c.y, way);
                    c.early("dependent", c.y, c.x, way);
                    c.plain("dependent", c.z, c.y, way);
                });
                expect(c.z, 5.0f);
            }
            for (const int way : {NO_WAIT, ONE_WAITS, LANE_WAITS, NAMED_ARRIVE, TOLD_EARLY, NOT_TOLD, EARLY_READ,
                                  EARLY_COPY}) {
                c.wrong(graph, missing, "dependent", named, [&] { // the one in the middle of three
                    c.plain("dependent_before", c.x, c.in);
                    c.early("dependent", c.y, c.x, way);
                    c.early("dependent_before", c.z, c.y);
                });
            }
            for (const int way : {EARLY_WRITE, EARLY_UPDATE}) {
                c.wrong(graph, missing, "dependent", {named[0], " read: this launch"}, [&] {
                    c.plain("dependent_before", c.x, c.in);
                    c.early("dependent", c.in, c.in, way);
                });
            }
            c.wrong(graph, missing, "dependent", named, [&] {
                c.plain("dependent_before", c.x, c.in, COUNTER);
                c.early("dependent", c.y, c.x, EARLY_COUNT);
            });
            c.wrong(graph, never, "dependent", {"block (1, 0, 0) of (2, 1, 1)"}, [&] {
                c.plain("dependent_before", c.x, c.in);
                c.early("dependent", c.y, c.x, ONE_BLOCK);
            });
            // What the launch before has waited for, this one has not.
            c.wrong(graph, missing, "dependent", {named[0], " wrote: this launch"}, [&] {
                c.plain("dependent_before", c.x, c.in);
                c.early("dependent", c.y, c.x);
                c.early("dependent", c.z, c.x, EARLY_READ);
            });
            // Beyond the last one without the attribute all is over.
            c.right(graph, [&] {
                c.plain("dependent_before", c.x, c.in);
                c.plain("dependent", c.y, c.x);
                c.early("dependent", c.z, c.x, EARLY_READ);
            });
            // A plain launch needs no wait, and a copy in between waits for all.
            c.right(graph, [&] {
                c.plain("dependent_before", c.x, c.in);
                c.plain("dependent", c.y, c.x, NO_WAIT);
                OK("cuMemcpyDtoDAsync_v2", c.z, c.y, Size(512), c.s);
                c.early("dependent", c.x, c.y, EARLY_READ);
            });
        }
        // So does the program; an event does not.
        c.right(false, [&] {
            c.plain("dependent_before", c.x, c.in);
            OK("cuStreamSynchronize", c.s);
            c.early("dependent", c.y, c.x, EARLY_READ);
        });
        void *event = nullptr;
        OK("cuEventCreate", &event, 2u);
        c.wrong(false, missing, "dependent", named, [&] {
            c.plain("dependent_before", c.x, c.in);
            call("cuEventRecord", event, c.s);
            c.early("dependent", c.y, c.x, EARLY_READ);
        });
        // What a wait for an event brings from another stream is over, what stands before in the own is not.
        void *const own = c.s, *const other = stream();
        for (const bool from_other : {true, false}) {
            for (const bool graph : {false, true}) {
                const auto fork = [&] {
                    call("cuEventRecord", event, own);
                    call("cuStreamWaitEvent", other, event, 0u);
                    c.plain("dependent_before", c.z, c.in);
                    c.s = other;
                    c.plain("dependent_before", c.x, c.in);
                    c.s = own;
                    call("cuEventRecord", event, other);
                    call("cuStreamWaitEvent", own, event, 0u);
                    c.early("dependent", c.y, from_other ? c.x : c.z, EARLY_READ);
                };
                if (from_other) {
                    c.right(graph, fork);
                } else {
                    c.wrong(graph, missing, "dependent", named, fork);
                }
            }
        }
        OK("cuStreamDestroy_v2", other);
        OK("cuEventDestroy_v2", event);
    }
}

void bulk_dependents() {
    char path[] = "/tmp/emulated-log-XXXXXX";
    CHECK(mkstemp(path) >= 0);
    setenv("EMU_LOG", path, 1);
    setenv("EMU_CC", "9.0", 1);
    start();
    Chain c;
    c.x = uploaded(std::vector<float>(1024)); // as fp16: 32 rows of 64
    alignas(64) unsigned char map[128];
    const std::uint64_t sizes[2] = {64, 32}, strides[1] = {128};
    const unsigned box[2] = {64, 32}, steps[2] = {1, 1};
    OK("cuTensorMapEncodeTiled", static_cast<void *>(map), 6, 2u, reinterpret_cast<void *>(c.x), sizes, strides, box,
       steps, 0, 0, 0, 0);
    for (int seed = 0; seed < 12; seed++) {
        CHECK(call("emu_set", "SEED", std::to_string(seed).c_str()) == 0);
        for (int early : {0, 1}) {
            const auto both = [&] {
                c.plain("dependent_before", c.x, c.in);
                void *parameters[] = {&c.y, &c.x, map, &early};
                launch_ex("dependent_bulk", parameters, 1, 6144, c.s, {programmatic(), cluster(1)});
            };
            for (const bool graph : {false, true}) {
                if (early == 0) {
                    c.right(graph, both);
                    CHECK(peek(c.y, 2)[0] == 1.0f && peek(c.y, 2)[1] == 2.0f + 1.875f); // 0x3f80 as fp16
                } else {
                    c.wrong(graph, "dependency wait missing or late", "dependent_bulk", {"which dependent_before"}, both);
                }
            }
        }
    }
    CHECK(call("emu_set", "LOG", "") == 0);
    std::stringstream text;
    text << std::ifstream(path).rdbuf();
    std::remove(path);
    const std::string tail = "\"grid\":[1,1,1],\"block\":[64,1,1],\"shared\":6144,\"programmatic\":true}";
    for (const char *event : {"call", "capture", "run"}) {
        std::string line;
        bool found = false;
        for (std::istringstream lines(text.str()); std::getline(lines, line);) {
            found |= holds(line, (std::string("\"event\":\"") + event).c_str()) && holds(line, tail.c_str());
        }
        CHECK(found);
    }
    CHECK(!holds(text.str(), "[2,1,1],\"block\":[64,1,1],\"shared\":2048,\"programmatic\""));
}
