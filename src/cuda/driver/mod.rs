//! The CUDA driver behind thin owners: what is created is destroyed, and every result is looked at.
//!
//! ```text
//!   library   is there a driver, new enough, with every function that is called here?
//!      └─ context   a device's primary context ─┬─ memory    on the device, pinned on the host; spans of it
//!                                               ├─ stream    streams, events, copies, captured graphs
//!                                               ├─ peer      stores and copies into another device's memory
//!                                               ├─ module    kernel images and their functions
//!                                               └─ tensor_map  boxes of tensors, for Hopper's bulk copies
//! ```
//!
//! `cudarc` has the signatures and opens the library; nothing of it is seen outside this folder. It panics
//! over a missing library or function, so `library` looks for all of them before the first is called.
//!
//! # Errors
//! Each failing call becomes an [`Error::Device`] with its name, the driver's code and what to do. Codes that
//! leave a context broken also mark the device as refused for the rest of the process: the primary context is
//! shared with everybody in it (PyTorch too), and nobody gets another.

use std::collections::BTreeMap;
use std::sync::Mutex;

pub(crate) use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::CUresult;

use crate::error::{Error, Result};

pub(in crate::cuda) mod attributes;
pub(crate) mod context;
pub(crate) mod library;
pub(crate) mod memory;
pub(crate) mod module;
mod peer;
pub(crate) mod stream;
pub(crate) mod tensor_map;

pub(crate) use context::Context;
#[allow(unused_imports, reason = "part of what this folder offers")]
pub(crate) use memory::{DeviceMemory, DevicePtr, PinnedMemory, Span, mebibytes};
pub(crate) use module::{Function, Module};
#[allow(unused_imports, reason = "part of what this folder offers")]
pub(crate) use stream::{Event, GraphExec, Stream};
pub(crate) use tensor_map::TensorMap;

/// Devices whose context broke in this process, by ordinal, and over what.
static REFUSED: Mutex<BTreeMap<usize, String>> = Mutex::new(BTreeMap::new());

/// An error about device `ordinal`.
pub(crate) fn device_error(ordinal: usize, problem: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::Device { device: format!("cuda:{ordinal}"), problem: problem.into(), remedy: remedy.into() }
}

/// Turns the result of `call` into ours; `call` says what was attempted, beginning with the function's name.
///
/// # Errors
/// [`Error::Device`] for anything but success.
fn check(ordinal: usize, call: impl FnOnce() -> String, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let problem = format!("{} failed: {result:?} ({})", call(), result as u32);
    if is_sticky(result) {
        tracing::error!("cuda:{ordinal}: {problem}; the device is refused from now on");
        if let Ok(mut refused) = REFUSED.lock() {
            refused.entry(ordinal).or_insert_with(|| problem.clone());
        }
    }
    Err(device_error(ordinal, problem, remedy(result)))
}

/// Refuses a device whose context broke earlier in this process.
///
/// # Errors
/// [`Error::Device`] naming the failure that broke it.
fn check_not_refused(ordinal: usize) -> Result<()> {
    match REFUSED.lock().ok().and_then(|refused| refused.get(&ordinal).cloned()) {
        None => Ok(()),
        Some(cause) => Err(device_error(
            ordinal,
            format!("its context broke earlier in this process: {cause}"),
            "Start a new process, or use `cpu`; everything else on this device's primary context (PyTorch, \
             for one) is broken as well",
        )),
    }
}

/// True for results after which a context answers nothing but errors.
fn is_sticky(result: CUresult) -> bool {
    use CUresult::*;
    matches!(
        result,
        CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_TENSOR_MEMORY_LEAK
            | CUDA_ERROR_EXTERNAL_DEVICE
    )
}

/// What to do about a result.
fn remedy(result: CUresult) -> &'static str {
    use CUresult::*;
    match result {
        CUDA_ERROR_OUT_OF_MEMORY => "Free memory on the device, use another one, or use `cpu`",
        CUDA_ERROR_NO_DEVICE => {
            "Check `nvidia-smi` and CUDA_VISIBLE_DEVICES (in a container: `--gpus`), or use `cpu`"
        }
        CUDA_ERROR_INVALID_DEVICE => "Use a device that `nvidia-smi` lists, or `cpu`",
        CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "libcuda.so and the running driver are of different versions: reboot, or install it again"
        }
        CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "Another process holds the device exclusively: use another, or `cpu`"
        }
        CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | CUDA_ERROR_INVALID_IMAGE
        | CUDA_ERROR_INVALID_PTX
        | CUDA_ERROR_JIT_COMPILER_NOT_FOUND => {
            "Update the driver, or build with an nvcc that is not newer than it"
        }
        CUDA_ERROR_ECC_UNCORRECTABLE | CUDA_ERROR_NVLINK_UNCORRECTABLE | CUDA_ERROR_CONTAINED => {
            "The hardware reported an error: see `nvidia-smi -q` and the kernel's log; start a new process"
        }
        sticky if is_sticky(sticky) && super::launch::waits() => {
            "The device can no longer be used in this process. Please report it"
        }
        sticky if is_sticky(sticky) => {
            "The device can no longer be used in this process. Run again with IMAGEHERE_CUDA_SYNC=1 to learn \
             which kernel failed, and please report it"
        }
        _ => "Check `nvidia-smi` and the kernel's log, or use `cpu`",
    }
}

#[cfg(test)]
mod tests;
