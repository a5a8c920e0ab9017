//! What went through but deserves a word: collected, returned, never printed by the library.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One warning. [`fmt::Display`] gives the sentence a user reads; `kind` is what a program matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Warning {
    /// What it is about.
    pub kind: WarningKind,
    /// One sentence: what was seen, and the option that changes it.
    pub message: String,
}

/// The kinds of [`Warning`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum WarningKind {
    /// An image was rotated or mirrored as its EXIF orientation says.
    ExifApplied,
    /// An image has an EXIF orientation that was ignored on request.
    ExifIgnored,
    /// An image has transparent pixels whose alpha was dropped.
    AlphaDropped,
    /// An image file has a fault that decoding survived (a missing end marker, say).
    ImageTolerated,
    /// The sequence is longer than upstream's `max_length`, where upstream would cut it silently.
    BeyondMaxLength,
    /// The sequence was cut on request; the message says what was lost.
    Truncated,
    /// Control tokens typed in user text were kept as plain text, or are live on request.
    ControlTokens,
    /// Something about the checkpoint: values saturated, became subnormal or zero, optional parts missing.
    Checkpoint,
    /// The feature cache could not keep something; the result is what it would be without a cache.
    FeatureCache,
}

impl Warning {
    /// Joins a kind and its sentence.
    pub(crate) fn new(kind: WarningKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
