//! What the tests of several writers share.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::f16;

use super::safetensors::SequenceRecord;
use crate::prompt::{SequencePlan, Slot};

/// The names in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

/// Five positions, two of them in an image, and an image that was cut off.
pub(crate) fn plan() -> SequencePlan {
    SequencePlan {
        input_ids: vec![1, 7, -1, -1, 9],
        slots: vec![Slot { offset: 2, len: 2 }, Slot { offset: 4, len: 0 }],
        segments: Vec::new(),
        im_mask: vec![false, false, true, true, false],
        warnings: Vec::new(),
    }
}

/// A record of rows of three elements.
pub(crate) fn record<'a>(plan: &'a SequencePlan, rows: &'a [f16]) -> SequenceRecord<'a> {
    let metadata = BTreeMap::from([("note".to_owned(), "\"ünï\n".to_owned())]);
    SequenceRecord { plan, inputs_embeds: rows, hidden: 3, metadata }
}
