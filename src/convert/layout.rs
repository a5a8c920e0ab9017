//! Which tensor goes under which name into which file, and the `config.json` beside them.

use half::f16;
use serde_json::{Value, json};

use super::Layout;
use crate::checkpoint::{Checkpoint, Tensor};
use crate::error::{Error, Result};

/// The file that makes a directory a checkpoint.
pub(super) const CONFIG: &str = "config.json";
/// In front of the tower's tensors where `CLIPVisionModel` saves them.
const CLIP_PREFIX: &str = "vision_model.";
/// The norm that `CLIPVisionModel` has and upstream's checkpoint has not.
const POST_NORM: &str = "post_layernorm";
/// Epsilon of the tower's norms, as JSON has it: in f64, that of the model would have more digits.
const LAYER_NORM_EPS: f64 = 1e-5;
const _: () = assert!(LAYER_NORM_EPS as f32 == crate::config::LAYER_NORM_EPS);

/// A file of weights.
pub(super) struct WeightsFile {
    pub name: &'static str,
    pub parts: Vec<Part>,
}

/// A tensor of a file.
pub(super) struct Part {
    pub name: String,
    pub source: Source,
}

/// Where its values come from.
pub(super) enum Source {
    /// The checkpoint.
    Stored(Tensor),
    /// This value, so many times.
    Constant(f16, usize),
}

impl Part {
    pub fn elements(&self) -> usize {
        match &self.source {
            Source::Stored(tensor) => tensor.elements(),
            Source::Constant(_, elements) => *elements,
        }
    }

    pub fn shape(&self) -> Vec<usize> {
        match &self.source {
            Source::Stored(tensor) => tensor.shape().to_vec(),
            Source::Constant(_, elements) => vec![*elements],
        }
    }
}

/// Lists the files, their tensors in the order of the data's journey.
pub(super) fn files(checkpoint: &Checkpoint, layout: Layout) -> Result<Vec<WeightsFile>> {
    let stored =
        |tensor: &Tensor, name: &str| Part { name: name.to_owned(), source: Source::Stored(tensor.clone()) };
    let needed = checkpoint.needed();
    if layout == Layout::Upstream {
        let parts = needed.iter().map(|tensor| stored(tensor, tensor.name())).collect();
        return Ok(vec![WeightsFile { name: "model.safetensors", parts }]);
    }
    let names = checkpoint.names();
    let below = |prefix: &str, new: &dyn Fn(&str) -> String| -> Vec<Part> {
        let renamed = |tensor: &&Tensor| {
            let part = tensor.name().strip_prefix(prefix)?;
            Some(stored(tensor, &new(part)))
        };
        needed.iter().filter_map(renamed).collect()
    };
    let mut tower = below(names.tower, &|part| format!("{CLIP_PREFIX}{part}"));
    tower.extend(post_norm(checkpoint)?);
    // A `Sequential` calls its layers 0 and 2.
    let layers = [(names.projector_hidden, "0"), (names.projector_out, "2")];
    let of_sequential = |part: &str| {
        let renamed = layers.iter().find_map(|(old, new)| Some(format!("{new}{}", part.strip_prefix(old)?)));
        renamed.unwrap_or_else(|| part.to_owned())
    };
    let files = vec![
        WeightsFile { name: "model.safetensors", parts: tower },
        WeightsFile { name: "projector.safetensors", parts: below(names.projector, &of_sequential) },
        WeightsFile { name: "token_embedding.safetensors", parts: below(names.embedding, &str::to_owned) },
    ];
    let (placed, count) = (files.iter().map(|file| file.parts.len()).sum::<usize>(), needed.len() + 2);
    if placed != count {
        return Err(Error::Internal(format!("{placed} tensors in files, of {count}")));
    }
    Ok(files)
}

/// The norm after the last block: the checkpoint's if it has one, else the identity, as transformers would begin with.
fn post_norm(checkpoint: &Checkpoint) -> Result<Vec<Part>> {
    let width = checkpoint.config().width;
    let part = |(end, value): (&str, f16)| {
        let name = checkpoint.names().of_tower(&format!("{POST_NORM}.{end}"));
        let source = match checkpoint.optional(&name)? {
            Some(tensor) if tensor.shape() != [width] => {
                return Err(Error::checkpoint(
                    tensor.file().path(),
                    format!("tensor `{name}` has shape {:?}, but [{width}] is needed", tensor.shape()),
                    "Use the files of one checkpoint, complete and unmixed",
                ));
            }
            Some(tensor) => Source::Stored(tensor),
            None => Source::Constant(value, width),
        };
        let name = format!("{CLIP_PREFIX}{POST_NORM}.{end}");
        Ok(Part { name, source })
    };
    [("weight", f16::ONE), ("bias", f16::ZERO)].into_iter().map(part).collect()
}

/// Returns the new `config.json`.
pub(super) fn config(checkpoint: &Checkpoint, layout: Layout) -> Result<Value> {
    match layout {
        Layout::Upstream => {
            // The original's, every key of it in its place, but the dtype of the weights.
            let bytes = checkpoint.file_beside(CONFIG)?.unwrap_or_default();
            let mut config: Value = serde_json::from_slice(&bytes).map_err(|e| {
                let path = checkpoint.dir().join(CONFIG);
                Error::checkpoint(
                    path,
                    format!("it is no JSON object: {e}"),
                    "Let nothing change it meanwhile",
                )
            })?;
            if config.get("dtype").is_some() {
                config["dtype"] = json!("float16"); // as transformers 5 spells it
            }
            config["torch_dtype"] = json!("float16");
            Ok(config)
        }
        Layout::ClipVision => {
            let c = checkpoint.config();
            Ok(json!({
                "architectures": ["CLIPVisionModel"],
                "attention_dropout": 0.0,
                "hidden_act": "quick_gelu",
                "hidden_size": c.width,
                "image_size": c.image_size,
                "intermediate_size": c.mlp_width,
                "layer_norm_eps": LAYER_NORM_EPS,
                "model_type": "clip_vision_model",
                "num_attention_heads": c.heads,
                "num_channels": 3,
                "num_hidden_layers": c.layers,
                "patch_size": c.patch_size,
                "torch_dtype": "float16",
            }))
        }
    }
}
