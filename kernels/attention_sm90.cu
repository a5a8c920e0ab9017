// attention_sm90.cu: the attention of attention.cuh for Hopper: wgmma, fed by bulk copies.
//
// Who computes what. A block stays on its multiprocessor and does task after task, a task being 128
// (attention_sm90) or 192 (attention_sm90_192) queries of one head of one image; block b does tasks b,
// b + grid, .. in the order query tile, head, image, so that blocks which run together read the same K and V.
//
//     qkv, by maps: x column, y token, z image; what is beyond T arrives as zeros, never from the next image
//      │
//      │  group 0, one thread: boxes of 64 columns and 64 (Q) or 112 (K, V) tokens
//      ▼
//     Q 2 x [128][64]  K 4 x [112][64]  V 4 x [112][64]     rows of 128 bytes, 128-byte swizzle; full, empty
//      │                │                │
//      └───────┬────────┘                │
//              ▼                         ▼
//     S [64][112] = Q K^T ──▶ P ──▶ O [64][64] += P V       groups 1, 2 (and 3): 64 queries each
//     both from shared memory,      P from registers: fragments of S are those of A
//     K-major                       V as it lies, N-major
//
// Time, for one consumer and tile i: what the tensor core does for it, above, while it issues what is below.
//
//     attention_sm90       Q K(i+1)              P V(i)                  ╎ Q K(i+2) ..
//     two S                e^S(i), pack P(i)     sums, tops of S(i+1)    ╎ shrink O; e^S(i+1) ..
//
//     attention_sm90_192   Q K(i+1), P V(i)                              ╎ Q K(i+2) ..
//     one S                wait for Q K(i+1); tops, e^S(i+1)             ╎ shrink O, pack P(i+1); ..
//
// The exponentials take as long as all multiplications do: 128 queries and 112 keys are 896 clocks of either,
// so each must run under the other. The last tile of a task is followed by the first of the next one, whose Q
// is there: the pipeline does not drain. Nothing orders the consumers: two that are half a tile apart fill the
// tensor core and the exponentials' unit in turn, and they start so, since the second's first scores wait for
// the first's. Turns at the exponentials (named barriers) would leave that unit to one warp of a scheduler,
// which fills it only when nothing stalls it.
//
// 112 keys: 11 tiles hold T = 1226 with 6 to spare. 176 would do with 7, but two S of 88 registers, P and O
// are 252, and ptxas then waits after every wgmma. Here: 2 x 56, 28 and 32. Three consumers have 160 registers
// each, which is one S. K and V have barriers of their own: K is free when the scores are there, V a tile later.
//
// Launch contract, checked by the launcher in this order (src/cuda/attention/sm90.rs):
//   grid        x from 1 to ceil(T / queries) NH B, which is below 2^31; y = z = 1; block THREADS;
//               SHARED_BYTES of shared memory
//   sizes       tokens >= 1, any; heads >= 1; images >= 1
//   maps        q, kv: qkv as [B][T][3 C], rows qkv_pitch and images T qkv_pitch apart, in boxes of 64 columns,
//               64 rows (q) and 112 (kv); 128-byte swizzle. The driver wants 16-byte alignment of all of that
//   out         16-byte aligned; out_pitch a multiple of 8, >= 64 heads
//   scale       log2(e) / 8, or log2(e) where Q has been divided by 8; positive, finite
//   aliasing    none
// Launches may overlap: qkv and out are touched only after grid_wait.
//
// Formula and numerics: attention.cuh; both entries give the same bits. Source: the schedule of the second entry
// is FlashAttention-3's (arXiv 2407.08608, section 3.2); that of the first has the scores half a tile earlier.

#include "attention.cuh"
#include "ptx_sm90.cuh"

namespace {

constexpr int KEYS = 112;          // of a tile: 56 f32 of scores per lane
constexpr int GROUP_QUERIES = 64;  // m of wgmma
constexpr int STAGES = 4;          // of K and of V; of Q there are two
constexpr int GROUP_WARPS = WARP_GROUP / WARP;
constexpr int TILE_BYTES = KEYS * ROW_BYTES, GROUP_BYTES = GROUP_QUERIES * ROW_BYTES;

static_assert(KEYS % 16 == 0 && KEYS <= 256, "n of wgmma, k of P V, and rows of a box");
static_assert(TILE_BYTES % 1024 == 0 && GROUP_BYTES % 1024 == 0, "where tiles of the 128-byte swizzle begin");

// GROUPS: consumers.
template <int GROUPS> constexpr int QUERIES = GROUPS * GROUP_QUERIES;
template <int GROUPS> constexpr int THREADS = (1 + GROUPS) * WARP_GROUP;
constexpr int MBARRIERS = 2 * (2 + STAGES + STAGES);
template <int GROUPS>
constexpr int SHARED_BYTES = 1024 + 2 * GROUPS * GROUP_BYTES + 2 * STAGES * TILE_BYTES + MBARRIERS * 8;
static_assert(SHARED_BYTES<3> <= 232448, "227 KB is what sm_90 gives a block");

using Scores = float[KEYS / 2];              // S, then P
using Fragments = unsigned[KEYS / 16][4];    // P in fp16
using Output = float[HS / 2];                // O

// A stage of a ring, and the parity of the round.
template <int COUNT> struct Place {
    int stage = 0, parity = 0;
    PTX_INLINE void advance() {
        stage++;
        if (stage == COUNT) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// A ring of COUNT tiles of BYTES: filled by one thread, released by each warp that multiplies.
template <int COUNT, int BYTES> struct Ring {
    unsigned char *tiles;
    Mbarrier *full, *empty;  // [COUNT]

    PTX_INLINE void init(int readers) const {
        for (int i = 0; i < COUNT; i++) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], readers);
        }
    }
    PTX_INLINE unsigned char *tile(Place<COUNT> at) const { return tiles + at.stage * BYTES; }
    // Until the stage may be written; all of its bytes are then expected.
    PTX_INLINE Mbarrier *fill(Place<COUNT> at) const {
        mbarrier_wait(&empty[at.stage], at.parity ^ 1);
        mbarrier_arrive_expect(&full[at.stage], BYTES);
        return &full[at.stage];
    }
    PTX_INLINE void await(Place<COUNT> at) const { mbarrier_wait(&full[at.stage], at.parity); }
    PTX_INLINE void release(Place<COUNT> &at) const {
        if (lane() == 0) {
            mbarrier_arrive(&empty[at.stage]);
        }
        at.advance();
    }
};

template <int GROUPS> struct Rings {
    Ring<2, GROUPS * GROUP_BYTES> q;  // [2][queries][64]
    Ring<STAGES, TILE_BYTES> k, v;    // [STAGES][KEYS][64]

    PTX_INLINE explicit Rings(unsigned char *shared) {
        q.tiles = align_1024(shared);
        k.tiles = q.tiles + 2 * GROUPS * GROUP_BYTES;
        v.tiles = k.tiles + STAGES * TILE_BYTES;
        q.full = reinterpret_cast<Mbarrier *>(v.tiles + STAGES * TILE_BYTES);
        q.empty = q.full + 2;
        k.full = q.empty + 2, k.empty = k.full + STAGES;
        v.full = k.empty + STAGES, v.empty = v.full + STAGES;
    }
};

// What there is to do, and where it goes.
struct Work {
    fp16 *out;  // [B T, pitch]
    int tokens, heads, tasks, pitch;
    float scale;
};

// The queries from `query` on of one head of one image.
struct Task {
    int query, head, image;
};
template <int GROUPS> PTX_INLINE Task task_at(const Work &work, int index) {
    const int tiles = ceil_div(work.tokens, QUERIES<GROUPS>), pair = index / tiles;
    return Task{index % tiles * QUERIES<GROUPS>, pair % work.heads, pair / work.heads};
}

// ----------------------------------------------------------------------------------------------------------
// The producer.

template <int GROUPS>
PTX_INLINE void produce(const Rings<GROUPS> &to, const TensorMap *q, const TensorMap *kv, const Work &work) {
    const int width = work.heads * HS;
    Place<2> q_at;
    Place<STAGES> at;  // of K and V
    for (int i = block_x(); i < work.tasks; i += grid_x()) {
        const Task task = task_at<GROUPS>(work, i);
        const int column = task.head * HS;
        Mbarrier *full = to.q.fill(q_at);
        for (int g = 0; g < GROUPS; g++) {
            tma_load_3d(to.q.tile(q_at) + g * GROUP_BYTES, q, column, task.query + g * GROUP_QUERIES,
                        task.image, full);
        }
        q_at.advance();
        for (int key = 0; key < work.tokens; key += KEYS) {
            full = to.k.fill(at);
            tma_load_3d(to.k.tile(at), kv, width + column, key, task.image, full);
            full = to.v.fill(at);
            tma_load_3d(to.v.tile(at), kv, 2 * width + column, key, task.image, full);
            at.advance();
        }
    }
}

// ----------------------------------------------------------------------------------------------------------
// A consumer.

// O / sum to memory: the four lanes of a row exchange what makes 16 bytes of it for each.
PTX_INLINE void store(fp16 *out, const Output &o, const float (&sum)[2], int row, int tokens, int pitch) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float factor = inverse(sum[half]);
        unsigned r[2][4];  // two columns of chunk 4 i + j
#pragma unroll
        for (int j = 0; j < HS / 8; j++) {
            const int at = j * 4 + 2 * half;
            r[j / 4][j % 4] = pack_fp16x2(o[at] * factor, o[at + 1] * factor);
        }
        transpose_quad(r[0]);  // now chunk lane % 4
        transpose_quad(r[1]);  // and 4 further
        if (row + half * 8 < tokens) {
            fp16 *to = out + static_cast<long long>(row + half * 8) * pitch + lane() % 4 * CHUNK;
            store_16(to, vec16{r[0][0], r[0][1], r[0][2], r[0][3]});
            store_16(to + 4 * CHUNK, vec16{r[1][0], r[1][1], r[1][2], r[1][3]});
        }
    }
}

// 64 queries of each task. ptxas lets wgmmas overlap only if nothing else touches the sums of any of them from the
// first that is issued to the wait for the last: so O shrinks before the next scores are issued, not beside them,
// and every path issues the same.
template <int GROUPS> struct Consumer {
    const Rings<GROUPS> &from;
    const Work &work;
    unsigned long long q_tiles, k_tiles, v_tiles;  // of stage 0
    int group;                                     // 0 ..
    int task, key;                                 // of the tile in S
    Place<2> q_at;
    Place<STAGES> k_at, v_at;
    RowPair rows;
    float decay[2];  // of what is in O
    Output o;
    Fragments p;

    PTX_INLINE Consumer(const Rings<GROUPS> &rings, const Work &all, int which)
        : from(rings), work(all), q_tiles(descriptor_k_major(rings.q.tiles + which * GROUP_BYTES)),
          k_tiles(descriptor_k_major(rings.k.tiles)), v_tiles(descriptor_n_major(rings.v.tiles, 0)), group(which),
          task(block_x()), key(0) {}

    // S = Q K^T of the next tile; `first`: of its task.
    PTX_INLINE void issue_scores(Scores &s, bool first) {
        if (first) {
            from.q.await(q_at);
        }
        from.k.await(k_at);
        const auto a = descriptor_after(q_tiles, q_at.stage * GROUPS * GROUP_BYTES);
        const auto b = descriptor_after(k_tiles, k_at.stage * TILE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < HS / 16; d++) {
            wgmma_ss<KEYS>(s, descriptor_after(a, d * 32), descriptor_after(b, d * 32), d > 0);
        }
        wgmma_commit();
    }

    // O += P V; O = P V for the first keys.
    PTX_INLINE void issue_output() {
        from.v.await(v_at);
        const auto b = descriptor_after(v_tiles, v_at.stage * TILE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            wgmma_rs<HS, true>(o, p[step], descriptor_after(b, step * 16 * ROW_BYTES), step > 0 || key > 0);
        }
        wgmma_commit();
    }

    // The scores are there.
    PTX_INLINE void find_tops(Scores &s) {
        from.k.release(k_at);
        if (key == 0) {
            rows = new_rows();
        }
        if (key + KEYS >= work.tokens) {
            from.q.release(q_at);
            if (key + KEYS > work.tokens) {
                mask(s, work.tokens - key);
            }
        }
        decay[0] = raise_top(s, rows, 0, work.scale);
        decay[1] = raise_top(s, rows, 1, work.scale);
    }

    // Scores of 16 keys become P.
    PTX_INLINE void weigh(Scores &s, int step) {
        exponentiate(s, rows, 0, work.scale, step * 8, step * 8 + 8);
        exponentiate(s, rows, 1, work.scale, step * 8, step * 8 + 8);
    }

    // O is there, and P with it free.
    PTX_INLINE void wait_output() {
        wgmma_wait<0>(o);
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            wgmma_keep(p[step]);
        }
        from.v.release(v_at);
    }

    PTX_INLINE void finish(int index, const float (&sum)[2]) {
        const Task t = task_at<GROUPS>(work, index);
        const int row = t.query + group * GROUP_QUERIES + warp() % GROUP_WARPS * 16 + lane() / 4;
        fp16 *out = work.out + static_cast<long long>(t.image) * work.tokens * work.pitch + t.head * HS;
        store(out, o, sum, row, work.tokens, work.pitch);
    }

    // From P V of this tile under way to an O that the next one can be added to. `s`: the next one's scores, under
    // way before it; `meanwhile`: what else there is to do with them until O is there.
    template <class F> PTX_INLINE void turn(Scores &s, F meanwhile) {
        const float sum[2] = {rows.sum[0], rows.sum[1]};
        const int done = task;
        key += KEYS;
        const bool last = key >= work.tokens;
        if (last) {
            key = 0;
            task += grid_x();
        }
        wgmma_wait<1>(s);
        find_tops(s);
        meanwhile();
        wait_output();
        if (last) {
            finish(done, sum);
        }
        shrink(o, 0, decay[0]);
        shrink(o, 1, decay[1]);
    }

    PTX_INLINE void begin(Scores &s) {
        issue_scores(s, true);
        wgmma_wait<0>(s);
        find_tops(s);
    }
    PTX_INLINE void weigh_and_pack(Scores &s) {
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            weigh(s, step);
            fragment(p[step], s, step);
        }
    }
    PTX_INLINE void end() {
        issue_output();
        wait_output();
        finish(task, rows.sum);
    }

    // A tile, with the next one's scores under its exponentials.
    PTX_INLINE void step_ahead(Scores &s, Scores &next) {
        issue_scores(next, key + KEYS >= work.tokens);
        weigh_and_pack(s);
        issue_output();
        turn(next, [] {});
    }
    PTX_INLINE void run_ahead(int tiles) {
        Scores a, b;  // take turns; the last tile is in a
        int left = tiles - 1;
        if (left % 2 == 0) {
            begin(a);
        } else {
            begin(b);
        }
#pragma unroll 1
        while (left > 0) {
            if (left % 2 == 0) {
                step_ahead(a, b);
                left--;
            }
            step_ahead(b, a);
            left--;
        }
        weigh_and_pack(a);
        end();
    }

    // With one S: the next one's scores and P V are issued together.
    PTX_INLINE void run_lean(int tiles) {
        Scores s;
        begin(s);
        weigh_and_pack(s);
#pragma unroll 1
        for (int left = tiles - 1; left > 0; left--) {
            issue_scores(s, key + KEYS >= work.tokens);
            issue_output();
            turn(s, [&] {
#pragma unroll
                for (int step = 0; step < KEYS / 16; step++) {
                    weigh(s, step);
                }
            });
#pragma unroll
            for (int step = 0; step < KEYS / 16; step++) {
                fragment(p[step], s, step);
            }
        }
        end();
    }
};

// ----------------------------------------------------------------------------------------------------------

template <int GROUPS, bool AHEAD, int PRODUCER_REGISTERS, int CONSUMER_REGISTERS>
PTX_INLINE void attend(const TensorMap *q, const TensorMap *kv, const Work &work) {
    static_assert((PRODUCER_REGISTERS + GROUPS * CONSUMER_REGISTERS) * WARP_GROUP <=
                      65536 / THREADS<GROUPS> / 8 * 8 * THREADS<GROUPS>,
                  "registers are moved, not made");
    PTX_SMEM(unsigned char, shared);
    const Rings<GROUPS> rings(shared);
    if (thread_x() == 0) {
        tma_prefetch(q);
        tma_prefetch(kv);
        rings.q.init(GROUPS * GROUP_WARPS);
        rings.k.init(GROUPS * GROUP_WARPS);
        rings.v.init(GROUPS * GROUP_WARPS);
        fence_mbarrier_init();
    }
    block_barrier();  // the mbarriers are there for all
    grid_wait();
    grid_launch_dependents();  // they find no room beside this block: whenever it ends is soon enough
    const int group = shuffle(thread_x() / WARP_GROUP, 0);  // the same for a warp, as ptxas now sees
    if (group == 0) {
        set_registers_dec<PRODUCER_REGISTERS>();
        if (thread_x() == 0) {
            produce<GROUPS>(rings, q, kv, work);
        }
    } else {
        set_registers_inc<CONSUMER_REGISTERS>();
        Consumer<GROUPS> consumer(rings, work, group - 1);
        const int tiles = ceil_div(work.tasks - block_x(), grid_x()) * ceil_div(work.tokens, KEYS);
        if (AHEAD) {
            consumer.run_ahead(tiles);
        } else {
            consumer.run_lean(tiles);
        }
    }
}

template <int GROUPS>
PTX_INLINE Work work_of(fp16 *out, int tokens, int heads, int images, int pitch, float scale) {
    return Work{out, tokens, heads, ceil_div(tokens, QUERIES<GROUPS>) * heads * images, pitch, scale};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS<2>) attention_sm90(
    fp16 *out, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap kv, int tokens, int heads,
    int images, int out_pitch, float scale) {
    attend<2, true, 24, 240>(&q, &kv, work_of<2>(out, tokens, heads, images, out_pitch, scale));
}
extern "C" __global__ void __launch_bounds__(THREADS<3>) attention_sm90_192(
    fp16 *out, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap kv, int tokens, int heads,
    int images, int out_pitch, float scale) {
    attend<3, false, 32, 160>(&q, &kv, work_of<3>(out, tokens, heads, images, out_pitch, scale));
}
