//! The register tile: the one loop in which the tower spends its time.
//!
//! ```text
//!   A [MR, K] rows A_STRIDE apart        B [K, NR] rows ldb apart        acc [MR, NR] in registers
//!
//!   a₀ ─ ─ k ─ ─ ▶                       b₀ b₁ … b_NR                    acc[i] += a[i, k] · b[k]
//!   a₁ ─ ─ k ─ ─ ▶                       │  k                            for k = 0, 1, 2, …
//!   …                                    ▼
//! ```
//!
//! Each element of A is broadcast and meets two vectors of B. An element of the result is one chain of
//! multiply-adds in the order of k, begun from what `acc` holds: the bits of a row depend on that row of A and
//! on B alone, not on where the row stands in a tile, how wide the tile is, or how K was cut into pieces.

use super::simd::Simd;

/// Elements added to a row of A, so that the rows of a tile do not fall into the same sets of the L1 cache.
pub(crate) const PAD: usize = 16;

/// Accumulators of a tile of `MR × NR`.
pub(crate) type Acc<S, const MR: usize> = [[<S as Simd>::V; 2]; MR];

/// A tile of zeros.
#[inline(always)]
pub(crate) fn zeros<S: Simd, const MR: usize>(s: S) -> Acc<S, MR> {
    [[s.splat(0.0); 2]; MR]
}

/// Steps between two rounds of prefetching: the fp16 of one row's so many elements are a cache line.
const ROUND: usize = 32;

/// Memory that will be needed soon, brought nearer while the tile is at work: a cache line from each every
/// [`ROUND`] steps.
#[derive(Clone, Copy)]
pub(crate) struct Ahead(pub(crate) [*const u8; 4]);

/// Adds `A · B` over `k` steps to `acc` and returns it.
///
/// `a_stride` should be a constant where it is called: the rows of A are then offsets within instructions.
///
/// # Safety
/// `a` is readable for `MR` rows of `k` elements, `a_stride` apart; `b` for `k` rows of `NR`, `ldb` apart.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const MR: usize>(
    s: S,
    k: usize,
    (a, a_stride): (*const f32, usize),
    (b, ldb): (*const f32, usize),
    ahead: Option<Ahead>,
    mut acc: Acc<S, MR>,
) -> Acc<S, MR> {
    let (mut a, mut b) = (a, b);
    let mut done = 0;
    while done < k {
        let mut steps = k - done;
        if let Some(Ahead(ahead)) = ahead {
            for from in ahead {
                s.prefetch(from.wrapping_add(2 * done));
            }
            steps = steps.min(ROUND);
        }
        for _ in 0..steps {
            // SAFETY: one of `k` steps; the caller vouches for its elements.
            unsafe {
                let b0 = s.load(b);
                let b1 = s.load(b.add(S::LANES));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = s.splat(*a.add(i * a_stride));
                    acc[0] = s.mul_add(x, b0, acc[0]);
                    acc[1] = s.mul_add(x, b1, acc[1]);
                }
            }
            a = a.wrapping_add(1);
            b = b.wrapping_add(ldb);
        }
        done += steps;
    }
    acc
}

/// Loads a tile stored row after row, `[MR, NR]`.
///
/// # Safety
/// `from` is readable for `MR · NR` elements.
#[inline(always)]
pub(crate) unsafe fn load<S: Simd, const MR: usize>(s: S, from: *const f32) -> Acc<S, MR> {
    let mut acc = zeros::<S, MR>(s);
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: row i of MR.
        *acc = unsafe { [s.load(from.add(i * S::NR)), s.load(from.add(i * S::NR + S::LANES))] };
    }
    acc
}

/// Stores a tile, its rows `stride` elements apart.
///
/// # Safety
/// `to` is writable for `MR` rows of `NR` elements, `stride` apart.
#[inline(always)]
pub(crate) unsafe fn store<S: Simd, const MR: usize>(s: S, to: *mut f32, stride: usize, acc: Acc<S, MR>) {
    for (i, acc) in acc.into_iter().enumerate() {
        // SAFETY: row i of MR.
        unsafe {
            s.store(to.add(i * stride), acc[0]);
            s.store(to.add(i * stride + S::LANES), acc[1]);
        }
    }
}

/// Calls a function that is generic over `MR` with the tile height of the instruction set.
macro_rules! with_mr {
    ($simd:ty, $f:ident($($arg:expr),* $(,)?)) => {
        match <$simd as $crate::cpu::simd::Simd>::MR {
            12 => $f::<$simd, 12>($($arg),*),
            6 => $f::<$simd, 6>($($arg),*),
            4 => $f::<$simd, 4>($($arg),*),
            height => unreachable!("no tile of {height} rows"),
        }
    };
}
pub(crate) use with_mr;
