//! Names, shapes and scales of the tensors, and the `config.json` beside them.

use serde_json::{Value, json};

use super::{DType, Preset, names};
use crate::config::{LLAVA, Profile, XCOMPOSER2};

/// The sizes of a model, letters as in this crate's documentation.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    pub profile: &'static Profile,
    pub image_size: usize, // pixels
    pub patch_size: usize, // pixels
    pub width: usize,      // C
    pub layers: usize,     // unused ones among them
    pub mlp_width: usize,  // F
    pub projector_width: usize,
    pub hidden: usize, // H
    pub vocab: usize,
}

/// One tensor to be made: `mean + std · noise`.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub mean: f32,
    pub std: f32,
}

impl Tensor {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Sizes {
    pub fn of(preset: Preset) -> Self {
        match preset {
            Preset::Tiny => Self {
                profile: &XCOMPOSER2,
                image_size: 70,
                patch_size: 14,
                width: 128,
                layers: 2,
                mlp_width: 256,
                projector_width: 256,
                hidden: 256,
                vocab: 1024,
            },
            Preset::LlavaTiny => Self {
                profile: &LLAVA,
                image_size: 70,
                patch_size: 14,
                width: 128,
                layers: 3,
                mlp_width: 256,
                projector_width: 256,
                hidden: 256,
                vocab: 1024,
            },
            Preset::Vl7bVision => Self {
                profile: &XCOMPOSER2,
                image_size: 490,
                patch_size: 14,
                width: 1024,
                layers: 24,
                mlp_width: 4096,
                projector_width: 4096,
                hidden: 4096,
                vocab: 92544,
            },
        }
    }

    /// Lists the tensors of each shard in the published model's order: the language model's embeddings first, tower and
    /// projector last. A small model is one shard; upstream's is two, embeddings in the first.
    pub fn shards(&self) -> Vec<Vec<Tensor>> {
        let embeddings =
            vec![tensor(&self.profile.names[0].token_embedding(), [self.vocab, self.hidden], 0.0, 0.02)];
        let vision = self.vision();
        match self.vocab * self.hidden {
            0..100_000_000 => vec![[embeddings, vision].concat()],
            _ => vec![embeddings, vision],
        }
    }

    /// Tower and projector.
    ///
    /// A linear layer's weights have a standard deviation of 1/√K, which keeps the size of what it is given;
    /// the two that end in the residual stream are smaller by √(2·layers), so that the stream keeps its size
    /// from the first block to the last.
    fn vision(&self) -> Vec<Tensor> {
        let (c, f, p, h) = (self.width, self.mlp_width, self.projector_width, self.hidden);
        let patch_len = 3 * self.patch_size * self.patch_size;
        let tokens = (self.image_size / self.patch_size).pow(2) + 1; // T
        let residual = (2.0 * self.layers as f32).sqrt();
        let names = &self.profile.names[0];
        let tower = names.tower.trim_end_matches('.');
        let patch_shape = [c, 3, self.patch_size, self.patch_size];

        let mut all = vec![
            tensor(&format!("{tower}.embeddings.class_embedding"), [c], 0.0, 0.3),
            tensor(
                &format!("{tower}.embeddings.patch_embedding.weight"),
                patch_shape,
                0.0,
                1.0 / (patch_len as f32).sqrt(),
            ),
            tensor(&format!("{tower}.embeddings.position_embedding.weight"), [tokens, c], 0.0, 0.3),
        ];
        norm(&mut all, &format!("{tower}.pre_layrnorm"), c);
        for i in 0..self.layers {
            let layer = format!("{tower}.encoder.layers.{i}");
            for part in ["k_proj", "v_proj", "q_proj"] {
                linear(&mut all, &format!("{layer}.self_attn.{part}"), c, c, 1.0);
            }
            linear(&mut all, &format!("{layer}.self_attn.out_proj"), c, c, 1.0 / residual);
            norm(&mut all, &format!("{layer}.layer_norm1"), c);
            linear(&mut all, &format!("{layer}.mlp.fc1"), f, c, 1.0);
            linear(&mut all, &format!("{layer}.mlp.fc2"), c, f, 1.0 / residual);
            norm(&mut all, &format!("{layer}.layer_norm2"), c);
        }
        linear(&mut all, &names.hidden_layer(), p, c, 1.0);
        linear(&mut all, &names.out_layer(), h, p, 1.0);
        all
    }

    /// Returns `config.json` as the profile's own is.
    pub fn config(&self, dtype: DType) -> Value {
        if *self.profile == LLAVA { self.llava_config(dtype) } else { self.xcomposer2_config(dtype) }
    }

    /// As transformers' `LlavaConfig` saves itself, the language model's layers aside: there are none.
    fn llava_config(&self, dtype: DType) -> Value {
        json!({
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_seq_length": (self.image_size / self.patch_size).pow(2),
            "image_token_index": self.vocab - 1,
            "model_type": "llava",
            "projector_hidden_act": "gelu",
            "text_config": {
                "hidden_size": self.hidden,
                "intermediate_size": self.hidden * 7 / 2,
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "num_attention_heads": 4,
                "num_hidden_layers": 0,
                "rms_norm_eps": 1e-5,
                "torch_dtype": names(dtype).torch,
                "vocab_size": self.vocab,
            },
            "tie_word_embeddings": false,
            "torch_dtype": names(dtype).torch,
            "vision_config": {
                "hidden_size": self.width,
                "image_size": self.image_size,
                "intermediate_size": self.mlp_width,
                "model_type": "clip_vision_model",
                "num_attention_heads": self.width / crate::config::HEAD_SIZE,
                "num_hidden_layers": self.layers,
                "patch_size": self.patch_size,
                "projection_dim": self.hidden,
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        })
    }

    /// Returns `config.json` with upstream's keys.
    ///
    /// Where upstream's key describes the language model (`num_hidden_layers`, `num_attention_heads`,
    /// `intermediate_size`, `hidden_act`), so it does here: never the tower.
    fn xcomposer2_config(&self, dtype: DType) -> Value {
        const HEAD: usize = 128; // of the language model
        let heads = (self.hidden / HEAD).max(1);
        json!({
            "architectures": ["InternLMXComposer2ForCausalLM"],
            "attn_implementation": "eager",
            "bias": false,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "img_size": self.image_size,
            "initializer_range": 0.02,
            "intermediate_size": self.hidden * 7 / 2,
            "max_length": 4096,
            "max_position_embeddings": 32768,
            "model_type": "internlmxcomposer2",
            "num_attention_heads": heads,
            "num_hidden_layers": 32,
            "num_key_value_heads": heads.div_ceil(4),
            "pad_token_id": 2,
            "rms_norm_eps": 1e-5,
            "rope_scaling": { "factor": 1.0, "type": "dynamic" },
            "rope_theta": 1_000_000,
            "tie_word_embeddings": false,
            "torch_dtype": names(dtype).torch,
            "transformers_version": "4.33.1",
            "use_cache": false,
            "vocab_size": self.vocab,
        })
    }
}

fn tensor<const N: usize>(name: &str, shape: [usize; N], mean: f32, std: f32) -> Tensor {
    Tensor { name: name.to_owned(), shape: shape.to_vec(), mean, std }
}

fn norm(all: &mut Vec<Tensor>, name: &str, width: usize) {
    all.push(tensor(&format!("{name}.weight"), [width], 1.0, 0.1));
    all.push(tensor(&format!("{name}.bias"), [width], 0.0, 0.05));
}

fn linear(all: &mut Vec<Tensor>, name: &str, n: usize, k: usize, scale: f32) {
    all.push(tensor(&format!("{name}.weight"), [n, k], 0.0, scale / (k as f32).sqrt()));
    all.push(tensor(&format!("{name}.bias"), [n], 0.0, 0.02));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_size_has_upstreams_tensors_and_parameters() {
        let shards = Sizes::of(Preset::Vl7bVision).shards();
        assert_eq!(shards.len(), 2);
        // Of the published 940 tensors: 1 of the language model's, 389 of the tower, 4 of the projector.
        assert_eq!(shards.iter().map(Vec::len).collect::<Vec<_>>(), [1, 389 + 4]);
        let elements = |shard: &[Tensor]| shard.iter().map(Tensor::elements).sum::<usize>();
        assert_eq!(elements(&shards[0]), 92544 * 4096);
        assert_eq!(elements(&shards[1]), 304_169_984 + 20_979_712);
    }

    #[test]
    fn a_small_model_is_one_shard() {
        assert_eq!(Sizes::of(Preset::Tiny).shards().len(), 1);
    }
}
