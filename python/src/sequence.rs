//! A filled sequence, as a value of Python's.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use imagehere::encoder::EncodeReport;

use crate::plan::Plan;

/// A filled sequence.
#[pyclass(frozen, module = "imagehere")]
pub struct Sequence {
    pub inputs_embeds: Py<PyAny>, // Tensor [1, L, H]
    pub plan: Py<Plan>,
    pub report: EncodeReport,
    pub norms: Option<Vec<f64>>,
}

#[pymethods]
impl Sequence {
    #[getter]
    /// [1, L, H] float16, where the encoder's device is, or the rows of ``out``.
    fn inputs_embeds(&self, py: Python<'_>) -> Py<PyAny> {
        self.inputs_embeds.clone_ref(py)
    }

    #[getter]
    fn plan(&self, py: Python<'_>) -> Py<Plan> {
        self.plan.clone_ref(py)
    }

    #[getter]
    /// [1, L] int64, -1 in the rows of images, in host memory.
    fn input_ids(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.plan.get().input_ids(py)
    }

    #[getter]
    /// [1, L] bool, in host memory.
    fn im_mask(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.plan.get().im_mask(py)
    }

    #[getter]
    /// First position and rows of each image, in the order of the markers.
    fn slots(&self) -> Vec<(usize, usize)> {
        self.plan.get().slots()
    }

    #[getter]
    /// Mean Euclidean norm of each slot's rows; None without ``verify``.
    fn norms(&self) -> Option<Vec<f64>> {
        self.norms.clone()
    }

    #[getter]
    fn warnings(&self) -> Vec<String> {
        let of_images = self.report.warnings.iter().map(ToString::to_string);
        self.plan.get().warnings().into_iter().chain(of_images).collect()
    }

    #[getter]
    /// Seconds of decoding, resizing and encoding; images that were encoded and that a cache had.
    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let report = PyDict::new(py);
        report.set_item("decode_s", self.report.decode.as_secs_f64())?;
        report.set_item("resize_s", self.report.resize.as_secs_f64())?;
        report.set_item("encode_s", self.report.encode.as_secs_f64())?;
        report.set_item("images_encoded", self.report.images_encoded)?;
        report.set_item("images_cached", self.report.images_cached)?;
        Ok(report)
    }

    /// L, in positions.
    fn __len__(&self) -> usize {
        self.plan.get().inner.len()
    }

    fn __repr__(&self) -> String {
        let plan = &self.plan.get().inner;
        format!("Sequence({} positions, {} images)", plan.len(), plan.image_count())
    }
}
