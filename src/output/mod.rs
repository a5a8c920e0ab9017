//! Sinks: where a finished sequence goes.
//!
//! [`AtomicFile`] makes a file that appears whole or not at all, and [`StagedDir`] a directory; [`safetensors`] fills
//! one file with a sequence, [`npy`] a directory. What other programs take is written by a module of their name, from
//! [`Rows`] that lie anywhere:
//!
//! | module | whose reader | what |
//! |---|---|---|
//! | [`torch_save`] | `torch.load(weights_only=True)` | numbers, texts, lists, dictionaries, tensors |
//! | [`vllm`] | vLLM | bodies with `image_embeds` or `prompt_embeds`, entries of an encoder cache |
//! | [`lmdeploy`] | LMDeploy's TurboMind | ids, each image's rows, their ranges |
//! | [`parquet`] | pyarrow, and any reader of Parquet | features of many images, a row each |
//! | [`sglang`] | SGLang's engine | ids, all images' rows as `precomputed_embedding` |
//!
//! Nothing here changes a value: what the encoder wrote is what the file holds, byte for byte.

mod atomic;
mod folder;
pub mod lmdeploy;
pub mod npy;
pub mod parquet;
mod rows;
pub mod safetensors;
pub mod sglang;
mod staged;
#[cfg(test)]
mod testkit;
pub mod torch_save;
pub mod vllm;

pub(crate) use atomic::write_error;
pub use atomic::{AtomicFile, stage};
pub use folder::Folder;
pub use rows::Rows;
pub(crate) use rows::{hex, sha256};
pub use staged::StagedDir;

// Tensors are written as the machine holds them, and every format written here is little-endian.
#[cfg(not(target_endian = "little"))]
compile_error!("imagehere writes tensors as they lie in memory, which must be little-endian");
