//! Sequences that stay on the device: memory of ours that grows, or the caller's.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use half::f16;

use super::driver::{DevicePtr, Event, Span, Stream};
use super::matrix::Matrix;
use super::peers::Devices;
use super::pictures::Growing;
use crate::error::{Error, Result};
use crate::prompt::Slot;
use crate::sequence::{DeviceRows, Place, RowChecks};

/// Devices that calls and sequences share.
pub(crate) type Shared = Arc<Mutex<Devices>>;

/// The devices, once nobody else has them. What a panic left half done is waited for, and overwritten by the
/// next call.
pub(crate) fn lock(devices: &Shared) -> MutexGuard<'_, Devices> {
    devices.lock().unwrap_or_else(|poisoned| {
        devices.clear_poison();
        let devices = poisoned.into_inner();
        devices.settle();
        devices
    })
}

/// Rows on the first of them.
pub(crate) struct CudaRows {
    devices: Shared,
    place: Place,
    memory: Memory,
    row_stride: usize, // elements
}

/// Whose memory it is.
enum Memory {
    Ours(Growing),
    Theirs { span: Span<f16>, stream: Stream },
}

impl CudaRows {
    /// Memory of ours; none yet.
    pub(crate) fn ours(devices: &Shared) -> Self {
        let context = lock(devices).primary.gpu().context.clone();
        let place = Place::Cuda(context.ordinal());
        let memory = Memory::Ours(Growing::new(&context, "a sequence"));
        Self { devices: devices.clone(), place, memory, row_stride: 0 }
    }

    /// The caller's memory.
    ///
    /// # Safety
    /// As [`Backend::wrap_device`](crate::backend::Backend::wrap_device).
    pub(crate) unsafe fn theirs(
        devices: &Shared,
        address: u64,
        elements: usize,
        row_stride: usize,
        stream: usize,
    ) -> Result<Self> {
        let context = lock(devices).primary.gpu().context.clone();
        if !address.is_multiple_of(2) || address == 0 {
            return Err(Error::argument(
                format!("{address:#x} is no address of fp16 elements"),
                "Give the device address of the buffer's first element",
            ));
        }
        let place = Place::Cuda(context.ordinal());
        // SAFETY: the caller's promise.
        let span = unsafe { Span::new(DevicePtr::new(address), elements) };
        // SAFETY: as above.
        let stream = unsafe { Stream::foreign(&context, stream) };
        Ok(Self { devices: devices.clone(), place, memory: Memory::Theirs { span, stream }, row_stride })
    }

    /// The first `rows` rows of `hidden` elements.
    fn matrix(&self, rows: usize, hidden: usize) -> Result<Matrix> {
        let span = match &self.memory {
            Memory::Ours(memory) => memory.peek()?.cast()?,
            Memory::Theirs { span, .. } => *span,
        };
        Matrix::new(span, rows, hidden, self.row_stride)
    }
}

impl DeviceRows for CudaRows {
    fn place(&self) -> Place {
        self.place
    }

    fn reserve(&mut self, rows: usize, hidden: usize) -> Result<(u64, usize)> {
        let mut devices = lock(&self.devices);
        match &mut self.memory {
            Memory::Ours(memory) => {
                let bytes = rows * hidden * size_of::<f16>();
                let span = devices.with_room(|_| memory.span(bytes))?.cast::<f16>()?;
                devices.primary.poison(span)?;
                self.row_stride = hidden;
                Ok((span.ptr().address(), hidden))
            }
            Memory::Theirs { span, stream } => {
                let need =
                    rows.checked_sub(1).map_or(0, |before| before.saturating_mul(self.row_stride) + hidden);
                if self.row_stride < hidden || need > span.len() {
                    return Err(Error::argument(
                        format!(
                            "the sequence needs {rows} rows of {hidden} elements, but the device memory given has {} \
                             elements with a row stride of {}",
                            span.len(),
                            self.row_stride
                        ),
                        format!("Give at least {need} elements and a stride of at least {hidden}"),
                    ));
                }
                // What the caller has given to that stream comes first.
                let theirs = Event::new(stream.context())?;
                theirs.record(stream)?;
                devices.primary.compute.wait_for(&theirs)?;
                Ok((span.ptr().address(), self.row_stride))
            }
        }
    }

    fn read(&self, rows: Range<usize>, hidden: usize) -> Result<Vec<f16>> {
        let devices = lock(&self.devices);
        let arena = &devices.primary;
        let from = self.matrix(rows.end, hidden)?.rows(rows.start, rows.len())?;
        let mut values = vec![f16::ZERO; rows.len() * hidden];
        let shape = (rows.len(), hidden);
        // SAFETY: `values` has so many rows, and is left alone until the wait.
        unsafe { arena.compute.download_rows(from.span, from.pitch, shape, values.as_mut_ptr(), hidden)? };
        arena.compute.synchronize()?;
        Ok(values)
    }

    fn check(&self, rows: usize, hidden: usize, slots: &[Slot]) -> Result<RowChecks> {
        let rows = self.matrix(rows, hidden)?;
        lock(&self.devices).with_room(|devices| devices.primary.check(&rows, slots))
    }
}

impl fmt::Debug for CudaRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = if matches!(self.memory, Memory::Ours(_)) { "ours" } else { "the caller's" };
        f.debug_struct("CudaRows").field("place", &self.place).field("memory", &whose).finish_non_exhaustive()
    }
}

impl Drop for CudaRows {
    fn drop(&mut self) {
        lock(&self.devices).settle();
    }
}
