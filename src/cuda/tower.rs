//! The CLIP tower and the projector on the device: the launches of [`crate::cpu`]'s tower, in its order.
//!
//! ```text
//!   patches ──▶ patch embedding + positions + class row ──▶ pre-norm ──▶ hidden [B · T, C]
//!                                                                          │
//!   per block:  hidden ─ norm1 ─ qkv ─ attention ─ out ─(+)─▶ hidden       │
//!               hidden ─ norm2 ─ fc1 quick_gelu ─ fc2 ─(+)─▶ hidden        │
//!                                                                          │
//!   rows 1.. of each image ─ projector hidden gelu ─ projector out ──▶ every slot of the image, in place
//! ```
//!
//! `4 + 7 · layers` launches for any number of images, `4 + 5 · layers` where norms are folded into the layers after them
//! ([`fusions`](super::fusions)), none of them with a size or an address that depends on the prompt: slots are read from a
//! table in device memory. So one captured graph serves every prompt.

use half::f16;

use super::Kernels;
use super::attention::{SCALE, SCALE_OF_DIVIDED};
use super::driver::{DeviceMemory, Span, Stream};
use super::fusions::Fusions;
use super::linear::{Epilogue, Input, MoreOfResidual, PART, RowPart, SlotTable};
use super::matrix::{Matrix, VECTOR};
use super::weights::DeviceWeights;
use crate::backend::Stage;
use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// Device memory for the stages of as many images as it was made for.
#[derive(Debug)]
pub(crate) struct Workspace {
    images: usize,
    patches: Matrix,      // [B · P, 3·patch²]
    hidden: Matrix,       // [B · T, C], the residual stream
    mixed: Matrix,        // [B · T, C], after a norm, or after attention
    qkv: Matrix,          // [B · T, 3C]
    mlp: Matrix,          // [B · T, F]
    inner: Matrix,        // [B · P, projector width]
    parts: Span<RowPart>, // [B · T, C / 16], statistics of hidden
    memory: DeviceMemory,
}

impl Workspace {
    /// Bytes that a workspace for `images` takes.
    pub(crate) fn bytes(config: &ModelConfig, images: usize) -> usize {
        Places::new(config, images).end * size_of::<f16>()
    }

    /// Allocates for up to `images`, zeroed, and waits for that. `None` says that there is no room.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn if_room(stream: &Stream, config: &ModelConfig, images: usize) -> Result<Option<Self>> {
        let places = Places::new(config, images);
        let bytes = places.end * size_of::<f16>();
        let Some(memory) = DeviceMemory::if_room(stream.context(), bytes)? else { return Ok(None) };
        // SAFETY: the memory lives as long as the matrices beside it, whose holder keeps them for as long as
        // anything is enqueued with them.
        let span = unsafe { memory.span() };
        // Columns between a matrix' width and its pitch are read, and must be finite: nobody writes them.
        stream.fill(span, 0)?;
        stream.synchronize()?;
        let span = span.cast::<f16>()?;
        let [patches, hidden, mixed, qkv, mlp, inner] = places.matrices.map(|place| {
            let Place { at, rows, columns } = place;
            let pitch = columns.next_multiple_of(VECTOR);
            Matrix::new(span.slice(at..at + rows * pitch)?, rows, columns, pitch)
        });
        let (patches, hidden, mixed) = (patches?, hidden?, mixed?);
        let parts = span.slice(places.parts_at..places.end)?.cast()?;
        Ok(Some(Self { images, patches, hidden, mixed, qkv: qkv?, mlp: mlp?, inner: inner?, parts, memory }))
    }

    /// Frees the memory: no image fits any more.
    pub(crate) fn release(&mut self) {
        self.images = 0;
        self.memory = DeviceMemory::none(self.memory.context());
    }

    /// The most images that fit.
    pub(crate) fn images(&self) -> usize {
        self.images
    }

    /// Where the patches of image `i` go before [`Tower::enqueue`], `[P, 3·patch²]`.
    ///
    /// # Errors
    /// [`Error::Internal`] if there is no room for so many images.
    pub(crate) fn patches_of(&self, i: usize) -> Result<Matrix> {
        let patches = self.patches.rows / self.images.max(1);
        self.patches.rows(i * patches, patches)
    }
}

/// A matrix' part of the workspace.
#[derive(Clone, Copy)]
struct Place {
    at: usize, // elements
    rows: usize,
    columns: usize,
}

/// Where the workspace's matrices lie, and where it ends.
struct Places {
    matrices: [Place; 6],
    parts_at: usize, // elements
    end: usize,      // elements
}

impl Places {
    /// QKV, MLP and projector are never needed at the same time and share a place. One whose rows are padded
    /// has its own: what another leaves in the padding need not be finite.
    fn new(config: &ModelConfig, images: usize) -> Self {
        let ModelConfig { tokens, patches, width, mlp_width, projector_width, .. } = *config;
        let mut end = 0;
        let mut take = |rows: usize, columns: usize| {
            let at = end;
            end = (at + rows * columns.next_multiple_of(VECTOR)).next_multiple_of(128);
            Place { at, rows, columns }
        };
        let of_patches = take(images * patches, config.patch_len());
        let hidden = take(images * tokens, width);
        let mixed = take(images * tokens, width);
        let wide =
            [(images * tokens, 3 * width), (images * tokens, mlp_width), (images * patches, projector_width)];
        let shared = wide.map(|(rows, columns)| if columns % VECTOR == 0 { rows * columns } else { 0 });
        let shared = take(1, shared.into_iter().max().unwrap_or(0).next_multiple_of(VECTOR));
        let [qkv, mlp, inner] = wide.map(|(rows, columns)| match columns % VECTOR {
            0 => Place { at: shared.at, rows, columns },
            _ => take(rows, columns),
        });
        let parts = take(images * tokens, width / PART * (size_of::<RowPart>() / size_of::<f16>()));
        Self { matrices: [of_patches, hidden, mixed, qkv, mlp, inner], parts_at: parts.at, end }
    }
}

/// What a tower is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tower<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) config: &'a ModelConfig,
    pub(crate) weights: &'a DeviceWeights,
    pub(crate) workspace: &'a Workspace,
    /// What the weights were prepared for.
    pub(crate) fusions: Fusions,
}

/// Who is told when a stage is enqueued, with the matrix that will hold it.
pub(crate) type After<'a> = &'a mut dyn FnMut(Stage, &Matrix) -> Result<()>;

impl Tower<'_> {
    /// Enqueues tower and projector for the first `images` images of the workspace, from their patches to all
    /// their slots.
    ///
    /// `after` is called when a stage is enqueued. Only enqueues: the result is there when the stream is done, and the
    /// call may be captured.
    ///
    /// # Errors
    /// [`Error::Internal`] if there is no room for so many images, or a contract is broken;
    /// [`Error::Device`] if the driver fails; those of `after`.
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        images: usize,
        slots: &SlotTable,
        mut after: Option<After<'_>>,
    ) -> Result<()> {
        let Self { kernels, config, weights, workspace, fusions } = *self;
        if images > workspace.images {
            return Err(Error::Internal(format!("{images} images in a workspace for {}", workspace.images)));
        }
        let ModelConfig { patches, tokens, .. } = *config;
        let of_patches = workspace.patches.first(images * patches)?;
        let hidden = workspace.hidden.first(images * tokens)?;
        let mixed = workspace.mixed.first(images * tokens)?;
        let qkv = workspace.qkv.first(images * tokens)?;
        let mlp = workspace.mlp.first(images * tokens)?;
        let inner = workspace.inner.first(images * patches)?;
        let Kernels { linear, attention, layer_norm, .. } = kernels;
        let traced = after.is_some();
        let mut after = |stage, matrix: &Matrix| after.as_mut().map_or(Ok(()), |after| after(stage, matrix));

        // Statistics of hidden, from whoever stores it to whoever has the next norm folded in.
        let parts = fusions.layer_norm.then_some(workspace.parts);
        let add_to_hidden =
            Epilogue::Residual { out: &hidden, residual: &hidden, more: MoreOfResidual { parts, drop: 0 } };
        let normed = |norm| match parts {
            Some(parts) => Ok(Input::BeforeNorm(&hidden, parts)),
            None => layer_norm.enqueue(stream, &mixed, &hidden, norm).map(|()| Input::All(&mixed)),
        };

        after(Stage::Patches, &of_patches)?;
        let embed = Epilogue::Embed { out: &hidden, positions: &weights.positions, patches };
        linear.enqueue(stream, Input::All(&of_patches), &weights.patch_embedding, &embed)?;
        layer_norm.enqueue_with(stream, &hidden, &hidden, &weights.pre_norm, parts)?;
        after(Stage::Embedded, &hidden)?;

        let kept = mixed.first(images * patches)?; // the last layer's rows without class rows
        for (i, layer) in weights.layers.iter().enumerate() {
            linear.enqueue(stream, normed(&layer.norm1)?, &layer.qkv, &Epilogue::Bias(&qkv))?;
            let scale = if fusions.query_scale { SCALE_OF_DIVIDED } else { SCALE };
            attention.enqueue(stream, &mixed, &qkv, tokens, scale)?;
            linear.enqueue(stream, Input::All(&mixed), &layer.out, &add_to_hidden)?;

            linear.enqueue(stream, normed(&layer.norm2)?, &layer.fc1, &Epilogue::QuickGelu(&mlp))?;
            let last = fusions.class_row && i + 1 == weights.layers.len();
            if last {
                let more = MoreOfResidual { parts: None, drop: tokens };
                let without_class = Epilogue::Residual { out: &kept, residual: &hidden, more };
                linear.enqueue(stream, Input::All(&mlp), &layer.fc2, &without_class)?;
            }
            if !last || traced {
                linear.enqueue(stream, Input::All(&mlp), &layer.fc2, &add_to_hidden)?;
            }
            after(Stage::Layer(i), &hidden)?;
        }

        let features =
            if fusions.class_row { Input::All(&kept) } else { Input::WithoutClass(&hidden, patches) };
        linear.enqueue(stream, features, &weights.projector_hidden, &Epilogue::Gelu(&inner))?;
        after(Stage::ProjectorHidden, &inner)?;
        let scatter = Epilogue::Scatter { table: slots, patches };
        linear.enqueue(stream, Input::All(&inner), &weights.projector_out, &scatter)
    }
}

#[cfg(test)]
mod tests;
