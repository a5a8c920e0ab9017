//! Text to ids, equal to SentencePiece, with no Python and no C++.
//!
//! ```text
//!  parts ─▶ one string, spaces as ▁ ─▶ literals cut out ─▶ what lies between: byte-pair merges ─▶ ids
//!  user │ template                     `<s>` `</s>` `<unk>`     (crate `tokenizers`)
//!                                      then user-defined pieces
//! ```
//!
//! `tokenizer.model` is read by a small reader of its own ([`Tokenizer::from_sentencepiece`]);
//! `tokenizer.json` only where there is no `tokenizer.model`. Literals are matched here and not by
//! `tokenizers`, because whether a control token is one depends on who wrote it: see [`TextPart`].

pub(crate) mod fuzzing;
mod json;
mod literals;
mod protobuf;
mod sentencepiece;
mod synthetic;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tokenizers::Model;
use tokenizers::models::bpe::BPE;

use self::literals::{Literal, Literals};
use self::sentencepiece::{Kind, Pieces};
use crate::error::{Error, Result};

pub use self::synthetic::synthetic;

/// Largest tokenizer file that is read, in bytes; upstream's model has 1.5 million.
const MAX_FILE: u64 = 64 << 20;

/// A run of text and what control tokens in it are.
///
/// Parts that are encoded together are one text: merges cross from one into the next as if nothing lay
/// between. Only control tokens ask whose text they stand in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextPart<'t> {
    /// The text.
    pub text: &'t str,
    /// Whether control tokens in it are tokens, or text like any other. A control token that lies across
    /// parts is one only if all of them are live.
    pub live: bool,
}

/// What merges the text between literals.
enum Engine {
    /// The merges of a `tokenizer.model`; takes text whose spaces are ▁.
    SentencePiece(Box<BPE>),
    /// A `tokenizer.json` without its added tokens; takes text as it is, but for a space in front of a prompt's first text
    /// where `spaced` says so, as Llama's has it.
    Json { tokenizer: Box<tokenizers::Tokenizer>, spaced: bool },
}

/// A tokenizer: text to ids.
///
/// `Send + Sync`; encoding keeps nothing.
pub struct Tokenizer {
    path: PathBuf,
    engine: Engine,
    /// Matched first: `<s>`, `</s>`, `<unk>`.
    specials: Literals,
    /// Matched in what the specials leave: `[UNUSED_TOKEN_n]` and other pieces that are never merged.
    user_defined: Literals,
    vocab_size: usize,
    bos_id: u32,
}

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint directory: `tokenizer.model`, else `tokenizer.json`.
    ///
    /// A `tokenizer.model` that wants a space in front of the text, as Llama's does, leaves open where that is when other
    /// tokens stand in it, and the `tokenizer.json` beside it says so: then that one is read.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is neither, or the file is broken, unsupported or a git-lfs pointer.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let model = dir.join("tokenizer.model");
        // A dangling link is a download cut short, not a missing file: it is opened, and the error names it.
        let json = dir.join("tokenizer.json");
        let has_json = json.symlink_metadata().is_ok();
        if model.symlink_metadata().is_ok() {
            let bytes = read(&model)?;
            if !(has_json && sentencepiece::wants_space_in_front(&bytes)) {
                return Self::from_sentencepiece(&bytes, &model);
            }
        }
        if has_json {
            return json::load(&read(&json)?, &json);
        }
        Err(Error::checkpoint(
            dir,
            "it has no tokenizer.model and no tokenizer.json",
            "Copy upstream's tokenizer.model into it",
        ))
    }

    /// Makes a tokenizer from the bytes of a `tokenizer.model`; `path` appears in messages only.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is broken, or not BPE with byte fallback and identity normaliser.
    ///
    /// # Source
    /// `sentencepiece_model.proto`, `bpe_model.cc`, `normalizer.cc` of google/sentencepiece; the literals
    /// `<s>`, `</s>`, `<unk>` as `transformers` splits them out, without stripping spaces beside them.
    pub fn from_sentencepiece(bytes: &[u8], path: &Path) -> Result<Self> {
        check_not_lfs(bytes, path)?;
        let refuse = |problem| {
            Error::checkpoint(
                path,
                problem,
                "Use upstream's tokenizer.model; download it again if it is broken",
            )
        };
        let pieces = Pieces::parse(bytes).map_err(refuse)?;
        let bpe = pieces.bpe().map_err(refuse)?;
        let (mut specials, mut user_defined) = (Vec::new(), Vec::new());
        let mut bos_id = None;
        for (id, piece) in (0..).zip(&pieces.0) {
            let literal = |control| Literal { text: piece.text.to_owned(), id, control };
            match piece.kind {
                Kind::Unknown => specials.push(literal(true)),
                Kind::Control if matches!(piece.text, "<s>" | "</s>") => specials.push(literal(true)),
                Kind::UserDefined => user_defined.push(literal(literals::is_control(piece.text))),
                Kind::Normal | Kind::Control | Kind::Byte => {}
            }
            if piece.kind == Kind::Control && piece.text == "<s>" {
                bos_id = Some(id);
            }
        }
        Ok(Self {
            path: path.to_owned(),
            engine: Engine::SentencePiece(Box::new(bpe)),
            specials: Literals::new(specials),
            user_defined: Literals::new(user_defined),
            vocab_size: pieces.0.len(),
            bos_id: bos_id.ok_or_else(|| refuse("it has no control piece `<s>`".into()))?,
        })
    }

    /// Returns where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the number of ids: one more than the largest.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Returns the id of the begin-of-sequence token `<s>`.
    pub fn bos_id(&self) -> u32 {
        self.bos_id
    }

    /// Returns the id of a control token such as `[UNUSED_TOKEN_145]` or `</s>`, if it is one.
    pub fn control_token_id(&self, token: &str) -> Option<u32> {
        let literal = self.specials.get(token).or_else(|| self.user_defined.get(token));
        literal.filter(|literal| literal.control).map(|literal| literal.id)
    }

    /// Finds the control tokens spelled in a text: byte offset and token, in order.
    pub fn control_tokens<'t>(&self, text: &'t str) -> Vec<(usize, &'t str)> {
        let mut found = Vec::new();
        let mut at = 0;
        while at < text.len() {
            let rest = &text.as_bytes()[at..];
            let literal = self.specials.longest(rest, |_| true).or_else(|| {
                // Literals of the model spell spaces as ▁; none of the control tokens has one.
                self.user_defined.longest(rest, |_| true)
            });
            let step = literal.map_or_else(|| char_len(text, at), |literal| literal.text.len());
            if literal.is_some_and(|literal| literal.control) {
                found.push((at, &text[at..at + step]));
            }
            at += step;
        }
        found
    }

    /// Encodes a text with all control tokens live, as upstream does; no BOS is added.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_parts`].
    ///
    /// # Examples
    /// ```
    /// use std::path::Path;
    ///
    /// use imagehere::tokenizer::{self, TextPart, Tokenizer};
    ///
    /// let tokenizer = Tokenizer::from_sentencepiece(&tokenizer::synthetic(512), Path::new("tokenizer.model"))?;
    /// let end = tokenizer.control_token_id("[UNUSED_TOKEN_145]").unwrap();
    /// assert_eq!(tokenizer.encode("[UNUSED_TOKEN_145]")?, [end]);
    ///
    /// let typed = [TextPart { text: "[UNUSED_TOKEN_145]", live: false }];
    /// assert!(!tokenizer.encode_parts(&typed)?.contains(&end));
    /// # Ok::<(), imagehere::Error>(())
    /// ```
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_parts(&[TextPart { text, live: true }])
    }

    /// Encodes parts as one text, a prompt's first; no BOS is added.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the tokenizer has no ids for a text (never with byte fallback).
    pub fn encode_parts(&self, parts: &[TextPart<'_>]) -> Result<Vec<u32>> {
        self.encode_run(parts, true)
    }

    /// As [`Tokenizer::encode_parts`], of a text that a prompt begins with, or one that stands further behind.
    pub(crate) fn encode_run(&self, parts: &[TextPart<'_>], first: bool) -> Result<Vec<u32>> {
        let mut text = String::with_capacity(parts.iter().map(|part| part.text.len()).sum());
        let mut plain: Vec<Range<usize>> = Vec::new(); // bytes of `text` that are not live, in order
        for part in parts {
            let start = text.len();
            match self.engine {
                Engine::SentencePiece(_) => {
                    for (i, word) in part.text.split(' ').enumerate() {
                        text.push_str(if i > 0 { "▁" } else { "" });
                        text.push_str(word);
                    }
                }
                Engine::Json { .. } => text.push_str(part.text),
            }
            if !part.live && start < text.len() {
                plain.push(start..text.len());
            }
        }

        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut start = 0;
        let mut at = 0;
        while at < text.len() {
            match self.match_at(&self.specials, &text, at, &plain) {
                Some(literal) => {
                    self.encode_between(&text, start..at, &plain, first, &mut ids)?;
                    ids.push(literal.id);
                    at += literal.text.len();
                    start = at;
                }
                None => at += char_len(&text, at),
            }
        }
        self.encode_between(&text, start..text.len(), &plain, first, &mut ids)?;
        Ok(ids)
    }

    /// Encodes the text between two specials.
    fn encode_between(
        &self,
        text: &str,
        range: Range<usize>,
        plain: &[Range<usize>],
        first: bool,
        ids: &mut Vec<u32>,
    ) -> Result<()> {
        let text = &text[..range.end]; // no match reaches beyond
        let mut start = range.start;
        let mut at = start;
        while at < text.len() {
            match self.match_at(&self.user_defined, text, at, plain) {
                Some(literal) => {
                    self.merge(&text[start..at], first && start == 0, ids)?;
                    ids.push(literal.id);
                    at += literal.text.len();
                    start = at;
                }
                None => at += char_len(text, at),
            }
        }
        self.merge(&text[start..], first && start == 0, ids)
    }

    /// Returns the longest literal at a position that may be one there.
    fn match_at<'l>(
        &self,
        literals: &'l Literals,
        text: &str,
        at: usize,
        plain: &[Range<usize>],
    ) -> Option<&'l Literal> {
        literals.longest(&text.as_bytes()[at..], |literal| {
            // The first plain range that ends behind the start of the literal must begin behind its end.
            let next = plain.partition_point(|range| range.end <= at);
            !literal.control || plain.get(next).is_none_or(|range| at + literal.text.len() <= range.start)
        })
    }

    /// Merges a text without literals; `first` is what a prompt begins with.
    fn merge(&self, text: &str, first: bool, ids: &mut Vec<u32>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let done = match &self.engine {
            Engine::SentencePiece(bpe) => {
                bpe.tokenize(text).map(|tokens| ids.extend(tokens.iter().map(|token| token.id)))
            }
            Engine::Json { tokenizer, spaced } => {
                let text = match first && *spaced && !text.starts_with([' ', '▁']) {
                    true => Cow::Owned(format!(" {text}")),
                    false => Cow::Borrowed(text),
                };
                tokenizer.encode_fast(&*text, false).map(|encoding| ids.extend(encoding.get_ids()))
            }
        };
        done.map_err(|error| {
            Error::checkpoint(
                &self.path,
                format!("it cannot encode the text: {error}"),
                "Use upstream's tokenizer",
            )
        })
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

/// Returns the length in bytes of the character at byte `at`.
fn char_len(text: &str, at: usize) -> usize {
    text[at..].chars().next().map_or(1, char::len_utf8)
}

/// Reads a tokenizer file, unless it is far too large to be one.
fn read(path: &Path) -> Result<Vec<u8>> {
    let cannot = |error| {
        Error::checkpoint(
            path,
            format!("cannot read it: {error}"),
            "Check that the file is there and readable; download it again if a link leads nowhere",
        )
    };
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes)).map_err(cannot)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::checkpoint(
            path,
            format!("it has more than {MAX_FILE} bytes"),
            "Use upstream's tokenizer, which has 1.5 million",
        ));
    }
    Ok(bytes)
}

/// Refuses the text file that git leaves in place of one that git-lfs did not fetch.
fn check_not_lfs(bytes: &[u8], path: &Path) -> Result<()> {
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(Error::checkpoint(
            path,
            "it is a git-lfs pointer, not the file",
            "Run `git lfs pull` in the directory, or download the file itself",
        ));
    }
    Ok(())
}
