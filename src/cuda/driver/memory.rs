//! Memory of the device and pinned memory of the host, and typed places inside the former.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::CUresult;

use super::context::Context;
use super::library::calls::*;
use super::{device_error, remedy};
use crate::error::{Error, Result};

/// The address of a `T` in device memory. The host must not follow it.
#[repr(transparent)]
pub(crate) struct DevicePtr<T>(u64, PhantomData<fn(T) -> T>);

impl<T> DevicePtr<T> {
    /// For a kernel's argument that it does not read.
    pub(crate) const NULL: Self = Self::new(0);

    /// Takes an address as the driver or a caller gives it.
    pub(crate) const fn new(address: u64) -> Self {
        Self(address, PhantomData)
    }

    /// The address, in bytes.
    pub(crate) const fn address(self) -> u64 {
        self.0
    }

    /// The element `count` further.
    pub(crate) const fn add(self, count: usize) -> Self {
        Self::new(self.0 + (count * size_of::<T>()) as u64)
    }

    /// True if the address is a multiple of `bytes`.
    pub(crate) const fn is_aligned(self, bytes: u64) -> bool {
        self.0.is_multiple_of(bytes)
    }
}

// SAFETY: an integer.
unsafe impl<T> Zeroable for DevicePtr<T> {}
// SAFETY: as above, of one field.
unsafe impl<T: 'static> Pod for DevicePtr<T> {}

impl<T> Clone for DevicePtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DevicePtr<T> {}

impl<T> PartialEq for DevicePtr<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<T> fmt::Debug for DevicePtr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A stretch of device memory: `len` elements from an address. What it stands for is alive.
pub(crate) struct Span<T> {
    ptr: DevicePtr<T>,
    len: usize, // elements
}

impl<T> Span<T> {
    /// A stretch of no elements, for a kernel's argument that it does not read.
    pub(crate) const NONE: Self = Self { ptr: DevicePtr::NULL, len: 0 };

    /// Names a stretch of memory.
    ///
    /// # Safety
    /// It must stay allocated, with room for `len` elements, until every stream and graph that this span, or
    /// one cut from it, was given to has finished; and nobody else may write what they read, or touch what
    /// they write, without an event or the same stream between.
    pub(crate) const unsafe fn new(ptr: DevicePtr<T>, len: usize) -> Self {
        Self { ptr, len }
    }

    /// The address of the first element.
    pub(crate) const fn ptr(self) -> DevicePtr<T> {
        self.ptr
    }

    /// Elements.
    pub(crate) const fn len(self) -> usize {
        self.len
    }

    /// Some of the elements.
    ///
    /// # Errors
    /// [`Error::Internal`] if they are not all inside.
    pub(crate) fn slice(self, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > self.len {
            return Err(Error::Internal(format!("elements {range:?} of {} on the device", self.len)));
        }
        Ok(Self { ptr: self.ptr.add(range.start), len: range.end - range.start })
    }

    /// The same memory as elements of another type.
    ///
    /// # Errors
    /// [`Error::Internal`] if the address is not aligned for them.
    pub(crate) fn cast<U>(self) -> Result<Span<U>> {
        if !self.ptr.is_aligned(align_of::<U>() as u64) {
            return Err(Error::Internal(format!("device address {:?} is not aligned for its use", self.ptr)));
        }
        let len = self.len * size_of::<T>() / size_of::<U>();
        Ok(Span { ptr: DevicePtr::new(self.ptr.address()), len })
    }
}

impl<T> Clone for Span<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Span<T> {}

impl<T> fmt::Debug for Span<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{}", self.ptr, self.len)
    }
}

/// An allocation on the device; freed when dropped, after everything that uses it on the device.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    context: Arc<Context>,
    ptr: DevicePtr<u8>,
    bytes: usize,
}

impl DeviceMemory {
    /// No memory.
    pub(crate) fn none(context: &Arc<Context>) -> Self {
        Self { context: context.clone(), ptr: DevicePtr::NULL, bytes: 0 }
    }

    /// Allocates, if there is room: `None` says that there is not.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails in another way.
    pub(crate) fn if_room(context: &Arc<Context>, bytes: usize) -> Result<Option<Self>> {
        context.bind()?;
        let mut address = 0;
        // SAFETY: a place for one address.
        match unsafe { cuMemAlloc_v2(&mut address, bytes.max(1)) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            result => {
                context.check(|| format!("cuMemAlloc of {bytes} bytes"), result)?;
                Ok(Some(Self { context: context.clone(), ptr: DevicePtr::new(address), bytes }))
            }
        }
    }

    /// Allocates `bytes`, at an address that is a multiple of 256. What is there before the first write is
    /// anything.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room, with the numbers and `purpose`.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize, purpose: &str) -> Result<Self> {
        if let Some(memory) = Self::if_room(context, bytes)? {
            return Ok(memory);
        }
        context.count_shortage();
        let (free, total) = context.memory()?;
        Err(device_error(
            context.ordinal(),
            format!(
                "no room for {purpose}: {} are needed, {} of {} are free",
                mebibytes(bytes),
                mebibytes(free),
                mebibytes(total)
            ),
            remedy(CUresult::CUDA_ERROR_OUT_OF_MEMORY),
        ))
    }

    /// Bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The context it is in.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// All of it, as a span.
    ///
    /// # Safety
    /// As [`Span::new`]: this must outlive the use of the span on the device. Dropping it waits for what was
    /// enqueued before, so what counts is that nothing is enqueued after.
    pub(crate) unsafe fn span(&self) -> Span<u8> {
        // SAFETY: the allocation has so many bytes; the rest is the caller's promise.
        unsafe { Span::new(self.ptr, self.bytes) }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated by this type, freed once (null: nothing to free); the driver waits for the
            // device first. A failure leaves nothing to be done.
            let _ = unsafe { cuMemFree_v2(self.ptr.address()) };
        }
    }
}

/// Bytes for people, to three digits at least: `5.25 MiB`, `81559 MiB`.
pub(crate) fn mebibytes(bytes: usize) -> String {
    let digits = if bytes < 10 << 20 { 2 } else { usize::from(bytes < 100 << 20) };
    format!("{:.digits$} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Page-locked memory of the host, which the device copies from and to by itself. Not write-combined: the
/// decoders read what they wrote.
pub(crate) struct PinnedMemory {
    context: Arc<Context>,
    data: *mut u8,
    bytes: usize,
}

// SAFETY: it owns its bytes as a Box does.
unsafe impl Send for PinnedMemory {}
// SAFETY: shared, it gives only shared access to them.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// Usable by all contexts of the process (CU_MEMHOSTALLOC_PORTABLE).
    const FLAGS: u32 = 1;

    /// Allocates `bytes`, zeroed.
    ///
    /// # Errors
    /// [`Error::Device`] if the system has no more memory that can be locked.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        context.bind()?;
        let mut data = std::ptr::null_mut();
        // SAFETY: a place for one address.
        let result = unsafe { cuMemHostAlloc(&mut data, bytes.max(1), Self::FLAGS) };
        context.check(|| format!("cuMemHostAlloc of {bytes} bytes"), result)?;
        let data = data.cast::<u8>();
        // SAFETY: as many bytes were just allocated.
        unsafe { data.write_bytes(0, bytes) };
        Ok(Self { context: context.clone(), data, bytes })
    }
}

impl Deref for PinnedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: allocated and initialised by `new`, and owned.
        unsafe { std::slice::from_raw_parts(self.data, self.bytes) }
    }
}

impl DerefMut for PinnedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated by this type, freed once. A failure leaves nothing to be done.
            let _ = unsafe { cuMemFreeHost(self.data.cast()) };
        }
    }
}

impl fmt::Debug for PinnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pinned bytes", self.bytes)
    }
}
