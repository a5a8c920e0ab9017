//! A filled sequence, as a value of Python's.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use imagehere::encoder::EncodeReport;

use crate::plan::Plan;

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
    fn inputs_embeds(&self, py: Python<'_>) -> Py<PyAny> {
        self.inputs_embeds.clone_ref(py)
    }

    #[getter]
    fn plan(&self, py: Python<'_>) -> Py<Plan> {
        self.plan.clone_ref(py)
    }

    #[getter]
    fn input_ids(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.plan.get().input_ids(py)
    }

    #[getter]
    fn im_mask(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.plan.get().im_mask(py)
    }

    #[getter]
    fn slots(&self) -> Vec<(usize, usize)> {
        self.plan.get().slots()
    }

    #[getter]
    fn norms(&self) -> Option<Vec<f64>> {
        self.norms.clone()
    }

    #[getter]
    fn warnings(&self) -> Vec<String> {
        let of_images = self.report.warnings.iter().map(ToString::to_string);
        self.plan.get().warnings().into_iter().chain(of_images).collect()
    }

    #[getter]
    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let report = PyDict::new(py);
        report.set_item("decode_s", self.report.decode.as_secs_f64())?;
        report.set_item("resize_s", self.report.resize.as_secs_f64())?;
        report.set_item("encode_s", self.report.encode.as_secs_f64())?;
        report.set_item("images_encoded", self.report.images_encoded)?;
        report.set_item("images_cached", self.report.images_cached)?;
        Ok(report)
    }

    fn __len__(&self) -> usize {
        self.plan.get().inner.len()
    }

    fn __repr__(&self) -> String {
        let plan = &self.plan.get().inner;
        format!("Sequence({} positions, {} images)", plan.len(), plan.image_count())
    }
}
