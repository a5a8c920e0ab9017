//! Tower and projector in device memory: one allocation, uploaded once.

use std::sync::Arc;

use half::f16;

use super::driver::{Context, DeviceMemory, Span, Stream};
use super::layer_norm::Norm;
use super::linear::Layer;
use super::matrix::{Matrix, VECTOR};
use crate::checkpoint::weights::{LinearWeights, NormWeights, VisionWeights};
use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// Where tensors begin, in elements: 256 bytes.
const ALIGNMENT: usize = 128;

/// The weights of one model on one device. Rows of matrices are a multiple of 16 bytes apart, with zeros
/// between.
#[derive(Debug)]
pub(crate) struct DeviceWeights {
    pub(crate) patch_embedding: Layer, // [C, 3·patch²]; as bias the class embedding
    pub(crate) positions: Matrix,      // [T, C]
    pub(crate) pre_norm: Norm,
    pub(crate) layers: Vec<DeviceLayer>,
    pub(crate) projector_hidden: Layer, // [projector width, C]
    pub(crate) projector_out: Layer,    // [H, projector width]
    memory: DeviceMemory,               // what all of these are in
}

/// One transformer block.
#[derive(Debug)]
pub(crate) struct DeviceLayer {
    pub(crate) norm1: Norm,
    pub(crate) qkv: Layer, // [3C, C]
    pub(crate) out: Layer, // [C, C]
    pub(crate) norm2: Norm,
    pub(crate) fc1: Layer, // [F, C]
    pub(crate) fc2: Layer, // [C, F]
}

impl DeviceWeights {
    /// Allocates and uploads, and waits for that.
    ///
    /// # Errors
    /// [`Error::Argument`] if a tensor is not as large as `config` says; [`Error::Device`] if there is no
    /// room or the driver fails.
    pub(crate) fn upload(stream: &Stream, config: &ModelConfig, weights: &VisionWeights) -> Result<Self> {
        let mut arena = Arena { stream, place: None, used: 0 };
        arena.all(config, weights)?;
        let memory = DeviceMemory::new(stream.context(), arena.used * size_of::<f16>(), "the weights")?;
        // SAFETY: the memory lives as long as the matrices in the result, whose holder keeps them for as long
        // as anything is enqueued with them.
        let span = unsafe { memory.span() };
        stream.fill(span, 0)?;
        let mut arena = Arena { stream, place: Some(span.cast()?), used: 0 };
        let parts = arena.all(config, weights)?;
        let Parts { patch_embedding, positions, pre_norm, layers, projector_hidden, projector_out } = parts;
        Ok(Self { patch_embedding, positions, pre_norm, layers, projector_hidden, projector_out, memory })
    }

    /// Bytes on the device.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The context they are in.
    pub(crate) fn context(&self) -> &Arc<Context> {
        self.memory.context()
    }
}

/// [`DeviceWeights`] without what they are in.
struct Parts {
    patch_embedding: Layer,
    positions: Matrix,
    pre_norm: Norm,
    layers: Vec<DeviceLayer>,
    projector_hidden: Layer,
    projector_out: Layer,
}

/// Gives places to tensors one after the other: first without memory, to learn how much; then for good.
struct Arena<'a> {
    stream: &'a Stream,
    place: Option<Span<f16>>,
    used: usize, // elements
}

impl Arena<'_> {
    fn all(&mut self, config: &ModelConfig, weights: &VisionWeights) -> Result<Parts> {
        let ModelConfig { width, tokens, mlp_width, projector_width, hidden_size, .. } = *config;
        let patch_embedding = Layer {
            weight: self.matrix("patch_embedding", &weights.patch_embedding, width, config.patch_len())?,
            bias: self.vector("class_embedding", &weights.class_embedding, width)?,
        };
        let positions = self.matrix("position_embedding", &weights.position_embedding, tokens, width)?;
        let pre_norm = self.norm("pre_norm", &weights.pre_norm, width)?;
        let mut layers = Vec::with_capacity(weights.layers.len());
        for (i, layer) in weights.layers.iter().enumerate() {
            let name = |part: &str| format!("layers[{i}].{part}");
            layers.push(DeviceLayer {
                norm1: self.norm(&name("norm1"), &layer.norm1, width)?,
                qkv: self.layer(&name("qkv"), &layer.qkv, 3 * width, width)?,
                out: self.layer(&name("out"), &layer.out, width, width)?,
                norm2: self.norm(&name("norm2"), &layer.norm2, width)?,
                fc1: self.layer(&name("fc1"), &layer.fc1, mlp_width, width)?,
                fc2: self.layer(&name("fc2"), &layer.fc2, width, mlp_width)?,
            });
        }
        let hidden = self.layer("projector_hidden", &weights.projector_hidden, projector_width, width)?;
        let out = self.layer("projector_out", &weights.projector_out, hidden_size, projector_width)?;
        Ok(Parts {
            patch_embedding,
            positions,
            pre_norm,
            layers,
            projector_hidden: hidden,
            projector_out: out,
        })
    }

    fn layer(&mut self, name: &str, layer: &LinearWeights, n: usize, k: usize) -> Result<Layer> {
        Ok(Layer {
            weight: self.matrix(name, &layer.weight, n, k)?,
            bias: self.vector(name, &layer.bias, n)?,
        })
    }

    fn norm(&mut self, name: &str, norm: &NormWeights, width: usize) -> Result<Norm> {
        let (weight, bias) = (&norm.weight, &norm.bias);
        Ok(Norm { weight: self.vector(name, weight, width)?, bias: self.vector(name, bias, width)? })
    }

    fn vector(&mut self, name: &str, values: &[f16], len: usize) -> Result<Span<f16>> {
        Ok(self.matrix(name, values, 1, len)?.span)
    }

    fn matrix(&mut self, name: &str, values: &[f16], rows: usize, columns: usize) -> Result<Matrix> {
        if values.len() != rows * columns {
            return Err(Error::argument(
                format!("`{name}` has {} elements, but its shape is [{rows}, {columns}]", values.len()),
                "Take configuration and weights from one checkpoint",
            ));
        }
        let pitch = columns.next_multiple_of(VECTOR);
        let at = self.used;
        self.used = (at + rows * pitch).next_multiple_of(ALIGNMENT);
        let Some(place) = self.place else {
            return Ok(Matrix { span: Span::NONE, rows, columns, pitch });
        };
        let matrix = Matrix::new(place.slice(at..at + rows * pitch)?, rows, columns, pitch)?;
        self.stream.upload_rows_and_wait(matrix.span, pitch, values, columns)?;
        Ok(matrix)
    }
}
