//! What vLLM takes: a chat with images that are encoded already, a sequence, entries of its encoder cache.
//!
//! ```text
//!   image_embeds     {"messages": [{"role": "user", "content": [
//!                        {"type": "text", "text": "…"},
//!                        {"type": "image_embeds", "image_embeds": base64 of a .npy [P, H], "uuid": its digest}, …]}]}
//!   prompt_embeds    {"prompt_embeds": base64 of a torch.save file [L, H]}
//!   encoder cache    DIR/<uuid>/encoder_cache.safetensors: ec_cache F16 [P, H]
//! ```
//!
//! `image_embeds` leaves template and text rows to the server, and needs `vllm serve --enable-mm-embeds` and a model whose
//! images have `[P, H]` features. `prompt_embeds` is the whole sequence, and needs `--enable-prompt-embeds`; a model with
//! PLoRA, as InternLM-XComposer2-VL has, would need `im_mask` beside it, for which vLLM has no place. A server casts fp16
//! to its own dtype.
//!
//! A file of the encoder cache is found by a server whose `--ec-transfer-config` has `ECExampleConnector`, the role
//! `ec_consumer` and DIR as `shared_storage_path`, when a request has the image as usual, and beside it the `uuid`: then its
//! tower is not run. The server itself needs the image only to count its rows.
//!
//! Where the images of a chat come to stand among its texts is the template's choice: vLLM keeps the places of parts if
//! the model's template takes lists of parts, or with `--interleave-mm-strings`.
//!
//! # Source
//! vLLM 0.33, read, not copied: `vllm/multimodal/media/image.py` (`ImageEmbeddingMediaIO`: a `.npy` is told by its magic;
//! base64 is strict), `vllm/entrypoints/chat_utils.py` (parts, `uuid`), `vllm/renderers/embed_utils.py`
//! (`safe_load_prompt_embeds`: `torch.load(weights_only=True)` alone, two axes),
//! `vllm/distributed/ec_transfer/ec_connector/example_connector.py`, `vllm/multimodal/processing/inputs.py`
//! (`get_mm_hashes`: the `uuid`, where there are no options of a processor).

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use base64::engine::general_purpose::STANDARD;
use base64::write::EncoderWriter;

use half::f16;

use super::safetensors::{Entry, header};
use super::{AtomicFile, Folder, Rows, npy, stage, torch_save};
use crate::error::{Error, Result};
use crate::prompt::{Turn, TurnPart};

/// What an entry's file is called in its folder.
const CACHE_FILE: &str = "encoder_cache.safetensors";
/// What its tensor is called.
const CACHE_TENSOR: &str = "ec_cache";

/// The body of a request to `/v1/chat/completions`, its images as `image_embeds`.
///
/// # Examples
/// ```
/// use imagehere::output::{Rows, vllm::ChatBody};
/// use imagehere::prompt::{Meta, Request};
///
/// let values = [half::f16::ONE; 6];
/// let images = [Rows::new(&values, 3)?];
/// let request = Request::new("<ImageHere>What is it?").meta_instruction(Meta::None);
/// let turns = request.turns(&imagehere::config::XCOMPOSER2)?;
/// let mut body = Vec::new();
/// ChatBody::new(&turns, &images)?.write(&mut body).unwrap();
/// let body = String::from_utf8(body).unwrap();
/// assert!(body.starts_with(r#"{"messages":[{"role":"user","content":[{"type":"image_embeds","image_embeds":"k05VTVBZ"#));
/// # Ok::<(), imagehere::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ChatBody<'a> {
    turns: &'a [Turn<'a>],
    images: &'a [Rows<'a>], // [N], each [P, H]
    model: Option<&'a str>,
}

impl<'a> ChatBody<'a> {
    /// Joins the turns of a chat ([`Request::turns`](crate::prompt::Request::turns)) and its images, each `[P, H]`.
    ///
    /// # Errors
    /// [`Error::Argument`] if the turns do not use every image once, in order, or an image has no rows.
    pub fn new(turns: &'a [Turn<'a>], images: &'a [Rows<'a>]) -> Result<Self> {
        let used = turns.iter().flat_map(|turn| &turn.parts).filter_map(|part| match part {
            TurnPart::Image(image) => Some(*image),
            TurnPart::Text(_) => None,
        });
        if !used.clone().eq(0..images.len()) {
            return Err(Error::argument(
                format!(
                    "the turns use the images {:?}, and there are {}",
                    Vec::from_iter(used),
                    images.len()
                ),
                "Use each image once, in order",
            ));
        }
        if let Some(image) = images.iter().position(Rows::is_empty) {
            return Err(Error::argument(
                format!("image {image} has no rows"),
                "Give the features of whole images",
            ));
        }
        Ok(Self { turns, images, model: None })
    }

    /// Names the model to ask. A server of one model does without.
    #[must_use]
    pub fn model(mut self, name: &'a str) -> Self {
        self.model = Some(name);
        self
    }

    /// Writes the body, the features straight from where they lie. Each part's `uuid` is the digest of its rows, so that
    /// a server may keep what it made of them.
    ///
    /// # Errors
    /// What `out` answers.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        let out: &mut dyn Write = &mut out;
        begin(out, self.model)?;
        out.write_all(b"\"messages\":[")?;
        for (i, turn) in self.turns.iter().enumerate() {
            out.write_all(if i > 0 { b",{\"role\":" } else { b"{\"role\":" })?;
            serde_json::to_writer(&mut *out, &turn.role)?;
            out.write_all(b",\"content\":")?;
            match turn.parts[..] {
                // A text alone is one to every template.
                [] => out.write_all(b"\"\"")?,
                [TurnPart::Text(text)] => serde_json::to_writer(&mut *out, text)?,
                _ => self.parts(out, &turn.parts)?,
            }
            out.write_all(b"}")?;
        }
        out.write_all(b"]}\n")
    }

    fn parts(&self, out: &mut dyn Write, parts: &[TurnPart<'_>]) -> io::Result<()> {
        for (i, part) in parts.iter().enumerate() {
            out.write_all(if i > 0 { b"," } else { b"[" })?;
            match *part {
                TurnPart::Text(text) => {
                    out.write_all(b"{\"type\":\"text\",\"text\":")?;
                    serde_json::to_writer(&mut *out, text)?;
                }
                TurnPart::Image(image) => {
                    let rows = self.images[image];
                    out.write_all(b"{\"type\":\"image_embeds\",\"image_embeds\":\"")?;
                    base64(out, |out| npy::write(out, rows))?;
                    write!(out, "\",\"uuid\":\"{}\"", rows.digest())?;
                }
            }
            out.write_all(b"}")?;
        }
        out.write_all(b"]")
    }
}

/// Writes the body of a request to `/v1/completions` whose prompt is a sequence `[L, H]`, as `prompt_embeds`. A server of
/// one model does without its name.
///
/// # Errors
/// What `out` answers.
pub fn write_completion_body(mut out: impl Write, sequence: Rows<'_>, model: Option<&str>) -> io::Result<()> {
    let out: &mut dyn Write = &mut out;
    begin(out, model)?;
    out.write_all(b"\"prompt_embeds\":\"")?;
    base64(out, |out| torch_save::write(out, &sequence.into()).map(drop))?;
    out.write_all(b"\"}\n")
}

/// Checks that entries of an encoder cache could be written to `dir`, which is made if it does not exist, and leaves no
/// trace.
///
/// # Errors
/// [`Error::Write`] if not.
pub fn check_encoder_cache(dir: impl AsRef<Path>) -> Result<()> {
    let _made = Folder::make(&dir)?;
    AtomicFile::check(dir.as_ref().join(CACHE_FILE))
}

/// Writes an image `[P, H]` to an encoder cache under its `uuid`, whole or not at all, and returns the bytes written.
///
/// `dir`, and the entry's folder in it, are made if they do not exist. An entry that is there is replaced, for what is
/// under one `uuid` is one image: [`Rows::digest`] is a `uuid` of the rows' own. A server may look at any moment.
///
/// # Errors
/// [`Error::Argument`] if `uuid` could be anything but the name of a folder, or there are no rows; [`Error::Write`] if the
/// entry cannot be written. Nothing is left behind then.
pub fn write_encoder_cache(dir: impl AsRef<Path>, uuid: &str, rows: Rows<'_>) -> Result<u64> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:+=@".contains(c);
    if uuid.is_empty() || uuid.len() > 255 || uuid.starts_with('.') || !uuid.chars().all(plain) {
        return Err(Error::argument(
            format!("the uuid {uuid:?} cannot be the name of a folder"),
            "Use up to 255 letters, digits and any of -_.:+=@, not beginning with a dot",
        ));
    }
    if rows.is_empty() {
        return Err(Error::argument(
            format!("the image of the uuid {uuid:?} has no rows"),
            "Give the features of whole images",
        ));
    }
    let folder = dir.as_ref().join(uuid);
    let _made = Folder::make(&folder)?;
    let shape = vec![rows.len(), rows.hidden()];
    let entry = Entry { name: CACHE_TENSOR.to_owned(), dtype: "F16", shape, width: size_of::<f16>() };
    let header = header(&[entry], &BTreeMap::new());
    let (file, bytes) = stage(folder.join(CACHE_FILE), |out| {
        out.write_all(&header)?;
        out.write_all(rows.bytes())
    })?;
    file.commit()?;
    Ok(bytes)
}

fn begin(out: &mut dyn Write, model: Option<&str>) -> io::Result<()> {
    out.write_all(b"{")?;
    if let Some(model) = model {
        out.write_all(b"\"model\":")?;
        serde_json::to_writer(&mut *out, model)?;
        out.write_all(b",")?;
    }
    Ok(())
}

/// Passes what `fill` writes on as base64, without a line's end, padded.
fn base64(out: &mut dyn Write, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut encoder = EncoderWriter::new(out, &STANDARD);
    fill(&mut encoder)?;
    encoder.finish().map(drop)
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use serde_json::{Value, json};

    use super::*;
    use crate::output::testkit::names;
    use crate::prompt::{Meta, Request};

    fn rows(count: usize) -> Vec<f16> {
        (0..count * 3).map(|i| f16::from_f32(i as f32 - 7.5)).collect()
    }

    fn written(write: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> Value {
        let mut bytes = Vec::new();
        write(&mut bytes).unwrap();
        assert_eq!(bytes.last(), Some(&b'\n'));
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn a_chat_has_its_texts_and_one_part_for_each_image() {
        let (a, b) = (rows(2), rows(5));
        let images = [Rows::new(&a, 3).unwrap(), Rows::new(&b, 3).unwrap()];
        let request = Request::new("A <ImageHere>, \"b\"\n<ImageHere>")
            .meta_instruction(Meta::Text("Bé brief".to_owned()))
            .history(vec![("Hi".to_owned(), "Ho".to_owned())]);
        let turns = request.turns(&crate::config::XCOMPOSER2).unwrap();
        let body = written(|out| ChatBody::new(&turns, &images).unwrap().model("m").write(out));
        let part = |rows: Rows<'_>| {
            let mut npy = Vec::new();
            npy::write(&mut npy, rows).unwrap();
            json!({ "type": "image_embeds", "image_embeds": STANDARD.encode(npy), "uuid": rows.digest() })
        };
        let text = |text: &str| json!({ "type": "text", "text": text });
        assert_eq!(
            body,
            json!({ "model": "m", "messages": [
                { "role": "system", "content": "Bé brief" },
                { "role": "user", "content": "Hi" },
                { "role": "assistant", "content": "Ho" },
                { "role": "user", "content": [text("A "), part(images[0]), text(", \"b\"\n"), part(images[1])] },
            ] })
        );
    }

    #[test]
    fn a_completion_has_the_file_that_torch_reads() {
        let a = rows(4);
        let rows = Rows::new(&a, 3).unwrap();
        let mut file = Vec::new();
        torch_save::write(&mut file, &rows.into()).unwrap();
        let body = written(|out| write_completion_body(out, rows, None));
        assert_eq!(body, json!({ "prompt_embeds": STANDARD.encode(file) }));
    }

    #[test]
    fn images_that_do_not_fit_the_turns_are_refused() {
        let (a, none) = (rows(2), rows(0));
        let (a, none) = (Rows::new(&a, 3).unwrap(), Rows::new(&none, 3).unwrap());
        let request = Request::new("<ImageHere>?");
        let turns = request.turns(&crate::config::XCOMPOSER2).unwrap();
        for (images, part) in [(vec![], "there are 0"), (vec![a, a], "there are 2"), (vec![none], "no rows")]
        {
            let message = ChatBody::new(&turns, &images).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn an_encoder_cache_has_each_image_under_its_name() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("a/cache");
        let (a, b) = (rows(2), rows(5));
        let (a, b) = (Rows::new(&a, 3).unwrap(), Rows::new(&b, 3).unwrap());
        check_encoder_cache(&dir).unwrap();
        for refused in ["", "a/b", "..", ".a", "\\", "é"] {
            let message = write_encoder_cache(&dir, refused, a).unwrap_err().to_string();
            assert!(message.contains("cannot be the name"), "{message}");
        }
        assert!(write_encoder_cache(&dir, "none", Rows::new(&[], 3).unwrap()).is_err());
        assert!(!place.path().join("a").exists(), "what is refused leaves a trace");

        for _ in 0..2 {
            for (uuid, rows) in [("one", a), ("two", b)] {
                let bytes = write_encoder_cache(&dir, uuid, rows).unwrap();
                assert_eq!(names(&dir.join(uuid)), [CACHE_FILE]);
                let file = std::fs::read(dir.join(uuid).join(CACHE_FILE)).unwrap();
                assert_eq!(file.len() as u64, bytes);
                let tensors = ::safetensors::SafeTensors::deserialize(&file).unwrap();
                let tensor = tensors.tensor(CACHE_TENSOR).unwrap();
                assert_eq!((tensor.shape(), tensor.data()), ([rows.len(), 3].as_slice(), rows.bytes()));
            }
            assert_eq!(names(&dir), ["one", "two"]);
        }
        // A file where the folder would be.
        std::fs::write(dir.join("three"), "").unwrap();
        assert!(matches!(write_encoder_cache(&dir, "three", a), Err(Error::Write { .. })));
        assert!(matches!(check_encoder_cache(dir.join("three")), Err(Error::Write { .. })));
    }
}
