//! What one device does in another's memory: stores of its kernels where it reaches, copies where it does not.

use cudarc::driver::sys::{CUDA_MEMCPY3D_PEER, CUmemorytype, CUpointer_attribute, CUresult};

use super::context::Context;
use super::library::calls::*;
use super::memory::{DevicePtr, Span};
use super::stream::{Stream, rows_fit};
use crate::error::Result;

impl Context {
    /// Lets this device's kernels use the memory of `other`. False if they cannot.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the driver fails.
    pub(crate) fn reach(&self, other: &Context) -> Result<bool> {
        let mut can = 0;
        // SAFETY: a place for one int; both devices are the driver's own.
        let result = unsafe { cuDeviceCanAccessPeer(&mut can, self.device(), other.device()) };
        self.check(|| "cuDeviceCanAccessPeer".into(), result)?;
        if can == 0 {
            return Ok(false);
        }
        self.bind()?;
        // SAFETY: `other` is alive, and retained by its owner; the flag must be 0.
        match unsafe { cuCtxEnablePeerAccess(other.raw(), 0) } {
            CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(true),
            CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED | CUresult::CUDA_ERROR_TOO_MANY_PEERS => Ok(false),
            result => {
                self.check(|| format!("cuCtxEnablePeerAccess of cuda:{}", other.ordinal()), result)?;
                Ok(true)
            }
        }
    }

    /// True if this device's kernels may write at `address`, whosever memory that is.
    ///
    /// Peer access opens what `cuMemAlloc` gives. Memory from pools or mapped by hand (PyTorch's expandable
    /// segments) is opened piece by piece, by its owner. In doubt: false.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the context is broken.
    pub(crate) fn may_write<T>(&self, address: DevicePtr<T>) -> Result<bool> {
        const READ_WRITE: u32 = 3;
        self.bind()?;
        let mut flags = 0u32;
        let which = CUpointer_attribute::CU_POINTER_ATTRIBUTE_ACCESS_FLAGS;
        // SAFETY: a place for the flags; the driver looks the address up and does not follow it.
        let result = unsafe { cuPointerGetAttribute((&raw mut flags).cast(), which, address.address()) };
        Ok(result == CUresult::CUDA_SUCCESS && flags == READ_WRITE)
    }
}

impl Stream {
    /// Copies rows of `columns` that lie without gaps on this stream's device to rows `pitch` elements apart on
    /// another: one copy, whatever lies between them there, which is not written.
    ///
    /// # Errors
    /// [`Error::Internal`](crate::Error::Internal) if the rows do not fit;
    /// [`Error::Device`](crate::Error::Device) if the driver fails.
    pub(crate) fn copy_rows_to_peer<T>(
        &self,
        peer: &Context,
        to: Span<T>,
        pitch: usize,
        from: Span<T>,
        columns: usize,
    ) -> Result<()> {
        let rows = from.len().checked_div(columns).unwrap_or(0);
        rows_fit(to, pitch, rows, columns)?;
        if rows == 0 {
            return Ok(());
        }
        let own = self.context().raw();
        let (target, source) = (to.ptr().address(), from.ptr().address());
        let width = columns * size_of::<T>();
        let what = || format!("{rows} rows of {width} bytes to cuda:{}", peer.ordinal());
        if pitch == columns || rows == 1 {
            return self.run(
                || format!("cuMemcpyPeerAsync of {}", what()),
                // SAFETY: both spans have so many bytes on their devices, and are alive as spans are.
                |raw| unsafe { cuMemcpyPeerAsync(target, peer.raw(), source, own, rows * width, raw) },
            );
        }
        let copy = CUDA_MEMCPY3D_PEER {
            srcXInBytes: 0,
            srcY: 0,
            srcZ: 0,
            srcLOD: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: source,
            srcArray: std::ptr::null_mut(),
            srcContext: own,
            srcPitch: width,
            srcHeight: rows,
            dstXInBytes: 0,
            dstY: 0,
            dstZ: 0,
            dstLOD: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: target,
            dstArray: std::ptr::null_mut(),
            dstContext: peer.raw(),
            dstPitch: pitch * size_of::<T>(),
            dstHeight: rows,
            WidthInBytes: width,
            Height: rows,
            Depth: 1,
        };
        self.run(
            || format!("cuMemcpy3DPeerAsync of {}", what()),
            // SAFETY: the rows are inside the spans, which are alive as spans are.
            |raw| unsafe { cuMemcpy3DPeerAsync(&copy, raw) },
        )
    }
}
