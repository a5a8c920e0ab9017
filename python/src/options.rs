//! Arguments that are words.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyString};

use imagehere::image::{Alpha, Exif, Resample};
use imagehere::prompt::{Bos, Meta, Request};

use crate::errors::argument;

/// Finds a word among those that an argument may be.
pub fn pick<T: Copy>(py: Python<'_>, what: &str, word: &str, words: &[(&str, T)]) -> PyResult<T> {
    words.iter().find(|(name, _)| *name == word).map(|&(_, value)| value).ok_or_else(|| {
        let names: Vec<String> = words.iter().map(|(name, _)| format!("{name:?}")).collect();
        argument(py, format!("{what}={word:?} is unknown. Use {}", names.join(" or ")))
    })
}

pub fn exif(py: Python<'_>, word: &str) -> PyResult<Exif> {
    pick(py, "exif", word, &[("apply", Exif::Apply), ("ignore", Exif::Ignore)])
}

pub fn resample(py: Python<'_>, word: &str) -> PyResult<Resample> {
    pick(py, "resample", word, &[("pillow", Resample::Pillow), ("pillow13", Resample::Pillow13)])
}

pub fn alpha(value: &Bound<'_, PyAny>) -> PyResult<Alpha> {
    if let Ok((red, green, blue)) = value.extract::<(u8, u8, u8)>() {
        return Ok(Alpha::Over([red, green, blue]));
    }
    let words = [("drop", Alpha::Drop), ("white", Alpha::WHITE), ("black", Alpha::BLACK)];
    let word: String = value
        .extract()
        .map_err(|_| PyTypeError::new_err("alpha is \"drop\", \"white\", \"black\" or (red, green, blue)"))?;
    pick(value.py(), "alpha", &word, &words)
}

/// The argument `meta_instruction`.
#[derive(Clone, Default, PartialEq)]
pub struct MetaArg(Meta);

impl<'a, 'py> FromPyObject<'a, 'py> for MetaArg {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if value.is_none() {
            return Ok(Self(Meta::None));
        }
        if value.is_instance_of::<PyBool>() {
            let text = value.str()?.to_string();
            return Err(PyTypeError::new_err(format!(
                "meta_instruction={text} is a bool, which upstream's code would put into the prompt as the text {text:?}. \
                 Give a string, or None for no system text"
            )));
        }
        match value.cast::<PyString>() {
            Ok(text) => Ok(Self(Meta::Text(text.to_str()?.to_owned()))),
            Err(_) => Err(PyTypeError::new_err(format!(
                "meta_instruction is a string or None, not {}",
                value.get_type().name()?
            ))),
        }
    }
}

/// What a prompt's plan depends on beside prompt and images.
#[derive(PartialEq)]
pub struct PromptOptions {
    pub meta: MetaArg,
    pub history: Option<Vec<(String, String)>>,
    pub raw: bool,
    pub bos: String,
    pub allow_control_tokens: bool,
    pub max_length: Option<usize>,
    pub truncate: bool,
}

impl Default for PromptOptions {
    fn default() -> Self {
        Self {
            meta: MetaArg::default(),
            history: None,
            raw: false,
            bos: "per-segment".into(),
            allow_control_tokens: false,
            max_length: None,
            truncate: false,
        }
    }
}

impl PromptOptions {
    /// Makes the request.
    pub fn request(self, py: Python<'_>, prompt: &str) -> PyResult<Request> {
        let bos = pick(py, "bos", &self.bos, &[("per-segment", Bos::PerSegment), ("first", Bos::First)])?;
        let mut request = Request::new(prompt)
            .meta_instruction(self.meta.0)
            .history(self.history.unwrap_or_default())
            .raw(self.raw)
            .bos(bos)
            .allow_control_tokens(self.allow_control_tokens)
            .truncate(self.truncate);
        if let Some(positions) = self.max_length {
            request = request.max_length(positions);
        }
        Ok(request)
    }
}
