//! Is there a driver, and has it all that is called?

use cudarc::driver::sys;

use crate::error::{Error, Result};

/// The oldest driver that runs what the kernels' compiler makes: CUDA 13.0, driver 580.
pub(crate) const OLDEST_DRIVER: i32 = 13_000;

/// Lists the functions of the driver that this crate calls: they are in scope from here and nowhere else, so
/// that none is called that was not looked for.
macro_rules! calls {
    ($($name:ident),* $(,)?) => {
        #[allow(unused_imports, reason = "one list for all of this folder")]
        pub(in crate::cuda) mod calls {
            pub(in crate::cuda) use cudarc::driver::sys::{$($name),*};
        }
        /// Their names, as the library exports them.
        const SYMBOLS: &[&str] = &[$(stringify!($name)),*];
    };
}

calls! {
    cuInit, cuDriverGetVersion,
    cuDeviceGetCount, cuDeviceGet, cuDeviceGetName, cuDeviceTotalMem_v2, cuDeviceGetAttribute,
    cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRelease_v2, cuCtxSetCurrent, cuCtxSynchronize,
    cuDeviceCanAccessPeer, cuCtxEnablePeerAccess, cuPointerGetAttribute,
    cuMemGetInfo_v2, cuMemAlloc_v2, cuMemFree_v2, cuMemHostAlloc, cuMemFreeHost,
    cuMemcpyHtoDAsync_v2, cuMemcpyDtoHAsync_v2, cuMemcpyDtoDAsync_v2, cuMemcpy2DAsync_v2,
    cuMemcpyPeerAsync, cuMemcpy3DPeerAsync,
    cuMemsetD8Async, cuMemsetD16Async,
    cuStreamCreate, cuStreamDestroy_v2, cuStreamSynchronize, cuStreamQuery, cuStreamWaitEvent,
    cuEventCreate, cuEventDestroy_v2, cuEventRecord, cuEventSynchronize, cuEventQuery, cuEventElapsedTime_v2,
    cuStreamBeginCapture_v2, cuStreamEndCapture, cuStreamIsCapturing,
    cuGraphInstantiateWithFlags, cuGraphUpload, cuGraphLaunch, cuGraphExecDestroy, cuGraphDestroy,
    cuModuleLoadData, cuModuleUnload, cuModuleGetFunction,
    cuFuncGetParamInfo, cuFuncGetAttribute, cuFuncSetAttribute, cuLaunchKernel, cuLaunchKernelEx,
    cuTensorMapEncodeTiled,
}

/// Looks for the driver, its version and its functions, and initialises it. Cheap when repeated.
///
/// Returns the driver's CUDA version, as 13000 for 13.0; `ordinal` is whom errors speak of.
///
/// # Errors
/// [`Error::Device`] if there is no library, if it is older than [`OLDEST_DRIVER`], if a function is missing,
/// or if it finds no device.
pub(crate) fn open(ordinal: usize) -> Result<i32> {
    let refuse = |problem: String, remedy: &str| {
        Err(Error::Device { device: format!("cuda:{ordinal}"), problem, remedy: remedy.into() })
    };
    // SAFETY: opening a library runs its initialisers; the names are those of NVIDIA's driver.
    if !unsafe { sys::is_culib_present() } {
        return refuse(
            "there is no NVIDIA driver: libcuda.so was not found".into(),
            "Install the driver, 580 or later (in a container: start it with `--gpus`), or use `cpu`",
        );
    }
    if !has("cuDriverGetVersion") {
        return refuse(
            "libcuda.so has no `cuDriverGetVersion`: it is no NVIDIA driver".into(),
            "Check LD_LIBRARY_PATH, or use `cpu`",
        );
    }
    let mut version = 0;
    // SAFETY: `version` is a place for one int; the call needs no initialisation.
    let result = unsafe { calls::cuDriverGetVersion(&mut version) };
    if result != sys::CUresult::CUDA_SUCCESS || version < OLDEST_DRIVER {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return refuse(
            format!("the NVIDIA driver is too old: it has CUDA {major}.{minor}, the kernels need 13.0"),
            "Update it to 580 or later, or use `cpu`",
        );
    }
    if let Some(missing) = SYMBOLS.iter().find(|name| !has(name)) {
        return refuse(
            format!("libcuda.so has no `{missing}`"),
            "Install the NVIDIA driver again, 580 or later, or use `cpu`",
        );
    }
    // SAFETY: no arguments but a flag that must be 0.
    let result = unsafe { calls::cuInit(0) };
    match result {
        sys::CUresult::CUDA_SUCCESS => Ok(version),
        _ => refuse(format!("cuInit failed: {result:?} ({})", result as u32), super::remedy(result)),
    }
}

/// True if the library exports `name`. There must be a library.
fn has(name: &str) -> bool {
    // SAFETY: the symbol is looked up, not called; a function of any type has an address.
    unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()).is_ok() }
}
