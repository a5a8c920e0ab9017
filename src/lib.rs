//! Many images into one multimodal LLM sequence.

pub mod backend;
pub mod checkpoint;
pub mod config;
pub mod cpu;
pub mod encoder;
pub mod error;
pub mod image;
pub mod output;
pub mod packing;
pub mod prompt;
pub mod sequence;
pub mod synth;
pub mod tokenizer;
pub mod warning;

pub use error::{Category, Error, ImageProblem, Result};
pub use warning::{Warning, WarningKind};
