//! AMX: a product of 16 × 32 by 32 × 16 bf16 in one instruction, summed in f32 (Sapphire Rapids and later).
//!
//! Everything that knows these instructions is in this file; the compiler does not know the tile registers, so nothing
//! but the assembly here touches them.
//!
//! ```text
//!   A, a step of k:  upper 0 │ upper 1 │ lower 0 │ lower 1      tiles of [16 rows][32 k], 1 KiB each
//!   B, a step of k:  upper 0 │ upper 1 │ lower 0 │ lower 1      tiles of [16 pairs of k][16 columns][2]
//!
//!   tmm0 += A₀ B₀    tmm1 += A₀ B₁        A in tmm4, tmm5
//!   tmm2 += A₁ B₀    tmm3 += A₁ B₁        B in tmm6, tmm7
//!
//!   a step: upper · upper, lower · upper, upper · lower: 12 products for 10 loads; where sums must be exact, lower · lower
//!   as well; 8 products for 6 loads where B is bf16. A product takes the unit 16 cycles and a load 8, so the loads hide
//!   behind the products as long as the tiles come from L2 or nearer.
//! ```
//!
//! # Source
//! Intel, Architecture Instruction Set Extensions Programming Reference, chapter 3, TDPBF16PS.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::LazyLock;

use super::tiles::{BLOCK, SPLIT};

/// What LDTILECFG reads: palette 1, eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// All eight tiles as large as they can be.
static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Returns whether the CPU has AMX-BF16 and the operating system lets this process use it; asks for it once.
pub(super) fn available() -> bool {
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| has_amx() && permitted());
    *AVAILABLE
}

/// Asks the CPU: AMX-TILE, AMX-BF16, and that their registers are part of what is saved between threads.
fn has_amx() -> bool {
    const OSXSAVE: u32 = 1 << 27; // leaf 1, ECX
    const AMX_BF16: u32 = 1 << 22; // leaf 7, EDX
    const AMX_TILE: u32 = 1 << 24;
    const TILE_STATE: u64 = 0b11 << 17; // XCR0: configuration and data
    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: register 0 is there wherever XGETBV is.
        unsafe { _xgetbv(0) }
    }
    let edx = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 };
    edx & AMX_BF16 != 0
        && edx & AMX_TILE != 0
        && __cpuid(1).ecx & OSXSAVE != 0
        // SAFETY: OSXSAVE says that XGETBV is there.
        && unsafe { saved() } & TILE_STATE == TILE_STATE
}

/// Asks Linux for the tile registers, for all threads of the process: they make its saved state 8 KiB larger.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: a request without pointers; it changes what the process may use, not what it does.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Other systems are not asked.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The calling thread's tiles, configured for as long as this lives.
#[derive(Debug)]
pub(super) struct Configured(());

impl Configured {
    /// Configures the tiles.
    ///
    /// # Safety
    /// AMX is [`available`].
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        // SAFETY: the caller has AMX; the configuration is a valid one.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly, preserves_flags));
        }
        Self(())
    }
}

impl Drop for Configured {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: `new` had AMX. An idle thread with live tiles would be dearer to switch.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// [`super::Simd::add_products`].
///
/// # Safety
/// As there; the CPU has AMX and a [`Configured`] of this thread lives.
#[inline(always)]
pub(super) unsafe fn add_products<const TERMS: usize>(
    steps: usize,
    (mut a, mut b): (*const u16, *const u16),
    acc: *mut f32,
    fresh: bool,
    mut meanwhile: impl FnMut(usize, usize),
) {
    // SAFETY: within A and B for so many steps, and within the four tiles of `acc`, by the caller's promise.
    unsafe {
        if fresh {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem, preserves_flags)
            );
        } else {
            asm!(
                "tileloadd tmm0, [{acc} + {row}*1]",
                "tileloadd tmm1, [{acc} + {row}*1 + 1024]",
                "tileloadd tmm2, [{acc} + {row}*1 + 2048]",
                "tileloadd tmm3, [{acc} + {row}*1 + 3072]",
                acc = in(reg) acc,
                row = in(reg) 64usize,
                options(nostack, readonly, preserves_flags)
            );
        }
        // A product of 32 × 32 by 32 × 32, after the loads of what it needs that is not there.
        macro_rules! product {
            ($($load:literal),*) => {
                asm!(
                    $($load,)*
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    a = in(reg) a,
                    b = in(reg) b,
                    row = in(reg) 64usize,
                    options(nostack, readonly, preserves_flags)
                )
            };
        }
        for step in 0..steps {
            product!(
                "tileloadd tmm6, [{b} + {row}*1]",
                "tileloadd tmm4, [{a} + {row}*1]",
                "tileloadd tmm7, [{b} + {row}*1 + 1024]",
                "tileloadd tmm5, [{a} + {row}*1 + 1024]"
            );
            meanwhile(step, 0);
            product!(
                "/* {b} */",
                "tileloadd tmm4, [{a} + {row}*1 + 2048]",
                "tileloadd tmm5, [{a} + {row}*1 + 3072]"
            );
            meanwhile(step, 1);
            if TERMS > 2 {
                product!(
                    "tileloadd tmm6, [{b} + {row}*1 + 2048]",
                    "tileloadd tmm4, [{a} + {row}*1]",
                    "tileloadd tmm7, [{b} + {row}*1 + 3072]",
                    "tileloadd tmm5, [{a} + {row}*1 + 1024]"
                );
                meanwhile(step, 2);
            }
            if TERMS > 3 {
                product!(
                    "/* {b} */",
                    "tileloadd tmm4, [{a} + {row}*1 + 2048]",
                    "tileloadd tmm5, [{a} + {row}*1 + 3072]"
                );
                meanwhile(step, 3);
            }
            a = a.wrapping_add(SPLIT);
            b = b.wrapping_add(if TERMS == 2 { BLOCK } else { SPLIT });
        }
        asm!(
            "tilestored [{acc} + {row}*1], tmm0",
            "tilestored [{acc} + {row}*1 + 1024], tmm1",
            "tilestored [{acc} + {row}*1 + 2048], tmm2",
            "tilestored [{acc} + {row}*1 + 3072], tmm3",
            acc = in(reg) acc,
            row = in(reg) 64usize,
            options(nostack, preserves_flags)
        );
    }
}
