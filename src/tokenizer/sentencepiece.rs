//! `tokenizer.model`: a SentencePiece BPE model, as pieces and as a `tokenizers` BPE.
//!
//! ```text
//!  ModelProto { 1: pieces { 1: text, 2: score, 3: kind } …, 2: trainer_spec { 3: model type, 35: byte fallback },
//!               3: normalizer_spec { 2: charsmap, 3: dummy prefix, 4: strip spaces, 5: escape spaces } }
//! ```
//!
//! SentencePiece keeps no merges: of two neighbours it joins whichever pair spells the piece with the highest
//! score, leftmost first. `tokenizers` keeps ranked merges. They come to the same when every way to split a
//! piece into two pieces is a merge, ranked by the piece's score, provided that (1) every character of a piece
//! is a piece, and (2) no two pieces of equal score can claim the same text, for SentencePiece then asks which
//! stands further left, and a rank cannot. Both are checked. Upstream's model has 2352 pairs of equal score,
//! one half Latin and the other Chinese, which never meet.

use std::collections::HashMap;

use rayon::prelude::*;
use tokenizers::models::bpe::{BPE, Merges, Vocab};

use super::protobuf::{Fields, Value};

/// Most pieces a model may have; real ones have 32 thousand to 256 thousand.
const MAX_PIECES: usize = 1 << 20;
/// Longest piece, in bytes; the longest of upstream's model is 384 (128 spaces). Splits cost its square.
const MAX_PIECE_LEN: usize = 512;

/// What a piece is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Made by merging.
    Normal,
    /// `<unk>`
    Unknown,
    /// `<s>`, `</s>`: never made from text by SentencePiece itself.
    Control,
    /// Matched in the text before any merging.
    UserDefined,
    /// `<0x00>` to `<0xFF>`, for characters that are no piece.
    Byte,
}

/// A vocabulary entry; its id is its index.
#[derive(Clone, Debug)]
pub(super) struct Piece<'b> {
    pub text: &'b str,
    pub score: f32,
    pub kind: Kind,
}

/// The setting that puts a space in front of a text.
const DUMMY_PREFIX: &str = "add_dummy_prefix = true";

/// Whether that setting is what keeps a model from being read.
pub(super) fn wants_space_in_front(bytes: &[u8]) -> bool {
    Pieces::parse(bytes).is_err_and(|problem| problem.contains(DUMMY_PREFIX))
}

/// A model whose settings are those that [`Pieces::bpe`] and the encoder implement.
#[derive(Debug)]
pub(super) struct Pieces<'b>(pub Vec<Piece<'b>>);

impl<'b> Pieces<'b> {
    /// Parses a model and checks that nothing in it is unsupported.
    ///
    /// # Errors
    /// What is broken or unsupported, by the name it has in SentencePiece.
    pub(super) fn parse(bytes: &'b [u8]) -> Result<Self, String> {
        let mut pieces = Vec::new();
        // Defaults of sentencepiece_model.proto, for what the file leaves out.
        let (mut model_type, mut byte_fallback) = (1, false);
        let (mut charsmap, mut dummy_prefix, mut strip, mut escape) = (false, true, true, true);
        for field in Fields::new(bytes) {
            match field? {
                (1, piece) => {
                    if pieces.len() == MAX_PIECES {
                        return Err(format!("it has more than {MAX_PIECES} pieces"));
                    }
                    let id = pieces.len();
                    pieces.push(parse_piece(piece).map_err(|problem| format!("piece {id}: {problem}"))?);
                }
                (2, trainer) => {
                    for field in Fields::new(trainer.bytes()?) {
                        match field? {
                            (3, value) => model_type = value.varint()?,
                            (35, value) => byte_fallback = value.varint()? != 0,
                            _ => {}
                        }
                    }
                }
                (3, normalizer) => {
                    for field in Fields::new(normalizer.bytes()?) {
                        match field? {
                            (2, value) => charsmap = !value.bytes()?.is_empty(),
                            (3, value) => dummy_prefix = value.varint()? != 0,
                            (4, value) => strip = value.varint()? != 0,
                            (5, value) => escape = value.varint()? != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if pieces.is_empty() {
            return Err("it is no SentencePiece model: it has no pieces".into());
        }
        let kinds = ["0", "UNIGRAM", "BPE", "WORD", "CHAR"];
        if model_type != 2 {
            let name = kinds.get(model_type as usize).copied().unwrap_or("unknown");
            return Err(format!("its model_type is {name}; BPE is supported"));
        }
        for (wrong, setting) in [
            (!byte_fallback, "byte_fallback = false"),
            (charsmap, "a normalizer other than `identity`"),
            (dummy_prefix, DUMMY_PREFIX),
            (strip, "remove_extra_whitespaces = true"),
            (!escape, "escape_whitespaces = false"),
        ] {
            if wrong {
                return Err(format!("it has {setting}, which is not supported"));
            }
        }
        Ok(Self(pieces))
    }

    /// Builds the BPE of the pieces that merging can make.
    ///
    /// # Errors
    /// Pieces that contradict each other.
    pub(super) fn bpe(&self) -> Result<BPE, String> {
        let pieces = &self.0;
        let mut vocab = Vocab::with_capacity(pieces.len());
        let mut bytes = 0;
        for (id, piece) in (0..).zip(pieces) {
            bytes += usize::from(piece.kind == Kind::Byte);
            if vocab.insert(piece.text.to_owned(), id).is_some() {
                return Err(format!("piece {id} `{}` is there twice", piece.text.escape_debug()));
            }
        }
        if bytes != 256 {
            return Err(format!("it has byte_fallback, but {bytes} byte pieces instead of 256"));
        }
        // Text never becomes one of the others by merging. SentencePiece takes NUL for an unused piece where
        // there is a byte piece for it.
        let merges_into = |piece: &Piece<'_>| piece.kind == Kind::Normal && piece.text != "\0";
        vocab.retain(|_, &mut id| {
            let piece = &pieces[id as usize];
            piece.kind == Kind::Byte || merges_into(piece)
        });

        self.check_characters()?;

        let mut ranked: Vec<&Piece<'_>> = pieces.iter().filter(|piece| merges_into(piece)).collect();
        // The sort is stable: equal scores stay in order of id.
        ranked.sort_by(|a, b| b.score.total_cmp(&a.score));
        let half = |text: &str| {
            let id = *vocab.get(text)?;
            (pieces[id as usize].kind == Kind::Normal).then_some(id)
        };
        // The ways to split a piece into two pieces: their ids, and where the second begins.
        let splits = |piece: &Piece<'_>| -> Vec<(u32, u32, usize)> {
            let inside = (1..piece.text.len()).filter(|&at| piece.text.is_char_boundary(at));
            let split = |at| {
                // The longer half is the one that most often is no piece: it is looked up first.
                let (left, right) = piece.text.split_at(at);
                if left.len() > right.len() {
                    half(left).and_then(|left| Some((left, half(right)?, at)))
                } else {
                    half(right).and_then(|right| Some((half(left)?, right, at)))
                }
            };
            inside.filter_map(split).collect()
        };
        for tied in ranked.chunk_by(|a, b| a.score == b.score).filter(|tied| tied.len() > 1) {
            check_tie(tied, splits)?;
        }
        let merges: Merges = ranked
            .par_iter()
            .flat_map_iter(|piece| {
                let mut splits = splits(piece);
                splits.sort_unstable();
                splits.into_iter().map(|(_, _, at)| {
                    let (left, right) = piece.text.split_at(at);
                    (left.to_owned(), right.to_owned())
                })
            })
            .collect();
        BPE::builder()
            .vocab_and_merges(vocab, merges)
            .byte_fallback(true)
            // Its cache keeps every text ever seen, per thread, for as long as the thread lives.
            .cache_capacity(0)
            .build()
            .map_err(|error| error.to_string())
    }

    /// Checks that merging can start from any piece's characters, as SentencePiece does even where one of them
    /// is no piece.
    fn check_characters(&self) -> Result<(), String> {
        let single =
            |piece: &Piece<'_>| piece.text.chars().next().filter(|c| c.len_utf8() == piece.text.len());
        let mut known = vec![false; char::MAX as usize + 1];
        for piece in self.0.iter().filter(|piece| matches!(piece.kind, Kind::Normal | Kind::UserDefined)) {
            if let Some(c) = single(piece) {
                known[c as usize] = c != '\0' || piece.kind == Kind::UserDefined;
            }
        }
        for piece in self.0.iter().filter(|piece| piece.kind == Kind::Normal && single(piece).is_none()) {
            if let Some(c) = piece.text.chars().find(|&c| !known[c as usize]) {
                return Err(format!(
                    "its piece `{}` has the character `{}`, which is no piece; that is not supported",
                    piece.text.escape_debug(),
                    c.escape_debug()
                ));
            }
        }
        Ok(())
    }
}

/// Checks that of pieces of equal score no two can claim the same text: none ends in a piece with which
/// another begins.
fn check_tie(
    tied: &[&Piece<'_>],
    splits: impl Fn(&Piece<'_>) -> Vec<(u32, u32, usize)>,
) -> Result<(), String> {
    let split: Vec<Vec<(u32, u32, usize)>> = tied.iter().map(|piece| splits(piece)).collect();
    // The pieces that begin with a given piece: the first of them, and one other if there is one.
    let mut begins: HashMap<u32, [Option<usize>; 2]> = HashMap::new();
    for (i, splits) in split.iter().enumerate() {
        for &(left, _, _) in splits {
            let begins = begins.entry(left).or_default();
            if begins[0].is_none() {
                begins[0] = Some(i);
            } else {
                begins[1] = Some(i);
            }
        }
    }
    for (i, splits) in split.iter().enumerate() {
        for (_, right, _) in splits {
            let others = begins.get(right).into_iter().flatten().flatten();
            if let Some(&other) = others.into_iter().find(|&&other| other != i) {
                return Err(format!(
                    "its pieces `{}` and `{}` have the same score and can overlap, which is not supported",
                    tied[i].text.escape_debug(),
                    tied[other].text.escape_debug()
                ));
            }
        }
    }
    Ok(())
}

/// Parses one piece.
fn parse_piece(message: Value<'_>) -> Result<Piece<'_>, String> {
    let (mut text, mut score, mut kind) = (&b""[..], 0.0, 1);
    for field in Fields::new(message.bytes()?) {
        match field? {
            (1, value) => text = value.bytes()?,
            (2, value) => score = value.float()?,
            (3, value) => kind = value.varint()?,
            _ => {}
        }
    }
    if text.is_empty() || text.len() > MAX_PIECE_LEN {
        return Err(format!("its text has {} bytes; 1 to {MAX_PIECE_LEN} are supported", text.len()));
    }
    let text = std::str::from_utf8(text).map_err(|_| "its text is not UTF-8")?;
    if score.is_nan() {
        return Err("its score is not a number".into());
    }
    let kind = match kind {
        1 => Kind::Normal,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        6 if is_byte_piece(text) => Kind::Byte,
        6 => return Err(format!("`{}` is no byte piece", text.escape_debug())),
        5 => return Err(format!("`{}` has the type UNUSED, which is not supported", text.escape_debug())),
        other => return Err(format!("`{}` has the unknown type {other}", text.escape_debug())),
    };
    Ok(Piece { text, score: score + 0.0, kind }) // -0.0 and 0.0 are one score
}

/// Returns whether a text is one of `<0x00>` to `<0xFF>`.
fn is_byte_piece(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|hex| hex.len() == 2 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F')))
}
