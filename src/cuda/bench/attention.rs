//! Attention for benchmarks: in the blocks that the tower takes, or in any other that there are.

use std::fmt;

use super::{Machine, Rows};
use crate::config::HEAD_SIZE;
use crate::cuda::attention::sm90::{self, Consumers};
use crate::cuda::attention::{Queries, SCALE, choose_queries};
use crate::error::{Error, Result};

/// One launch of attention.
#[derive(Clone, Debug)]
pub struct Attention {
    /// `[B · T, C]`
    pub out: Rows,
    /// `[B · T, 3C]`
    pub qkv: Rows,
    /// T
    pub tokens: usize,
    /// The kernel; the one that the tower takes if there is none.
    pub blocks: Option<Blocks>,
}

/// A kernel of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks(Which);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Portable(Queries),
    Hopper(Consumers),
}

impl fmt::Display for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Which::Portable(queries) => write!(f, "sm80 {}", queries.count()),
            Which::Hopper(consumers) => write!(f, "sm90 {}", consumers.queries()),
        }
    }
}

impl Machine {
    /// All kernels of attention that this device has loaded.
    pub fn attention_blocks(&self) -> Vec<Blocks> {
        let portable = [Queries::Many, Queries::Few].map(Which::Portable);
        let hopper = [Consumers::Two, Consumers::Three].map(Which::Hopper);
        let hopper = hopper.into_iter().filter(|_| self.gpu.kernels.attention.sm90.is_some());
        hopper.chain(portable).map(Blocks).collect()
    }

    /// The kernel that the tower takes.
    pub fn chosen_blocks(&self, of: &Attention) -> Blocks {
        let pairs = of.out.0.rows / of.tokens * (of.out.0.columns / HEAD_SIZE);
        let multiprocessors = self.multiprocessors();
        Blocks(match self.gpu.kernels.attention.sm90 {
            Some(_) => Which::Hopper(sm90::choose(of.tokens, pairs, multiprocessors)),
            None => Which::Portable(choose_queries(of.tokens, pairs, multiprocessors)),
        })
    }

    pub(super) fn enqueue_attention(&self, of: &Attention) -> Result<()> {
        let (stream, attention) = (&self.stream, &self.gpu.kernels.attention);
        let (out, qkv) = (&of.out.0, &of.qkv.0);
        match of.blocks {
            None => attention.enqueue(stream, out, qkv, of.tokens, SCALE),
            Some(Blocks(Which::Portable(queries))) => {
                attention.enqueue_in(stream, queries, out, qkv, of.tokens)
            }
            Some(Blocks(Which::Hopper(consumers))) => {
                let sm90 = attention.sm90.as_ref();
                let sm90 = sm90.ok_or_else(|| Error::Internal("no kernels of Hopper's are loaded".into()))?;
                sm90.enqueue_in(stream, consumers, out, qkv, of.tokens, SCALE)
            }
        }
    }
}
