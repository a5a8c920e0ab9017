//! Memory that starts on a cache line: for a call, and for a thread, to use again and again.

use std::cell::RefCell;

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

/// A cache line.
#[derive(Clone, Copy, Debug, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Where the numbers are.
#[derive(Debug)]
enum Memory {
    Lines(Vec<Line>),
    /// For what fills a quarter of a huge page or more, huge pages, where the system has them: weights and panels are read front
    /// to back, and looking up small pages took 3 % of that. The bytes begin at the offset.
    Huge(MmapMut, usize),
}

impl Memory {
    /// Takes `bytes` of zeros from the system, which gives them when they are touched; `None` if there are not so many.
    fn zeroed(bytes: usize) -> Option<Self> {
        if cfg!(target_os = "linux") && bytes >= HUGE / 4 {
            let len = bytes.checked_next_multiple_of(HUGE)?;
            let map = MmapMut::map_anon(len.checked_add(HUGE)?).ok()?;
            let offset = map.as_ptr().align_offset(HUGE);
            if offset < HUGE {
                #[cfg(target_os = "linux")]
                let _ = map.advise_range(memmap2::Advice::HugePage, offset, len); // a wish
                return Some(Self::Huge(map, offset));
            }
        }
        Some(Self::Lines(bytemuck::allocation::try_zeroed_vec(bytes.div_ceil(size_of::<Line>())).ok()?))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Lines(lines) => bytemuck::cast_slice(lines),
            Self::Huge(map, offset) => &map[*offset..],
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Lines(lines) => bytemuck::cast_slice_mut(lines),
            Self::Huge(map, offset) => &mut map[*offset..],
        }
    }
}

/// A growing buffer of numbers.
#[derive(Debug)]
pub(crate) struct Scratch {
    memory: Memory,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { memory: Memory::Lines(Vec::new()) }
    }
}

impl Scratch {
    /// Makes a buffer of `len` zeros; `None` if there is no memory for them.
    pub(crate) fn zeroed<T: Pod>(len: usize) -> Option<Self> {
        Some(Self { memory: Memory::zeroed(len.checked_mul(size_of::<T>())?)? })
    }

    /// Returns `len` numbers with whatever values they have.
    ///
    /// # Panics
    /// If there is no memory for them.
    pub(crate) fn take<T: Pod>(&mut self, len: usize) -> &mut [T] {
        let bytes = len * size_of::<T>();
        if self.memory.bytes().len() < bytes {
            self.memory = Memory::Lines(Vec::new()); // the old one is free before there is a new one
            self.memory = Memory::zeroed(bytes).unwrap_or_else(|| panic!("no memory for {bytes} bytes"));
        }
        bytemuck::cast_slice_mut(&mut self.memory.bytes_mut()[..bytes])
    }

    /// Returns the first `len` numbers.
    ///
    /// # Panics
    /// If there are not so many.
    pub(crate) fn get<T: Pod>(&self, len: usize) -> &[T] {
        bytemuck::cast_slice(&self.memory.bytes()[..len * size_of::<T>()])
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Lends `len` f32 of the calling thread's own, with whatever values they have.
///
/// `work` must not call rayon: a stolen task on this thread would ask for the same memory.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| work(scratch.take(len)))
}
