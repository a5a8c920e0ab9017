//! Tower and projector as fp16: one allocation per field, filled in parallel, straight from the mapping.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use rayon::prelude::*;

use super::convert::{RangePolicy, ValueStats};
use super::names::{CLASS_EMBEDDING, PATCH_EMBEDDING, POSITION_EMBEDDING};
use super::report::{ConversionReport, Groups, conversion_report};
use super::tensor::Tensor;
use super::weights::{LayerWeights, LinearWeights, NormWeights, VisionWeights};
use crate::config::{ModelConfig, TensorNames};
use crate::error::{Error, Result};

/// Elements converted by one task: 2 MB of fp16, so that a few hundred tasks share out evenly.
const CHUNK: usize = 1 << 20;

/// Converts tower and projector. `tensors` holds the needed ones, with shapes that agree with `config`.
pub(crate) fn vision_weights(
    dir: &Path,
    config: &ModelConfig,
    names: &TensorNames,
    tensors: &BTreeMap<String, Tensor>,
    policy: RangePolicy,
) -> Result<(VisionWeights, ConversionReport)> {
    let mut weights = allocate(config).ok_or_else(|| {
        let problem = "there is not enough memory for its tower and projector as fp16";
        Error::checkpoint(dir, problem, "Use a machine with more memory, or end other programs")
    })?;
    let stored = stored_weights(config, names, tensors)?;
    let mut filled = Vec::new(); // the tensors, in the order of the fields
    let mut tasks = Vec::new(); // (tensor, first element, elements of the field)
    for (tensors, field) in stored.fields().into_iter().zip(weights.fields_mut()) {
        let elements: usize = tensors.iter().map(|tensor| tensor.elements()).sum();
        if elements != field.len() {
            let names: Vec<&str> = tensors.iter().map(|tensor| tensor.name()).collect();
            let len = field.len();
            return Err(Error::Internal(format!("{elements} elements of {names:?} for a field of {len}")));
        }
        let mut rest = field.as_mut_slice();
        for &tensor in tensors {
            let (part, after) = rest.split_at_mut(tensor.elements());
            tasks.extend(
                part.chunks_mut(CHUNK).enumerate().map(|(c, chunk)| (filled.len(), c * CHUNK, chunk)),
            );
            filled.push(tensor);
            rest = after;
        }
    }

    let convert = |(i, first, chunk): (usize, usize, &mut [f16])| {
        let tensor: &Tensor = filled[i];
        let stats = tensor.read(first, chunk, policy)?;
        tensor.release(first..first + chunk.len());
        Ok((i, stats))
    };
    // All tasks run, also after one has failed: the error reported is the first in order, whoever was faster.
    let done: Vec<Result<(usize, ValueStats)>> = tasks.into_par_iter().map(convert).collect();

    // Again as wholes: a page fault maps pages around it, also such as were given back a moment before.
    filled.iter().for_each(|tensor| tensor.release(0..tensor.elements()));

    let mut totals = vec![ValueStats::default(); filled.len()];
    for outcome in done {
        let (i, stats) = outcome?;
        totals[i].merge(&stats);
    }
    let mut groups = Groups::default();
    for (tensor, stats) in filled.iter().zip(&totals) {
        groups.add(tensor.name(), tensor.dtype(), stats);
    }
    Ok((weights, conversion_report(groups, policy)))
}

/// Allocates all fields, zeroed by the operating system and not touched here: each page is first touched by
/// the thread that fills it.
fn allocate(config: &ModelConfig) -> Option<VisionWeights> {
    let (c, f, h) = (config.width, config.mlp_width, config.hidden_size);
    let zeroed = |shape: &[usize]| {
        let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size))?;
        bytemuck::allocation::try_zeroed_vec::<f16>(elements).ok()
    };
    let linear = |n: usize, k: usize| Some(LinearWeights { weight: zeroed(&[n, k])?, bias: zeroed(&[n])? });
    let norm = || Some(NormWeights { weight: zeroed(&[c])?, bias: zeroed(&[c])? });
    let layer = || {
        Some(LayerWeights {
            norm1: norm()?,
            qkv: linear(c.checked_mul(3)?, c)?,
            out: linear(c, c)?,
            norm2: norm()?,
            fc1: linear(f, c)?,
            fc2: linear(c, f)?,
        })
    };
    Some(VisionWeights {
        class_embedding: zeroed(&[c])?,
        patch_embedding: zeroed(&[c, config.patch_len()])?,
        position_embedding: zeroed(&[config.tokens, c])?,
        pre_norm: norm()?,
        layers: (0..config.layers).map(|_| layer()).collect::<Option<_>>()?,
        projector_hidden: linear(config.projector_width, c)?,
        projector_out: linear(h, config.projector_width)?,
    })
}

/// The tensors behind every field, stacked along their first axis: query, key and value make one field.
pub(crate) fn stored_weights<'t>(
    config: &ModelConfig,
    names: &TensorNames,
    tensors: &'t BTreeMap<String, Tensor>,
) -> Result<VisionWeights<Vec<&'t Tensor>>> {
    let find = |name: String| {
        tensors.get(&name).ok_or_else(|| Error::Internal(format!("there is no tensor `{name}`")))
    };
    let one = |name: String| Ok::<_, Error>(vec![find(name)?]);
    let norm = |name: String| {
        Ok::<_, Error>(NormWeights {
            weight: one(format!("{name}.weight"))?,
            bias: one(format!("{name}.bias"))?,
        })
    };
    let linear = |stacked: &[String]| {
        let all =
            |end: &str| stacked.iter().map(|name| find(format!("{name}.{end}"))).collect::<Result<Vec<_>>>();
        Ok::<_, Error>(LinearWeights { weight: all("weight")?, bias: all("bias")? })
    };
    let layer = |i: usize| {
        let name = |part: &str| names.of_layer(i, part);
        Ok(LayerWeights {
            norm1: norm(name("layer_norm1"))?,
            qkv: linear(&["q", "k", "v"].map(|which| name(&format!("self_attn.{which}_proj"))))?,
            out: linear(&[name("self_attn.out_proj")])?,
            norm2: norm(name("layer_norm2"))?,
            fc1: linear(&[name("mlp.fc1")])?,
            fc2: linear(&[name("mlp.fc2")])?,
        })
    };
    Ok(VisionWeights {
        class_embedding: one(names.of_tower(CLASS_EMBEDDING))?,
        patch_embedding: one(names.of_tower(PATCH_EMBEDDING))?,
        position_embedding: one(names.of_tower(POSITION_EMBEDDING))?,
        pre_norm: norm(names.of_tower("pre_layrnorm"))?,
        layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
        projector_hidden: linear(&[names.hidden_layer()])?,
        projector_out: linear(&[names.out_layer()])?,
    })
}
