//! The one error type: what is wrong, and what to do next.

use std::path::PathBuf;

use crate::prompt::MarkerMismatch;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose turn it is after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Category {
    /// The request is wrong: an argument, a prompt, an image. Change the request.
    Input,
    /// The checkpoint directory is missing something, broken or unsupported. Change the directory.
    Checkpoint,
    /// The output cannot be written. Change the target or make room.
    Output,
    /// The device is absent or unusable. Choose another or mend the installation.
    Device,
    /// The caller asked to stop. Nothing is wrong.
    Stopped,
    /// The result failed its completeness check, or a promise inside this library was broken. Report it.
    Internal,
}

/// Everything that can go wrong. Each message names the file, tensor or image, both sides of a
/// disagreement, and the next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument or a request that cannot be carried out.
    #[error("{problem}. {remedy}")]
    Argument {
        /// What is wrong with which argument.
        problem: String,
        /// What to do next.
        remedy: String,
    },

    /// An input file (prompt, history, image) that cannot be read.
    #[error("cannot {action} {}: {source}. {remedy}", path.display())]
    Read {
        /// What was attempted: "read", "open", "map".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
        /// What to do next.
        remedy: String,
    },

    /// The number of markers in the prompt is not the number of images.
    #[error("{0}")]
    MarkerCount(Box<MarkerMismatch>),

    /// The sequence would be longer than its limit.
    #[error(
        "the sequence needs {length} positions ({sum}), but the limit is {limit} ({limit_source}). {remedy}"
    )]
    SequenceTooLong {
        /// Positions needed.
        length: usize,
        /// The same, spelled out segment by segment.
        sum: String,
        /// Positions allowed.
        limit: usize,
        /// Where the limit comes from.
        limit_source: String,
        /// What to do next.
        remedy: String,
    },

    /// An image that cannot be used. Nothing was written.
    #[error("image {index} ({name}): {problem}. {remedy}")]
    Image {
        /// Index among the images of the call, from 0.
        index: usize,
        /// Its path, or what stands for one.
        name: String,
        /// What is wrong with it.
        problem: ImageProblem,
        /// What to do next.
        remedy: String,
    },

    /// A file of features that cannot be used.
    #[error("{}: {problem}. {remedy}", path.display())]
    Features {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, or what does not fit.
        problem: String,
        /// What to do next.
        remedy: String,
    },

    /// A checkpoint directory or one of its files that cannot be used.
    #[error("{}: {problem}. {remedy}", path.display())]
    Checkpoint {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do next.
        remedy: String,
    },

    /// A tensor whose dtype is not bf16, f16 or f32.
    #[error("tensor `{tensor}` in {} has dtype {dtype}; bf16, f16 and f32 are supported. {remedy}", path.display())]
    DType {
        /// The tensor's name.
        tensor: String,
        /// The dtype as the file names it.
        dtype: String,
        /// The file.
        path: PathBuf,
        /// What to do next.
        remedy: String,
    },

    /// A weight that fp16 cannot hold.
    #[error("tensor `{tensor}`[{index}] is {value}, beyond fp16's limit 65504. {remedy}")]
    ValueOutOfRange {
        /// The tensor's name.
        tensor: String,
        /// Flat element index, row-major.
        index: usize,
        /// The value as stored.
        value: f32,
        /// What to do next.
        remedy: String,
    },

    /// A device that is absent or unusable.
    #[error("device `{device}`: {problem}. {remedy}")]
    Device {
        /// The device as asked for.
        device: String,
        /// What is wrong with it.
        problem: String,
        /// What to do next.
        remedy: String,
    },

    /// An output that cannot be written. Nothing was left behind.
    #[error("cannot write {}: {source}. {remedy}", path.display())]
    Write {
        /// The target.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
        /// What to do next.
        remedy: String,
    },

    /// What is wrong with one sequence of several.
    #[error("{sequence}: {source}")]
    Sequence {
        /// Which one, as messages call it: `sequence 1 ("left")`, counted from 0.
        sequence: String,
        /// What is wrong with it.
        source: Box<Error>,
    },

    /// A sequence that failed its completeness check.
    #[error("the sequence is not complete: {problem}")]
    Incomplete {
        /// The first failures found.
        problem: String,
    },

    /// A call that was stopped by who watched it. Rows that were written are not to be used.
    #[error("stopped on request, before all was done")]
    Stopped,

    /// A broken promise inside this library.
    #[error("internal error: {0}. Please report it with the command that led here")]
    Internal(String),
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageProblem {
    /// The file cannot be read.
    #[error("cannot read it: {0}")]
    Unreadable(std::io::Error),
    /// The bytes are no image of a supported format.
    #[error("not a supported image: {0}")]
    Unsupported(String),
    /// The data end before the last row, or contradict themselves.
    #[error("broken image data: {0}")]
    Broken(String),
    /// A limit on bytes or pixels is exceeded.
    #[error("{0}")]
    TooLarge(String),
    /// Borrowed pixels whose size, stride and length do not agree.
    #[error("the pixel buffer does not fit its size: {0}")]
    Layout(String),
}

impl Error {
    /// Whose turn it is: what a caller may branch on.
    pub fn category(&self) -> Category {
        match self {
            Self::Argument { .. }
            | Self::Read { .. }
            | Self::MarkerCount(_)
            | Self::SequenceTooLong { .. }
            | Self::Image { .. }
            | Self::Features { .. } => Category::Input,
            Self::Checkpoint { .. } | Self::DType { .. } | Self::ValueOutOfRange { .. } => {
                Category::Checkpoint
            }
            Self::Device { .. } => Category::Device,
            Self::Write { .. } => Category::Output,
            Self::Sequence { source, .. } => source.category(),
            Self::Stopped => Category::Stopped,
            Self::Incomplete { .. } | Self::Internal(_) => Category::Internal,
        }
    }

    /// Counts the image that an [`Error::Image`] names among all images, `before` of which went before those of the call;
    /// other errors stay as they are.
    pub fn after_images(self, before: usize) -> Self {
        match self {
            Self::Image { index, name, problem, remedy } => {
                Self::Image { index: index + before, name, problem, remedy }
            }
            other => other,
        }
    }

    /// An [`Error::Argument`] from its two halves.
    pub(crate) fn argument(problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Argument { problem: problem.into(), remedy: remedy.into() }
    }

    /// An [`Error::Checkpoint`] from its three parts.
    pub(crate) fn checkpoint(
        path: impl Into<PathBuf>,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Checkpoint { path: path.into(), problem: problem.into(), remedy: remedy.into() }
    }
}
