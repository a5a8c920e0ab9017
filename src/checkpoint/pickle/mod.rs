//! The restricted pickle interpreter: as much of the pickle machine as a `state_dict` of tensors needs.
//!
//! A pickle is a program, and Python's reader runs it: `c os\nsystem` followed by `R` is a shell. This
//! reader executes nothing. It keeps a stack of plain values, knows the handful of globals in `machine::GLOBALS`,
//! whose "calls" do no more than note an offset, a shape and strides, and refuses everything else by name,
//! at the moment it is named.
//!
//! ```text
//! OrderedDict ── "vision_proj.0.weight" ─▶ _rebuild_tensor_v2( storage "7", offset, (4096, 1024), (1024, 1) )
//!             ── "vision_proj.0.bias"   ─▶ _rebuild_tensor_v2( storage "8", offset, (4096,), (1,) )
//! ```
//!
//! It is bounded against programs that are small and make much of it. Values live in an arena and refer to
//! each other by index, so a tuple that holds itself a billion times over costs one entry per opcode, no
//! value is ever copied, expanded or walked recursively, and time and memory are linear in the pickle's
//! bytes, with the caps below on top. Nothing is allocated by a size that the pickle declares.
//!
//! # Source
//! The opcodes: CPython's `pickletools.py`. The shape of a `state_dict`: `torch/serialization.py` and
//! `torch/_utils.py`.

mod machine;
#[cfg(test)]
mod tests;

use std::fmt;

use self::machine::Machine;
use super::dtype::StoredType;

/// Longest pickle read, in bytes; that of the 7B checkpoint's larger shard has about 100 kB.
pub(crate) const MAX_PICKLE: u64 = 32 << 20;
/// A tensor as the pickle describes it; nothing about it is checked against the archive yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PickledTensor<'p> {
    /// Name of the storage's entry in the archive, below `data/`.
    pub storage: &'p str,
    /// Length that the pickle declares for the storage, in bytes.
    pub storage_len: u64,
    pub dtype: StoredType,
    /// Of the first element in the storage, in elements.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// In elements, one per dimension.
    pub strides: Vec<usize>,
}

/// What a `state_dict` holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct StateDict<'p> {
    /// In the order of the pickle; a name set twice has its last tensor, as in Python.
    pub tensors: Vec<(&'p str, PickledTensor<'p>)>,
    /// Keys whose values are dictionaries: where a training checkpoint hides its tensors.
    pub nested: Vec<&'p str>,
}

/// Why a pickle was refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PickleError {
    /// Offset in the pickle, in bytes.
    pub at: usize,
    pub problem: Problem,
}

/// The kinds of refusal, as far as the advice differs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    /// A global that tensors do not need.
    Global(String),
    /// A tensor of PyTorch's own quantisation.
    Quantised(String),
    /// Anything else: damage, or an opcode that tensors do not need.
    Malformed(String),
}

impl fmt::Display for PickleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problem {
            Problem::Global(name) => write!(f, "the pickle asks for `{name}` (at byte {})", self.at),
            Problem::Quantised(name) => {
                write!(f, "the pickle holds quantised tensors (`{name}` at byte {})", self.at)
            }
            Problem::Malformed(problem) => write!(f, "broken pickle: {problem} (at byte {})", self.at),
        }
    }
}

type Outcome<T> = std::result::Result<T, PickleError>;

/// Reads the `state_dict` that a pickle describes, executing nothing.
///
/// # Errors
/// [`PickleError`] where the pickle ends early, asks for something that tensors do not need, or describes
/// no dictionary.
pub(crate) fn read_state_dict(bytes: &[u8]) -> Outcome<StateDict<'_>> {
    Machine::new(bytes).state_dict()
}
