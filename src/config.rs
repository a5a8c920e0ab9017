//! The numbers of the model. Filled by [`crate::checkpoint`] from the tensors' shapes, checked against
//! `config.json`; read by everyone else.

use serde::Serialize;

/// Per-channel mean of CLIP's pixel normalisation, RGB, in units of 1 (after u8 / 255).
pub const PIXEL_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Per-channel standard deviation of CLIP's pixel normalisation, RGB, in units of 1.
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
}

impl ModelConfig {
    /// Returns the length of a flattened patch, in elements: 3 channels × patch × patch (588).
    pub fn patch_len(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }
}
