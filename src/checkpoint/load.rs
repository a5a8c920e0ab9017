//! Tower and projector as fp16: one allocation per field, filled in parallel, straight from the mapping.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use rayon::prelude::*;

use super::convert::{RangePolicy, ValueStats};
use super::names;
use super::report::{ConversionReport, Groups, conversion_report};
use super::tensor::Tensor;
use super::weights::{LayerWeights, LinearWeights, NormWeights, VisionWeights};
use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// Elements converted by one task: 2 MB of fp16, so that a few hundred tasks share out evenly.
const CHUNK: usize = 1 << 20;

/// A field of the weights, the tensor that fills it, and no copy in between.
type Field<'w> = (String, &'w mut [f16]);

/// Converts tower and projector. `tensors` holds the needed ones, with shapes that agree with `config`.
pub(crate) fn vision_weights(
    dir: &Path,
    config: &ModelConfig,
    tensors: &BTreeMap<String, Tensor>,
    policy: RangePolicy,
) -> Result<(VisionWeights, ConversionReport)> {
    let mut weights = allocate(config).ok_or_else(|| {
        let problem = "there is not enough memory for its tower and projector as fp16";
        Error::checkpoint(dir, problem, "Use a machine with more memory, or end other programs")
    })?;
    let mut filled = Vec::new(); // the tensors, in the order of the fields
    let mut tasks = Vec::new(); // (field, first element, rows of it)
    for (i, (name, field)) in fields(&mut weights, config.width).into_iter().enumerate() {
        let tensor = tensors.get(&name).filter(|tensor| tensor.elements() == field.len());
        let tensor = tensor.ok_or_else(|| Error::Internal(format!("no tensor fills `{name}`")))?;
        filled.push(tensor);
        tasks.extend(field.chunks_mut(CHUNK).enumerate().map(|(c, chunk)| (i, c * CHUNK, chunk)));
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

/// Names the tensor behind every field. Query, key and value fill one field each third.
fn fields(weights: &mut VisionWeights, width: usize) -> Vec<Field<'_>> {
    let VisionWeights {
        class_embedding,
        patch_embedding,
        position_embedding,
        pre_norm,
        layers,
        projector_hidden,
        projector_out,
    } = weights;
    let mut fields: Vec<Field<'_>> = vec![
        (names::tower(names::CLASS_EMBEDDING), class_embedding),
        (names::tower(names::PATCH_EMBEDDING), patch_embedding),
        (names::tower(names::POSITION_EMBEDDING), position_embedding),
        (names::tower("pre_layrnorm.weight"), &mut pre_norm.weight),
        (names::tower("pre_layrnorm.bias"), &mut pre_norm.bias),
    ];
    for (i, layer) in layers.iter_mut().enumerate() {
        let LayerWeights { norm1, qkv, out, norm2, fc1, fc2 } = layer;
        let name = |part: &str| names::layer(i, part);
        fields.extend([
            (name("layer_norm1.weight"), &mut norm1.weight[..]),
            (name("layer_norm1.bias"), &mut norm1.bias[..]),
        ]);
        let thirds = qkv.weight.chunks_mut(width * width).zip(qkv.bias.chunks_mut(width));
        for (which, (weight, bias)) in ["q", "k", "v"].into_iter().zip(thirds) {
            fields.push((name(&format!("self_attn.{which}_proj.weight")), weight));
            fields.push((name(&format!("self_attn.{which}_proj.bias")), bias));
        }
        fields.extend([
            (name("self_attn.out_proj.weight"), &mut out.weight[..]),
            (name("self_attn.out_proj.bias"), &mut out.bias[..]),
            (name("layer_norm2.weight"), &mut norm2.weight[..]),
            (name("layer_norm2.bias"), &mut norm2.bias[..]),
            (name("mlp.fc1.weight"), &mut fc1.weight[..]),
            (name("mlp.fc1.bias"), &mut fc1.bias[..]),
            (name("mlp.fc2.weight"), &mut fc2.weight[..]),
            (name("mlp.fc2.bias"), &mut fc2.bias[..]),
        ]);
    }
    fields.extend([
        ("vision_proj.0.weight".to_owned(), &mut projector_hidden.weight[..]),
        ("vision_proj.0.bias".to_owned(), &mut projector_hidden.bias[..]),
        ("vision_proj.2.weight".to_owned(), &mut projector_out.weight[..]),
        ("vision_proj.2.bias".to_owned(), &mut projector_out.bias[..]),
    ]);
    fields
}
