//! A device and its primary context.

use std::ffi::{CStr, c_char};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys::{CUcontext, CUdevice, CUdevice_attribute, CUresult};

use super::library::{self, calls::*};
use super::{check, check_not_refused, device_error};
use crate::error::Result;

/// The oldest compute capability: mma.sync m16n8k16 and cp.async.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// A device, with its primary context retained for as long as this lives.
pub(crate) struct Context {
    ordinal: usize,
    device: CUdevice,
    raw: CUcontext,
    name: String,
    capability: (i32, i32),
    multiprocessors: u32,
    shared_per_block: usize, // bytes a block may ask for
    launches: AtomicU64,
    shortages: AtomicU64,
}

// SAFETY: a context may be used by any thread that makes it current; the handle is a plain address.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks what its functions share.
unsafe impl Sync for Context {}

impl Context {
    /// Opens device `ordinal`: finds the driver, checks the device, retains its primary context.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if there is no driver, no such device, if it is older than compute capability
    /// 8.0, or if its context broke earlier in this process.
    pub(crate) fn open(ordinal: usize) -> Result<Arc<Self>> {
        library::open(ordinal)?;
        let count = device_count()?;
        if ordinal >= count {
            let plural = if count == 1 { "" } else { "s" };
            return Err(device_error(
                ordinal,
                format!("there is no such device: the driver shows {count} device{plural}"),
                "Use a smaller number, check CUDA_VISIBLE_DEVICES, or use `cpu`",
            ));
        }
        check_not_refused(ordinal)?;
        let mut device = 0;
        // SAFETY: a place for one device; the ordinal is below the count.
        let result = unsafe { cuDeviceGet(&mut device, ordinal as i32) };
        check(ordinal, || format!("cuDeviceGet({ordinal})"), result)?;
        let attribute = |which| attribute(ordinal, device, which);
        let capability = (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let name = device_name(ordinal, device)?;
        if capability < OLDEST_CAPABILITY {
            return Err(device_error(
                ordinal,
                format!(
                    "{name} has compute capability {}.{}, the kernels need 8.0 (Ampere)",
                    capability.0, capability.1
                ),
                "Use a newer device, or `cpu`",
            ));
        }
        let multiprocessors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let shared_per_block =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for one context; `device` is the driver's own answer.
        let result = unsafe { cuDevicePrimaryCtxRetain(&mut raw, device) };
        check(ordinal, || "cuDevicePrimaryCtxRetain".into(), result)?;
        let context = Self {
            ordinal,
            device,
            raw,
            name,
            capability,
            multiprocessors,
            shared_per_block,
            launches: AtomicU64::new(0),
            shortages: AtomicU64::new(0),
        };
        context.bind()?;
        Ok(Arc::new(context))
    }

    /// The device's number, as `cuda:N` has it.
    pub(crate) fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The device's name: `NVIDIA H100 80GB HBM3`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability, major and minor.
    pub(crate) fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Its multiprocessors: blocks that run at a time, or half or a third of those.
    pub(crate) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Shared memory that a block may ask for, in bytes.
    pub(crate) fn shared_per_block(&self) -> usize {
        self.shared_per_block
    }

    /// Kernels launched since it was opened, graphs counting those that were captured into them.
    pub(crate) fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Counts a launch.
    pub(super) fn count_launch(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
    }

    /// Errors over too little memory since it was opened.
    pub(crate) fn shortages(&self) -> u64 {
        self.shortages.load(Ordering::Relaxed)
    }

    /// Counts an error over too little memory.
    pub(super) fn count_shortage(&self) {
        self.shortages.fetch_add(1, Ordering::Relaxed);
    }

    /// Free and total memory, in bytes.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the driver does not answer.
    pub(crate) fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: places for two sizes.
        let result = unsafe { cuMemGetInfo_v2(&mut free, &mut total) };
        self.check(|| "cuMemGetInfo".into(), result)?;
        Ok((free, total))
    }

    /// Waits for everything that was given to this context, by whomever.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if any of it failed.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the current context is this one.
        let result = unsafe { cuCtxSynchronize() };
        self.check(|| "cuCtxSynchronize".into(), result)
    }

    /// Makes this the current context of the calling thread, as nearly every function of the driver expects.
    pub(super) fn bind(&self) -> Result<()> {
        // SAFETY: the handle was retained and is alive.
        let result = unsafe { cuCtxSetCurrent(self.raw) };
        self.check(|| "cuCtxSetCurrent".into(), result)
    }

    /// The driver's handle of the device.
    pub(super) fn device(&self) -> CUdevice {
        self.device
    }

    /// The driver's handle.
    pub(super) fn raw(&self) -> CUcontext {
        self.raw
    }

    /// As [`check`], for a call on this device.
    pub(super) fn check(&self, call: impl FnOnce() -> String, result: CUresult) -> Result<()> {
        check(self.ordinal, call, result)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `open`. A failure leaves nothing to be done.
        let _ = unsafe { cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} ({}, {}.{})", self.ordinal, self.name, self.capability.0, self.capability.1)
    }
}

/// Devices that the driver shows. [`library::open`] must have succeeded.
pub(crate) fn device_count() -> Result<usize> {
    let mut count = 0;
    // SAFETY: a place for one int.
    let result = unsafe { cuDeviceGetCount(&mut count) };
    check(0, || "cuDeviceGetCount".into(), result)?;
    Ok(count as usize)
}

fn attribute(ordinal: usize, device: CUdevice, which: CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: a place for one int; `device` is the driver's own answer.
    let result = unsafe { cuDeviceGetAttribute(&mut value, which, device) };
    check(ordinal, || format!("cuDeviceGetAttribute({which:?})"), result)?;
    Ok(value)
}

fn device_name(ordinal: usize, device: CUdevice) -> Result<String> {
    let mut name = [0 as c_char; 256];
    // SAFETY: room for as many bytes as it is told.
    let result = unsafe { cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device) };
    check(ordinal, || "cuDeviceGetName".into(), result)?;
    name[name.len() - 1] = 0;
    // SAFETY: there is a zero byte, at the latest the one just written.
    Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
}
