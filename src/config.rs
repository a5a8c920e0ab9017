//! The numbers of the model, and the family it is of ([`Profile`]). Filled by [`crate::checkpoint`] from the tensors' shapes, checked against
//! `config.json`; read by everyone else.

use serde::Serialize;

use crate::error::{Error, Result};

mod profile;
mod template;

pub use profile::{Fit, Frame, LLAVA, PROFILES, Profile, XCOMPOSER2};
pub(crate) use profile::{Size, TensorNames};
pub(crate) use template::Template;
pub use template::{DEFAULT_META_INSTRUCTION, MARKER};

/// Per-channel mean of CLIP's pixel normalisation, RGB, in units of 1 (after u8 / 255).
pub const PIXEL_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Per-channel standard deviation of CLIP's pixel normalisation, RGB, in units of 1.
#[expect(clippy::excessive_precision, reason = "the digits that CLIP's own code has")]
pub const PIXEL_STD: [f32; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
/// Head size of the CLIP tower, in channels: heads = width / 64.
pub const HEAD_SIZE: usize = 64;
/// Epsilon of the tower's layer norms.
pub const LAYER_NORM_EPS: f32 = 1e-5;
/// Id of the begin-of-sequence token `<s>`.
pub const BOS_ID: u32 = 1;

/// Sizes of vision tower, projector and language model input, each with its letter in the shapes of
/// this crate's documentation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Side of the square input image, in pixels (490).
    pub image_size: usize,
    /// Side of a patch, in pixels (14).
    pub patch_size: usize,
    /// Patches per side of the image: `image_size / patch_size` (35).
    pub grid: usize,
    /// **P**: patches per image, which is also the rows an image fills in the sequence (1225).
    pub patches: usize,
    /// **T** = P + 1: tokens in the tower, the class token first (1226).
    pub tokens: usize,
    /// **C**: width of the tower, in channels (1024).
    pub width: usize,
    /// **NH**: attention heads of the tower (16).
    pub heads: usize,
    /// Transformer blocks of the tower (24).
    pub layers: usize,
    /// **F**: width of the tower's MLP, in channels (4096).
    pub mlp_width: usize,
    /// Output width of the projector's first linear layer, in channels (4096).
    pub projector_width: usize,
    /// **H**: hidden size of the language model, in channels (4096).
    pub hidden_size: usize,
    /// Rows of the token embedding table (92544).
    pub vocab_size: usize,
    /// Where upstream silently cuts a sequence, in positions (`max_length`, 4096).
    pub max_length: Option<usize>,
    /// Positions the language model accepts (`max_position_embeddings`, 32768).
    pub max_position_embeddings: Option<usize>,
    /// The family that the model is of.
    pub profile: &'static Profile,
}

/// The sizes from which the rest of a [`ModelConfig`] follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelSizes {
    /// Side of the square input image, in pixels; a multiple of `patch_size`.
    pub image_size: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// **C**: width of the tower, in channels; a multiple of [`HEAD_SIZE`].
    pub width: usize,
    /// Transformer blocks of the tower.
    pub layers: usize,
    /// **F**: width of the tower's MLP, in channels.
    pub mlp_width: usize,
    /// Output width of the projector's first linear layer, in channels.
    pub projector_width: usize,
    /// **H**: hidden size of the language model, in channels.
    pub hidden_size: usize,
    /// Rows of the token embedding table.
    pub vocab_size: usize,
}

impl ModelConfig {
    /// Fills in what follows from the sizes: grid, **P**, **T** and heads. No limit of length is known yet, and the model
    /// is an [`XCOMPOSER2`]; see [`ModelConfig::with_profile`].
    ///
    /// # Errors
    /// [`Error::Argument`] if a size is 0, if `image_size` is no multiple of `patch_size`, if `width` is no
    /// multiple of [`HEAD_SIZE`], or if a product of them overflows; the message names the size.
    ///
    /// # Examples
    /// ```
    /// use imagehere::config::{ModelConfig, ModelSizes};
    ///
    /// let config = ModelConfig::from_sizes(ModelSizes {
    ///     image_size: 490,
    ///     patch_size: 14,
    ///     width: 1024,
    ///     layers: 24,
    ///     mlp_width: 4096,
    ///     projector_width: 4096,
    ///     hidden_size: 4096,
    ///     vocab_size: 92544,
    /// })?;
    /// assert_eq!((config.grid, config.patches, config.tokens, config.heads), (35, 1225, 1226, 16));
    /// # Ok::<(), imagehere::Error>(())
    /// ```
    pub fn from_sizes(sizes: ModelSizes) -> Result<Self> {
        let ModelSizes {
            image_size,
            patch_size,
            width,
            layers,
            mlp_width,
            projector_width,
            hidden_size,
            vocab_size,
        } = sizes;
        let refuse = |problem: String| Error::argument(problem, "Give sizes that such a tower can have");
        let all =
            [image_size, patch_size, width, layers, mlp_width, projector_width, hidden_size, vocab_size];
        if all.contains(&0) {
            return Err(refuse(format!("a size of the model is 0: {sizes:?}")));
        }
        if !image_size.is_multiple_of(patch_size) {
            return Err(refuse(format!(
                "the image size {image_size} is no multiple of the patch size {patch_size} (pixels)"
            )));
        }
        if !width.is_multiple_of(HEAD_SIZE) {
            return Err(refuse(format!(
                "the tower's width {width} is no multiple of the head size {HEAD_SIZE} (channels)"
            )));
        }
        let grid = image_size / patch_size;
        let tokens = grid.checked_mul(grid).and_then(|patches| patches.checked_add(1));
        let patch_len = patch_size.checked_mul(patch_size).and_then(|area| area.checked_mul(3));
        let (Some(tokens), Some(_)) = (tokens, patch_len) else {
            return Err(refuse(format!("the sizes of the model overflow: {sizes:?}")));
        };
        Ok(Self {
            image_size,
            patch_size,
            grid,
            patches: tokens - 1,
            tokens,
            width,
            heads: width / HEAD_SIZE,
            layers,
            mlp_width,
            projector_width,
            hidden_size,
            vocab_size,
            max_length: None,
            max_position_embeddings: None,
            profile: &XCOMPOSER2,
        })
    }

    /// Sets the family that the model is of.
    #[must_use]
    pub fn with_profile(mut self, profile: &'static Profile) -> Self {
        self.profile = profile;
        self
    }

    /// Returns the square that images are made to fit.
    pub fn frame(&self) -> Frame {
        Frame { side: self.image_size as u32, fit: self.profile.fit }
    }

    /// Returns the length of a flattened patch, in elements: 3 channels × patch × patch (588).
    pub fn patch_len(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }
}
