//! Options to a request, images and the rules for both.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use imagehere::image::{Alpha, DecodeOptions, Exif, ImageSource, Resample, read_limited};
use imagehere::prompt::{Bos, Meta, Request};
use imagehere::{Error, ImageProblem, Result};

use super::args::{Compat, ImageArgs, PromptArgs};
use super::argument;

/// What stands for stdin among paths.
const STDIN: &str = "-";

/// Makes the request that the options describe. Reads prompt and history, no image.
pub fn request(prompt: &PromptArgs, images: &ImageArgs) -> Result<Request> {
    request_of(prompt, images, images.image.iter().map(|path| name(path)).collect())
}

/// As [`request`], for images of these names.
pub fn request_of(prompt: &PromptArgs, images: &ImageArgs, names: Vec<String>) -> Result<Request> {
    refuse_contradictions(Some(prompt), images)?;
    let from_stdin = |path: &PathBuf| path.as_os_str() == STDIN;
    if prompt.prompt_file.as_ref().is_some_and(from_stdin) && images.image.iter().any(from_stdin) {
        return Err(argument(
            "`--prompt-file -` and `--image -` both want stdin",
            "Give one of them the path of a file",
        ));
    }
    let query = match (&prompt.prompt, &prompt.prompt_file) {
        (_, Some(path)) => prompt_file(path)?,
        (Some(text), None) => text.clone(),
        (None, None) => return Err(argument("there is no prompt", "Give `--prompt` or `--prompt-file`")),
    };
    let history = prompt.history.as_deref().map_or(Ok(Vec::new()), history)?;
    assemble(prompt, images, query, history, names)
}

/// Makes a request of a query, earlier turns and names of images that are at hand, and the options.
pub fn assemble(
    prompt: &PromptArgs,
    images: &ImageArgs,
    query: String,
    history: Vec<(String, String)>,
    names: Vec<String>,
) -> Result<Request> {
    refuse_contradictions(Some(prompt), images)?;
    let upstream = images.compat == Some(Compat::Upstream);
    let meta = match &prompt.meta_instruction {
        _ if prompt.no_meta => Meta::None,
        Some(text) => Meta::Text(text.clone()),
        None => Meta::Default,
    };
    let mut request = Request::new(query)
        .images(names)
        .meta_instruction(meta)
        .history(history)
        .raw(prompt.raw)
        .bos(prompt.bos.unwrap_or_default())
        .allow_control_tokens(prompt.allow_control_tokens || upstream)
        .truncate(prompt.truncate || upstream);
    if let Some(positions) = prompt.max_length {
        request = request.max_length(positions);
    }
    Ok(request)
}

/// Makes the rules that the options give for images.
pub fn image_rules(images: &ImageArgs) -> Result<(DecodeOptions, Resample)> {
    refuse_contradictions(None, images)?;
    let upstream = images.compat == Some(Compat::Upstream);
    let exif = if upstream { Exif::Ignore } else { images.exif.unwrap_or_default() };
    let decode = DecodeOptions::default().with_exif(exif).with_alpha(images.alpha.unwrap_or_default());
    Ok((decode, images.resample.unwrap_or_default()))
}

/// Refuses what `--compat upstream` says otherwise.
fn refuse_contradictions(prompt: Option<&PromptArgs>, images: &ImageArgs) -> Result<()> {
    let mut clash = None;
    if images.compat != Some(Compat::Upstream) {
        return Ok(());
    }
    if images.exif == Some(Exif::Apply) {
        clash = Some(("--exif apply", "ignores EXIF"));
    } else if images.alpha.is_some_and(|alpha| alpha != Alpha::Drop) {
        clash = Some(("--alpha white|black", "drops alpha"));
    } else if let Some(prompt) = prompt {
        if prompt.bos.is_some_and(|bos| bos != Bos::PerSegment) {
            clash = Some(("--bos first", "puts BOS on every segment"));
        } else if prompt.max_length.is_some() {
            clash = Some(("--max-length", "cuts at the model's max_length"));
        }
    }
    match clash {
        None => Ok(()),
        Some((option, rule)) => Err(argument(
            format!("`--compat upstream` {rule}, and `{option}` was given"),
            "Leave one of the two out",
        )),
    }
}

/// Makes the images of a call. Reads stdin if it is one of them; files are only looked for, so that a wrong
/// path is found before a model is loaded.
pub fn sources<'a>(paths: &'a [PathBuf], rules: &DecodeOptions) -> Result<Vec<ImageSource<'a>>> {
    check_paths(paths)?;
    let source = |(index, path): (usize, &'a PathBuf)| {
        if path.as_os_str() != STDIN {
            return Ok(path.into());
        }
        let bytes = read_limited(io::stdin().lock(), rules.limits.file_bytes)
            .map_err(|problem| unusable(index, path, problem))?;
        Ok(ImageSource::Named(name(path).into(), bytes.into()))
    };
    paths.iter().enumerate().map(source).collect()
}

/// Checks that files are there, reading none of them, and that stdin is asked for once at most.
pub fn check_paths(paths: &[PathBuf]) -> Result<()> {
    for (index, path) in paths.iter().enumerate() {
        if path.as_os_str() != STDIN {
            readable(path).map_err(|e| unusable(index, path, ImageProblem::Unreadable(e)))?;
        } else if paths[..index].contains(path) {
            return Err(argument("`--image -` was given twice", "Stdin can be read once; give a path"));
        }
    }
    Ok(())
}

fn unusable(index: usize, path: &Path, problem: ImageProblem) -> Error {
    let remedy = "Check the path, and that the file may be read".to_owned();
    Error::Image { index, name: name(path), problem, remedy }
}

/// What messages and tables call an image.
pub fn name(path: &Path) -> String {
    if path.as_os_str() == STDIN { "stdin".to_owned() } else { path.display().to_string() }
}

/// Opens a file to see whether it can be read, and reads nothing.
pub fn readable(path: &Path) -> io::Result<()> {
    match File::open(path)?.metadata()?.is_dir() {
        true => Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory")),
        false => Ok(()),
    }
}

/// Reads a prompt, byte for byte: no newline is added or taken away.
fn prompt_file(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let read = match path.as_os_str() == STDIN {
        true => io::stdin().lock().read_to_end(&mut bytes),
        false => File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)),
    };
    read.map_err(|source| unreadable(path, source, "Check the path of `--prompt-file`"))?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        argument(
            format!("{} is not UTF-8: byte {:#04x} at offset {at}", name(path), e.as_bytes()[at]),
            "Save the prompt as UTF-8",
        )
    })
}

/// Reads earlier turns: `[[query, answer], ...]`.
fn history(path: &Path) -> Result<Vec<(String, String)>> {
    let bytes = fs::read(path).map_err(|e| unreadable(path, e, "Check the path of `--history`"))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        argument(
            format!("{} is no history: {e}", path.display()),
            "Write a JSON array of pairs of texts: [[\"query\", \"answer\"], ...]",
        )
    })
}

/// Says that a file of the command line cannot be read.
pub fn unreadable(path: &Path, source: io::Error, remedy: &str) -> Error {
    Error::Read { action: "read", path: path.to_path_buf(), source, remedy: remedy.to_owned() }
}
