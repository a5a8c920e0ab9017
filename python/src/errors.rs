//! Errors of the library as the exceptions of `imagehere.errors`, with the same text.

use pyo3::prelude::*;
use pyo3::types::PyType;

use imagehere::Error;

/// The name of an error's exception.
fn name(error: &Error) -> &'static str {
    match error {
        Error::Argument { .. } => "ArgumentError",
        Error::Read { .. } => "ReadError",
        Error::MarkerCount(_) => "MarkerCountError",
        Error::SequenceTooLong { .. } => "SequenceTooLongError",
        Error::Image { .. } => "ImageError",
        Error::Features { .. } => "FeaturesError",
        Error::Checkpoint { .. } => "CheckpointError",
        Error::DType { .. } => "DTypeError",
        Error::ValueOutOfRange { .. } => "ValueOutOfRangeError",
        Error::Device { .. } => "DeviceError",
        Error::Write { .. } => "WriteError",
        Error::Sequence { source, .. } => name(source),
        Error::Incomplete { .. } => "IncompleteError",
        Error::Internal(_) => "InternalError",
        _ => "Error",
    }
}

/// Makes an exception of `imagehere.errors` by name.
pub fn named(py: Python<'_>, name: &str, text: String) -> PyErr {
    let class = || py.import("imagehere.errors")?.getattr(name)?.cast_into::<PyType>().map_err(PyErr::from);
    match class() {
        Ok(class) => PyErr::from_type(class, (text,)),
        Err(error) => error,
    }
}

/// Makes the exception for an error.
pub fn raise(py: Python<'_>, error: &Error) -> PyErr {
    named(py, name(error), error.to_string())
}

/// Makes an `ArgumentError`.
pub fn argument(py: Python<'_>, text: impl Into<String>) -> PyErr {
    named(py, "ArgumentError", text.into())
}
