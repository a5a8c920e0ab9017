//! A small tokenizer of our own making, for synthetic checkpoints and for tests without upstream's file.

use std::collections::HashSet;

use super::protobuf::{put_bytes, put_float, put_number};

/// Special and byte pieces, and the two control tokens of the chat template.
const MIN_PIECES: usize = 3 + 256 + 2;
/// Highest n of `[UNUSED_TOKEN_n]`.
const LAST_UNUSED: usize = 146;

/// Single characters, most needed first.
const CHARS: &str = "▁\nesatiornmudcplhgbfyvwkxjqzUISDECTPMAW.,:;?!<>_[]()-'\"/0123456789\
                     BFGHJKLNOQRVXYZ#%&*+=@图片第一二张的请描述这，。？：";
/// Words that become pieces, each with all of its beginnings.
const WORDS: &[&str] = &[
    "user",
    "system",
    "assistant",
    "▁the",
    "▁image",
    "▁picture",
    "First",
    "Describe",
    "Image",
    "▁these",
    "▁two",
    "▁second",
    "▁in",
    "▁detail",
    "▁of",
    "▁and",
    "Compare",
    "Please",
    "What",
    "▁is",
    "▁what",
    "▁changed",
    "▁▁▁▁",
    "图片",
    "描述",
    "请描述",
];

/// Writes a SentencePiece BPE model of `vocab_size` pieces, in the manner of upstream's `tokenizer.model`.
///
/// Laid out as upstream's: `<unk>`, `<s>`, `</s>`, 256 byte pieces, pieces made by merging, user-defined
/// pieces with `[UNUSED_TOKEN_146]` last, so that of 92544 pieces the control tokens have upstream's ids. It
/// knows a few words and any number of invented ones; everything else falls back to bytes. Below 512 pieces
/// the words go, and then the lower `[UNUSED_TOKEN_n]`; fewer than 261 pieces are never written.
///
/// # Examples
/// ```
/// use std::path::Path;
///
/// use imagehere::tokenizer::{self, Tokenizer};
///
/// let bytes = tokenizer::synthetic(92544);
/// let tokenizer = Tokenizer::from_sentencepiece(&bytes, Path::new("tokenizer.model"))?;
/// assert_eq!(tokenizer.vocab_size(), 92544);
/// assert_eq!(tokenizer.control_token_id("[UNUSED_TOKEN_145]"), Some(92542));
/// # Ok::<(), imagehere::Error>(())
/// ```
pub fn synthetic(vocab_size: usize) -> Vec<u8> {
    let vocab_size = vocab_size.max(MIN_PIECES);
    let unused = (vocab_size - 3 - 256).min(LAST_UNUSED + 1);
    let dashes: &[&str] = if vocab_size >= 512 { &["——", "……"] } else { &[] };

    let mut model = Vec::new();
    for (text, kind) in [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)] {
        put_piece(&mut model, text, 0.0, kind);
    }
    for byte in 0..=u8::MAX {
        put_piece(&mut model, &format!("<{byte:#04X}>"), 0.0, BYTE);
    }
    let normal = vocab_size - 3 - 256 - unused - dashes.len();
    let mut seen = HashSet::new();
    let fresh = pieces().filter(|text| seen.insert(text.clone()));
    for (rank, text) in fresh.take(normal).enumerate() {
        put_piece(&mut model, &text, -(rank as f32), NORMAL);
    }
    for text in dashes {
        put_piece(&mut model, text, 0.0, USER_DEFINED);
    }
    for n in LAST_UNUSED + 1 - unused..=LAST_UNUSED {
        put_piece(&mut model, &format!("[UNUSED_TOKEN_{n}]"), 0.0, USER_DEFINED);
    }
    put_settings(
        &mut model,
        &[(MODEL_TYPE, 2), (VOCAB_SIZE, vocab_size as u64), (BYTE_FALLBACK, 1)],
        &IDENTITY,
    );
    model
}

// Piece types and field numbers of `sentencepiece_model.proto`.
pub(super) const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
pub(super) const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;
pub(super) const MODEL_TYPE: u64 = 3;
const VOCAB_SIZE: u64 = 4;
pub(super) const BYTE_FALLBACK: u64 = 35;
/// Settings of the identity normaliser: no dummy prefix, no stripping of spaces, spaces escaped.
pub(super) const IDENTITY: [(u64, u64); 3] = [(3, 0), (4, 0), (5, 1)];

/// Appends a piece to a model.
pub(super) fn put_piece(model: &mut Vec<u8>, text: &str, score: f32, kind: u64) {
    let mut piece = Vec::new();
    put_bytes(&mut piece, 1, text.as_bytes());
    put_float(&mut piece, 2, score);
    put_number(&mut piece, 3, kind);
    put_bytes(model, 1, &piece);
}

/// Appends the numbers among a model's settings: of its trainer and of its normaliser, by field.
pub(super) fn put_settings(model: &mut Vec<u8>, trainer: &[(u64, u64)], normalizer: &[(u64, u64)]) {
    let mut message = Vec::new();
    trainer.iter().for_each(|&(field, value)| put_number(&mut message, field, value));
    put_bytes(model, 2, &message);
    message.clear();
    put_bytes(&mut message, 1, b"identity");
    normalizer.iter().for_each(|&(field, value)| put_number(&mut message, field, value));
    put_bytes(model, 3, &message);
}

/// Yields the pieces that merging makes, each after its halves: characters, words with their beginnings, then
/// invented words. More than anyone can want: 105 syllables, the 11 thousand words of two, the million of three.
fn pieces() -> impl Iterator<Item = String> {
    let chars = CHARS.chars().map(String::from);
    let words = WORDS.iter().flat_map(|word| {
        let ends = word.char_indices().map(|(at, c)| at + c.len_utf8());
        ends.map(|end| word[..end].to_owned())
    });
    let syllables =
        || "bcdfghjklmnpqrstvwxyz".chars().flat_map(|c| "aeiou".chars().map(move |v| format!("{c}{v}")));
    let twos = move || syllables().flat_map(move |a| syllables().map(move |b| format!("{a}{b}")));
    let threes = move || twos().flat_map(move |a| syllables().map(move |b| format!("{a}{b}")));
    let spaced = |word: String| format!("▁{word}");
    chars
        .chain(words)
        .chain(syllables())
        .chain(syllables().map(spaced))
        .chain(twos())
        .chain(twos().map(spaced))
        .chain(threes())
        .chain(threes().map(spaced))
}
