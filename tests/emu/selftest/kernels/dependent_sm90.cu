// dependent_sm90.cu: kernels whose launch may begin while the one before it runs, right and wrong.
//
//     out[i] = in[i] + weights[i]      `in`: what the launch before made; `weights`: what nobody writes meanwhile
//
// Blocks of 64 threads, one thread to a number; 2048 bytes of shared memory, 6144 of dependent_bulk.
#include "ptx_sm90.cuh"

enum Way {
    ALL_WAIT,
    // One thread waits, and a barrier tells the others: of the block, of each warp, of two warps, an mbarrier.
    BLOCK_BARRIER,
    WARP_BARRIER,
    NAMED_BARRIER,
    MBARRIER,
    COUNTER, // right, and counts in the number after the last, by atomic updates
    // Wrong.
    NO_WAIT,
    ONE_WAITS,    // and nothing tells the others
    LANE_WAITS,   // and tells the others by a vote, which orders no memory
    NAMED_ARRIVE, // a warp comes to the barrier and does not wait there
    TOLD_EARLY,   // the barrier comes before the wait
    NOT_TOLD,     // the mbarrier's phase is over before the wait
    // Wrong, and then all wait.
    EARLY_READ,
    EARLY_WRITE,  // over what the launch before reads
    EARLY_UPDATE, // the same, of what this one reads first
    EARLY_COPY,   // cp.async
    EARLY_COUNT,  // the number that the launch before counts in
    // One block never waits, and touches nothing.
    ONE_BLOCK,
};

PTX_INLINE void come_to_wait(unsigned char *smem, int way) {
    Mbarrier *told = reinterpret_cast<Mbarrier *>(smem);
    const bool first = way == WARP_BARRIER || way == LANE_WAITS ? lane() == 0 : thread_x() == 0;
    if (way == MBARRIER || way == NOT_TOLD) {
        if (first) {
            mbarrier_init(told, 1);
        }
        block_barrier(); // the mbarrier is there for all
    }
    if (way == TOLD_EARLY) {
        block_barrier();
    }
    if (way == NOT_TOLD && first) {
        mbarrier_arrive(told);
    }
    if (way == ALL_WAIT || way == COUNTER || way >= EARLY_READ || (first && way != NO_WAIT)) {
        grid_wait();
    }
    if (way == MBARRIER && first) {
        mbarrier_arrive(told);
    }
    if (way == BLOCK_BARRIER) {
        block_barrier();
    } else if (way == WARP_BARRIER) {
        warp_barrier();
    } else if (way == LANE_WAITS) {
        warp_ballot(true);
    } else if (way == NAMED_BARRIER || (way == NAMED_ARRIVE && warp() == 0)) {
        named_barrier(1, 64);
    } else if (way == NAMED_ARRIVE) {
        named_arrive(1, 64);
    } else if (way == MBARRIER || way == NOT_TOLD) {
        mbarrier_wait(told, 0);
    }
}

PTX_INLINE void dependent_body(float *out, const float *in, const float *weights, int n, int way) {
    PTX_SMEM(unsigned char, smem);
    const int i = block_x() * 64 + thread_x();
    const float w = weights[i];
    if (way == ONE_BLOCK && block_x() == 1) {
        return;
    }
    grid_launch_dependents();
    float early = 0.0f;
    if (way == EARLY_READ) {
        early = in[i];
    } else if (way == EARLY_WRITE) {
        out[i] = w;
    } else if (way == EARLY_UPDATE) {
        out[i] += w;
    } else if (way == EARLY_COPY) {
        cp_async_16(smem + 1024 + thread_x() * 16, in + block_x() * 64 + thread_x() / 4 * 4, true);
        cp_async_commit();
        cp_async_wait<0>();
    } else if (way == EARLY_COUNT && i == 0) {
        early = in[n];
    }
    come_to_wait(smem, way);
    if (way == EARLY_WRITE || way == EARLY_UPDATE) {
        return;
    }
    if (way == COUNTER) {
        atomic_add_u32(reinterpret_cast<unsigned *>(out + n), 1);
    }
    out[i] = w + (way == EARLY_READ ? early : in[i]);
}

// Two of a kind, so that reports can be seen to name the right one.
extern "C" __global__ void __launch_bounds__(64, 1) dependent_before(
    float *out, const float *in, const float *weights, int n, int way) {
    dependent_body(out, in, weights, n, way);
}
extern "C" __global__ void __launch_bounds__(64, 1) dependent(
    float *out, const float *in, const float *weights, int n, int way) {
    dependent_body(out, in, weights, n, way);
}

// A bulk copy of 64 x 32 fp16 after the wait, or before it, and a number of `in` that only the copy's mbarrier orders
// with the wait. One block.
extern "C" __global__ void __launch_bounds__(64, 1) dependent_bulk(
    float *out, const float *in, const __grid_constant__ TensorMap map, int early) {
    PTX_SMEM(unsigned char, smem);
    unsigned char *tile = align_1024(smem);
    Mbarrier *full = reinterpret_cast<Mbarrier *>(tile + 4096);
    if (thread_x() == 0) {
        tma_prefetch(&map);
        mbarrier_init(full, 1);
        fence_mbarrier_init();
    }
    block_barrier(); // the mbarrier is there for all
    if (thread_x() == 0) {
        mbarrier_arrive_expect(full, 4096);
        if (early == 0) {
            grid_wait();
        }
        tma_load_2d(tile, &map, 0, 0, full);
        grid_wait();
    }
    mbarrier_wait(full, 0);
    out[thread_x()] = fp16_to_f32(reinterpret_cast<const fp16 *>(tile)[thread_x()]) + in[thread_x()];
}
