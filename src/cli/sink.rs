//! Where a sequence goes: one file, or a folder of arrays; as this program has it, or as an engine takes it.

use std::path::Path;

use clap::ValueEnum;
use imagehere::output::safetensors::SequenceRecord;
use imagehere::output::vllm::{self, ChatBody};
use imagehere::output::{AtomicFile, Rows, StagedDir, npy, safetensors, stage, torch_save};
use imagehere::prompt::{Request, SequencePlan, Slot};
use imagehere::{Error, Result, WarningKind};

use super::argument;

/// How a sequence is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sink {
    /// One file of this program's own tensors
    #[default]
    Safetensors,
    /// A folder with a NumPy array for each tensor, and one for each image's rows
    Npy,
    /// For `vllm serve --enable-mm-embeds`: the JSON body of a chat, each image a part `image_embeds`
    VllmImageEmbeds,
    /// For vLLM's `prompt_embeds`: all rows [L,H], as torch.save writes a tensor
    VllmPromptEmbeds,
    /// For `vllm serve --enable-prompt-embeds`: the JSON body of a completion with `prompt_embeds`
    VllmCompletion,
}

/// A sequence that is written, and waits for its name.
#[derive(Debug)]
pub enum Pending {
    /// One file.
    File(AtomicFile),
    /// A folder.
    Folder(StagedDir),
}

impl Sink {
    /// What the option calls it.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// What a sequence's own name is followed by in a folder of several.
    pub fn ending(self) -> &'static str {
        match self {
            Self::Safetensors => ".safetensors",
            Self::Npy => "",
            Self::VllmImageEmbeds | Self::VllmCompletion => ".json",
            Self::VllmPromptEmbeds => ".pt",
        }
    }

    /// What is counted where there are several.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Npy => "folder",
            _ => "file",
        }
    }

    /// Checks that a sequence could be written there.
    pub fn check(self, out: &Path) -> Result<()> {
        match self {
            Self::Npy => StagedDir::check(out),
            _ => AtomicFile::check(out),
        }
    }

    /// Checks that the format has a place for all that makes this sequence what it is.
    pub fn check_plan(self, request: &Request, plan: &SequencePlan) -> Result<()> {
        if self != Self::VllmImageEmbeds {
            return Ok(());
        }
        request.turns().map_err(|error| self.unfit(error))?;
        match plan.warnings.iter().any(|warning| warning.kind == WarningKind::Truncated) {
            false => Ok(()),
            true => Err(self.unfit(argument(
                "the sequence is cut, and a server lays it out again from the whole prompt",
                "Use a shorter prompt, or another `--format`",
            ))),
        }
    }

    /// Writes a sequence, up to its name, and returns its bytes as well. `request` is what it was made from.
    pub fn stage(self, out: &Path, request: &Request, record: &SequenceRecord<'_>) -> Result<(Pending, u64)> {
        let rows = Rows::new(record.inputs_embeds, record.hidden)?;
        let (file, bytes) = match self {
            Self::Safetensors => safetensors::stage_sequence(out, record)?,
            Self::Npy => {
                let (folder, bytes) = npy::stage_sequence(out, record)?;
                return Ok((Pending::Folder(folder), bytes));
            }
            Self::VllmImageEmbeds => {
                let (turns, images) = (request.turns()?, images(record)?);
                let body = ChatBody::new(&turns, &images)?;
                stage(out, |out| body.write(out))?
            }
            Self::VllmPromptEmbeds => stage(out, |out| torch_save::write(out, &rows.into()).map(drop))?,
            Self::VllmCompletion => stage(out, |out| vllm::write_completion_body(out, rows, None))?,
        };
        Ok((Pending::File(file), bytes))
    }

    /// Names the format that an error is about.
    fn unfit(self, error: Error) -> Error {
        match error {
            Error::Argument { problem, remedy } => {
                argument(format!("`--format {}`: {problem}", self.name()), remedy)
            }
            other => other,
        }
    }
}

/// The rows of each slot.
fn images<'a>(record: &SequenceRecord<'a>) -> Result<Vec<Rows<'a>>> {
    let rows = |slot: &Slot| {
        let rows = slot.offset * record.hidden..(slot.offset + slot.len) * record.hidden;
        let values = record.inputs_embeds.get(rows).ok_or_else(|| {
            Error::Internal(format!("{slot:?} of a plan of {} positions", record.plan.len()))
        })?;
        Rows::new(values, record.hidden)
    };
    record.plan.slots.iter().map(rows).collect()
}

impl Pending {
    /// Gives it its name.
    pub fn commit(self) -> Result<()> {
        match self {
            Self::File(file) => file.commit(),
            Self::Folder(folder) => folder.commit(),
        }
    }
}
