//! A backend without a tower: it places text and kept features in host memory.
//!
//! For a process that has features from a file, the tower's weights would be read and converted for nothing.

use crate::backend::{Backend, Job, Observer, TokenEmbeddings, Work};
use crate::error::{Error, Result};
use crate::sequence::Place;

/// The token embedding, and nothing else of a checkpoint.
#[derive(Debug)]
pub(super) struct Placer {
    embedding: Box<dyn TokenEmbeddings>,
}

impl Placer {
    /// Takes the rows of text.
    pub fn new(embedding: impl TokenEmbeddings + 'static) -> Self {
        Self { embedding: Box::new(embedding) }
    }
}

impl Backend for Placer {
    fn describe(&self) -> String {
        "host (no tower)".to_owned()
    }

    fn fill(&self, job: Job<'_>, _: &mut Observer<'_>) -> Result<Work> {
        let Job { texts, kept, pictures, targets: _ } = job;
        let lent = texts.iter().map(|(_, rows)| rows).chain(kept.iter().map(|(_, rows)| rows));
        if !pictures.sources.is_empty() || lent.into_iter().any(|rows| rows.place() != Place::Host) {
            return Err(Error::argument(
                "an encoder without tower places kept features in host memory, and does nothing else",
                "Open the encoder with its tower: Encoder::open()",
            ));
        }
        let start = std::time::Instant::now();
        for (ids, mut rows) in texts {
            for (i, &id) in ids.iter().enumerate() {
                self.embedding.gather_row(id, rows.row_mut(i))?;
            }
        }
        for (features, mut rows) in kept {
            for (i, row) in features.chunks_exact(rows.hidden()).take(rows.len()).enumerate() {
                rows.row_mut(i).copy_from_slice(row);
            }
        }
        Ok(Work { encode: start.elapsed(), ..Work::default() })
    }
}
