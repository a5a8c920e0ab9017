//! A checkpoint directory as the Hub holds it.

pub mod weights;
