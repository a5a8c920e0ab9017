//! Where a sequence is written: memory made for it, or the caller's.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use half::f16;
use pyo3::prelude::*;

use imagehere::encoder::Encoder;
use imagehere::sequence::{Place as SequencePlace, SequenceBuffer};

use crate::errors::argument;
use crate::rows::Rows;
use crate::tensor::{Kind, Memory, Place};

/// Host memory `[L, H]` that Python shares. Written while a call has it, then by nobody here.
struct HostRows(Box<[u64]>);

/// A GPU's memory that Python shares.
struct DeviceRows(#[expect(dead_code, reason = "owns the memory")] Mutex<SequenceBuffer<'static>>);

/// Where a call writes. Buffers go before the memory that they are lent.
pub enum Target {
    Host(HostTarget),
    Device(SequenceBuffer<'static>),
    Out(SequenceBuffer<'static>, Rows),
}

/// Rows of our own.
pub struct HostTarget {
    buffer: SequenceBuffer<'static>,
    rows: HostRows,
}

impl Target {
    /// Makes room for `[rows, hidden]`, or takes `out`.
    pub fn new(
        py: Python<'_>,
        encoder: &Encoder,
        rows: usize,
        out: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let hidden = encoder.config().hidden_size;
        let Some(out) = out else {
            // Refused by an encoder on the CPU, and by no other.
            if let Ok(buffer) = encoder.device_sequence() {
                return Ok(Self::Device(buffer));
            }
            let mut rows = HostRows(vec![0; (rows * hidden).div_ceil(4)].into_boxed_slice());
            // SAFETY: the box does not move, outlives the buffer (`finish` drops that first), and nobody else looks at it
            // before the call is over.
            let memory = unsafe {
                std::slice::from_raw_parts_mut(rows.0.as_mut_ptr().cast::<f16>(), 4 * rows.0.len())
            };
            let buffer = SequenceBuffer::wrap(memory, hidden);
            return Ok(Self::Host(HostTarget { buffer, rows }));
        };
        let out = Rows::of(out, "out", true)?;
        if out.shape.len() == 3 && out.shape[0] != 1 {
            let text = format!("out has shape {:?}. Give [rows, H] or [1, rows, H]", out.shape);
            return Err(argument(py, text));
        }
        if out.hidden != hidden {
            let text = format!("out has rows of {} elements, but H is {hidden}", out.hidden);
            return Err(argument(py, text));
        }
        if out.count < rows {
            let text =
                format!("out has {} rows, but the sequence needs {rows}. Give at least as many", out.count);
            return Err(argument(py, text));
        }
        let buffer = match out.place {
            Place::Host => {
                // SAFETY: whoever gave the memory keeps it where it is while `out` lives; that nobody else touches it
                // during the call is what the docstring asks for.
                let memory = match out.elements() {
                    0 => &mut [],
                    elements => unsafe { std::slice::from_raw_parts_mut(out.first, elements) },
                };
                SequenceBuffer::wrap(memory, out.row_stride)
            }
            // SAFETY: as above; the capsule's stream is waited for by the default stream.
            Place::Cuda(_) => unsafe {
                encoder
                    .wrap_device(out.first as u64, out.elements(), out.row_stride, 0)
                    .map_err(|e| crate::errors::raise(py, &e))?
            },
        };
        Ok(Self::Out(buffer, out))
    }

    /// The buffer for the call.
    pub fn buffer(&mut self) -> &mut SequenceBuffer<'static> {
        match self {
            Self::Host(HostTarget { buffer, .. }) => buffer,
            Self::Device(buffer) | Self::Out(buffer, _) => buffer,
        }
    }

    /// Gives the rows that were written to Python, `[1, L, H]`.
    pub fn finish(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self {
            Self::Host(HostTarget { buffer, rows }) => {
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
            Self::Out(buffer, out) => {
                let (len, hidden) = (buffer.len() as i64, out.hidden as i64);
                drop(buffer);
                let strides = vec![len * out.row_stride as i64, out.row_stride as i64, 1];
                let (first, place) = (out.first.cast(), out.place);
                // SAFETY: the caller's memory has these rows, and what keeps it is the owner.
                unsafe {
                    Memory::new(out.keeps, first, Kind::Float16, place, vec![1, len, hidden], false)
                        .with_strides(strides)
                }
                .into_tensor(py)
            }
        }
    }
}
