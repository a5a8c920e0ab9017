//! Where a sequence is written: memory made for it, or the caller's.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use half::f16;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::prelude::*;

use imagehere::encoder::Encoder;
use imagehere::sequence::{Place as SequencePlace, SequenceBuffer};

use crate::buffer::View;
use crate::dlpack;
use crate::errors::argument;
use crate::tensor::{Kind, Memory, Place};

/// Host memory `[L, H]` that Python shares. Written while a call has it, then by nobody here.
struct HostRows(Box<[u64]>);

/// A GPU's memory that Python shares.
struct DeviceRows(#[expect(dead_code, reason = "owns the memory")] Mutex<SequenceBuffer<'static>>);

/// The caller's memory, as rows.
pub struct Out<'py> {
    keeps: Keeps<'py>,
    first: *mut f16, // an address of the device's, where it lies there
    rows: usize,
    hidden: usize,
    row_stride: usize, // elements
    place: Place,
}

/// What keeps the caller's memory where it is.
enum Keeps<'py> {
    Import(dlpack::Import),
    View { _view: View<'py>, object: Py<PyAny> },
}

impl<'py> Out<'py> {
    /// Takes the argument `out`.
    pub fn of(out: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = out.py();
        if out.hasattr("__dlpack__")? {
            let import = dlpack::Import::of(out)?;
            let place = match import.device {
                dlpack::Device { kind: dlpack::CPU | dlpack::CUDA_HOST, .. } => Place::Host,
                dlpack::Device { kind: dlpack::CUDA, id } => Place::Cuda(id.unsigned_abs() as usize),
                dlpack::Device { kind, id } => {
                    let text = format!("out lies on device {kind}:{id} of DLPack. Give memory of the CPU or an NVIDIA GPU");
                    return Err(argument(py, text));
                }
            };
            if import.dtype != Kind::Float16.dlpack() {
                let dlpack::DataType { code, bits, .. } = import.dtype;
                let kind = ["int", "uint", "float", "handle", "bfloat", "complex", "bool"];
                let kind = kind.get(usize::from(code)).unwrap_or(&"type ");
                return Err(not_half(&format!("{kind}{bits}")));
            }
            if import.read_only {
                return Err(PyBufferError::new_err("out is read-only"));
            }
            let rows = Rows::of(py, &import.shape, &import.strides)?;
            let first = import.data.cast();
            return Ok(Self::new(Keeps::Import(import), first, rows, place));
        }
        let Some(view) = View::of(out, true) else {
            return Err(PyTypeError::new_err(format!(
                "out is a {}. Give a float16 tensor or a writable float16 array",
                out.get_type().name()?
            )));
        };
        if view.format() != "e" {
            return Err(not_half(&format!("{:?}", view.format())));
        }
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        if view.strides().iter().any(|stride| stride % 2 != 0) {
            return Err(argument(py, "out has rows at odd addresses"));
        }
        let strides: Vec<i64> = view.strides().iter().map(|&n| n as i64 / 2).collect();
        let rows = Rows::of(py, &shape, &strides)?;
        let first = view.first().cast();
        Ok(Self::new(Keeps::View { _view: view, object: out.clone().unbind() }, first, rows, Place::Host))
    }

    fn new(keeps: Keeps<'py>, first: *mut f16, rows: Rows, place: Place) -> Self {
        let Rows { rows, hidden, row_stride } = rows;
        Self { keeps, first, rows, hidden, row_stride, place }
    }

    /// Elements from the first row's first to the last row's last.
    fn elements(&self) -> usize {
        self.rows.checked_sub(1).map_or(0, |before| before * self.row_stride + self.hidden)
    }
}

fn not_half(dtype: &str) -> PyErr {
    PyTypeError::new_err(format!("out has dtype {dtype}, but the rows are float16, end to end. Give float16"))
}

/// Rows of a caller's memory.
struct Rows {
    rows: usize,
    hidden: usize,
    row_stride: usize, // elements
}

impl Rows {
    /// Reads shape and strides, in elements, of `[rows, H]` or `[1, rows, H]`.
    fn of(py: Python<'_>, shape: &[i64], strides: &[i64]) -> PyResult<Self> {
        let ([rows, hidden], [down, across]) = match (shape, strides) {
            (&[rows, hidden], &[down, across]) | (&[1, rows, hidden], &[_, down, across]) => {
                ([rows, hidden], [down, across])
            }
            _ => {
                let text = format!("out has shape {shape:?}. Give [rows, H] or [1, rows, H]");
                return Err(argument(py, text));
            }
        };
        if rows < 0 || hidden < 0 || (across != 1 && hidden > 1) || (down < hidden && rows > 1) {
            let text = format!("out has shape {shape:?} and strides {strides:?}. Give rows without gaps inside");
            return Err(argument(py, text));
        }
        let down = if rows > 1 { down } else { hidden };
        Ok(Self { rows: rows as usize, hidden: hidden as usize, row_stride: down as usize })
    }
}

/// Where a call writes.
pub enum Target<'py> {
    Host(HostTarget),
    Device(SequenceBuffer<'static>),
    Out(Out<'py>, SequenceBuffer<'static>),
}

/// Rows of our own.
pub struct HostTarget {
    rows: HostRows,
    buffer: SequenceBuffer<'static>,
}

impl<'py> Target<'py> {
    /// Makes room for `[rows, hidden]`, or takes `out`.
    pub fn new(
        py: Python<'py>,
        encoder: &Encoder,
        rows: usize,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let hidden = encoder.config().hidden_size;
        let Some(out) = out else {
            if encoder.describe().starts_with("cuda") {
                let buffer = encoder.device_sequence().map_err(|e| crate::errors::raise(py, &e))?;
                return Ok(Self::Device(buffer));
            }
            let mut rows = HostRows(vec![0; (rows * hidden).div_ceil(4)].into_boxed_slice());
            // SAFETY: the box does not move, outlives the buffer (`finish` drops that first), and nobody else looks at it
            // before the call is over.
            let memory = unsafe { std::slice::from_raw_parts_mut(rows.0.as_mut_ptr().cast::<f16>(), 4 * rows.0.len()) };
            let buffer = SequenceBuffer::wrap(memory, hidden);
            return Ok(Self::Host(HostTarget { rows, buffer }));
        };
        let out = Out::of(out)?;
        if out.hidden != hidden {
            let text = format!("out has rows of {} elements, but H is {hidden}", out.hidden);
            return Err(argument(py, text));
        }
        if out.rows < rows {
            let text = format!("out has {} rows, but the sequence needs {rows}. Give at least as many", out.rows);
            return Err(argument(py, text));
        }
        let buffer = match out.place {
            Place::Host => {
                // SAFETY: whoever gave the memory keeps it where it is while `out` lives; that nobody else touches it
                // during the call is what the docstring asks for.
                let memory = unsafe { std::slice::from_raw_parts_mut(out.first, out.elements()) };
                SequenceBuffer::wrap(memory, out.row_stride)
            }
            // SAFETY: as above; the capsule's stream is waited for by the default stream.
            Place::Cuda(_) => unsafe {
                encoder
                    .wrap_device(out.first as u64, out.elements(), out.row_stride, 0)
                    .map_err(|e| crate::errors::raise(py, &e))?
            },
        };
        Ok(Self::Out(out, buffer))
    }

    /// The buffer for the call.
    pub fn buffer(&mut self) -> &mut SequenceBuffer<'static> {
        match self {
            Self::Host(HostTarget { buffer, .. }) => buffer,
            Self::Device(buffer) | Self::Out(_, buffer) => buffer,
        }
    }

    /// Gives the rows that were written to Python, `[1, L, H]`.
    pub fn finish(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self {
            Self::Host(HostTarget { rows, buffer }) => {
                let shape = vec![1, buffer.len() as i64, buffer.hidden() as i64];
                drop(buffer);
                let owner = Arc::new(rows);
                let first = owner.0.as_ptr().cast_mut().cast::<c_void>();
                // SAFETY: the owner has as many elements; the exclusive borrow of them is gone.
                unsafe { Memory::new(owner, first, Kind::Float16, Place::Host, shape, false) }.into_tensor(py)
            }
            Self::Device(buffer) => {
                let shape = vec![1, buffer.len() as i64, buffer.hidden() as i64];
                let (address, row_stride) = buffer.device_address().unwrap_or_default();
                let place = match buffer.place() {
                    SequencePlace::Cuda(ordinal) => Place::Cuda(ordinal),
                    _ => return Err(argument(py, "the sequence is not on the device")),
                };
                let strides = vec![shape[1] * row_stride as i64, row_stride as i64, 1];
                let owner = Arc::new(DeviceRows(Mutex::new(buffer)));
                let first = std::ptr::without_provenance_mut(address as usize);
                // SAFETY: the owner has the memory, and encodes nothing into it any more.
                unsafe { Memory::new(owner, first, Kind::Float16, place, shape, false).with_strides(strides) }
                    .into_tensor(py)
            }
            Self::Out(out, buffer) => {
                let (len, hidden) = (buffer.len() as i64, out.hidden as i64);
                drop(buffer);
                let strides = vec![len * out.row_stride as i64, out.row_stride as i64, 1];
                let (first, place) = (out.first.cast(), out.place);
                let owner: Arc<dyn std::any::Any + Send + Sync> = match out.keeps {
                    Keeps::Import(import) => Arc::new(import),
                    // A view is given back with the GIL; the object stays, and with it the memory, as long as nobody
                    // resizes it.
                    Keeps::View { object, .. } => Arc::new(object),
                };
                // SAFETY: the caller's memory has these rows, and the owner keeps it.
                unsafe { Memory::new(owner, first, Kind::Float16, place, vec![1, len, hidden], false).with_strides(strides) }
                    .into_tensor(py)
            }
        }
    }
}
