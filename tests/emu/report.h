// report.h: from a return address to a line of a kernel, and from a fault to words.
#pragma once

#include <string>

namespace emu {

struct Executor;
struct Fault;

// "file:line" of the innermost frame outside ptx.cuh. Asks addr2line once per address; without it,
// object+offset.
std::string line_of(const void *pc);
// All frames that were inlined into one another there, one a line, innermost first.
std::string lines_of(const void *pc);

// A placeholder for line_of(pc) in a text that is made where there is little stack; compose_report fills it
// in.
std::string mark_line(const void *pc);

// Fills fault.where and fault.report.
void compose_report(const Executor &executor, Fault &fault);

} // namespace emu
