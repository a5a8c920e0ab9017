//! Launching kernels: one unsafe function, and what makes it hold.
//!
//! A kernel takes its arguments as `void **`, which hides a wrong count, order or size. So each launcher
//! file declares its kernel's parameters once, as a `#[repr(C)]` struct made by [`parameters!`]; when the
//! kernel is loaded, offset and size of every field are compared with what the module says of the compiled
//! kernel (`cuFuncGetParamInfo`). A launch then passes the addresses of the fields.
//!
//! Threads per block and dynamic shared memory are a kernel's own, in its [`Entry`]; the grid is the
//! launch's.
//!
//! # Launches that overlap
//! A programmatic launch may begin before the launch before it in its stream is over, in a captured graph too. Its kernel
//! says with `grid_wait` (`kernels/ptx_sm90.cuh`) from where on it needs that one; all it touches earlier must be what
//! no launch writes meanwhile, back to the last one that is not programmatic. The emulated device holds kernels to it.
//! Only devices of compute capability 9.0 and later take such launches. `IMAGEHERE_CUDA_PDL=0` makes none, to compare.
//!
//! # Debugging
//! `IMAGEHERE_CUDA_SYNC=1` waits after every launch, so that the error names the kernel that failed; no launch is
//! programmatic then. Every launch is a `tracing` event of level TRACE.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};

use super::driver::attributes::Attributes;
use super::driver::library::calls::{cuLaunchKernel, cuStreamSynchronize};
use super::driver::{Function, Module, Stream};
use crate::error::{Error, Result};

/// What every launch of a kernel has in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The kernel's name.
    pub(crate) name: &'static str,
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub(crate) shared: u32,
    /// The launch may begin before the one before it is over: the kernel has a `grid_wait`, the device allows it.
    pub(crate) programmatic: bool,
    /// Blocks of a cluster, along x; 1: there are none.
    pub(crate) cluster: u32,
}

impl Entry {
    /// Launches that wait for what stands before them, of blocks on their own.
    pub(crate) const fn new(name: &'static str, threads: u32, shared: u32) -> Self {
        Self { name, threads, shared, programmatic: false, cluster: 1 }
    }

    /// The same kernel, launched so that it may overlap with the launch before it.
    pub(crate) const fn programmatic(self) -> Self {
        Self { programmatic: true, ..self }
    }

    /// The same kernel, in clusters of so many blocks along x.
    pub(crate) const fn cluster(self, blocks: u32) -> Self {
        Self { cluster: blocks, ..self }
    }
}

/// One parameter of a kernel, as Rust has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parameter {
    pub(crate) name: &'static str,
    pub(crate) offset: usize, // bytes
    pub(crate) size: usize,   // bytes
}

/// The parameters of a kernel, in order.
///
/// # Safety
/// `LAYOUT` must list all fields of the type, with their offsets and sizes.
pub(crate) unsafe trait Parameters: Copy {
    const LAYOUT: &'static [Parameter];
}

/// Declares a kernel's parameters as a struct: fields in the kernel's order.
macro_rules! parameters {
    ($(#[$about:meta])* $vis:vis struct $name:ident { $($(#[$note:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        $vis struct $name {
            $($(#[$note])* $vis $field: $type,)*
        }

        // SAFETY: the list is made from the fields.
        unsafe impl $crate::cuda::launch::Parameters for $name {
            const LAYOUT: &'static [$crate::cuda::launch::Parameter] = &[$(
                $crate::cuda::launch::Parameter {
                    name: stringify!($field),
                    offset: std::mem::offset_of!($name, $field),
                    size: size_of::<$type>(),
                },
            )*];
        }
    };
}
pub(super) use parameters;

/// Refuses a launch that breaks the kernel's contract; the message names the kernel.
macro_rules! contract {
    ($kernel:expr, $holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err($crate::cuda::launch::broken($kernel, format!($($message)+)));
        }
    };
}
pub(super) use contract;

/// The error of a broken launch contract.
pub(crate) fn broken(kernel: &str, problem: String) -> Error {
    Error::Internal(format!("launch of {kernel}: {problem}"))
}

/// A size as the kernels take it: a non-negative 32-bit integer.
pub(crate) fn int(kernel: &str, what: &str, size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| broken(kernel, format!("{what} is {size}, beyond 32 bits")))
}

/// A loaded kernel whose parameters are those of `P`.
#[derive(Debug)]
pub(crate) struct Kernel<P> {
    function: Function,
    entry: Entry,
    parameters: PhantomData<fn(P)>,
}

impl<P: Parameters> Kernel<P> {
    /// Finds a kernel in a module and compares what both sides say about it.
    ///
    /// # Errors
    /// [`Error::Internal`] if it is not there or its parameters are others; [`Error::Device`] if this device
    /// cannot run blocks of this size.
    pub(crate) fn load(module: &Arc<Module>, entry: Entry) -> Result<Self> {
        let function = module.function(entry.name)?;
        for (i, Parameter { name, offset, size }) in P::LAYOUT.iter().enumerate() {
            let compiled = function.parameter(i)?;
            contract!(
                entry.name,
                compiled == Some((*offset, *size)),
                "parameter {i} (`{name}`) is {size} bytes at {offset} here, {compiled:?} (offset, size) in \
                 the kernel"
            );
        }
        let count = P::LAYOUT.len();
        let further = function.parameter(count)?;
        contract!(entry.name, further.is_none(), "the kernel has more than {count} parameters");
        let most = function.threads_per_block()?;
        contract!(entry.name, entry.threads as usize <= most, "{} threads, at most {most}", entry.threads);
        if entry.shared > 0 {
            function.allow_shared(entry.shared as usize)?;
        }
        Ok(Self { function, entry, parameters: PhantomData })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &'static str {
        self.entry.name
    }
}

/// Enqueues a kernel: the only launch in this crate.
///
/// # Safety
/// The kernel's launch contract must hold for `grid` and `parameters`, and all memory that it reaches through
/// them must be as [`Span::new`](super::driver::Span::new) says.
///
/// # Errors
/// [`Error::Internal`] if the grid is empty or too large; [`Error::Device`] if the driver refuses the launch,
/// or, when launches are waited for, if the kernel fails.
pub(crate) unsafe fn launch<P: Parameters>(
    stream: &Stream,
    kernel: &Kernel<P>,
    grid: [usize; 3],
    parameters: &P,
) -> Result<()> {
    const MOST: usize = 16;
    const { assert!(P::LAYOUT.len() <= MOST, "more parameters than there are places") };
    let Entry { name, threads, shared, programmatic, cluster } = kernel.entry;
    let fits = grid[0] <= i32::MAX as usize && grid[1] <= 0xffff && grid[2] <= 0xffff;
    contract!(name, fits && !grid.contains(&0), "a grid of {grid:?} blocks");
    let clusters = cluster > 0 && grid[0].is_multiple_of(cluster as usize);
    contract!(name, clusters, "a grid of {grid:?} blocks in clusters of {cluster}");
    let [x, y, z] = grid.map(|blocks| blocks as u32);
    let base = std::ptr::from_ref(parameters).cast::<u8>();
    let mut addresses = [std::ptr::null_mut::<c_void>(); MOST];
    for (address, parameter) in addresses.iter_mut().zip(P::LAYOUT) {
        *address = base.wrapping_add(parameter.offset).cast_mut().cast();
    }
    let programmatic = programmatic && !waits() && overlaps();
    tracing::trace!(kernel = name, ?grid, threads, shared, programmatic, cluster, "launch");
    let raw = kernel.function.raw();
    // Asked before, so that the next call after the launch is the wait: it is the next call that gets the
    // error.
    let wait = waits() && !stream.is_capturing()?;
    let what = || format!("{name} in {x}x{y}x{z} blocks of {threads} threads");
    let attributes = Attributes { programmatic, cluster };
    let call = if attributes.any() { "cuLaunchKernelEx" } else { "cuLaunchKernel" };
    stream.run(
        || format!("{call} of {}", what()),
        // SAFETY: the parameters were compared with the kernel's when it was loaded, and are copied by the
        // call; the rest is the caller's promise.
        |stream| unsafe {
            let addresses = addresses.as_mut_ptr();
            if attributes.any() {
                return attributes.launch(raw, [x, y, z], threads, shared, stream, addresses);
            }
            cuLaunchKernel(raw, x, y, z, threads, 1, 1, shared, stream, addresses, std::ptr::null_mut())
        },
    )?;
    stream.count_launch();
    if wait {
        // SAFETY: the stream is alive.
        stream.run(|| format!("kernel {}", what()), |stream| unsafe { cuStreamSynchronize(stream) })?;
    }
    Ok(())
}

/// True if every launch is waited for (`IMAGEHERE_CUDA_SYNC=1`). Graphs are no use then.
pub(crate) fn waits() -> bool {
    static WAITS: OnceLock<bool> = OnceLock::new();
    *WAITS.get_or_init(|| std::env::var_os("IMAGEHERE_CUDA_SYNC").is_some_and(|value| value == "1"))
}

/// False if no launch shall be programmatic (`IMAGEHERE_CUDA_PDL=0`).
fn overlaps() -> bool {
    static OVERLAPS: OnceLock<bool> = OnceLock::new();
    *OVERLAPS.get_or_init(|| std::env::var_os("IMAGEHERE_CUDA_PDL").is_none_or(|value| value != "0"))
}
