//! Where a sequence goes: one file, or a folder of arrays; as this program has it, or as an engine takes it.

use std::path::Path;

use clap::ValueEnum;
use imagehere::config::Profile;
use imagehere::output::safetensors::SequenceRecord;
use imagehere::output::vllm::{self, ChatBody};
use imagehere::output::{AtomicFile, Rows, StagedDir, lmdeploy, npy, safetensors, sglang, stage, torch_save};
use imagehere::prompt::{Request, SequencePlan};
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
    /// For LMDeploy's TurboMind, read by torch.load: input_ids, input_embeddings and their ranges
    Lmdeploy,
    /// For SGLang's engine, read by torch.load: input_ids and image_data, a precomputed_embedding; with --image-token
    Sglang,
    /// One of those that hold images and no sequence
    #[value(hide = true)]
    VllmEncoderCache,
    /// One of those that hold images and no sequence
    #[value(hide = true)]
    Parquet,
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
            Self::VllmPromptEmbeds | Self::Lmdeploy | Self::Sglang => ".pt",
            Self::VllmEncoderCache | Self::Parquet => "",
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

    /// Checks that the options go together, before anything costs time.
    pub fn check_options(self, image_token: Option<u32>) -> Result<()> {
        match (self, image_token) {
            (Self::VllmEncoderCache | Self::Parquet, _) => Err(self.unfit(argument(
                "it holds images, and no sequence",
                "Use `imagehere features`, which has this format too",
            ))),
            (Self::Sglang, None) => Err(self.unfit(argument(
                "SGLang finds images by the served model's image token",
                "Give its id with `--image-token`",
            ))),
            (Self::Lmdeploy | Self::Sglang, _) | (_, None) => Ok(()),
            (_, Some(_)) => {
                Err(self.unfit(argument("it has no ids", "Leave `--image-token` out, or use another format")))
            }
        }
    }

    /// Checks that the format has a place for all that makes this sequence what it is.
    pub fn check_plan(
        self,
        request: &Request,
        plan: &SequencePlan,
        profile: &Profile,
        image_token: Option<u32>,
    ) -> Result<()> {
        match self {
            Self::VllmImageEmbeds => {
                request.turns(profile).map_err(|error| self.unfit(error))?;
                match plan.warnings.iter().any(|warning| warning.kind == WarningKind::Truncated) {
                    false => Ok(()),
                    true => Err(self.unfit(argument(
                        "the sequence is cut, and a server lays it out again from the whole prompt",
                        "Use a shorter prompt, or another `--format`",
                    ))),
                }
            }
            Self::Sglang => {
                sglang::check(plan, image_token.unwrap_or_default()).map_err(|error| self.unfit(error))
            }
            _ => Ok(()),
        }
    }

    /// Writes a sequence, up to its name, and returns its bytes as well. `request` is what it was made from.
    pub fn stage(
        self,
        out: &Path,
        request: &Request,
        record: &SequenceRecord<'_>,
        profile: &Profile,
        image_token: Option<u32>,
    ) -> Result<(Pending, u64)> {
        let saved = |value: torch_save::Value<'_>| stage(out, |out| torch_save::write(out, &value).map(drop));
        let rows = Rows::new(record.inputs_embeds, record.hidden)?;
        let (file, bytes) = match self {
            Self::Safetensors => safetensors::stage_sequence(out, record)?,
            Self::Npy => {
                let (folder, bytes) = npy::stage_sequence(out, record)?;
                return Ok((Pending::Folder(folder), bytes));
            }
            Self::VllmImageEmbeds => {
                let (turns, images) = (request.turns(profile)?, rows.of_slots(record.plan)?);
                let body = ChatBody::new(&turns, &images)?;
                stage(out, |out| body.write(out))?
            }
            Self::VllmPromptEmbeds => saved(rows.into())?,
            Self::VllmCompletion => stage(out, |out| vllm::write_completion_body(out, rows, None))?,
            Self::Lmdeploy => {
                let image_token = image_token.unwrap_or(lmdeploy::IMAGE_TOKEN);
                saved(lmdeploy::arguments(record.plan, rows, image_token)?)?
            }
            Self::Sglang => saved(sglang::arguments(record.plan, rows, image_token.unwrap_or_default())?)?,
            Self::VllmEncoderCache | Self::Parquet => {
                return Err(Error::Internal(format!("a sequence as {}", self.name())));
            }
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

impl Pending {
    /// Gives it its name.
    pub fn commit(self) -> Result<()> {
        match self {
            Self::File(file) => file.commit(),
            Self::Folder(folder) => folder.commit(),
        }
    }
}
