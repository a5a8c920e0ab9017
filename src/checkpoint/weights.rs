//! The weights that encoding needs, as every backend receives them: in fp16 (`V` is `Vec<f16>`), or as the tensors of
//! the checkpoint that a device converts by itself.

use half::f16;

/// A linear layer `y = x Wᵀ + b`.
#[derive(Clone, Debug, Default)]
pub struct LinearWeights<V = Vec<f16>> {
    /// `[N, K]`, row-major: N outputs, K inputs.
    pub weight: V,
    /// `[N]`
    pub bias: V,
}

/// A layer norm over the last axis.
#[derive(Clone, Debug, Default)]
pub struct NormWeights<V = Vec<f16>> {
    /// `[C]`
    pub weight: V,
    /// `[C]`
    pub bias: V,
}

/// One transformer block of the tower.
#[derive(Clone, Debug, Default)]
pub struct LayerWeights<V = Vec<f16>> {
    /// Before attention.
    pub norm1: NormWeights<V>,
    /// Query, key and value projections stacked in this order: N = 3C, K = C.
    pub qkv: LinearWeights<V>,
    /// Output projection: N = C, K = C.
    pub out: LinearWeights<V>,
    /// Before the MLP.
    pub norm2: NormWeights<V>,
    /// N = F, K = C.
    pub fc1: LinearWeights<V>,
    /// N = C, K = F.
    pub fc2: LinearWeights<V>,
}

/// Tower and projector.
#[derive(Clone, Debug, Default)]
pub struct VisionWeights<V = Vec<f16>> {
    /// `[C]`
    pub class_embedding: V,
    /// `[C, 3·patch²]`, input order channel, y, x; no bias.
    pub patch_embedding: V,
    /// `[T, C]`, the class token's row first.
    pub position_embedding: V,
    /// After the positions are added (`pre_layrnorm`, misspelt in the checkpoint).
    pub pre_norm: NormWeights<V>,
    /// The blocks, first to last.
    pub layers: Vec<LayerWeights<V>>,
    /// `vision_proj.0`: N = projector width, K = C.
    pub projector_hidden: LinearWeights<V>,
    /// `vision_proj.2`: N = H, K = projector width.
    pub projector_out: LinearWeights<V>,
}

impl<V> VisionWeights<V> {
    /// All fields, in order.
    pub(crate) fn fields(&self) -> Vec<&V> {
        let Self { class_embedding, patch_embedding, position_embedding, pre_norm, layers, .. } = self;
        let mut fields = vec![class_embedding, patch_embedding, position_embedding];
        fields.extend([&pre_norm.weight, &pre_norm.bias]);
        for LayerWeights { norm1, qkv, out, norm2, fc1, fc2 } in layers {
            fields.extend([&norm1.weight, &norm1.bias, &qkv.weight, &qkv.bias, &out.weight, &out.bias]);
            fields.extend([&norm2.weight, &norm2.bias, &fc1.weight, &fc1.bias, &fc2.weight, &fc2.bias]);
        }
        for LinearWeights { weight, bias } in [&self.projector_hidden, &self.projector_out] {
            fields.extend([weight, bias]);
        }
        fields
    }

    /// All fields, in the order of [`VisionWeights::fields`].
    pub(crate) fn fields_mut(&mut self) -> Vec<&mut V> {
        let Self { class_embedding, patch_embedding, position_embedding, pre_norm, layers, .. } = self;
        let mut fields = vec![class_embedding, patch_embedding, position_embedding];
        fields.extend([&mut pre_norm.weight, &mut pre_norm.bias]);
        for LayerWeights { norm1, qkv, out, norm2, fc1, fc2 } in layers {
            fields.extend([&mut norm1.weight, &mut norm1.bias, &mut qkv.weight, &mut qkv.bias]);
            fields.extend([&mut out.weight, &mut out.bias, &mut norm2.weight, &mut norm2.bias]);
            fields.extend([&mut fc1.weight, &mut fc1.bias, &mut fc2.weight, &mut fc2.bias]);
        }
        for LinearWeights { weight, bias } in [&mut self.projector_hidden, &mut self.projector_out] {
            fields.extend([weight, bias]);
        }
        fields
    }
}
