//! The tensors that encoding needs, by name, and the sizes that their shapes say.
//!
//! Every shape is written once, in letters ([`TOWER`], [`LAYER`], [`REST`]). Each letter has one tensor that
//! defines it; every other tensor with that letter in its shape has to agree, and `config.json` too.
//!
//! # Source
//! `build_mlp.py` and `modeling_internlm_xcomposer2.py` of the checkpoint's repository.

use std::path::Path;

use super::index::ConfigFile;
use super::printable;
use crate::config::{HEAD_SIZE, ModelConfig, ModelSizes};
use crate::error::{Error, Result};

/// Where the tower's tensors live.
const TOWER_PREFIX: &str = "vit.vision_tower.vision_model.";
/// Where its blocks live, followed by their number.
const LAYERS_PREFIX: &str = "vit.vision_tower.vision_model.encoder.layers.";
/// Where the projector's tensors live.
pub(crate) const PROJECTOR_PREFIX: &str = "vision_proj.";
/// Where the token embedding table lives.
pub(crate) const EMBEDDING_PREFIX: &str = "model.tok_embeddings.";
/// The table itself.
pub(crate) const TOKEN_EMBEDDING: &str = "model.tok_embeddings.weight";

/// A letter in a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dim {
    /// Width of the tower.
    C,
    /// Width of the tower's MLP.
    F,
    /// Tokens in the tower.
    T,
    /// Side of a patch.
    Patch,
    /// Output width of the projector's first layer.
    Projector,
    /// Hidden size of the language model.
    H,
    /// Rows of the token embedding table.
    Vocab,
    /// Red, green, blue.
    Rgb,
}
use Dim::{C, F, H, Patch, Projector, Rgb, T, Vocab};

impl Dim {
    /// The letter as a message shows it.
    fn letter(self) -> &'static str {
        match self {
            C => "width",
            F => "MLP width",
            T => "patches + 1",
            Patch => "patch",
            Projector => "projector width",
            H => "hidden size",
            Vocab => "vocabulary",
            Rgb => "3",
        }
    }

    /// The tensor that defines it, and the axis.
    fn definition(self) -> (String, usize) {
        match self {
            C => (format!("{TOWER_PREFIX}{PATCH_EMBEDDING}"), 0),
            Rgb => (format!("{TOWER_PREFIX}{PATCH_EMBEDDING}"), 1),
            Patch => (format!("{TOWER_PREFIX}{PATCH_EMBEDDING}"), 2),
            T => (format!("{TOWER_PREFIX}{POSITION_EMBEDDING}"), 0),
            F => (format!("{LAYERS_PREFIX}0.mlp.fc1.weight"), 0),
            Projector => (format!("{PROJECTOR_PREFIX}0.weight"), 0),
            H => (format!("{PROJECTOR_PREFIX}2.weight"), 0),
            Vocab => (TOKEN_EMBEDDING.into(), 0),
        }
    }
}

pub(crate) const CLASS_EMBEDDING: &str = "embeddings.class_embedding";
pub(crate) const PATCH_EMBEDDING: &str = "embeddings.patch_embedding.weight";
pub(crate) const POSITION_EMBEDDING: &str = "embeddings.position_embedding.weight";

/// Outside the blocks, after [`TOWER_PREFIX`].
const TOWER: [(&str, &[Dim]); 5] = [
    (CLASS_EMBEDDING, &[C]),
    (PATCH_EMBEDDING, &[C, Rgb, Patch, Patch]),
    (POSITION_EMBEDDING, &[T, C]),
    ("pre_layrnorm.weight", &[C]),
    ("pre_layrnorm.bias", &[C]),
];

/// Of each block, after its number.
const LAYER: [(&str, &[Dim]); 16] = [
    ("layer_norm1.weight", &[C]),
    ("layer_norm1.bias", &[C]),
    ("self_attn.q_proj.weight", &[C, C]),
    ("self_attn.q_proj.bias", &[C]),
    ("self_attn.k_proj.weight", &[C, C]),
    ("self_attn.k_proj.bias", &[C]),
    ("self_attn.v_proj.weight", &[C, C]),
    ("self_attn.v_proj.bias", &[C]),
    ("self_attn.out_proj.weight", &[C, C]),
    ("self_attn.out_proj.bias", &[C]),
    ("layer_norm2.weight", &[C]),
    ("layer_norm2.bias", &[C]),
    ("mlp.fc1.weight", &[F, C]),
    ("mlp.fc1.bias", &[F]),
    ("mlp.fc2.weight", &[C, F]),
    ("mlp.fc2.bias", &[C]),
];

/// The projector and the table, by their whole names.
const REST: [(&str, &[Dim]); 5] = [
    ("vision_proj.0.weight", &[Projector, C]),
    ("vision_proj.0.bias", &[Projector]),
    ("vision_proj.2.weight", &[H, Projector]),
    ("vision_proj.2.bias", &[H]),
    (TOKEN_EMBEDDING, &[Vocab, H]),
];

/// Name of a tensor of the tower outside its blocks.
pub(crate) fn tower(part: &str) -> String {
    format!("{TOWER_PREFIX}{part}")
}

/// Name of a tensor of block `i`.
pub(crate) fn layer(i: usize, part: &str) -> String {
    format!("{LAYERS_PREFIX}{i}.{part}")
}

/// Every needed tensor of a tower of `layers` blocks, with the letters of its shape.
pub(crate) fn needed(layers: usize) -> Vec<(String, &'static [Dim])> {
    let mut all: Vec<_> = TOWER.iter().map(|(part, shape)| (tower(part), *shape)).collect();
    for i in 0..layers {
        all.extend(LAYER.iter().map(|(part, shape)| (layer(i, part), *shape)));
    }
    all.extend(REST.iter().map(|(name, shape)| ((*name).to_owned(), *shape)));
    all
}

/// Whether a name is one of the tensors that fine-tunes saved by other tools hold beside the needed ones,
/// and that never change the result.
pub(crate) fn is_optional(name: &str) -> bool {
    let unused_norm = name.strip_prefix(TOWER_PREFIX).is_some_and(|part| part.starts_with("post_layernorm."));
    unused_norm || name.ends_with(".embeddings.position_ids") || name.ends_with(".rotary_emb.inv_freq")
}

/// The quantisation method that a tensor of this name belongs to, if any.
pub(crate) fn quantised_by(name: &str) -> Option<&'static str> {
    let last = name.rsplit('.').next()?;
    match last {
        "qweight" | "qzeros" | "g_idx" => Some("GPTQ or AWQ"),
        "SCB" | "weight_format" | "absmax" | "quant_map" | "nested_absmax" | "nested_quant_map" => {
            Some("bitsandbytes")
        }
        "weight_scale" | "weight_scale_inv" | "input_scale" | "weight_packed" => {
            Some("fp8 or compressed-tensors")
        }
        _ if name.contains(".quant_state.") => Some("bitsandbytes"),
        _ => None,
    }
}

/// A number of layers, counted from names: blocks have to be there from 0 on without a gap.
///
/// # Errors
/// [`Error::Checkpoint`] naming the block that is missing, or a name below the tower or the projector that
/// is neither needed nor known to be harmless: such a tensor changes the result, and ignoring it would be
/// wrong in silence.
pub(crate) fn count_layers<'a>(names: impl Iterator<Item = &'a str> + Clone, source: &Path) -> Result<usize> {
    let refuse = |problem: String, remedy: &str| Error::checkpoint(source, problem, remedy);
    let mut seen = std::collections::BTreeSet::new();
    for name in names.clone().filter(|name| !is_optional(name)) {
        let known = if let Some(rest) = name.strip_prefix(LAYERS_PREFIX) {
            match rest.split_once('.').and_then(|(i, part)| Some((parse_number(i)?, part))) {
                Some((i, part)) if LAYER.iter().any(|known| known.0 == part) => {
                    seen.insert(i);
                    true
                }
                _ => false,
            }
        } else if let Some(part) = name.strip_prefix(TOWER_PREFIX) {
            TOWER.iter().any(|known| known.0 == part)
        } else if name.starts_with(PROJECTOR_PREFIX) {
            REST.iter().any(|known| known.0 == name)
        } else {
            true
        };
        if !known {
            let problem = format!(
                "tensor `{}` is no part of the InternLM-XComposer2-VL tower or projector",
                printable(name)
            );
            return Err(refuse(problem, "Use the checkpoint itself; merge adapters into its weights first"));
        }
    }
    match seen.iter().enumerate().find(|&(expected, &i)| i != expected) {
        None if !seen.is_empty() => Ok(seen.len()),
        Some((expected, &i)) => {
            let problem = format!("the tower's block {expected} is missing, while block {i} is there");
            Err(refuse(problem, "Complete the download"))
        }
        None => Err(missing(names, &layer(0, LAYER[0].0), source, &[])),
    }
}

/// A number as Python writes it: no sign, no leading zero.
fn parse_number(text: &str) -> Option<usize> {
    let number: usize = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// The error for a needed tensor that is not there, with a guess at the reason.
pub(crate) fn missing<'a>(
    names: impl Iterator<Item = &'a str> + Clone,
    needed: &str,
    source: &Path,
    nested: &[String],
) -> Error {
    // A file saved by another tool has the tensors under other prefixes.
    let tail = needed.strip_prefix(TOWER_PREFIX).unwrap_or(needed);
    let similar = names.clone().find(|name| *name != needed && name.ends_with(tail));
    let (problem, remedy) = if let Some(similar) = similar {
        (
            format!("tensor `{needed}` is missing, but there is `{}`", printable(similar)),
            "Rename the tensors to the names of the original checkpoint".to_owned(),
        )
    } else if let (Some(key), None) = (nested.first(), names.clone().next()) {
        (
            format!("its tensors are nested under `{key}`: it is a training checkpoint"),
            format!("Save the dictionary under `{key}` as the checkpoint"),
        )
    } else {
        let total = names.clone().count();
        let some = names.take(3).map(|name| format!("`{}`", printable(name))).collect::<Vec<_>>().join(", ");
        let some = if some.is_empty() { some } else { format!(", such as {some}") };
        (
            format!("tensor `{needed}` is missing; there are {total} others{some}"),
            "Use a checkpoint of InternLM-XComposer2-VL, with all its files".to_owned(),
        )
    };
    Error::checkpoint(source, problem, remedy)
}

/// Reads the sizes off the shapes, and checks that all shapes and `config.json` agree with them.
///
/// `shape_of` returns a needed tensor's shape and the file it lies in.
///
/// # Errors
/// [`Error::Checkpoint`] naming both sides of a disagreement.
pub(crate) fn read_sizes<'a>(
    layers: usize,
    config: &ConfigFile,
    shape_of: impl Fn(&str) -> Option<(&'a [usize], &'a Path)>,
) -> Result<ModelConfig> {
    let value_of = |dim: Dim| -> Result<usize> {
        if dim == Rgb {
            return Ok(3);
        }
        let (name, axis) = dim.definition();
        let (shape, file) = shape_of(&name).ok_or_else(|| Error::Internal(format!("no tensor `{name}`")))?;
        match shape.get(axis) {
            Some(&size) if size > 0 => Ok(size),
            _ => Err(Error::checkpoint(
                file,
                format!("tensor `{name}` has shape {shape:?}, from which no {} can be read", dim.letter()),
                "Use a checkpoint of InternLM-XComposer2-VL",
            )),
        }
    };
    for (name, letters) in needed(layers) {
        let (shape, file) = shape_of(&name).ok_or_else(|| Error::Internal(format!("no tensor `{name}`")))?;
        let expected = letters.iter().map(|&dim| value_of(dim)).collect::<Result<Vec<_>>>()?;
        if shape != expected {
            return Err(shape_error(&name, shape, letters, &expected, file));
        }
    }

    let (width, patch_size, tokens) = (value_of(C)?, value_of(Patch)?, value_of(T)?);
    let position_embedding = tower(POSITION_EMBEDDING);
    let file_of = |name: &str| shape_of(name).map_or(config.path.as_path(), |(_, file)| file);
    let grid = (tokens - 1).isqrt();
    if grid == 0 || grid * grid != tokens - 1 {
        return Err(Error::checkpoint(
            file_of(&position_embedding),
            format!("`{position_embedding}` has {tokens} rows, which is not one more than a square number"),
            "Use a checkpoint whose images are square",
        ));
    }
    if !width.is_multiple_of(HEAD_SIZE) {
        let patch_embedding = tower(PATCH_EMBEDDING);
        return Err(Error::checkpoint(
            file_of(&patch_embedding),
            format!(
                "the tower is {width} channels wide (`{patch_embedding}`), no multiple of the head size {HEAD_SIZE}"
            ),
            "Use a checkpoint whose heads have 64 channels",
        ));
    }
    let sizes = ModelSizes {
        image_size: grid.saturating_mul(patch_size),
        patch_size,
        width,
        layers,
        mlp_width: value_of(F)?,
        projector_width: value_of(Projector)?,
        hidden_size: value_of(H)?,
        vocab_size: value_of(Vocab)?,
    };
    check_config(&sizes, tokens, config)?;
    let mut model = ModelConfig::from_sizes(sizes)?;
    model.max_length = config.max_length;
    model.max_position_embeddings = config.max_position_embeddings;
    Ok(model)
}

/// The error for a shape that disagrees with the tensor that defines a letter of it.
fn shape_error(name: &str, shape: &[usize], letters: &[Dim], expected: &[usize], file: &Path) -> Error {
    let formula = letters.iter().map(|dim| dim.letter()).collect::<Vec<_>>().join(", ");
    let mut reasons = Vec::new();
    for (axis, (&dim, &size)) in letters.iter().zip(expected).enumerate() {
        let reason = format!("{} {size} from `{}`", dim.letter(), dim.definition().0);
        if dim != Rgb
            && shape.get(axis) != Some(&size)
            && dim.definition().0 != name
            && !reasons.contains(&reason)
        {
            reasons.push(reason);
        }
    }
    let reasons =
        if reasons.is_empty() { String::new() } else { format!(", with {}", reasons.join(" and ")) };
    let problem =
        format!("tensor `{name}` has shape {shape:?}, but [{formula}] = {expected:?} is needed{reasons}");
    // The larger models of the family merge 2×2 patches in front of the same projector.
    let merged = name == REST[0].0 && shape.len() == 2 && shape[1] == expected[1].saturating_mul(4);
    let remedy = if merged {
        "This is the projector of InternLM-XComposer2-4KHD or 2.5, which merge patches; use XComposer2-VL"
    } else {
        "Use the files of one checkpoint, complete and unmixed"
    };
    Error::checkpoint(file, problem, remedy)
}

/// Checks what `config.json` says against the shapes.
fn check_config(sizes: &ModelSizes, tokens: usize, config: &ConfigFile) -> Result<()> {
    let disagree = |problem: String| {
        Err(Error::checkpoint(&config.path, problem, "Use the config.json that belongs to these weights"))
    };
    if let Some(img_size) = config.img_size.filter(|&size| size != sizes.image_size) {
        return disagree(format!(
            "`img_size` is {img_size}, but `{}` has {tokens} rows, which with patches of {} pixels makes {} pixels",
            tower(POSITION_EMBEDDING),
            sizes.patch_size,
            sizes.image_size,
        ));
    }
    if let Some(hidden_size) = config.hidden_size.filter(|&size| size != sizes.hidden_size) {
        return disagree(format!(
            "`hidden_size` is {hidden_size}, but `{}` has {} outputs",
            REST[2].0, sizes.hidden_size
        ));
    }
    if let Some(vocab_size) = config.vocab_size.filter(|&size| size > sizes.vocab_size) {
        return disagree(format!(
            "`vocab_size` is {vocab_size}, but `{TOKEN_EMBEDDING}` has only {} rows",
            sizes.vocab_size
        ));
    }
    Ok(())
}
