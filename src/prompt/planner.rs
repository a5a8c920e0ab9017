//! Requests to plans.

use std::path::Path;

use super::layout::{Block, check_ids, lay_out};
use super::markers::MarkerMismatch;
use super::plan::SequencePlan;
use super::request::{Bos, LengthOptions, Request};
use super::template::{self, Run};
use crate::checkpoint::Checkpoint;
use crate::config::{ModelConfig, Profile};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::warning::{Warning, WarningKind};

/// Control tokens named in one warning; more are only counted.
const NAMED: usize = 5;

/// A tokenizer and the sizes of the model it belongs to: all that planning needs, and no weight.
#[derive(Debug)]
pub struct Planner {
    tokenizer: Tokenizer,
    config: ModelConfig,
}

impl Planner {
    /// Opens the tokenizer of a checkpoint directory and reads the model's sizes. No weight is touched.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], [`Tokenizer::from_dir`] and [`Planner::new`].
    ///
    /// # Examples
    /// ```
    /// use imagehere::prompt::{Planner, Request};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let dir = &dir.path().join("model");
    /// # imagehere::synth::write(imagehere::synth::Preset::Tiny, &Default::default(), dir).unwrap();
    ///
    /// let planner = Planner::open(dir)?;
    /// let plan = planner.plan(&Request::new("<ImageHere>What is this?").image_count(1))?;
    /// assert_eq!(plan.slots[0].len, planner.config().patches);
    /// # Ok::<(), imagehere::Error>(())
    /// ```
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let checkpoint = Checkpoint::open(dir)?;
        Self::new(Tokenizer::from_dir(dir)?, checkpoint.config().clone())
    }

    /// Joins a tokenizer and a model.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the tokenizer has more pieces than the model has embeddings.
    pub fn new(tokenizer: Tokenizer, config: ModelConfig) -> Result<Self> {
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(Error::checkpoint(
                tokenizer.path(),
                format!(
                    "it has {} pieces, but the embedding table has {} rows",
                    tokenizer.vocab_size(),
                    config.vocab_size
                ),
                "Put the tokenizer that belongs to these weights into the directory",
            ));
        }
        Ok(Self { tokenizer, config })
    }

    /// Returns the tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Returns the sizes of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Lays out a sequence: [`plan`] with this tokenizer and model.
    ///
    /// # Errors
    /// As [`plan`].
    pub fn plan(&self, request: &Request) -> Result<SequencePlan> {
        plan(request, &self.tokenizer, &self.config)
    }

    /// Lays out a sequence of text that is already ids: [`plan_tokens`] with this model.
    ///
    /// # Errors
    /// As [`plan_tokens`].
    pub fn plan_tokens(&self, segments: &[TokenSegment], length: LengthOptions) -> Result<SequencePlan> {
        plan_tokens(segments, &self.config, length)
    }
}

/// Lays out a sequence: template, markers, ids, slots, mask. No pixel is seen.
///
/// The whole prompt is one string to the tokenizer but for the markers that split it. A segment without text
/// (between adjacent markers, before the first, after the last) contributes nothing, not even BOS; but in a family whose
/// prompts begin with one BOS (LLaVA), that stands before an image, too.
///
/// # Errors
/// [`Error::MarkerCount`] if markers and images do not match, before anything is tokenised;
/// [`Error::SequenceTooLong`] past the limit; [`Error::Argument`] if the options contradict each other or the
/// prompt is empty; [`Error::Checkpoint`] if the tokenizer lacks the control tokens of the template.
///
/// # Source
/// `interleav_wrap_chat` of upstream's `modeling_internlm_xcomposer2.py`; [`Bos::First`] as `interleav_wrap`. For LLaVA,
/// `LlavaProcessor` of transformers with the chat template beside the published weights.
///
/// # Examples
/// ```
/// use std::path::Path;
///
/// use imagehere::config::{ModelConfig, ModelSizes};
/// use imagehere::prompt::{self, Request};
/// use imagehere::tokenizer::{self, Tokenizer};
///
/// let tokenizer = Tokenizer::from_sentencepiece(&tokenizer::synthetic(512), Path::new("tokenizer.model"))?;
/// let config = ModelConfig::from_sizes(ModelSizes {
///     image_size: 28,
///     patch_size: 14,
///     width: 64,
///     layers: 2,
///     mlp_width: 128,
///     projector_width: 96,
///     hidden_size: 96,
///     vocab_size: 512,
/// })?;
///
/// let request = Request::new("<ImageHere><ImageHere>Compare.").image_count(2);
/// let plan = prompt::plan(&request, &tokenizer, &config)?;
/// assert_eq!(plan.slots.len(), 2);
/// assert_eq!(plan.slots[1].offset, plan.slots[0].offset + 4); // adjacent: 2 × 2 patches, nothing between
/// assert_eq!(plan.input_ids[plan.slots[0].offset], -1);
/// # Ok::<(), imagehere::Error>(())
/// ```
pub fn plan(request: &Request, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<SequencePlan> {
    let Profile { marker, template, .. } = config.profile;
    let runs = template::runs(request, template)?;
    let (places, segments) = template::split(&runs, marker);
    if places.len() != request.images.len() {
        return Err(Error::MarkerCount(Box::new(MarkerMismatch::new(request, places, marker))));
    }
    if !request.raw {
        check_template_tokens(config.profile, tokenizer)?;
    }
    let mut blocks = Vec::with_capacity(2 * segments.len());
    let mut bos_due = true;
    for (i, parts) in segments.iter().enumerate() {
        if i > 0 {
            blocks.push(Block::Image);
        }
        if parts.is_empty() && !(bos_due && template.leading_bos && segments.len() > 1) {
            continue;
        }
        let mut ids = tokenizer.encode_run(parts, i == 0)?;
        if bos_due {
            ids.insert(0, tokenizer.bos_id());
        }
        bos_due = request.bos == Bos::PerSegment && !template.leading_bos;
        check_ids(&ids, config.vocab_size, || format!("text segment {i}"))?;
        blocks.push(Block::Text { ids, text: parts.iter().map(|part| part.text).collect() });
    }
    if blocks.is_empty() {
        return Err(Error::argument("the prompt is empty", "Write a prompt"));
    }
    let mut plan = lay_out(blocks, config, request.length, |i| request.images.describe(i))?;
    plan.warnings.extend(control_token_warning(request, &runs, marker, tokenizer));
    Ok(plan)
}

/// A piece of a sequence whose text is already ids.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenSegment {
    /// Token ids, taken as they are: no BOS is added. Empty ones contribute nothing.
    Text(Vec<u32>),
    /// The next image.
    Image,
}

/// Lays out a sequence of text that is already ids, for services with a tokenizer of their own.
///
/// # Errors
/// [`Error::Argument`] if an id is outside the embedding table or there is no position at all;
/// [`Error::SequenceTooLong`] past the limit.
///
/// # Examples
/// ```
/// use imagehere::config::{ModelConfig, ModelSizes};
/// use imagehere::prompt::{LengthOptions, Slot, TokenSegment, plan_tokens};
/// # let config = ModelConfig::from_sizes(ModelSizes {
/// #     image_size: 28,
/// #     patch_size: 14,
/// #     width: 64,
/// #     layers: 2,
/// #     mlp_width: 128,
/// #     projector_width: 96,
/// #     hidden_size: 96,
/// #     vocab_size: 512,
/// # })?;
///
/// // A model of 2 × 2 patches.
/// let segments = [TokenSegment::Text(vec![1, 7, 8]), TokenSegment::Image, TokenSegment::Text(vec![9])];
/// let plan = plan_tokens(&segments, &config, LengthOptions::new())?;
/// assert_eq!(plan.input_ids, [1, 7, 8, -1, -1, -1, -1, 9]);
/// assert_eq!(plan.slots, [Slot { offset: 3, len: 4 }]);
/// # Ok::<(), imagehere::Error>(())
/// ```
pub fn plan_tokens(
    segments: &[TokenSegment],
    config: &ModelConfig,
    length: LengthOptions,
) -> Result<SequencePlan> {
    let mut blocks = Vec::with_capacity(segments.len());
    for (i, segment) in segments.iter().enumerate() {
        match segment {
            TokenSegment::Image => blocks.push(Block::Image),
            TokenSegment::Text(ids) if ids.is_empty() => {}
            TokenSegment::Text(ids) => {
                check_ids(ids, config.vocab_size, || format!("segment {i}"))?;
                blocks.push(Block::Text { ids: ids.clone(), text: String::new() });
            }
        }
    }
    if blocks.is_empty() {
        return Err(Error::argument("there is neither a token nor an image", "Give at least one of them"));
    }
    lay_out(blocks, config, length, |i| format!("image {}", i + 1))
}

/// Checks that the template's control tokens are tokens: otherwise they would be spelled out as text.
fn check_template_tokens(profile: &Profile, tokenizer: &Tokenizer) -> Result<()> {
    let mut tokens = profile.template.tokens.iter();
    match tokens.find(|token| tokenizer.control_token_id(token).is_none()) {
        None => Ok(()),
        Some(token) => Err(Error::checkpoint(
            tokenizer.path(),
            format!("it has no token `{token}`, which the chat template is made of"),
            format!(
                "Use the tokenizer of {}, or raw mode with a prompt that brings its own template",
                profile.title
            ),
        )),
    }
}

/// Says which control tokens stand in the user's texts and what became of them.
///
/// Raw mode is silent: there the template itself is typed.
fn control_token_warning(
    request: &Request,
    runs: &[Run<'_>],
    marker: &str,
    tokenizer: &Tokenizer,
) -> Option<Warning> {
    use super::PromptText::Meta;
    let mut named = Vec::new();
    let mut count = 0usize;
    let user = |run: &&Run<'_>| !request.raw && !matches!(run.source, None | Some(Meta));
    for run in runs.iter().filter(user) {
        let Some(source) = run.source else { continue };
        let typed = tokenizer.control_tokens(run.text).into_iter();
        // A marker that is a token too was cut out, and is an image.
        for (offset, token) in typed.filter(|&(_, token)| token != marker) {
            count += 1;
            if named.len() < NAMED {
                named.push(format!("`{token}` at byte {offset} of the {source}"));
            }
        }
    }
    if count > named.len() {
        named.push(format!("{} more", count - named.len()));
    }
    let (fate, remedy) = if request.allow_control_tokens {
        (
            "live, as asked: they can end or open a turn of the conversation",
            "Do without `--allow-control-tokens`",
        )
    } else {
        ("kept as plain text", "`--allow-control-tokens` makes them live, as upstream has them")
    };
    (count > 0).then(|| {
        let message = format!("control tokens in user text are {fate}: {}. {remedy}", named.join(", "));
        Warning::new(WarningKind::ControlTokens, message)
    })
}
