//! What a caller asks for: texts, images by name, and how to lay them out.

/// The system text of the template.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Meta {
    /// The model's own: in XComposer2, [`DEFAULT_META_INSTRUCTION`](super::DEFAULT_META_INSTRUCTION); in LLaVA, none.
    #[default]
    Default,
    /// No system block.
    None,
    /// The operator's own text; an empty one is none.
    Text(String),
}

/// Which text segments begin with BOS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Bos {
    /// As the model's own chat does: in XComposer2, every one that is not empty; in LLaVA, one in front of all.
    #[default]
    PerSegment,
    /// The first one that is not empty, as upstream's training does.
    First,
}

/// The limits of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LengthOptions {
    /// The caller's limit, in positions; without one, config's `max_position_embeddings`, else `max_length`.
    pub max_length: Option<usize>,
    /// Cut at config's `max_length`, as upstream does, instead of refusing.
    pub truncate: bool,
}

impl LengthOptions {
    /// Makes the default options: the model's own limit, no cut.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the caller's limit, in positions.
    pub fn max_length(mut self, positions: usize) -> Self {
        self.max_length = Some(positions);
        self
    }

    /// Sets whether to cut at config's `max_length`.
    pub fn truncate(mut self, truncate: bool) -> Self {
        self.truncate = truncate;
        self
    }
}

/// The images of a request: their names where they have some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Images {
    Named(Vec<String>),
    Count(usize),
}

impl Images {
    /// Returns the number of images, **N**.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Named(names) => names.len(),
            Self::Count(count) => *count,
        }
    }

    /// Returns how a message calls image `i` (from 0): `image 3 (c.jpg)`, counting from 1 as prompts do.
    pub(super) fn describe(&self, i: usize) -> String {
        match self {
            Self::Named(names) if i < names.len() => format!("image {} ({})", i + 1, names[i]),
            _ => format!("image {}", i + 1),
        }
    }
}

/// A prompt with its markers and the images that belong to them.
///
/// Every marker ([`MARKER`](super::MARKER), in LLaVA `<image>`) in the whole prompt counts, in the order of the text: meta instruction,
/// history turn by turn, query. The images take them in that order.
///
/// # Examples
/// ```
/// use imagehere::prompt::{Meta, Request};
///
/// let request = Request::new("First picture:<ImageHere>, second picture:<ImageHere>. What changed?")
///     .images(["before.jpg", "after.jpg"])
///     .meta_instruction(Meta::None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Request {
    pub(super) query: String,
    pub(super) images: Images,
    pub(super) meta: Meta,
    pub(super) history: Vec<(String, String)>,
    pub(super) raw: bool,
    pub(super) bos: Bos,
    pub(super) allow_control_tokens: bool,
    pub(super) length: LengthOptions,
}

impl Request {
    /// Makes a request of one query, without images or history, with upstream's system text.
    pub fn new(query: impl Into<String>) -> Self {
        Self {
            query: query.into(),
            images: Images::Count(0),
            meta: Meta::Default,
            history: Vec::new(),
            raw: false,
            bos: Bos::PerSegment,
            allow_control_tokens: false,
            length: LengthOptions::default(),
        }
    }

    /// Replaces the query.
    pub(crate) fn with_query(mut self, query: String) -> Self {
        self.query = query;
        self
    }

    /// Sets the images by name, in the order of their markers. Names appear in messages only.
    pub fn images(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.images = Images::Named(names.into_iter().map(Into::into).collect());
        self
    }

    /// Sets the number of images, where they have no names.
    pub fn image_count(mut self, count: usize) -> Self {
        self.images = Images::Count(count);
        self
    }

    /// Sets the system text.
    pub fn meta_instruction(mut self, meta: Meta) -> Self {
        self.meta = meta;
        self
    }

    /// Sets the earlier turns: (query, answer), oldest first.
    pub fn history(mut self, turns: Vec<(String, String)>) -> Self {
        self.history = turns;
        self
    }

    /// Sets whether the query is the whole prompt, without template. Control tokens in it are live.
    pub fn raw(mut self, raw: bool) -> Self {
        self.raw = raw;
        self
    }

    /// Sets which text segments begin with BOS.
    pub fn bos(mut self, bos: Bos) -> Self {
        self.bos = bos;
        self
    }

    /// Sets whether control tokens typed in query and history are live, as upstream has them, or plain text.
    pub fn allow_control_tokens(mut self, allow: bool) -> Self {
        self.allow_control_tokens = allow;
        self
    }

    /// Sets the limit of the sequence, in positions.
    pub fn max_length(mut self, positions: usize) -> Self {
        self.length.max_length = Some(positions);
        self
    }

    /// Sets whether to cut at config's `max_length`, as upstream does, instead of refusing.
    pub fn truncate(mut self, truncate: bool) -> Self {
        self.length.truncate = truncate;
        self
    }
}
