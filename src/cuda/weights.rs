//! Tower and projector in device memory: one allocation, uploaded once.
//!
//! ```text
//!   fp16 of the host ──────────────────────────────── copy, row by row ─▶ rows of the device's pitch
//!   tensors of the mapped checkpoint ─ ring ─▶ raw, as stored ─ convert ─▶      (and a report, band by band)
//! ```

use half::f16;

use super::convert::{Convert, Stored};
use super::driver::{DeviceMemory, Span, Stream};
use super::layer_norm::Norm;
use super::linear::Layer;
use super::matrix::{Matrix, VECTOR};
use super::range::RangeReport;
use super::upload::Ring;
use crate::checkpoint::weights::{LinearWeights, NormWeights, VisionWeights};
use crate::checkpoint::{ConversionReport, Groups, RangePolicy, Tensor, ValueStats, conversion_report};
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

/// Where a model's weights come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// fp16 on the host.
    Host(&'a VisionWeights),
    /// Tensors of a mapped checkpoint, which the device converts by this policy.
    Stored(&'a VisionWeights<Vec<&'a Tensor>>, RangePolicy),
}

impl DeviceWeights {
    /// Allocates and uploads weights that are fp16 already, and waits for that.
    ///
    /// # Errors
    /// [`Error::Argument`] if a tensor is not as large as `config` says; [`Error::Device`] if there is no room
    /// or the driver fails.
    pub(crate) fn upload(stream: &Stream, config: &ModelConfig, weights: &VisionWeights) -> Result<Self> {
        Self::send(&mut FromHost(stream), stream, config, weights)
    }

    /// Allocates, and converts the checkpoint's tensors on the device as they come through `ring`; waits for that.
    ///
    /// # Errors
    /// As [`Checkpoint::vision_weights`](crate::checkpoint::Checkpoint::vision_weights), in its words;
    /// [`Error::Device`] if there is no room or the driver fails.
    pub(crate) fn convert(
        stream: &Stream,
        convert: &Convert,
        ring: &mut Ring,
        config: &ModelConfig,
        weights: &VisionWeights<Vec<&Tensor>>,
        policy: RangePolicy,
    ) -> Result<(Self, ConversionReport)> {
        let tensors = || weights.fields().into_iter().flatten();
        let stored = |tensor: &&Tensor| tensor.elements() * tensor.dtype().size();
        let largest = tensors().map(stored).max().unwrap_or(0);
        // Whole rows go in a band: it is at least half full, but for the last of a tensor.
        let bands = tensors().map(|tensor| 2 * stored(tensor) / ring.bytes() + 1).sum();
        let mut sender = FromFile {
            stream,
            convert,
            ring,
            policy,
            largest,
            most_bands: bands,
            memory: None,
            bands: Vec::new(),
        };
        let converted = Self::send(&mut sender, stream, config, weights)?;
        Ok((converted, sender.finish()?))
    }

    fn send<V, S: Sender<V>>(
        sender: &mut S,
        stream: &Stream,
        config: &ModelConfig,
        weights: &VisionWeights<V>,
    ) -> Result<Self> {
        let mut arena = Arena { sender, place: None, used: 0 };
        arena.all(config, weights)?;
        let memory = DeviceMemory::new(stream.context(), arena.used * size_of::<f16>(), "the weights")?;
        // SAFETY: the memory lives as long as the matrices in the result, whose holder keeps them for as long
        // as anything is enqueued with them.
        let span = unsafe { memory.span() };
        stream.fill(span, 0)?;
        let mut arena = Arena { sender, place: Some(span.cast()?), used: 0 };
        let parts = arena.all(config, weights)?;
        stream.synchronize()?;
        let Parts { patch_embedding, positions, pre_norm, layers, projector_hidden, projector_out } = parts;
        Ok(Self { patch_embedding, positions, pre_norm, layers, projector_hidden, projector_out, memory })
    }

    /// Bytes on the device.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
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
struct Arena<'a, S> {
    sender: &'a mut S,
    place: Option<Span<f16>>,
    used: usize, // elements
}

impl<S> Arena<'_, S> {
    fn all<V>(&mut self, config: &ModelConfig, weights: &VisionWeights<V>) -> Result<Parts>
    where
        S: Sender<V>,
    {
        let ModelConfig { width, tokens, mlp_width, projector_width, hidden_size, .. } = *config;
        let patch_embedding = Layer {
            bias: self.vector("class_embedding", &weights.class_embedding, width)?,
            weight: self.matrix("patch_embedding", &weights.patch_embedding, width, config.patch_len())?,
            norm: None,
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

    fn layer<V>(&mut self, name: &str, layer: &LinearWeights<V>, n: usize, k: usize) -> Result<Layer>
    where
        S: Sender<V>,
    {
        Ok(Layer {
            weight: self.matrix(name, &layer.weight, n, k)?,
            bias: self.vector(name, &layer.bias, n)?,
            norm: None,
        })
    }

    fn norm<V>(&mut self, name: &str, norm: &NormWeights<V>, width: usize) -> Result<Norm>
    where
        S: Sender<V>,
    {
        let (weight, bias) = (&norm.weight, &norm.bias);
        Ok(Norm { weight: self.vector(name, weight, width)?, bias: self.vector(name, bias, width)? })
    }

    fn vector<V>(&mut self, name: &str, values: &V, len: usize) -> Result<Span<f16>>
    where
        S: Sender<V>,
    {
        Ok(self.matrix(name, values, 1, len)?.span)
    }

    fn matrix<V>(&mut self, name: &str, values: &V, rows: usize, columns: usize) -> Result<Matrix>
    where
        S: Sender<V>,
    {
        let elements = S::elements(values);
        if elements != rows * columns {
            return Err(Error::argument(
                format!("`{name}` has {elements} elements, but its shape is [{rows}, {columns}]"),
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
        self.sender.send(values, &matrix)?;
        Ok(matrix)
    }
}

/// A way to the device for values of type `V`.
trait Sender<V> {
    /// How many there are.
    fn elements(values: &V) -> usize;

    /// Sends them, row by row, to a matrix of as many; what lies between its rows stays, or becomes, zero.
    fn send(&mut self, values: &V, to: &Matrix) -> Result<()>;
}

/// fp16 of the host, as it is.
struct FromHost<'a>(&'a Stream);

impl Sender<Vec<f16>> for FromHost<'_> {
    fn elements(values: &Vec<f16>) -> usize {
        values.len()
    }

    fn send(&mut self, values: &Vec<f16>, to: &Matrix) -> Result<()> {
        self.0.upload_rows_and_wait(to.span, to.pitch, values, to.columns)
    }
}

/// Tensors of a checkpoint, converted on the device, band by band.
struct FromFile<'a, 't> {
    stream: &'a Stream,
    convert: &'a Convert,
    ring: &'a mut Ring,
    policy: RangePolicy,
    largest: usize, // bytes of a tensor
    most_bands: usize,
    /// A band as stored: the next is uploaded when this one is converted, in stream order; and the reports,
    /// `[most_bands]`.
    memory: Option<(DeviceMemory, DeviceMemory)>,
    bands: Vec<Band<'t>>, // what each report is about
}

/// Elements of a tensor that were sent in one piece.
#[derive(Clone, Copy)]
struct Band<'t> {
    tensor: &'t Tensor,
    first: usize,    // elements
    elements: usize, // from there
}

impl<'t> FromFile<'_, 't> {
    /// Device memory for a band and for all reports: made when the first tensor is sent, after the weights' own.
    fn memory(&mut self) -> Result<(Span<u8>, Span<RangeReport>)> {
        if self.memory.is_none() {
            let context = self.stream.context();
            let raw =
                DeviceMemory::new(context, self.largest.min(self.ring.bytes()), "weights on their way")?;
            let reports = DeviceMemory::new(
                context,
                self.most_bands * size_of::<RangeReport>(),
                "reports about the weights",
            )?;
            // SAFETY: kept beside the stream until it is idle.
            let clean = unsafe { reports.span() };
            self.ring.send_all(self.stream, clean, &vec![RangeReport::CLEAN; self.most_bands])?;
            self.memory = Some((raw, reports));
        }
        let (raw, reports) = self.memory.as_ref().ok_or_else(|| Error::Internal("no memory".into()))?;
        // SAFETY: both are kept beside the stream until it is idle.
        unsafe { Ok((raw.span(), reports.span().cast()?)) }
    }

    /// Waits, and says what the device found, in the host's words where it found what is refused.
    fn finish(mut self) -> Result<ConversionReport> {
        let mut reports = vec![RangeReport::CLEAN; self.bands.len()];
        let span = self.memory()?.1.slice(0..reports.len())?;
        self.stream.download_and_wait(span, &mut reports)?;
        let mut totals: Vec<(&Tensor, ValueStats)> = Vec::new(); // bands of a tensor follow one another
        for (&Band { tensor, first, elements }, report) in self.bands.iter().zip(&reports) {
            if let Some(index) = report.refused() {
                tensor.read(first + index as usize, &mut [f16::ZERO], self.policy)?;
                let name = tensor.name();
                return Err(Error::Internal(format!(
                    "the device refused value {index} of a band of `{name}`"
                )));
            }
            let stats = match report.out_of_range() {
                0 => ValueStats { elements: elements as u64, ..ValueStats::default() },
                _ => tensor.survey(first..first + elements), // the host tells more of what is rare
            };
            match totals.last_mut() {
                Some((last, total)) if std::ptr::eq(*last, tensor) => total.merge(&stats),
                _ => totals.push((tensor, stats)),
            }
        }
        let mut groups = Groups::default();
        for (tensor, stats) in totals {
            groups.add(tensor.name(), tensor.dtype(), &stats);
        }
        Ok(conversion_report(groups, self.policy))
    }
}

impl<'t> Sender<Vec<&'t Tensor>> for FromFile<'_, 't> {
    fn elements(values: &Vec<&'t Tensor>) -> usize {
        values.iter().map(|tensor| tensor.elements()).sum()
    }

    fn send(&mut self, values: &Vec<&'t Tensor>, to: &Matrix) -> Result<()> {
        let mut at = 0; // elements
        for &tensor in values {
            let part = match to.rows {
                // Biases are joined end to end, weights row by row.
                1 => {
                    let span = to.span.slice(at..to.span.len())?;
                    let last = at + tensor.elements() == to.columns;
                    let pitch = if last { to.pitch - at } else { tensor.elements() };
                    Matrix::new(span, 1, tensor.elements(), pitch)?
                }
                _ => to.rows(at / to.columns, tensor.elements() / to.columns)?,
            };
            at += tensor.elements();
            self.send_tensor(tensor, &part)?;
            tensor.release(0..tensor.elements());
        }
        Ok(())
    }
}

impl<'t> FromFile<'_, 't> {
    /// Sends one tensor to a matrix of as many elements.
    fn send_tensor(&mut self, tensor: &'t Tensor, to: &Matrix) -> Result<()> {
        let size = tensor.dtype().size();
        let most = (self.ring.bytes() / (to.columns * size)).max(1);
        for row in (0..to.rows).step_by(most) {
            let rows = most.min(to.rows - row);
            let band = Band { tensor, first: row * to.columns, elements: rows * to.columns };
            let (raw, reports) = self.memory()?;
            let raw = raw.slice(0..rows * to.columns * size)?;
            let report = reports.slice(self.bands.len()..self.bands.len() + 1)?;
            self.ring.send(self.stream, raw, |slot| tensor.copy_stored(band.first, slot))?;
            let stored = Stored { values: raw, dtype: tensor.dtype() };
            self.convert.enqueue(self.stream, &to.rows(row, rows)?, stored, 1.0, self.policy, report)?;
            self.bands.push(band);
        }
        Ok(())
    }
}

impl Drop for FromFile<'_, '_> {
    fn drop(&mut self) {
        // What was enqueued before a failure reads memory that is freed now.
        if let Err(error) = self.stream.synchronize() {
            tracing::debug!(%error, "while giving up on weights");
        }
    }
}

#[cfg(test)]
mod tests;
