//! One file of weights, through a buffer of fixed size.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use half::f16;
use rayon::prelude::*;

use super::layout::{Part, Source, WeightsFile};
use crate::checkpoint::{Groups, RangePolicy, Tensor, ValueStats};
use crate::error::{Error, Result};
use crate::output::AtomicFile;
use crate::output::safetensors::{Entry, header};

/// Elements in memory at a time: 16 MB.
const BUFFER: usize = 8 << 20;
/// Elements converted by one task: 512 kB.
const CHUNK: usize = 256 << 10;

/// Allocates what [`write()`] needs.
pub(super) fn buffer(dir: &Path) -> Result<Vec<f16>> {
    bytemuck::allocation::try_zeroed_vec(BUFFER).map_err(|()| {
        let problem = format!("there is not enough memory to convert it: {} bytes", 2 * BUFFER);
        Error::checkpoint(dir, problem, "Use a machine with more memory, or end other programs")
    })
}

/// Writes a file, whole but for its name, and returns its bytes. `groups` gets what became of the values, `progress` is
/// called with every run of elements.
pub(super) fn write(
    file: &WeightsFile,
    policy: RangePolicy,
    buffer: &mut [f16], // [BUFFER]
    sink: &mut AtomicFile,
    groups: &mut Groups,
    progress: &mut dyn FnMut(usize),
) -> Result<u64> {
    let entry = |part: &Part| Entry { name: part.name.clone(), dtype: "F16", shape: part.shape(), width: 2 };
    let entries: Vec<_> = file.parts.iter().map(entry).collect();
    // Transformers asks for this key.
    let header = header(&entries, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]));
    let mut written = 0;
    let mut put = |bytes: &[u8]| {
        written += bytes.len() as u64;
        sink.write_all(bytes).map_err(|e| sink.failed(e))
    };
    put(&header)?;
    for part in &file.parts {
        let mut stats = ValueStats::default();
        for first in (0..part.elements()).step_by(BUFFER) {
            let n = BUFFER.min(part.elements() - first);
            let run = &mut buffer[..n];
            match &part.source {
                Source::Stored(tensor) => stats.merge(&read(tensor, first, run, policy)?),
                Source::Constant(value, _) => run.fill(*value),
            }
            put(bytemuck::cast_slice(run))?;
            progress(n);
        }
        if let Source::Stored(tensor) = &part.source {
            // As a whole: a page fault maps pages around it, also such as were given back a moment before.
            tensor.release(0..tensor.elements());
            groups.add(tensor.name(), tensor.dtype(), &stats);
        }
    }
    Ok(written)
}

/// Reads elements from `first` on, on all threads; an error is the first in order, whoever was faster.
fn read(tensor: &Tensor, first: usize, out: &mut [f16], policy: RangePolicy) -> Result<ValueStats> {
    let chunks = out.par_chunks_mut(CHUNK).enumerate();
    let done: Vec<Result<ValueStats>> =
        chunks.map(|(c, chunk)| tensor.read(first + c * CHUNK, chunk, policy)).collect();
    tensor.release(first..first + out.len());
    let mut total = ValueStats::default();
    for stats in done {
        total.merge(&stats?);
    }
    Ok(total)
}
