//! What a family of models is, in one table: everything else asks it.
//!
//! | | [`XCOMPOSER2`] | [`LLAVA`] |
//! |---|---|---|
//! | `model_type` in `config.json` | `internlmxcomposer2`, or none | `llava` |
//! | marker of an image | `<ImageHere>` | `<image>` |
//! | image to square | stretched | shortest edge, then the centre |
//! | features | the last block's | those of the block before the last |
//! | projector | `vision_proj.0`, `.2` | `multi_modal_projector.linear_1`, `linear_2` |
//! | chat template | ChatML of InternLM2 | Vicuna's |
//!
//! In common is what the backends are made of: a CLIP tower with heads of 64 channels and `quick_gelu`, its class token
//! dropped, and a projector of two linear layers with an exact GELU between them.
//!
//! A new family is a new constant, and a line in [`PROFILES`].

use std::fmt;

use serde::{Serialize, Serializer};

use super::template::{self, MARKER, Template};

/// How an image of any size becomes the tower's square.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fit {
    /// Both sides are resized to the square's; the aspect ratio is not kept, and nothing is lost.
    #[default]
    Stretch,
    /// The shorter side is resized to the square's, the longer one in proportion, and what is beyond the square on either
    /// side of it is cut off.
    CentreCrop,
}

/// A square of pixels that images are made to fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// Its side, in pixels.
    pub side: u32,
    /// How images come to have that.
    pub fit: Fit,
}

impl From<u32> for Frame {
    /// A square of so many pixels that images are stretched to.
    fn from(side: u32) -> Self {
        Self { side, fit: Fit::Stretch }
    }
}

/// A family of models: how its checkpoints are recognised, what their tensors are called, how images and prompts are made.
///
/// Two of them are equal if they have the same name. Serialised as its name.
#[non_exhaustive]
pub struct Profile {
    /// Its short name: `internlm-xcomposer2-vl`, `llava-1.5`.
    pub name: &'static str,
    /// What people call it.
    pub title: &'static str,
    /// The text in a prompt that stands for an image. Not a token: it is split out before tokenisation.
    pub marker: &'static str,
    /// How images become the tower's square.
    pub fit: Fit,
    /// Blocks at the end of the tower that features do not come through.
    pub unused_blocks: usize,
    /// The `model_type` of its `config.json`.
    pub(crate) model_types: &'static [&'static str],
    /// What else `config.json` has to say, by key; where it says nothing, it means this.
    pub(crate) facts: &'static [(&'static str, Fact)],
    /// Where `config.json` has sizes, with what is meant where it has not.
    pub(crate) sizes: &'static [(Size, &'static str, Option<usize>)],
    /// Whether a `preprocessor_config.json` beside it has a say.
    pub(crate) has_preprocessor: bool,
    /// What its tensors are called: any of these.
    pub(crate) names: &'static [TensorNames],
    /// What stands around the texts of a conversation.
    pub(crate) template: Template,
}

/// A value in `config.json`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fact {
    Text(&'static str),
    Integer(i64),
    /// Equal as f32.
    Real(f32),
    Flag(bool),
    /// No such key.
    Absent,
}

/// A size that `config.json` may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Size {
    /// Side of the square image, in pixels.
    Image,
    /// Side of a patch, in pixels.
    Patch,
    /// **C**
    Width,
    /// **NH**
    Heads,
    /// **F**
    Mlp,
    /// Blocks of the tower, unused ones among them.
    Blocks,
    /// **H**
    Hidden,
    /// Rows of the token embedding table.
    Vocab,
    /// Where upstream cuts a sequence, in positions.
    MaxLength,
    /// Positions that the language model accepts.
    MaxPositions,
}

/// What the tensors of a checkpoint are called.
#[derive(Debug)]
pub(crate) struct TensorNames {
    /// In front of the tower's.
    pub tower: &'static str,
    /// In front of the projector's.
    pub projector: &'static str,
    /// The projector's first layer, after that.
    pub projector_hidden: &'static str,
    /// The projector's second layer.
    pub projector_out: &'static str,
    /// In front of `weight`: the token embedding table.
    pub embedding: &'static str,
}

/// InternLM-XComposer2-VL.
///
/// # Source
/// `build_mlp.py` and `modeling_internlm_xcomposer2.py` of the checkpoint's repository.
pub static XCOMPOSER2: Profile = Profile {
    name: "internlm-xcomposer2-vl",
    title: "InternLM-XComposer2-VL",
    marker: MARKER,
    fit: Fit::Stretch,
    unused_blocks: 0,
    // The first is the published one; its classes, and those of the family, save themselves under the others.
    model_types: &["internlmxcomposer2", "internlm2", "internlm"],
    facts: &[],
    // `num_attention_heads`, `num_hidden_layers` and `intermediate_size` stand there, too, and are the language model's.
    sizes: &[
        (Size::Image, "img_size", None),
        (Size::Hidden, "hidden_size", None),
        (Size::Vocab, "vocab_size", None),
        (Size::MaxLength, "max_length", None),
        (Size::MaxPositions, "max_position_embeddings", None),
    ],
    has_preprocessor: false,
    names: &[TensorNames {
        tower: "vit.vision_tower.vision_model.",
        projector: "vision_proj.",
        projector_hidden: "0",
        projector_out: "2",
        embedding: "model.tok_embeddings.",
    }],
    template: template::XCOMPOSER2,
};

/// What LLaVA's tensors are called, below names for tower, projector and embedding.
macro_rules! llava_names {
    ($tower:literal, $projector:literal, $embedding:literal) => {
        TensorNames {
            tower: $tower,
            projector: $projector,
            projector_hidden: "linear_1",
            projector_out: "linear_2",
            embedding: $embedding,
        }
    };
}

/// LLaVA-1.5, as transformers' `LlavaForConditionalGeneration` has it.
///
/// # Source
/// `configuration_llava.py`, `modeling_llava.py` and the configurations of CLIP and Llama in transformers.
pub static LLAVA: Profile = Profile {
    name: "llava-1.5",
    title: "LLaVA-1.5",
    marker: "<image>",
    fit: Fit::CentreCrop,
    unused_blocks: 1,
    model_types: &["llava"],
    facts: &[
        // The checkpoints of LLaVA's own repository are of the same `model_type`, and leave the tower elsewhere.
        ("mm_vision_tower", Fact::Absent),
        ("vision_config.model_type", Fact::Text("clip_vision_model")),
        ("vision_config.hidden_act", Fact::Text("quick_gelu")),
        ("vision_config.layer_norm_eps", Fact::Real(super::LAYER_NORM_EPS)),
        ("text_config.model_type", Fact::Text("llama")),
        ("projector_hidden_act", Fact::Text("gelu")),
        ("vision_feature_select_strategy", Fact::Text("default")),
        ("vision_feature_layer", Fact::Integer(-2)),
        ("multimodal_projector_bias", Fact::Flag(true)),
    ],
    sizes: &[
        (Size::Image, "vision_config.image_size", None),
        (Size::Patch, "vision_config.patch_size", None),
        (Size::Width, "vision_config.hidden_size", None),
        (Size::Heads, "vision_config.num_attention_heads", None),
        (Size::Mlp, "vision_config.intermediate_size", None),
        (Size::Blocks, "vision_config.num_hidden_layers", None),
        (Size::Hidden, "text_config.hidden_size", None),
        (Size::Vocab, "text_config.vocab_size", None),
        (Size::MaxPositions, "text_config.max_position_embeddings", Some(2048)),
    ],
    has_preprocessor: true,
    names: &[
        // Of transformers 4, and on the Hub; 5 saves the tower without that level.
        llava_names!(
            "vision_tower.vision_model.",
            "multi_modal_projector.",
            "language_model.model.embed_tokens."
        ),
        llava_names!("vision_tower.", "multi_modal_projector.", "language_model.model.embed_tokens."),
        // As the modules are called since 4.52.
        llava_names!(
            "model.vision_tower.vision_model.",
            "model.multi_modal_projector.",
            "model.language_model.embed_tokens."
        ),
        llava_names!(
            "model.vision_tower.",
            "model.multi_modal_projector.",
            "model.language_model.embed_tokens."
        ),
    ],
    template: template::VICUNA,
};

/// All profiles. The first is that of a `config.json` without `model_type`.
pub static PROFILES: [&Profile; 2] = [&XCOMPOSER2, &LLAVA];

impl PartialEq for Profile {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Profile {}

impl fmt::Debug for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Serialize for Profile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

impl fmt::Display for Fact {
    /// As JSON has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "\"{text}\""),
            Self::Integer(number) => write!(f, "{number}"),
            Self::Real(number) => write!(f, "{number:e}"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Absent => f.write_str("no such key"),
        }
    }
}

impl Fact {
    /// Whether `value` says this.
    pub(crate) fn is(self, value: &serde_json::Value) -> bool {
        match self {
            Self::Text(text) => value.as_str() == Some(text),
            Self::Integer(number) => value.as_i64() == Some(number),
            Self::Real(number) => value.as_f64().is_some_and(|value| value as f32 == number),
            Self::Flag(flag) => value.as_bool() == Some(flag),
            Self::Absent => value.is_null(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tells_profiles_apart_is_different_in_each() {
        for (i, one) in PROFILES.iter().enumerate() {
            assert!(!one.names.is_empty() && !one.model_types.is_empty());
            for other in &PROFILES[..i] {
                assert_ne!(one, other);
                assert_ne!(one.title, other.title);
                assert!(!one.model_types.iter().any(|name| other.model_types.contains(name)));
            }
        }
    }

    #[test]
    fn facts_are_compared_as_what_they_are() {
        use serde_json::json;
        assert!(Fact::Integer(-2).is(&json!(-2)) && !Fact::Integer(-2).is(&json!([-2])));
        assert!(Fact::Real(1e-5).is(&json!(1e-5)) && !Fact::Real(1e-5).is(&json!(1e-6)));
        assert!(Fact::Text("gelu").is(&json!("gelu")) && !Fact::Text("gelu").is(&json!("gelu_new")));
        assert!(Fact::Flag(true).is(&json!(true)) && !Fact::Flag(true).is(&json!(1)));
        assert_eq!(Fact::Real(1e-5).to_string(), "1e-5");
    }
}
