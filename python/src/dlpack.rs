//! DLPack, both ways: memory that changes hands without a copy.
//!
//! # Source
//! `include/dlpack/dlpack.h` of dmlc/dlpack 1.0 and its page on the Python protocol: a capsule `dltensor`, or
//! `dltensor_versioned` where the consumer's `max_version` is 1 or later; who takes the tensor renames the capsule.

use std::any::Any;
use std::ffi::{CStr, c_void};
use std::sync::Arc;

use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;

pub const CPU: i32 = 1;
pub const CUDA: i32 = 2;
pub const CUDA_HOST: i32 = 3;

const READ_ONLY: u64 = 1;
const COPIED: u64 = 2;

const NAME: &CStr = c"dltensor";
const NAME_USED: &CStr = c"used_dltensor";
const NAME_VERSIONED: &CStr = c"dltensor_versioned";
const NAME_VERSIONED_USED: &CStr = c"used_dltensor_versioned";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Device {
    pub kind: i32,
    pub id: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct DataType {
    pub code: u8, // 0 int, 1 uint, 2 float, 6 bool
    pub bits: u8,
    pub lanes: u16,
}

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64, // elements; null: contiguous
    byte_offset: u64,
}

#[repr(C)]
struct Managed {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    flags: u64,
    tensor: Tensor,
}

/// Memory to hand out.
pub struct Export {
    pub owner: Arc<dyn Any + Send + Sync>,
    pub data: *mut c_void,
    pub device: Device,
    pub dtype: DataType,
    pub shape: Vec<i64>,
    pub strides: Vec<i64>, // elements
    pub read_only: bool,
    pub copied: bool,
}

/// What an exported tensor points into.
struct Kept {
    _owner: Arc<dyn Any + Send + Sync>,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

impl Export {
    /// Makes the capsule.
    pub fn capsule(self, py: Python<'_>, versioned: bool) -> PyResult<Bound<'_, PyAny>> {
        let flags = if self.read_only { READ_ONLY } else { 0 } | if self.copied { COPIED } else { 0 };
        let mut kept = Box::new(Kept { _owner: self.owner, shape: self.shape, strides: self.strides });
        let tensor = Tensor {
            data: self.data,
            device: self.device,
            ndim: kept.shape.len() as i32,
            dtype: self.dtype,
            shape: kept.shape.as_mut_ptr(),
            strides: kept.strides.as_mut_ptr(),
            byte_offset: 0,
        };
        let context = Box::into_raw(kept).cast();
        // SAFETY: the capsule owns the tensor until it is renamed; its destructor and its deleter free what is boxed here,
        // once. The names are static.
        unsafe {
            let capsule = if versioned {
                let deleter = Some(delete_versioned as unsafe extern "C" fn(*mut Versioned));
                let managed = Box::new(Versioned { major: 1, minor: 0, context, deleter, flags, tensor });
                let destructor = Some(drop_versioned as unsafe extern "C" fn(*mut ffi::PyObject));
                ffi::PyCapsule_New(Box::into_raw(managed).cast(), NAME_VERSIONED.as_ptr(), destructor)
            } else {
                let deleter = Some(delete as unsafe extern "C" fn(*mut Managed));
                let managed = Box::new(Managed { tensor, context, deleter });
                let destructor = Some(drop_unversioned as unsafe extern "C" fn(*mut ffi::PyObject));
                ffi::PyCapsule_New(Box::into_raw(managed).cast(), NAME.as_ptr(), destructor)
            };
            Bound::from_owned_ptr_or_err(py, capsule)
        }
    }
}

/// Frees an exported tensor. Needs no GIL.
unsafe extern "C" fn delete(managed: *mut Managed) {
    // SAFETY: made by `Export::capsule`, and deleted once, as the protocol has it.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.context.cast::<Kept>()));
    }
}

/// As [`delete`].
unsafe extern "C" fn delete_versioned(managed: *mut Versioned) {
    // SAFETY: as in `delete`.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.context.cast::<Kept>()));
    }
}

/// Frees the tensor of a capsule that nobody took.
unsafe extern "C" fn drop_unversioned(capsule: *mut ffi::PyObject) {
    // SAFETY: a capsule with this name holds our tensor; one whose tensor was taken has another.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) != 0 {
            delete(ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast());
        }
    }
}

/// As [`drop_unversioned`].
unsafe extern "C" fn drop_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: as in `drop_unversioned`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME_VERSIONED.as_ptr()) != 0 {
            delete_versioned(ffi::PyCapsule_GetPointer(capsule, NAME_VERSIONED.as_ptr()).cast());
        }
    }
}

/// Memory taken from somebody else, who keeps it until this is dropped.
pub struct Import {
    managed: Taken,
    pub data: *mut u8,
    pub device: Device,
    pub dtype: DataType,
    pub shape: Vec<i64>,
    pub strides: Vec<i64>, // elements
    pub read_only: bool,
}

enum Taken {
    Unversioned(*mut Managed),
    Versioned(*mut Versioned),
}

// SAFETY: the pointers are used by `Drop` alone, and a deleter may be called from any thread; who reads or writes the memory
// answers for that.
unsafe impl Send for Import {}
// SAFETY: as above; `&Import` gives copies of numbers.
unsafe impl Sync for Import {}

impl Import {
    /// Takes the memory of an object that has `__dlpack__`. On a GPU, work given to the object's stream so far will be
    /// waited for by the legacy default stream.
    pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let (kind, _): (i32, i32) = object.call_method0("__dlpack_device__")?.extract()?;
        let ask = |versioned: bool| {
            let options = PyDict::new(py);
            if kind == CUDA {
                options.set_item("stream", 1)?;
            }
            if versioned {
                options.set_item("max_version", (1, 0))?;
            }
            object.call_method("__dlpack__", (), Some(&options))
        };
        // Older producers do not know the word.
        let capsule = ask(true).or_else(|error| match error.is_instance_of::<PyTypeError>(py) {
            true => ask(false),
            false => Err(error),
        })?;
        // SAFETY: a capsule by either name holds what the protocol says; renamed, it is ours.
        unsafe {
            let raw = capsule.as_ptr();
            if ffi::PyCapsule_IsValid(raw, NAME_VERSIONED.as_ptr()) != 0 {
                let managed: *mut Versioned = ffi::PyCapsule_GetPointer(raw, NAME_VERSIONED.as_ptr()).cast();
                if (*managed).major != 1 {
                    let text = format!("DLPack {}.{} is not supported", (*managed).major, (*managed).minor);
                    return Err(PyBufferError::new_err(text));
                }
                ffi::PyCapsule_SetName(raw, NAME_VERSIONED_USED.as_ptr());
                let read_only = (*managed).flags & READ_ONLY != 0;
                return Ok(Self::new(Taken::Versioned(managed), &(*managed).tensor, read_only));
            }
            if ffi::PyCapsule_IsValid(raw, NAME.as_ptr()) != 0 {
                let managed: *mut Managed = ffi::PyCapsule_GetPointer(raw, NAME.as_ptr()).cast();
                ffi::PyCapsule_SetName(raw, NAME_USED.as_ptr());
                return Ok(Self::new(Taken::Unversioned(managed), &(*managed).tensor, false));
            }
        }
        Err(PyBufferError::new_err("`__dlpack__` gave no DLPack capsule"))
    }

    /// # Safety
    /// `tensor` is that of `managed`, as the protocol has it.
    unsafe fn new(managed: Taken, tensor: &Tensor, read_only: bool) -> Self {
        let count = usize::try_from(tensor.ndim).unwrap_or(0);
        let numbers = |first: *const i64| match first.is_null() || count == 0 {
            true => vec![],
            // SAFETY: as many numbers as axes.
            false => unsafe { std::slice::from_raw_parts(first, count) }.to_vec(),
        };
        let shape = numbers(tensor.shape);
        let mut strides = numbers(tensor.strides);
        if strides.is_empty() {
            strides = contiguous(&shape);
        }
        let data = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize);
        Self { managed, data, device: tensor.device, dtype: tensor.dtype, shape, strides, read_only }
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        // A deleter may want the GIL: torch's does. Where there is no interpreter any more, nothing needs to be freed.
        let _ = Python::try_attach(|_| {
            // SAFETY: taken once, deleted once.
            unsafe {
                match self.managed {
                    Taken::Unversioned(managed) => {
                        if let Some(deleter) = (*managed).deleter {
                            deleter(managed);
                        }
                    }
                    Taken::Versioned(managed) => {
                        if let Some(deleter) = (*managed).deleter {
                            deleter(managed);
                        }
                    }
                }
            }
        });
    }
}

/// The strides of rows without gaps, in elements.
pub fn contiguous(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis].max(1);
    }
    strides
}
