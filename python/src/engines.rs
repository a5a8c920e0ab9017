//! What other engines take, for Python: bytes of their requests, arguments of their calls, files of theirs.

use std::path::PathBuf;

use half::f16;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use imagehere::output::vllm::{self, ChatBody};
use imagehere::output::{Rows, lmdeploy, sglang, torch_save};

use crate::call::run;
use crate::encoder::Encoder;
use crate::errors::{argument, raise};
use crate::features::Features;
use crate::options::{MetaArg, PromptOptions};
use crate::sequence::Sequence;
use crate::tensor::{self, Memory};

/// The rows of features, as the library writes them.
fn rows<'a>(features: &'a [PyRef<'_, Features>]) -> Vec<Rows<'a>> {
    features.iter().map(|features| Rows::from(&features.inner)).collect()
}

/// All rows of a sequence in host memory without gaps, copied if they do not lie so.
fn host(py: Python<'_>, sequence: &Sequence) -> PyResult<Memory> {
    let memory = tensor::memory(sequence.inputs_embeds.bind(py))?;
    memory
        .contiguous()
        .ok_or_else(|| argument(py, "the sequence lies in a GPU's memory. Encode with out= on the host"))
}

/// Writes to memory, without the GIL.
fn bytes<'py>(
    py: Python<'py>,
    write: impl FnOnce(&mut Vec<u8>) -> imagehere::Result<()> + Send,
) -> PyResult<Bound<'py, PyBytes>> {
    let written = run(py, |_| {
        let mut out = Vec::new();
        write(&mut out).map(|()| out)
    })?;
    Ok(PyBytes::new(py, &written))
}

/// As errors of writing to memory are: there are none but broken promises.
fn internal(error: std::io::Error) -> imagehere::Error {
    imagehere::Error::Internal(format!("writing to memory: {error}"))
}

/// The JSON body of a chat for ``vllm serve --enable-mm-embeds``: each image a part ``image_embeds`` in its place.
///
/// The server puts its own template around it. ``features``: one for each marker, in order. Raises ArgumentError.
#[pyfunction]
#[pyo3(signature = (encoder, prompt, features, *, model = None, meta_instruction = MetaArg::default(), history = None))]
pub fn vllm_chat_body<'py>(
    py: Python<'py>,
    encoder: &Bound<'py, Encoder>,
    prompt: &str,
    features: Vec<PyRef<'_, Features>>,
    model: Option<String>,
    meta_instruction: MetaArg,
    history: Option<Vec<(String, String)>>,
) -> PyResult<Bound<'py, PyBytes>> {
    let options = PromptOptions { meta: meta_instruction, history, ..PromptOptions::default() };
    let request = options.request(py, prompt)?;
    let images = rows(&features);
    let profile = encoder.get().inner.config().profile;
    bytes(py, |out| {
        let turns = request.turns(profile)?;
        let body = ChatBody::new(&turns, &images)?;
        let body = model.as_deref().map_or(body, |model| body.model(model));
        body.write(out).map_err(internal)
    })
}

/// What ``torch.save`` writes of all rows, [L, H] float16: vLLM's ``prompt_embeds``, before base64.
#[pyfunction]
pub fn vllm_prompt_embeds<'py>(
    py: Python<'py>,
    sequence: &Bound<'py, Sequence>,
) -> PyResult<Bound<'py, PyBytes>> {
    let memory = host(py, sequence.get())?;
    let (values, hidden) = memory.rows();
    bytes(py, |out| torch_save::write(out, &Rows::new(values, hidden)?.into()).map(drop).map_err(internal))
}

/// The JSON body of a completion for ``vllm serve --enable-prompt-embeds``, all rows as ``prompt_embeds``.
#[pyfunction]
#[pyo3(signature = (sequence, *, model = None))]
pub fn vllm_completion_body<'py>(
    py: Python<'py>,
    sequence: &Bound<'py, Sequence>,
    model: Option<String>,
) -> PyResult<Bound<'py, PyBytes>> {
    let memory = host(py, sequence.get())?;
    let (values, hidden) = memory.rows();
    bytes(py, |out| {
        vllm::write_completion_body(out, Rows::new(values, hidden)?, model.as_deref()).map_err(internal)
    })
}

/// Writes entries for vLLM's ``ECExampleConnector`` under a folder, and returns the ``uuid`` of each.
#[pyfunction]
pub fn vllm_encoder_cache(
    py: Python<'_>,
    path: PathBuf,
    features: Vec<PyRef<'_, Features>>,
) -> PyResult<Vec<String>> {
    let images = rows(&features);
    run(py, |_| {
        vllm::check_encoder_cache(&path)?;
        let write = |rows: &Rows<'_>| {
            let uuid = rows.digest();
            vllm::write_encoder_cache(&path, &uuid, *rows).map(|_| uuid)
        };
        images.iter().map(write).collect()
    })
}

/// What LMDeploy's TurboMind takes: ``input_ids``, ``input_embeddings`` (a Tensor [P, H] for each image, not copied; pass
/// them through ``torch.from_dlpack``) and ``input_embedding_ranges``.
///
/// ``image_token``: the id in the rows of images, 0 if not given.
#[pyfunction]
#[pyo3(signature = (sequence, *, image_token = lmdeploy::IMAGE_TOKEN))]
pub fn lmdeploy_arguments<'py>(
    py: Python<'py>,
    sequence: &Bound<'py, Sequence>,
    image_token: u32,
) -> PyResult<Bound<'py, PyDict>> {
    let sequence = sequence.get();
    let plan = sequence.plan.get();
    let memory = tensor::memory(sequence.inputs_embeds.bind(py))?;
    let (embeddings, ranges) = (PyList::empty(py), PyList::empty(py));
    for (offset, len) in plan.slots().into_iter().filter(|(_, len)| *len > 0) {
        embeddings.append(memory.part(offset, len).into_tensor(py)?)?;
        ranges.append(PyList::new(py, [offset, offset + len])?)?;
    }
    let arguments = PyDict::new(py);
    arguments.set_item("input_ids", plan.inner.ids_with(image_token).collect::<Vec<_>>())?;
    let none = embeddings.is_empty();
    arguments.set_item("input_embedding_ranges", if none { None } else { Some(ranges) })?;
    arguments.set_item("input_embeddings", if none { None } else { Some(embeddings) })?;
    Ok(arguments)
}

/// What SGLang's ``Engine.generate`` takes: ``input_ids`` and ``image_data``, one ``precomputed_embedding`` for all images,
/// its ``feature`` a Tensor (pass it through ``torch.from_dlpack``), with the first and last position of each image.
///
/// ``image_token``: the served model's. Raises ArgumentError if it occurs in text.
#[pyfunction]
#[pyo3(signature = (sequence, *, image_token))]
pub fn sglang_arguments<'py>(
    py: Python<'py>,
    sequence: &Bound<'py, Sequence>,
    image_token: u32,
) -> PyResult<Bound<'py, PyDict>> {
    let sequence = sequence.get();
    let plan = sequence.plan.get();
    sglang::check(&plan.inner, image_token).map_err(|error| raise(py, &error))?;
    let slots: Vec<_> = plan.slots().into_iter().filter(|(_, len)| *len > 0).collect();
    let arguments = PyDict::new(py);
    arguments.set_item("input_ids", plan.inner.ids_with(image_token).collect::<Vec<_>>())?;
    let feature = match slots[..] {
        [] => {
            arguments.set_item("image_data", py.None())?;
            return Ok(arguments);
        }
        [(offset, len)] => tensor::memory(sequence.inputs_embeds.bind(py))?.part(offset, len),
        _ => {
            let memory = host(py, sequence)?;
            let (values, hidden) = memory.rows();
            let part = |&(offset, len): &(usize, usize)| &values[offset * hidden..(offset + len) * hidden];
            let all: Vec<f16> = slots.iter().flat_map(part).copied().collect();
            Memory::own(all, hidden)
        }
    };
    let image = PyDict::new(py);
    image.set_item("format", "precomputed_embedding")?;
    image.set_item("feature", feature.into_tensor(py)?)?;
    let ends: Vec<_> = slots.iter().map(|(offset, len)| (*offset, offset + len - 1)).collect();
    image.set_item("offsets", ends)?;
    arguments.set_item("image_data", PyList::new(py, [image])?)?;
    Ok(arguments)
}
