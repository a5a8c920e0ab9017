//! Streams: work in order. Copies, events between streams, and graphs captured from them.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys::{
    CUDA_MEMCPY2D, CUevent, CUgraphExec, CUmemorytype, CUresult, CUstream, CUstreamCaptureMode,
    CUstreamCaptureStatus,
};

use super::context::Context;
use super::library::calls::*;
use super::memory::{PinnedMemory, Span};
use crate::error::{Error, Result};

/// A queue of work on a device.
pub(crate) struct Stream {
    context: Arc<Context>,
    raw: CUstream,
    owned: bool,
}

// SAFETY: any thread may enqueue on a stream; the driver locks it.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// Rows in memory: where they start, and how far apart they are, in bytes.
#[derive(Clone, Copy)]
struct Pitched {
    kind: CUmemorytype,
    address: u64,
    pitch: usize,
}

impl Stream {
    /// Makes a stream that the default stream does not wait for, nor it for that.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        const NON_BLOCKING: u32 = 1;
        // SAFETY: a place for one stream.
        let result = unsafe { cuStreamCreate(&mut raw, NON_BLOCKING) };
        context.check(|| "cuStreamCreate".into(), result)?;
        Ok(Self { context: context.clone(), raw, owned: true })
    }

    /// Takes a stream of the caller's, 0 for the default one. It is not destroyed.
    ///
    /// # Safety
    /// `raw` must be a stream of this context's device and stay one for as long as this lives.
    pub(crate) unsafe fn foreign(context: &Arc<Context>, raw: usize) -> Self {
        Self { context: context.clone(), raw: raw as CUstream, owned: false }
    }

    /// The context it belongs to.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The driver's handle.
    pub(in crate::cuda) fn raw(&self) -> CUstream {
        self.raw
    }

    /// Binds the context, and hands the result of a call on this stream to its check.
    pub(in crate::cuda) fn run(
        &self,
        call: impl FnOnce() -> String,
        work: impl FnOnce(CUstream) -> CUresult,
    ) -> Result<()> {
        self.context.bind()?;
        self.context.check(call, work(self.raw))
    }

    /// Counts a launch.
    pub(in crate::cuda) fn count_launch(&self) {
        self.context.count_launch();
    }

    /// Waits until all work given so far is done.
    ///
    /// # Errors
    /// [`Error::Device`] if any of it failed.
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        self.run(|| "cuStreamSynchronize".into(), |raw| unsafe { cuStreamSynchronize(raw) })
    }

    /// True if all work given so far is done.
    ///
    /// # Errors
    /// [`Error::Device`] if any of it failed.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        self.context.bind()?;
        // SAFETY: the stream is alive.
        match unsafe { cuStreamQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => self.context.check(|| "cuStreamQuery".into(), result).map(|()| true),
        }
    }

    /// Lets work given from now on start only after `event`.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<()> {
        // SAFETY: stream and event are alive; the flag must be 0.
        self.run(|| "cuStreamWaitEvent".into(), |raw| unsafe { cuStreamWaitEvent(raw, event.raw, 0) })
    }

    /// Copies from pinned memory, from byte `at` on, as many elements as `to` has. Returns at once.
    ///
    /// # Safety
    /// `from` must be left alone, and alive, until the copy is done: wait for an event recorded after it.
    ///
    /// # Errors
    /// [`Error::Internal`] if `from` is too short; [`Error::Device`] if the driver fails.
    pub(crate) unsafe fn upload<T>(&self, to: Span<T>, from: &PinnedMemory, at: usize) -> Result<()> {
        let bytes = to.len() * size_of::<T>();
        let from = from.get(at..).and_then(|from| from.get(..bytes)).ok_or_else(|| {
            Error::Internal(format!("an upload of {bytes} bytes from byte {at} of {}", from.len()))
        })?;
        self.copy_in(to.ptr().address(), from)
    }

    /// Copies `rows` rows of `columns` bytes, without gaps in pinned memory, to rows `pitch` bytes apart, by one copy.
    /// Returns at once. What lies between the rows is not written.
    ///
    /// # Safety
    /// As [`Stream::upload`].
    ///
    /// # Errors
    /// [`Error::Internal`] if `from` is too short or the rows do not fit; [`Error::Device`] if the driver fails.
    pub(crate) unsafe fn upload_rows(
        &self,
        to: Span<u8>,
        pitch: usize,
        from: &PinnedMemory,
        (rows, columns): (usize, usize),
    ) -> Result<()> {
        rows_fit(to, pitch, rows, columns)?;
        if rows * columns > from.len() {
            return Err(Error::Internal(format!("{rows} rows of {columns} from {} bytes", from.len())));
        }
        let device = pitched(CUmemorytype::CU_MEMORYTYPE_DEVICE, to.ptr().address(), pitch);
        let host = pitched(CUmemorytype::CU_MEMORYTYPE_HOST, from.as_ptr() as u64, columns);
        // SAFETY: both sides were checked; that `from` stays is the caller's promise.
        unsafe { self.copy_rows(device, host, columns, rows) }
    }

    /// Copies from any memory of the host, and waits for that.
    ///
    /// # Errors
    /// [`Error::Internal`] if the lengths differ; [`Error::Device`] if the driver fails.
    pub(crate) fn upload_and_wait<T: Pod>(&self, to: Span<T>, from: &[T]) -> Result<()> {
        same_len(to, from)?;
        self.copy_in(to.ptr().address(), bytemuck::cast_slice(from))?;
        self.synchronize()
    }

    /// Copies rows of `columns` from any memory of the host to rows `pitch` elements apart, and waits for
    /// that. What lies between the rows is not written.
    ///
    /// # Errors
    /// [`Error::Internal`] if the rows do not fit; [`Error::Device`] if the driver fails.
    pub(crate) fn upload_rows_and_wait<T: Pod>(
        &self,
        to: Span<T>,
        pitch: usize,
        from: &[T],
        columns: usize,
    ) -> Result<()> {
        let rows = from.len().checked_div(columns).unwrap_or(0);
        rows_fit(to, pitch, rows, columns)?;
        let device = pitched(CUmemorytype::CU_MEMORYTYPE_DEVICE, to.ptr().address(), pitch * size_of::<T>());
        let host = pitched(CUmemorytype::CU_MEMORYTYPE_HOST, from.as_ptr() as u64, columns * size_of::<T>());
        // SAFETY: `from` has so many whole rows, `to` was checked; both are left alone until the wait.
        unsafe { self.copy_rows(device, host, columns * size_of::<T>(), rows)? };
        self.synchronize()
    }

    /// Copies to any memory of the host, and waits for that and all before it.
    ///
    /// # Errors
    /// [`Error::Internal`] if the lengths differ; [`Error::Device`] if the driver or earlier work fails.
    pub(crate) fn download_and_wait<T: Pod>(&self, from: Span<T>, to: &mut [T]) -> Result<()> {
        same_len(from, to)?;
        let to: &mut [u8] = bytemuck::cast_slice_mut(to);
        if !to.is_empty() {
            let (address, bytes) = (to.as_mut_ptr().cast::<c_void>(), to.len());
            self.run(
                || format!("cuMemcpyDtoHAsync of {bytes} bytes"),
                // SAFETY: both sides have so many bytes; `to` is borrowed until the wait below is over.
                |raw| unsafe { cuMemcpyDtoHAsync_v2(address, from.ptr().address(), bytes, raw) },
            )?;
        }
        self.synchronize()
    }

    /// Copies `rows` rows of `columns` elements, `pitch` apart on the device, to rows `to_stride` elements
    /// apart on the host. Returns at once, or when it is done if the host's memory is pageable.
    ///
    /// # Safety
    /// `to` must be valid for writes of all the rows and be left alone until the copy is done.
    ///
    /// # Errors
    /// [`Error::Internal`] if the rows are not inside `from`; [`Error::Device`] if the driver fails.
    pub(crate) unsafe fn download_rows<T>(
        &self,
        from: Span<T>,
        pitch: usize,
        (rows, columns): (usize, usize),
        to: *mut T,
        to_stride: usize,
    ) -> Result<()> {
        rows_fit(from, pitch, rows, columns)?;
        let device =
            pitched(CUmemorytype::CU_MEMORYTYPE_DEVICE, from.ptr().address(), pitch * size_of::<T>());
        let host = pitched(CUmemorytype::CU_MEMORYTYPE_HOST, to as u64, to_stride * size_of::<T>());
        // SAFETY: `from` was checked, `to` is the caller's promise.
        unsafe { self.copy_rows(host, device, columns * size_of::<T>(), rows) }
    }

    /// Copies on the device.
    ///
    /// # Errors
    /// [`Error::Internal`] if the lengths differ; [`Error::Device`] if the driver fails.
    pub(crate) fn copy<T>(&self, to: Span<T>, from: Span<T>) -> Result<()> {
        let bytes = bytes_of(to, from)?;
        if bytes == 0 {
            return Ok(());
        }
        self.run(
            || format!("cuMemcpyDtoDAsync of {bytes} bytes"),
            // SAFETY: both spans have so many bytes, and are alive as spans are.
            |raw| unsafe { cuMemcpyDtoDAsync_v2(to.ptr().address(), from.ptr().address(), bytes, raw) },
        )
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn fill<T>(&self, to: Span<T>, byte: u8) -> Result<()> {
        let bytes = to.len() * size_of::<T>();
        if bytes == 0 {
            return Ok(());
        }
        self.run(
            || format!("cuMemsetD8Async of {bytes} bytes"),
            // SAFETY: the span has so many bytes, and is alive as spans are.
            |raw| unsafe { cuMemsetD8Async(to.ptr().address(), byte, bytes, raw) },
        )
    }

    /// Sets every 16-bit element.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn fill_16(&self, to: Span<half::f16>, bits: u16) -> Result<()> {
        if to.len() == 0 {
            return Ok(());
        }
        self.run(
            || format!("cuMemsetD16Async of {} elements", to.len()),
            // SAFETY: the span has so many elements of 16 bits, and is alive as spans are.
            |raw| unsafe { cuMemsetD16Async(to.ptr().address(), bits, to.len(), raw) },
        )
    }

    /// True while work given to this stream is recorded instead of run.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn is_capturing(&self) -> Result<bool> {
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: a place for the status.
        self.run(|| "cuStreamIsCapturing".into(), |raw| unsafe { cuStreamIsCapturing(raw, &mut status) })?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Records what `work` gives to this stream, running none of it, as a graph that can be replayed.
    ///
    /// `work` must not allocate, wait or copy from pageable memory. Other threads are not disturbed.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Device`] if the driver cannot record or instantiate it.
    pub(crate) fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<GraphExec> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and captures nothing yet, or the driver says so.
        self.run(|| "cuStreamBeginCapture".into(), |raw| unsafe { cuStreamBeginCapture_v2(raw, mode) })?;
        let done = work();
        let mut graph = std::ptr::null_mut();
        let ended =
            // SAFETY: a place for one graph.
            self.run(|| "cuStreamEndCapture".into(), |raw| unsafe { cuStreamEndCapture(raw, &mut graph) });
        let mut exec = std::ptr::null_mut();
        let made = done.and(ended).and_then(|()| {
            // SAFETY: a place for one executable graph, and the graph just captured.
            self.run(
                || "cuGraphInstantiate".into(),
                |_| unsafe { cuGraphInstantiateWithFlags(&mut exec, graph, 0) },
            )
        });
        if !graph.is_null() {
            // SAFETY: made above; what was instantiated from it does not need it.
            let _ = unsafe { cuGraphDestroy(graph) };
        }
        made?;
        let graph = GraphExec { context: self.context.clone(), raw: exec };
        // SAFETY: both are alive. Spares the first replay a part of its work.
        self.run(|| "cuGraphUpload".into(), |raw| unsafe { cuGraphUpload(graph.raw, raw) })?;
        Ok(graph)
    }

    /// Replays a graph.
    ///
    /// # Safety
    /// All memory that it was captured with must still be allocated, and be free for what it does to it.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) unsafe fn replay(&self, graph: &GraphExec) -> Result<()> {
        // SAFETY: both are alive; the memory is the caller's promise.
        self.run(|| "cuGraphLaunch".into(), |raw| unsafe { cuGraphLaunch(graph.raw, raw) })
    }

    /// Copies bytes of the host to an address of the device.
    fn copy_in(&self, to: u64, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.run(
            || format!("cuMemcpyHtoDAsync of {} bytes", from.len()),
            // SAFETY: the callers checked both lengths and see to it that `from` stays.
            |raw| unsafe { cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), raw) },
        )
    }

    /// Copies `rows` rows of `width` bytes.
    ///
    /// # Safety
    /// Both sides must have all the rows, and stay until the copy is done.
    unsafe fn copy_rows(&self, to: Pitched, from: Pitched, width: usize, rows: usize) -> Result<()> {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        let mut copy = CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: from.kind,
            srcHost: from.address as *const c_void,
            srcDevice: from.address,
            srcArray: std::ptr::null_mut(),
            srcPitch: from.pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: to.kind,
            dstHost: to.address as *mut c_void,
            dstDevice: to.address,
            dstArray: std::ptr::null_mut(),
            dstPitch: to.pitch,
            WidthInBytes: width,
            Height: rows,
        };
        if rows == 1 {
            (copy.srcPitch, copy.dstPitch) = (width, width);
        }
        self.run(
            || format!("cuMemcpy2DAsync of {rows} rows of {width} bytes"),
            // SAFETY: the caller's promise.
            |raw| unsafe { cuMemcpy2DAsync_v2(&copy, raw) },
        )
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owned && self.context.bind().is_ok() {
            // SAFETY: made by `new`, destroyed once; work still in it is finished by the driver.
            let _ = unsafe { cuStreamDestroy_v2(self.raw) };
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {:?} of {:?}", self.raw, self.context)
    }
}

fn pitched(kind: CUmemorytype, address: u64, pitch: usize) -> Pitched {
    Pitched { kind, address, pitch }
}

fn same_len<T>(device: Span<T>, host: &[T]) -> Result<()> {
    if device.len() == host.len() {
        return Ok(());
    }
    Err(Error::Internal(format!("a copy between {} and {} elements", device.len(), host.len())))
}

fn bytes_of<T>(to: Span<T>, from: Span<T>) -> Result<usize> {
    if to.len() == from.len() {
        return Ok(to.len() * size_of::<T>());
    }
    Err(Error::Internal(format!("a copy of {} elements to {}", from.len(), to.len())))
}

pub(super) fn rows_fit<T>(span: Span<T>, pitch: usize, rows: usize, columns: usize) -> Result<()> {
    if rows == 0 || (columns <= pitch && (rows - 1) * pitch + columns <= span.len()) {
        return Ok(());
    }
    Err(Error::Internal(format!("{rows} rows of {columns}, {pitch} apart, in {} elements", span.len())))
}

/// A point in a stream.
pub(crate) struct Event {
    context: Arc<Context>,
    raw: CUevent,
}

// SAFETY: any thread may record or wait for an event; the driver locks it.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Makes an event that orders work but takes no time.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        const DISABLE_TIMING: u32 = 2;
        Self::with_flags(context, DISABLE_TIMING)
    }

    /// Makes an event for [`Event::milliseconds_since`].
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn with_time(context: &Arc<Context>) -> Result<Self> {
        Self::with_flags(context, 0)
    }

    fn with_flags(context: &Arc<Context>, flags: u32) -> Result<Self> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for one event.
        let result = unsafe { cuEventCreate(&mut raw, flags) };
        context.check(|| "cuEventCreate".into(), result)?;
        Ok(Self { context: context.clone(), raw })
    }

    /// The context it belongs to.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Moves this event to the end of what `stream` was given so far.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are alive.
        stream.run(|| "cuEventRecord".into(), |raw| unsafe { cuEventRecord(self.raw, raw) })
    }

    /// Waits for it; an event that was never recorded is past.
    ///
    /// # Errors
    /// [`Error::Device`] if work before it failed.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the event is alive.
        let result = unsafe { cuEventSynchronize(self.raw) };
        self.context.check(|| "cuEventSynchronize".into(), result)
    }

    /// True if it is past.
    ///
    /// # Errors
    /// [`Error::Device`] if work before it failed.
    pub(crate) fn is_past(&self) -> Result<bool> {
        self.context.bind()?;
        // SAFETY: the event is alive.
        match unsafe { cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => self.context.check(|| "cuEventQuery".into(), result).map(|()| true),
        }
    }

    /// Time on the device since `start`, in milliseconds. Both must be past.
    ///
    /// # Errors
    /// [`Error::Device`] if they are not, or take no time.
    pub(crate) fn milliseconds_since(&self, start: &Event) -> Result<f32> {
        self.context.bind()?;
        let mut time = 0.0;
        // SAFETY: a place for one number; both events are alive.
        let result = unsafe { cuEventElapsedTime_v2(&mut time, start.raw, self.raw) };
        self.context.check(|| "cuEventElapsedTime".into(), result)?;
        Ok(time)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by this type, destroyed once.
            let _ = unsafe { cuEventDestroy_v2(self.raw) };
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event {:?} of {:?}", self.raw, self.context)
    }
}

/// Recorded work, ready to be replayed by [`Stream::replay`].
pub(crate) struct GraphExec {
    context: Arc<Context>,
    raw: CUgraphExec,
}

// SAFETY: it may be launched from any thread, one at a time; `Stream::replay` makes no other use of it and
// the driver locks it.
unsafe impl Send for GraphExec {}
// SAFETY: as above.
unsafe impl Sync for GraphExec {}

impl Drop for GraphExec {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by `Stream::capture`, destroyed once; a replay under way goes on.
            let _ = unsafe { cuGraphExecDestroy(self.raw) };
        }
    }
}

impl fmt::Debug for GraphExec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "graph {:?} of {:?}", self.raw, self.context)
    }
}
