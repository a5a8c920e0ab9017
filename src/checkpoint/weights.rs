//! The weights that encoding needs, in fp16, as every backend receives them.

use half::f16;

/// A linear layer `y = x Wᵀ + b`.
#[derive(Debug, Default)]
pub struct LinearWeights {
    /// `[N, K]`, row-major: N outputs, K inputs.
    pub weight: Vec<f16>,
    /// `[N]`
    pub bias: Vec<f16>,
}

/// A layer norm over the last axis.
#[derive(Debug, Default)]
pub struct NormWeights {
    /// `[C]`
    pub weight: Vec<f16>,
    /// `[C]`
    pub bias: Vec<f16>,
}

/// One transformer block of the tower.
#[derive(Debug, Default)]
pub struct LayerWeights {
    /// Before attention.
    pub norm1: NormWeights,
    /// Query, key and value projections stacked in this order: N = 3C, K = C.
    pub qkv: LinearWeights,
    /// Output projection: N = C, K = C.
    pub out: LinearWeights,
    /// Before the MLP.
    pub norm2: NormWeights,
    /// N = F, K = C.
    pub fc1: LinearWeights,
    /// N = C, K = F.
    pub fc2: LinearWeights,
}

/// Tower and projector.
#[derive(Debug, Default)]
pub struct VisionWeights {
    /// `[C]`
    pub class_embedding: Vec<f16>,
    /// `[C, 3·patch²]`, input order channel, y, x; no bias.
    pub patch_embedding: Vec<f16>,
    /// `[T, C]`, the class token's row first.
    pub position_embedding: Vec<f16>,
    /// After the positions are added (`pre_layrnorm`, misspelt in the checkpoint).
    pub pre_norm: NormWeights,
    /// The blocks, first to last.
    pub layers: Vec<LayerWeights>,
    /// `vision_proj.0`: N = projector width, K = C.
    pub projector_hidden: LinearWeights,
    /// `vision_proj.2`: N = H, K = projector width.
    pub projector_out: LinearWeights,
}
