//! `imagehere._imagehere`: the library's calls for Python. Names, types and shapes stand in `imagehere/_imagehere.pyi`.
//!
//! ```text
//!   arguments ─▶ images, options ─▶ library, without the GIL ─▶ memory shared with who asks
//!                pointers, no copy    signals looked at            DLPack, buffer protocol
//! ```
//!
//! What is unsafe has its addresses: `buffer` (Python's buffer protocol) and `dlpack` take and give memory, `images`, `rows`
//! and `target` read and write what was taken, `tensor` ties what is given to those who look at it.

use pyo3::prelude::*;

mod buffer;
mod call;
mod dlpack;
mod encoder;
mod engines;
mod errors;
mod features;
mod images;
mod options;
mod plan;
mod rows;
mod sequence;
mod target;
mod tensor;

#[pymodule]
fn _imagehere(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("DEFAULT_META_INSTRUCTION", imagehere::prompt::DEFAULT_META_INSTRUCTION)?;
    module.add("MARKER", imagehere::prompt::MARKER)?;
    module.add("Tensor", tensor::class(py)?)?;
    module.add_class::<encoder::Encoder>()?;
    module.add_class::<features::Features>()?;
    module.add_class::<plan::Plan>()?;
    module.add_class::<sequence::Sequence>()?;
    module.add_function(wrap_pyfunction!(engines::lmdeploy_arguments, module)?)?;
    module.add_function(wrap_pyfunction!(engines::sglang_arguments, module)?)?;
    module.add_function(wrap_pyfunction!(engines::vllm_chat_body, module)?)?;
    module.add_function(wrap_pyfunction!(engines::vllm_completion_body, module)?)?;
    module.add_function(wrap_pyfunction!(engines::vllm_encoder_cache, module)?)?;
    module.add_function(wrap_pyfunction!(engines::vllm_prompt_embeds, module)?)?;
    module.add_function(wrap_pyfunction!(encoder::make_random_checkpoint, module)?)?;
    Ok(())
}
