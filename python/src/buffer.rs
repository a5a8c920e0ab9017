//! Python's buffer protocol.
//!
//! It has been in the stable ABI since Python 3.11 only, so that PyO3 leaves it out of wheels for 3.10; its functions, its
//! slots and the layout of a view have been the same since 3.3 all the same, and are declared here.
//!
//! # Source
//! The buffer protocol's chapter of Python's C API; `Include/pybuffer.h`, `Include/typeslots.h`.

use std::ffi::{CStr, c_char, c_int, c_void};

use pyo3::ffi::{Py_ssize_t, PyObject};
use pyo3::prelude::*;

/// `Py_buffer`.
#[repr(C)]
pub struct Raw {
    pub buf: *mut c_void,
    pub obj: *mut PyObject,
    pub len: Py_ssize_t,
    pub itemsize: Py_ssize_t,
    pub readonly: c_int,
    pub ndim: c_int,
    pub format: *mut c_char,
    pub shape: *mut Py_ssize_t,
    pub strides: *mut Py_ssize_t,
    pub suboffsets: *mut Py_ssize_t,
    pub internal: *mut c_void,
}

/// The slot `bf_getbuffer` of a type.
pub const SLOT_GET: c_int = 1;

pub const WRITABLE: c_int = 0x0001;
pub const FORMAT: c_int = 0x0004;
pub const ND: c_int = 0x0008;
pub const STRIDES: c_int = 0x0010 | ND;
pub const F_CONTIGUOUS: c_int = 0x0040 | STRIDES;

unsafe extern "C" {
    fn PyObject_GetBuffer(object: *mut PyObject, view: *mut Raw, flags: c_int) -> c_int;
    fn PyBuffer_Release(view: *mut Raw);
}

/// A view of an object's memory, which stays where it is for as long as the view lives.
pub struct View {
    raw: Box<Raw>,
}

// SAFETY: a view's numbers do not change, it is released with the GIL, and who reads or writes the memory answers for that.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// Asks `object` for its memory, writable if so wished; `None` if it has none to show.
    pub fn of(object: &Bound<'_, PyAny>, writable: bool) -> Option<Self> {
        let raw = Raw {
            buf: std::ptr::null_mut(),
            obj: std::ptr::null_mut(),
            len: 0,
            itemsize: 0,
            readonly: 0,
            ndim: 0,
            format: std::ptr::null_mut(),
            shape: std::ptr::null_mut(),
            strides: std::ptr::null_mut(),
            suboffsets: std::ptr::null_mut(),
            internal: std::ptr::null_mut(),
        };
        let mut raw = Box::new(raw);
        let flags = FORMAT | STRIDES | if writable { WRITABLE } else { 0 };
        // SAFETY: the GIL is held, the object lives, and the view is filled or left alone.
        if unsafe { PyObject_GetBuffer(object.as_ptr(), &mut *raw, flags) } != 0 {
            PyErr::take(object.py()); // an exception says so; the caller knows better what is wrong
            return None;
        }
        Some(Self { raw })
    }

    /// Where the first element is.
    pub fn first(&self) -> *mut u8 {
        self.raw.buf.cast()
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.raw.len.unsigned_abs()
    }

    /// What an element is, in the words of the module `struct`.
    pub fn format(&self) -> &str {
        if self.raw.format.is_null() {
            return "B";
        }
        // SAFETY: a view's format is a string that lives as long as the view.
        unsafe { CStr::from_ptr(self.raw.format) }.to_str().unwrap_or("?")
    }

    /// Elements along each axis.
    pub fn shape(&self) -> &[isize] {
        self.numbers(self.raw.shape)
    }

    /// Bytes from one element to the next along each axis.
    pub fn strides(&self) -> &[isize] {
        self.numbers(self.raw.strides)
    }

    fn numbers(&self, first: *const Py_ssize_t) -> &[isize] {
        let count = usize::try_from(self.raw.ndim).unwrap_or(0);
        if first.is_null() || count == 0 {
            return &[];
        }
        // SAFETY: asked for with STRIDES, a view has as many of them as axes.
        unsafe { std::slice::from_raw_parts(first, count) }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // Where there is no interpreter any more, nothing needs to be released.
        let _ = Python::try_attach(|_| {
            // SAFETY: `of` filled it, nobody released it, and the GIL is held.
            unsafe { PyBuffer_Release(&mut *self.raw) }
        });
    }
}
