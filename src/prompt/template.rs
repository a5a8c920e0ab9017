//! The chat template, and the markers that split it into segments.
//!
//! ```text
//!  «146»system\n META «145»\n │ «146»user\n Q «145»\n«146»assistant\n A «145»\n │ … │ «146»user\n QUERY «145»\n«146»assistant\n
//!                    └────────────── one string to upstream; markers anywhere in it ──────────────┘
//! ```
//!
//! with `«n»` for `[UNUSED_TOKEN_n]`, in InternLM-XComposer2-VL; other families have other texts in the same places.
//! Nothing is inserted around images: the marker is cut out, and what
//! stands before and after it become segments of their own. Everything else stays one string, so that
//! template and texts are one BPE segment, as upstream's tokenizer sees them.

use std::fmt;

use super::request::{Meta, Request};
use crate::config::Template;
pub use crate::config::{DEFAULT_META_INSTRUCTION, MARKER};
use crate::error::{Error, Result};
use crate::tokenizer::TextPart;

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
pub(super) fn runs<'r>(request: &'r Request, template: &Template) -> Result<Vec<Run<'r>>> {
    let user = |text, source| Run { text, source: Some(source), live: request.allow_control_tokens };
    let fixed = |text: &'static str| Run { text, source: None, live: true };
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
    let meta = meta_text(request, template);
    if !meta.is_empty() {
        // The operator's text, not the user's: its control tokens stay what they are.
        let meta = Run { text: meta, source: Some(PromptText::Meta), live: true };
        let [before, after] = template.around_meta;
        runs.extend([fixed(before), meta, fixed(after)]);
    }
    let [before, to_answer] = template.around_query;
    for (turn, (query, answer)) in (1..).zip(&request.history) {
        runs.extend([fixed(before), user(query, PromptText::HistoryQuery(turn)), fixed(to_answer)]);
        let [before, after] = template.around_answer;
        runs.extend([fixed(before), user(answer, PromptText::HistoryAnswer(turn)), fixed(after)]);
    }
    runs.extend([fixed(before), user(&request.query, PromptText::Query), fixed(to_answer)]);
    Ok(runs)
}

/// The system text; empty for none.
pub(super) fn meta_text<'r>(request: &'r Request, template: &Template) -> &'r str {
    match &request.meta {
        Meta::Default => template.meta,
        Meta::None => "",
        Meta::Text(text) => text,
    }
}

/// Splits the runs at their markers: N places, N + 1 segments, each of parts that are not empty.
///
/// A marker never spans two runs: a run of template, which has no `<` and no `>`, stands between any two texts.
pub(super) fn split<'r>(runs: &[Run<'r>], marker: &str) -> (Vec<MarkerPlace>, Vec<Vec<TextPart<'r>>>) {
    let mut places = Vec::new(); // [N]
    let mut segments = vec![Vec::new()]; // [N + 1]
    for run in runs {
        let mut offset = 0;
        for (i, text) in run.text.split(marker).enumerate() {
            if i > 0 {
                if let Some(text) = run.source {
                    places.push(MarkerPlace { text, offset });
                }
                segments.push(Vec::new());
                offset += marker.len();
            }
            offset += text.len();
            if let Some(segment) = segments.last_mut().filter(|_| !text.is_empty()) {
                segment.push(TextPart { text, live: run.live });
            }
        }
    }
    (places, segments)
}
