//! One image's features, as a value of Python's.

use std::ffi::c_void;
use std::sync::Arc;

use pyo3::prelude::*;

use crate::tensor::{Kind, Memory, Place};

/// One image's features, to be placed in any number of sequences. Bound to the checkpoint that made them.
#[pyclass(frozen, module = "imagehere")]
pub struct Features {
    pub inner: imagehere::features::Features,
    rows: Py<PyAny>, // Tensor [P, H]
}

impl Features {
    pub fn new(py: Python<'_>, inner: imagehere::features::Features) -> PyResult<Self> {
        let owner = Arc::new(inner.clone());
        let shape = vec![inner.len() as i64, inner.hidden() as i64];
        let first = inner.as_slice().as_ptr().cast_mut().cast::<c_void>();
        // SAFETY: the owner shares the rows, which nobody writes.
        let memory = unsafe { Memory::new(owner, first, Kind::Float16, Place::Host, shape, true) };
        Ok(Self { inner, rows: memory.into_tensor(py)? })
    }
}

#[pymethods]
impl Features {
    #[getter]
    /// [P, H] float16 in host memory. Read-only.
    fn rows(&self, py: Python<'_>) -> Py<PyAny> {
        self.rows.clone_ref(py)
    }

    #[getter]
    fn fingerprint(&self) -> &str {
        self.inner.fingerprint()
    }

    /// P.
    fn __len__(&self) -> usize {
        self.inner.len()
    }

    fn __repr__(&self) -> String {
        format!("Features([{}, {}])", self.inner.len(), self.inner.hidden())
    }
}
