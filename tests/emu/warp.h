// warp.h: what warp.cpp, hooks.cpp and numbers.cpp lend one another.
#pragma once

#include <cstdint>

namespace emu {

struct Thread;
enum class Op : std::uint8_t;

enum class Access : std::uint8_t { Read, Write, Atomic };

// Ends the launch unless the running thread may do this. `pc`: a return address in the kernel.
void check_shared(const void *at, int bytes, Access access, const void *pc); // aligned to `bytes`
void check_global(const void *at, int bytes, int alignment, Access access, const void *pc);

// The running thread comes to a collective; returns when the whole warp has, and the work is done.
void collect(Thread *self, Op op, const void *pc);

// A cp.async of the running thread has written 16 bytes there.
void landed_in_shared(const void *at, const void *pc);

// D[16][8] += A[16][16] . B[8][16]^T: fp16 in, f32 sums, one fused multiply-add per term in the order of k.
// A tensor core adds the sixteen terms in an order and with a rounding of its own; compare with a tolerance.
void mma_m16n8k16(float (*d)[8], const unsigned short (*a)[16], const unsigned short (*b)[16]);

} // namespace emu
