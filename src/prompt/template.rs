//! The chat template, and the markers that split it into segments.
//!
//! ```text
//!  «146»system\n META «145»\n │ «146»user\n Q «145»\n«146»assistant\n A «145»\n │ … │ «146»user\n QUERY «145»\n«146»assistant\n
//!                    └────────────── one string to upstream; markers anywhere in it ──────────────┘
//! ```
//!
//! with `«n»` for `[UNUSED_TOKEN_n]`. Nothing is inserted around images: the marker is cut out, and what
//! stands before and after it become segments of their own. Everything else stays one string, so that
//! template and texts are one BPE segment, as upstream's tokenizer sees them.

use std::fmt;

use super::request::{Meta, Request};
use crate::error::{Error, Result};
use crate::tokenizer::TextPart;

/// The text in a prompt that stands for an image. Not a token: it is split out before tokenisation.
pub const MARKER: &str = "<ImageHere>";

/// Upstream's default system text, without the trailing newline that only its batch demos add.
pub const DEFAULT_META_INSTRUCTION: &str = "\
You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).
- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model that is developed by \
Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.
- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the user \
such as English and 中文.
- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses effectively based on \
the provided image.";

/// The control token that opens a turn.
pub(super) const TURN_BEGIN: &str = "[UNUSED_TOKEN_146]";
/// The control token that closes a turn.
pub(super) const TURN_END: &str = "[UNUSED_TOKEN_145]";

const SYSTEM_BEGIN: &str = "[UNUSED_TOKEN_146]system\n";
const USER_BEGIN: &str = "[UNUSED_TOKEN_146]user\n";
const BLOCK_END: &str = "[UNUSED_TOKEN_145]\n";
const TO_ASSISTANT: &str = "[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n";

/// One of the texts that a prompt is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PromptText {
    /// The meta instruction.
    Meta,
    /// The query of a history turn, counted from 1.
    HistoryQuery(usize),
    /// The answer of a history turn, counted from 1.
    HistoryAnswer(usize),
    /// The query; the whole prompt in raw mode.
    Query,
}

impl fmt::Display for PromptText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Meta => f.write_str("meta instruction"),
            Self::HistoryQuery(turn) => write!(f, "history turn {turn}, query"),
            Self::HistoryAnswer(turn) => write!(f, "history turn {turn}, answer"),
            Self::Query => f.write_str("query"),
        }
    }
}

/// Where a marker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MarkerPlace {
    /// In which text.
    pub text: PromptText,
    /// At which byte of it, from 0.
    pub offset: usize,
}

/// A run of the prompt, from the template (no source) or from one of its texts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'r> {
    pub text: &'r str,
    pub source: Option<PromptText>,
    /// Whether control tokens in it are tokens or plain text.
    pub live: bool,
}

/// Lays out the whole prompt as runs, in order.
///
/// # Errors
/// [`Error::Argument`] if raw mode is asked for together with what only the template has a place for.
pub(super) fn runs(request: &Request) -> Result<Vec<Run<'_>>> {
    let user = |text, source| Run { text, source: Some(source), live: request.allow_control_tokens };
    let fixed = |text| Run { text, source: None, live: true };
    if request.raw {
        let extra = match (&request.meta, request.history.is_empty()) {
            (_, false) => "a history",
            (Meta::Text(text), true) if !text.is_empty() => "a meta instruction",
            _ => return Ok(vec![Run { live: true, ..user(&request.query, PromptText::Query) }]),
        };
        return Err(Error::argument(
            format!("raw mode takes the prompt as it is and has no place for {extra}"),
            "Write it into the prompt, or do without raw mode",
        ));
    }
    let mut runs = Vec::new();
    let meta = meta_text(request);
    if !meta.is_empty() {
        // The operator's text, not the user's: its control tokens stay what they are.
        let meta = Run { text: meta, source: Some(PromptText::Meta), live: true };
        runs.extend([fixed(SYSTEM_BEGIN), meta, fixed(BLOCK_END)]);
    }
    for (turn, (query, answer)) in (1..).zip(&request.history) {
        runs.extend([fixed(USER_BEGIN), user(query, PromptText::HistoryQuery(turn)), fixed(TO_ASSISTANT)]);
        runs.extend([user(answer, PromptText::HistoryAnswer(turn)), fixed(BLOCK_END)]);
    }
    runs.extend([fixed(USER_BEGIN), user(&request.query, PromptText::Query), fixed(TO_ASSISTANT)]);
    Ok(runs)
}

/// The system text; empty for none.
pub(super) fn meta_text(request: &Request) -> &str {
    match &request.meta {
        Meta::Default => DEFAULT_META_INSTRUCTION,
        Meta::None => "",
        Meta::Text(text) => text,
    }
}

/// Splits the runs at their markers: N places, N + 1 segments, each of parts that are not empty.
///
/// A marker never spans two runs: a run of template, which has no `<` and no `>`, stands between any two texts.
pub(super) fn split<'r>(runs: &[Run<'r>]) -> (Vec<MarkerPlace>, Vec<Vec<TextPart<'r>>>) {
    let mut places = Vec::new(); // [N]
    let mut segments = vec![Vec::new()]; // [N + 1]
    for run in runs {
        let mut offset = 0;
        for (i, text) in run.text.split(MARKER).enumerate() {
            if i > 0 {
                if let Some(text) = run.source {
                    places.push(MarkerPlace { text, offset });
                }
                segments.push(Vec::new());
                offset += MARKER.len();
            }
            offset += text.len();
            if let Some(segment) = segments.last_mut().filter(|_| !text.is_empty()) {
                segment.push(TextPart { text, live: run.live });
            }
        }
    }
    (places, segments)
}
