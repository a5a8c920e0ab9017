//! The layout of a sequence, as a value of Python's.

use std::ffi::c_void;
use std::sync::Arc;

use pyo3::prelude::*;

use imagehere::prompt::{SegmentKind, SequencePlan};

use crate::tensor::{Kind, Memory, Place};

/// Begin, rows, image or none, text.
type Segment = (usize, usize, Option<usize>, String);

/// The layout of a sequence: integers alone, nothing decoded.
#[pyclass(frozen, module = "imagehere")]
pub struct Plan {
    pub inner: Arc<SequencePlan>,
}

impl Plan {
    pub fn new(inner: SequencePlan) -> Self {
        Self { inner: Arc::new(inner) }
    }

    /// Numbers of the plan as a tensor `[1, L]`.
    fn row<T>(&self, py: Python<'_>, numbers: &[T], kind: Kind) -> PyResult<Py<PyAny>> {
        let first = numbers.as_ptr().cast_mut().cast::<c_void>();
        let shape = vec![1, numbers.len() as i64];
        // SAFETY: the numbers belong to the plan, which the owner shares and nobody writes.
        unsafe { Memory::new(self.inner.clone(), first, kind, Place::Host, shape, true) }.into_tensor(py)
    }
}

#[pymethods]
impl Plan {
    #[getter]
    /// [1, L] int64, -1 in the rows of images. Read-only.
    pub fn input_ids(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.row(py, &self.inner.input_ids, Kind::Int64)
    }

    #[getter]
    /// [1, L] bool, true in the rows of images. Read-only.
    pub fn im_mask(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.row(py, &self.inner.im_mask, Kind::Bool)
    }

    #[getter]
    /// First position and rows of each image, in the order of the markers.
    pub fn slots(&self) -> Vec<(usize, usize)> {
        self.inner.slots.iter().map(|slot| (slot.offset, slot.len)).collect()
    }

    #[getter]
    /// First position, rows, image or None, and text of everything, in order.
    fn segments(&self) -> Vec<Segment> {
        let segment = |segment: &imagehere::prompt::Segment| {
            let image = match segment.kind {
                SegmentKind::Image(image) => Some(image),
                _ => None,
            };
            (segment.offset, segment.len, image, segment.text.clone())
        };
        self.inner.segments.iter().map(segment).collect()
    }

    #[getter]
    pub fn warnings(&self) -> Vec<String> {
        self.inner.warnings.iter().map(ToString::to_string).collect()
    }

    /// L, in positions.
    fn __len__(&self) -> usize {
        self.inner.len()
    }

    fn __repr__(&self) -> String {
        format!("Plan({} positions, {} images)", self.inner.len(), self.inner.image_count())
    }
}
