//! The tensors that encoding needs, by name, and the sizes that their shapes say.
//!
//! Every shape is written once, in letters ([`TOWER`], [`LAYER`], [`TensorNames::rest`]). Each letter has one tensor that
//! defines it; every other tensor with that letter in its shape has to agree, and `config.json` too. What tensors are
//! called is the profile's to say, in front of the names that CLIP has for its own.

use std::path::Path;

use super::index::ConfigFile;
use super::printable;
use crate::config::{HEAD_SIZE, ModelConfig, ModelSizes, Profile, Size, TensorNames, XCOMPOSER2};
use crate::error::{Error, Result};

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
    fn definition(self, names: &TensorNames) -> (String, usize) {
        match self {
            C => (names.of_tower(PATCH_EMBEDDING), 0),
            Rgb => (names.of_tower(PATCH_EMBEDDING), 1),
            Patch => (names.of_tower(PATCH_EMBEDDING), 2),
            T => (names.of_tower(POSITION_EMBEDDING), 0),
            F => (names.of_layer(0, "mlp.fc1.weight"), 0),
            Projector => (format!("{}.weight", names.hidden_layer()), 0),
            H => (format!("{}.weight", names.out_layer()), 0),
            Vocab => (names.token_embedding(), 0),
        }
    }
}

pub(crate) const CLASS_EMBEDDING: &str = "embeddings.class_embedding";
pub(crate) const PATCH_EMBEDDING: &str = "embeddings.patch_embedding.weight";
pub(crate) const POSITION_EMBEDDING: &str = "embeddings.position_embedding.weight";

/// Where its blocks are, in the tower, followed by their number.
const LAYERS: &str = "encoder.layers.";

/// Outside the blocks.
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

impl TensorNames {
    /// Name of a tensor of the tower outside its blocks.
    pub(crate) fn of_tower(&self, part: &str) -> String {
        format!("{}{part}", self.tower)
    }

    /// Name of a tensor of block `i`.
    pub(crate) fn of_layer(&self, i: usize, part: &str) -> String {
        format!("{}{LAYERS}{i}.{part}", self.tower)
    }

    /// Name of the projector's first layer, without `weight` and `bias`.
    pub(crate) fn hidden_layer(&self) -> String {
        format!("{}{}", self.projector, self.projector_hidden)
    }

    /// Name of the projector's second layer.
    pub(crate) fn out_layer(&self) -> String {
        format!("{}{}", self.projector, self.projector_out)
    }

    /// Name of the token embedding table.
    pub(crate) fn token_embedding(&self) -> String {
        format!("{}weight", self.embedding)
    }

    /// The projector and the table.
    fn rest(&self) -> [(String, &'static [Dim]); 5] {
        let (hidden, out) = (self.hidden_layer(), self.out_layer());
        [
            (format!("{hidden}.weight"), &[Projector, C]),
            (format!("{hidden}.bias"), &[Projector]),
            (format!("{out}.weight"), &[H, Projector]),
            (format!("{out}.bias"), &[H]),
            (self.token_embedding(), &[Vocab, H]),
        ]
    }

    /// Every needed tensor of a tower of `layers` blocks, with the letters of its shape.
    pub(crate) fn needed(&self, layers: usize) -> Vec<(String, &'static [Dim])> {
        let mut all: Vec<_> = TOWER.iter().map(|(part, shape)| (self.of_tower(part), *shape)).collect();
        for i in 0..layers {
            all.extend(LAYER.iter().map(|(part, shape)| (self.of_layer(i, part), *shape)));
        }
        all.extend(self.rest());
        all
    }

    /// Whether a name is one of the tensors that fine-tunes saved by other tools hold beside the needed ones,
    /// and that never change the result.
    pub(crate) fn is_optional(&self, name: &str) -> bool {
        let unused_norm =
            name.strip_prefix(self.tower).is_some_and(|part| part.starts_with("post_layernorm."));
        unused_norm || name.ends_with(".embeddings.position_ids") || name.ends_with(".rotary_emb.inv_freq")
    }
}

/// What a file's tensors are called, of what its profile knows: the names under which it has a tower, else the first.
pub(crate) fn choose<'a>(
    profile: &'static Profile,
    names: impl Iterator<Item = &'a str> + Clone,
) -> &'static TensorNames {
    let is_there = |known: &&TensorNames| names.clone().any(|name| name == known.of_tower(PATCH_EMBEDDING));
    profile.names.iter().find(is_there).unwrap_or(&profile.names[0])
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

/// A number of layers that features come through: blocks are counted from names, and have to be there from 0 on without
/// a gap; where `config.json` has their number, it decides, and those that the profile leaves unused may be absent.
///
/// # Errors
/// [`Error::Checkpoint`] naming the block that is missing or too many, or a name below the tower or the projector that
/// is neither needed nor known to be harmless: such a tensor changes the result, and ignoring it would be
/// wrong in silence.
pub(crate) fn count_layers<'a>(
    all: impl Iterator<Item = &'a str> + Clone,
    names: &TensorNames,
    config: &ConfigFile,
    source: &Path,
) -> Result<usize> {
    let refuse = |problem: String, remedy: &str| Error::checkpoint(source, problem, remedy);
    let profile = config.profile;
    let rest = names.rest();
    let mut seen = std::collections::BTreeSet::new();
    for name in all.clone().filter(|name| !names.is_optional(name)) {
        let known = if let Some(part) = name.strip_prefix(names.tower) {
            match part.strip_prefix(LAYERS) {
                Some(part) => match part.split_once('.').and_then(|(i, part)| Some((parse_number(i)?, part)))
                {
                    Some((i, part)) if LAYER.iter().any(|known| known.0 == part) => {
                        seen.insert(i);
                        true
                    }
                    _ => false,
                },
                None => TOWER.iter().any(|known| known.0 == part),
            }
        } else if name.starts_with(names.projector) {
            rest.iter().any(|known| known.0 == name)
        } else {
            true
        };
        if !known {
            let problem = format!(
                "tensor `{}` is no part of the {} tower or projector",
                printable(name),
                profile.title
            );
            return Err(refuse(problem, "Use the checkpoint itself; merge adapters into its weights first"));
        }
    }
    if seen.is_empty() {
        return Err(missing(all, &names.of_layer(0, LAYER[0].0), profile, names, source, &[]));
    }
    if let Some((expected, &i)) = seen.iter().enumerate().find(|&(expected, &i)| i != expected) {
        let problem = format!("the tower's block {expected} is missing, while block {i} is there");
        return Err(refuse(problem, "Complete the download"));
    }
    if profile.unused_blocks == 0 {
        return Ok(seen.len());
    }
    let (key, found) = (config.key(Size::Blocks), seen.len());
    let Some(blocks) = config.size(Size::Blocks) else {
        let problem = format!("`{key}` is not there, without which nothing says where features come from");
        return Err(Error::checkpoint(
            &config.path,
            problem,
            "Use the config.json that belongs to these weights",
        ));
    };
    match blocks.checked_sub(profile.unused_blocks).filter(|&layers| layers > 0) {
        Some(layers) if (layers..=blocks).contains(&found) => Ok(layers),
        Some(_) => {
            let problem =
                format!("the tower has {found} blocks, where `{key}` of its config.json is {blocks}");
            Err(refuse(problem, "Use weights and a config.json that belong together, complete"))
        }
        None => {
            let problem =
                format!("`{key}` is {blocks}, and {} of them would be left unused", profile.unused_blocks);
            Err(Error::checkpoint(&config.path, problem, "Use a checkpoint with a larger tower"))
        }
    }
}

/// A number as Python writes it: no sign, no leading zero.
fn parse_number(text: &str) -> Option<usize> {
    let number: usize = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// The error for a needed tensor that is not there, with a guess at the reason.
pub(crate) fn missing<'a>(
    all: impl Iterator<Item = &'a str> + Clone,
    needed: &str,
    profile: &Profile,
    names: &TensorNames,
    source: &Path,
    nested: &[String],
) -> Error {
    // A file saved by another tool has the tensors under other prefixes.
    let tail = needed.strip_prefix(names.tower).unwrap_or(needed);
    let similar = all.clone().find(|name| *name != needed && name.ends_with(tail));
    let (problem, remedy) = if let Some(similar) = similar {
        (
            format!("tensor `{needed}` is missing, but there is `{}`", printable(similar)),
            "Rename the tensors to the names of the original checkpoint".to_owned(),
        )
    } else if let (Some(key), None) = (nested.first(), all.clone().next()) {
        (
            format!("its tensors are nested under `{key}`: it is a training checkpoint"),
            format!("Save the dictionary under `{key}` as the checkpoint"),
        )
    } else {
        let total = all.clone().count();
        let some = all.take(3).map(|name| format!("`{}`", printable(name))).collect::<Vec<_>>().join(", ");
        let some = if some.is_empty() { some } else { format!(", such as {some}") };
        (
            format!("tensor `{needed}` is missing; there are {total} others{some}"),
            format!("Use a checkpoint of {}, with all its files", profile.title),
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
    names: &TensorNames,
    config: &ConfigFile,
    shape_of: impl Fn(&str) -> Option<(&'a [usize], &'a Path)>,
) -> Result<ModelConfig> {
    let value_of = |dim: Dim| -> Result<usize> {
        if dim == Rgb {
            return Ok(3);
        }
        let (name, axis) = dim.definition(names);
        let (shape, file) = shape_of(&name).ok_or_else(|| Error::Internal(format!("no tensor `{name}`")))?;
        match shape.get(axis) {
            Some(&size) if size > 0 => Ok(size),
            _ => Err(Error::checkpoint(
                file,
                format!("tensor `{name}` has shape {shape:?}, from which no {} can be read", dim.letter()),
                format!("Use a checkpoint of {}", config.profile.title),
            )),
        }
    };
    for (name, letters) in names.needed(layers) {
        let (shape, file) = shape_of(&name).ok_or_else(|| Error::Internal(format!("no tensor `{name}`")))?;
        let expected = letters.iter().map(|&dim| value_of(dim)).collect::<Result<Vec<_>>>()?;
        if shape != expected {
            return Err(shape_error(&name, shape, letters, &expected, names, file));
        }
    }

    let (width, patch_size, tokens) = (value_of(C)?, value_of(Patch)?, value_of(T)?);
    let position_embedding = names.of_tower(POSITION_EMBEDDING);
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
        let patch_embedding = names.of_tower(PATCH_EMBEDDING);
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
    check_config(&sizes, tokens, names, config)?;
    let mut model = ModelConfig::from_sizes(sizes)?.with_profile(config.profile);
    model.max_length = config.size(Size::MaxLength);
    model.max_position_embeddings = config.size(Size::MaxPositions);
    Ok(model)
}

/// The error for a shape that disagrees with the tensor that defines a letter of it.
fn shape_error(
    name: &str,
    shape: &[usize],
    letters: &[Dim],
    expected: &[usize],
    names: &TensorNames,
    file: &Path,
) -> Error {
    let formula = letters.iter().map(|dim| dim.letter()).collect::<Vec<_>>().join(", ");
    let mut reasons = Vec::new();
    for (axis, (&dim, &size)) in letters.iter().zip(expected).enumerate() {
        let reason = format!("{} {size} from `{}`", dim.letter(), dim.definition(names).0);
        if dim != Rgb
            && shape.get(axis) != Some(&size)
            && dim.definition(names).0 != name
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
    let merged = names.tower == XCOMPOSER2.names[0].tower
        && name == names.rest()[0].0
        && shape.len() == 2
        && shape[1] == expected[1].saturating_mul(4);
    let remedy = if merged {
        "This is the projector of InternLM-XComposer2-4KHD or 2.5, which merge patches; use XComposer2-VL"
    } else {
        "Use the files of one checkpoint, complete and unmixed"
    };
    Error::checkpoint(file, problem, remedy)
}

/// Checks what `config.json` says against the shapes.
fn check_config(sizes: &ModelSizes, tokens: usize, names: &TensorNames, config: &ConfigFile) -> Result<()> {
    let disagree = |problem: String| {
        Err(Error::checkpoint(&config.path, problem, "Use the config.json that belongs to these weights"))
    };
    let other = |size: Size, is: usize| {
        config.size(size).filter(|&said| said != is).map(|said| (config.key(size), said))
    };
    if let Some((key, said)) = other(Size::Image, sizes.image_size) {
        return disagree(format!(
            "`{key}` is {said}, but `{}` has {tokens} rows, which with patches of {} pixels makes {} pixels",
            names.of_tower(POSITION_EMBEDDING),
            sizes.patch_size,
            sizes.image_size,
        ));
    }
    for (size, is, dim, what) in [
        (Size::Patch, sizes.patch_size, Patch, "pixels to a side"),
        (Size::Width, sizes.width, C, "outputs"),
        (Size::Mlp, sizes.mlp_width, F, "outputs"),
        (Size::Hidden, sizes.hidden_size, H, "outputs"),
    ] {
        if let Some((key, said)) = other(size, is) {
            return disagree(format!("`{key}` is {said}, but `{}` has {is} {what}", dim.definition(names).0));
        }
    }
    let heads = sizes.width / HEAD_SIZE;
    if let Some((key, said)) = other(Size::Heads, heads) {
        let width = sizes.width;
        return disagree(format!(
            "`{key}` is {said}, but a tower {width} channels wide has {heads} heads of {HEAD_SIZE} channels"
        ));
    }
    let vocab_size = config.size(Size::Vocab).filter(|&said| said > sizes.vocab_size);
    if let Some(said) = vocab_size {
        return disagree(format!(
            "`{}` is {said}, but `{}` has only {} rows",
            config.key(Size::Vocab),
            names.token_embedding(),
            sizes.vocab_size
        ));
    }
    Ok(())
}
