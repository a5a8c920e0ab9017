//! From runs of ids and images to a [`SequencePlan`]: the limit, the cut, the integers.

use super::plan::{Segment, SegmentKind, SequencePlan, Slot};
use super::request::LengthOptions;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::warning::{Warning, WarningKind};

/// Terms of a sum that a message spells out; the rest are summed up.
const TERMS: usize = 24;

/// The most positions of a sequence, whatever the model says of itself: 34 GB of rows of the published model.
const MOST: usize = 1 << 22;

/// What fills the next positions; the images are numbered in the order in which they appear.
#[derive(Debug)]
pub(super) enum Block {
    /// Ids, and the text they come from where there is one.
    Text { ids: Vec<u32>, text: String },
    /// The rows of the next image.
    Image,
}

/// Lays blocks end to end and cuts them if asked; `name(i)` is how a message calls image `i`.
pub(super) fn lay_out(
    blocks: Vec<Block>,
    config: &ModelConfig,
    length: LengthOptions,
    name: impl Fn(usize) -> String,
) -> Result<SequencePlan> {
    let rows = |block: &Block| match block {
        Block::Text { ids, .. } => ids.len(),
        Block::Image => config.patches,
    };
    // Saturates far beyond any limit, and there is always one.
    let total = blocks.iter().fold(0usize, |sum, block| sum.saturating_add(rows(block)));
    let mut warnings = Vec::new();
    let len = match (length.truncate, config.max_length) {
        (true, None) => {
            return Err(Error::argument(
                "config.json has no `max_length`, so there is no length at which upstream would cut",
                "Do without `--truncate`, or set a limit with `--max-length`",
            ));
        }
        (true, Some(cut)) if total > cut => {
            warnings.push(Warning::new(WarningKind::Truncated, lost(&blocks, config, cut, total, &name)));
            cut
        }
        _ => total,
    };
    let own = limit(config, length).filter(|&(limit, _)| len > limit);
    let any = own.or((len > MOST).then_some((MOST, "the most of any model")));
    if let Some((limit, limit_source)) = any {
        return Err(too_long(&blocks, rows, len, total, limit, limit_source));
    }
    if let Some(cut) = config.max_length.filter(|&cut| len > cut) {
        warnings.push(Warning::new(
            WarningKind::BeyondMaxLength,
            format!(
                "the sequence has {len} positions; upstream cuts it silently at {cut} (`max_length` in \
                 config.json) and loses its end, imagehere keeps it whole. `--truncate` cuts it there"
            ),
        ));
    }

    let mut plan = SequencePlan {
        input_ids: Vec::with_capacity(len),
        slots: Vec::new(),
        segments: Vec::new(),
        im_mask: Vec::with_capacity(len),
        warnings,
    };
    for block in blocks {
        let offset = plan.input_ids.len();
        let here = rows(&block).min(len - offset); // what the cut leaves of it
        let (kind, text) = match block {
            Block::Text { ids, text } => {
                plan.input_ids.extend(ids[..here].iter().map(|&id| i64::from(id)));
                (SegmentKind::Text, text)
            }
            Block::Image => {
                plan.input_ids.resize(offset + here, -1);
                plan.slots.push(Slot { offset, len: here });
                (SegmentKind::Image(plan.slots.len() - 1), String::new())
            }
        };
        plan.im_mask.resize(offset + here, matches!(kind, SegmentKind::Image(_)));
        if here > 0 {
            plan.segments.push(Segment { offset, len: here, kind, text });
        }
    }
    Ok(plan)
}

/// Checks every id against the embedding table; `place` names the text segment for the message.
pub(super) fn check_ids(ids: &[u32], vocab_size: usize, place: impl Fn() -> String) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(at) => Err(Error::argument(
            format!(
                "token {at} of {} has id {}, but the embedding table has {vocab_size} rows",
                place(),
                ids[at]
            ),
            "Use the tokenizer that belongs to this checkpoint",
        )),
    }
}

/// Returns the limit that holds and where it comes from.
fn limit(config: &ModelConfig, length: LengthOptions) -> Option<(usize, &'static str)> {
    let own = length.max_length.map(|limit| (limit, "the caller's maximum length"));
    let positions =
        || config.max_position_embeddings.map(|limit| (limit, "`max_position_embeddings` in config.json"));
    own.or_else(positions).or_else(|| config.max_length.map(|limit| (limit, "`max_length` in config.json")))
}

/// Says how a sequence comes to be too long: `137 text + 1225 image 1 + 5 text + …`.
fn too_long(
    blocks: &[Block],
    rows: impl Fn(&Block) -> usize,
    len: usize,
    total: usize,
    limit: usize,
    limit_source: &str,
) -> Error {
    let mut images = 0;
    let mut terms = Vec::new();
    for block in blocks.iter().filter(|block| rows(block) > 0).take(TERMS) {
        terms.push(match block {
            Block::Text { ids, .. } => format!("{} text", ids.len()),
            Block::Image => {
                images += 1;
                format!("{} image {images}", rows(block))
            }
        });
    }
    let rest = blocks.iter().filter(|block| rows(block) > 0).skip(TERMS);
    let (count, more) = rest.fold((0, 0usize), |(n, sum), block| (n + 1, sum.saturating_add(rows(block))));
    if count > 0 {
        terms.push(format!("{more} in {count} more"));
    }
    let mut sum = terms.join(" + ");
    if len < total {
        sum.push_str(&format!(", cut to {len} by `--truncate`"));
    }
    Error::SequenceTooLong {
        length: len,
        sum,
        limit,
        limit_source: limit_source.to_owned(),
        remedy: match limit < MOST {
            true => {
                "Use fewer images or a shorter text, split the request, or raise the limit with `--max-length` if the \
                 language model can take it"
            }
            false => "Use fewer images or a shorter text, or split the request",
        }
        .to_owned(),
    }
}

/// Says what a cut at `cut` takes from `total` positions.
fn lost(
    blocks: &[Block],
    config: &ModelConfig,
    cut: usize,
    total: usize,
    name: impl Fn(usize) -> String,
) -> String {
    let (mut offset, mut image, mut tokens) = (0, 0, 0);
    let mut parts = Vec::new();
    for block in blocks {
        match block {
            Block::Text { ids, .. } => {
                tokens += ids.len() - cut.saturating_sub(offset).min(ids.len());
                offset = offset.saturating_add(ids.len());
            }
            Block::Image => {
                let gone = config.patches - cut.saturating_sub(offset).min(config.patches);
                if gone == config.patches {
                    parts.push(format!("all of {}", name(image)));
                } else if gone > 0 {
                    parts.push(format!("{gone} of the {} rows of {}", config.patches, name(image)));
                }
                offset = offset.saturating_add(config.patches);
                image += 1;
            }
        }
    }
    if parts.len() > TERMS {
        let more = parts.len() - TERMS;
        parts.truncate(TERMS);
        parts.push(format!("{more} more images"));
    }
    if tokens > 0 {
        parts.push(format!("{tokens} text token{} at the end", if tokens == 1 { "" } else { "s" }));
    }
    format!(
        "the sequence was cut from {total} to {cut} positions (`max_length` in config.json), as upstream cuts it. \
         Lost: {}",
        parts.join(", ")
    )
}
