//! The picture of `encode --picture`: what goes into it, and the file.

use std::io::Write as _;
use std::path::{Path, PathBuf, absolute};
use std::time::{Duration, Instant};

use imagehere::image::{DecodeOptions, Frame, ImageSource, Resample, RgbImage, prepare_all};
use imagehere::output::AtomicFile;
use imagehere::picture::{self, Map, PictureRecord};
use imagehere::{Error, Result};
use serde_json::{Value, json};

use super::args::EncodeArgs;
use super::{argument, in_threads};

/// A picture that was written, for table and JSON.
pub struct Drawn {
    pub out: PathBuf,
    pub bytes: u64,
    pub map: Map,
    pub time: Duration, // of pixels, maps and file
}

/// Checks that a picture could be written, and is not the sequence's own target.
pub fn check(args: &EncodeArgs, sequence: &Path) -> Result<()> {
    let Some(target) = &args.picture else { return Ok(()) };
    if let (Ok(a), Ok(b)) = (absolute(target), absolute(sequence))
        && a == b
    {
        return Err(argument(
            format!("`--out` and `--picture` are both {}", target.display()),
            "Give the picture a name of its own",
        ));
    }
    AtomicFile::check(target)
}

/// Decodes the images once more, to the squares that the tower saw.
pub fn squares(
    args: &EncodeArgs,
    images: &[ImageSource<'_>],
    frame: Frame,
    (decode, resample): &(DecodeOptions, Resample),
) -> Result<Vec<RgbImage>> {
    let prepare = || prepare_all(images, frame, *resample, decode);
    let prepared = in_threads(args.running.threads, prepare)??;
    Ok(prepared.into_iter().map(|image| image.pixels).collect())
}

/// Draws and writes the picture, up to its name. `squares` makes the pixels, or none.
pub fn stage(
    args: &EncodeArgs,
    record: PictureRecord<'_>,
    squares: impl FnOnce() -> Result<Vec<RgbImage>>,
) -> Result<Option<(AtomicFile, Drawn)>> {
    let Some(target) = &args.picture else { return Ok(None) };
    let start = Instant::now();
    let map = args.picture_map.unwrap_or_default();
    let pixels = squares()?;
    let record = PictureRecord { pixels: &pixels, map, ..record };
    let image = in_threads(args.running.threads, || picture::draw(&record))??;
    let mut png = Vec::new();
    image.write_png(&mut png).map_err(|e| Error::Internal(format!("a PNG could not be made: {e}")))?;
    let mut file = AtomicFile::create(target)?;
    file.write_all(&png).map_err(|source| Error::Write {
        path: target.clone(),
        source,
        remedy: "Make room there or choose another target".to_owned(),
    })?;
    Ok(Some((file, Drawn { out: target.clone(), bytes: png.len() as u64, map, time: start.elapsed() })))
}

/// Gives a picture its name, once the sequence has its own.
pub fn commit(staged: Option<(AtomicFile, Drawn)>, sequence: &Path) -> Result<Option<Drawn>> {
    let Some((file, drawn)) = staged else { return Ok(None) };
    match file.commit() {
        Ok(()) => Ok(Some(drawn)),
        Err(Error::Write { path, source, remedy }) => {
            let remedy = format!("{remedy}. The sequence is written, and whole: {}", sequence.display());
            Err(Error::Write { path, source, remedy })
        }
        Err(error) => Err(error),
    }
}

impl Drawn {
    /// The object that `--json` has.
    pub fn json(&self) -> Value {
        let map = match self.map {
            Map::Norm => "norm",
            _ => "pca",
        };
        json!({ "out": self.out.to_string_lossy(), "bytes": self.bytes, "map": map })
    }
}
