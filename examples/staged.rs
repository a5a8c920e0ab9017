//! Staged use: look at each image by itself, then at all of them together, encoding each once.
//!
//! `cargo run --release --example staged -- MODEL IMAGE IMAGE...` with any checkpoint, for instance one from
//! `imagehere synth tiny --out MODEL`.

use imagehere::Encoder;
use imagehere::image::ImageSource;
use imagehere::prompt::{MARKER, Request};
use imagehere::sequence::SequenceBuffer;

fn main() -> imagehere::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(model), paths) = (args.next(), args.collect::<Vec<_>>()) else {
        eprintln!("usage: staged MODEL IMAGE IMAGE...");
        std::process::exit(2);
    };
    let encoder = Encoder::open(model)?;
    let images: Vec<ImageSource<'_>> = paths.iter().map(|path| path.as_str().into()).collect();

    // The tower runs here, and only here.
    let features = encoder.features(&images)?;

    // First stage: one sequence per image. A language model would answer each of them.
    let alone = encoder.plan(&Request::new(format!("{MARKER}Describe this image.")).image_count(1))?;
    let mut sequence = SequenceBuffer::new();
    let mut answers = Vec::new();
    for (path, features) in paths.iter().zip(&features) {
        encoder.place_into(&alone, std::slice::from_ref(features), &mut sequence)?;
        let report = sequence.verify()?;
        println!("{path}: {} positions, mean norm {:.2}", report.rows, report.slots[0].mean_norm);
        answers.push(format!("(what was said of {path})"));
    }

    // Second stage: all images and what was said of each, in one sequence.
    let mut query = String::new();
    for (i, answer) in answers.iter().enumerate() {
        query += &format!("Image {}: {MARKER}\n{answer}\n", i + 1);
    }
    query += "What do they have in common?";
    let together = encoder.plan(&Request::new(query).images(paths))?;
    encoder.place_into(&together, &features, &mut sequence)?;
    println!("together: {} positions in {} slots", sequence.verify()?.rows, together.slots.len());
    Ok(())
}
