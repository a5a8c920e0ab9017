//! Rows of float16 in the caller's memory.

use std::any::Any;
use std::sync::Arc;

use half::f16;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::prelude::*;

use crate::buffer::View;
use crate::dlpack::{self, DataType, Device, Import};
use crate::errors::argument;
use crate::tensor::{Kind, Place};

/// Rows of `H` elements, evenly spaced.
pub struct Rows {
    pub keeps: Arc<dyn Any + Send + Sync>, // the memory where it is
    pub first: *mut f16,                   // an address of the device's, where it lies there
    pub shape: Vec<i64>,
    pub count: usize,
    pub hidden: usize,
    pub row_stride: usize, // elements
    pub place: Place,
}

impl Rows {
    /// Takes the memory of the argument `what`, to be written if so wished: `[rows, H]` or `[N, rows, H]`, by the buffer
    /// protocol, or else by DLPack.
    pub fn of(object: &Bound<'_, PyAny>, what: &str, writable: bool) -> PyResult<Self> {
        let py = object.py();
        if let Some(view) = View::of(object, writable) {
            if view.format() != "e" {
                return Err(not_half(what, name(view.format())));
            }
            if view.strides().iter().any(|stride| stride % 2 != 0)
                || !(view.first() as usize).is_multiple_of(2)
            {
                return Err(argument(py, format!("{what} has elements at odd addresses")));
            }
            let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            let strides: Vec<i64> = view.strides().iter().map(|&n| n as i64 / 2).collect();
            let first = view.first().cast();
            return Self::new(py, what, Arc::new(view), first, shape, &strides, Place::Host);
        }
        if !object.hasattr("__dlpack__")? {
            return Err(PyTypeError::new_err(format!(
                "{what} is a {}. Give a float16 tensor or array{}",
                object.get_type().name()?,
                if writable { " that can be written" } else { "" }
            )));
        }
        let import = Import::of(object)?;
        let place = match import.device {
            Device { kind: dlpack::CPU | dlpack::CUDA_HOST, .. } => Place::Host,
            Device { kind: dlpack::CUDA, id } => Place::Cuda(id.unsigned_abs() as usize),
            Device { kind, id } => {
                let text = format!(
                    "{what} lies on device {kind}:{id} of DLPack. Give memory of the CPU or an NVIDIA GPU"
                );
                return Err(argument(py, text));
            }
        };
        if import.dtype != Kind::Float16.dlpack() {
            let DataType { code, bits, .. } = import.dtype;
            let kinds = ["int", "uint", "float", "handle", "bfloat", "complex", "bool"];
            let kind = kinds.get(usize::from(code)).unwrap_or(&"type ");
            return Err(not_half(what, &format!("{kind}{bits}")));
        }
        if writable && import.read_only {
            return Err(PyBufferError::new_err(format!("{what} is read-only")));
        }
        let (first, shape, strides) = (import.data.cast(), import.shape.clone(), import.strides.clone());
        Self::new(py, what, Arc::new(import), first, shape, &strides, place)
    }

    /// Takes the argument `rows`, to be read in host memory.
    pub fn read(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let rows = Self::of(object, "rows", false)?;
        match rows.place {
            Place::Host => Ok(rows),
            Place::Cuda(_) => {
                Err(argument(object.py(), "rows lie in a GPU's memory. Give a copy on the CPU"))
            }
        }
    }

    /// Checks shape and strides, in elements.
    fn new(
        py: Python<'_>,
        what: &str,
        keeps: Arc<dyn Any + Send + Sync>,
        first: *mut f16,
        shape: Vec<i64>,
        strides: &[i64],
        place: Place,
    ) -> PyResult<Self> {
        let (count, hidden, down, across) = match (&shape[..], strides) {
            (&[rows, hidden], &[down, across]) => (rows, hidden, down, across),
            (&[1, rows, hidden], &[_, down, across]) => (rows, hidden, down, across),
            (&[images, 1, hidden], &[down, _, across]) => (images, hidden, down, across),
            (&[images, rows, hidden], &[apart, down, across]) if apart == rows.saturating_mul(down) => {
                (images.saturating_mul(rows), hidden, down, across)
            }
            (&[_, _, _], _) => {
                let text = format!(
                    "{what} has shape {shape:?} and strides {strides:?}. Give images without gaps between"
                );
                return Err(argument(py, text));
            }
            _ => {
                let text = format!("{what} has shape {shape:?}. Give [rows, H] or [N, rows, H]");
                return Err(argument(py, text));
            }
        };
        if count < 0 || hidden < 0 || (across != 1 && hidden > 1) || (down < hidden && count > 1) {
            let text =
                format!("{what} has shape {shape:?} and strides {strides:?}. Give rows without gaps inside");
            return Err(argument(py, text));
        }
        let row_stride = if count > 1 { down } else { hidden } as usize;
        let (count, hidden) = (count as usize, hidden as usize);
        Ok(Self { keeps, first, shape, count, hidden, row_stride, place })
    }

    /// Elements from the first row's first to the last row's last.
    pub fn elements(&self) -> usize {
        self.count.checked_sub(1).map_or(0, |before| before * self.row_stride + self.hidden)
    }

    /// Copies the rows of an image that has `rows` of them, `[rows, H]`, from host memory.
    pub fn image(&self, image: usize, rows: usize) -> Vec<f16> {
        assert!(self.place == Place::Host && (image + 1) * rows <= self.count, "rows of the memory");
        let mut copied = Vec::with_capacity(rows * self.hidden);
        for row in image * rows..(image + 1) * rows {
            // SAFETY: there are `count` rows, which `keeps` keeps.
            copied.extend_from_slice(unsafe {
                std::slice::from_raw_parts(self.first.add(row * self.row_stride), self.hidden)
            });
        }
        copied
    }
}

/// What arrays call a format of the module `struct`.
fn name(format: &str) -> &str {
    let names =
        [("f", "float32"), ("d", "float64"), ("h", "int16"), ("i", "int32"), ("l", "int64"), ("B", "uint8")];
    names.iter().find(|(short, _)| *short == format).map_or(format, |(_, long)| long)
}

fn not_half(what: &str, dtype: &str) -> PyErr {
    PyTypeError::new_err(format!("{what} has dtype {dtype}, but rows are float16, end to end. Give float16"))
}
