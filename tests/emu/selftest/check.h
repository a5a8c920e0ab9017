// check.h: what the tests of the engine ask of a launch: that it passes, or that it is reported as it should be.
#pragma once

#include <cstdio>
#include <string>

#include "harness.h"

namespace {

constexpr std::uint64_t SEEDS = 12;
int failures = 0;

void complain(const char *kernel, std::uint64_t seed, const std::string &what) {
    std::printf("FAILED %s, seed %llu: %s\n", kernel, static_cast<unsigned long long>(seed), what.c_str());
    failures++;
}

bool holds(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

// No fault, and `right` afterwards.
template <class F> void passes(const char *kernel, std::uint64_t seed, const emu::Fault &fault, F right) {
    if (fault.code != 0) {
        complain(kernel, seed, "a false alarm:\n" + fault.report);
    } else if (!right()) {
        complain(kernel, seed, "wrong values");
    }
}

// A fault of this kind (or of one of several: "a|b") with all that a reader needs: kernel, block, thread,
// seed, line.
void reported(const char *kernel, std::uint64_t seed, const emu::Fault &fault, const char *kind,
              const char *file) {
    if (fault.code == 0) {
        complain(kernel, seed, std::string("not reported: ") + kind);
        return;
    }
    bool expected = false;
    for (std::string rest = std::string(kind) + "|"; !rest.empty(); rest.erase(0, rest.find('|') + 1)) {
        expected = expected || holds(fault.kind, rest.substr(0, rest.find('|')));
    }
    if (!expected) {
        complain(kernel, seed, std::string("expected ") + kind + ":\n" + fault.report);
    }
    for (const std::string &part :
         {"kernel " + std::string(kernel) + ",", std::string("block ("), std::string("thread "),
          "seed " + std::to_string(seed) + "\n", std::string("at ") + file + ":"}) {
        if (!holds(fault.report, part)) {
            complain(kernel, seed, "no \"" + part + "\" in:\n" + fault.report);
        }
    }
}

} // namespace
