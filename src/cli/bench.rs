//! `imagehere bench`: what each step of an encode takes, beside what the machine can do.
//!
//! ```text
//!   run = peak of multiply-adds ─▶ decode ─▶ resize ─▶ ops of the tower … ─▶ the rest ─▶ verified
//!                                  └──────────────── whole ────────────────┘      encode = ops + the rest
//! ```
//!
//! The peak is measured anew before every run: a machine that has other things to do, or grows warm, shows it in both.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use imagehere::backend::Op;
use imagehere::checkpoint::Checkpoint;
use imagehere::cpu::bench::Stages;
use imagehere::encoder::Encoder;
use imagehere::image::{DecodeOptions, ImageSource, Resample};
use imagehere::prompt::{LengthOptions, Planner, TokenSegment, plan_tokens};
use imagehere::sequence::SequenceBuffer;
use imagehere::tokenizer::Tokenizer;
use imagehere::{Error, Result, Warning};
use serde_json::{Map, Value, json};

use super::args::{BenchArgs, RunningArgs};
use super::progress::Progress;
use super::scenes::{SCENES, draw};
use super::{encode, in_threads, inputs, json_line, show, warn};

/// Multiply-adds on each register of a thread between two looks at the clock: milliseconds.
const STEPS: usize = 1 << 18;
/// Looks at the peak before each run.
const LOOKS: usize = 5;
/// The size of the drawing that is measured where no image is given, in pixels.
const DRAWING: (u32, u32) = (640, 480);

/// A limit of the machine that steps are held against.
struct Peak {
    name: &'static str,
    what: &'static str,
    flops: f64, // operations a second
}

/// A step, or several together.
struct Row {
    name: &'static str,
    flop: u64,         // of matrix products, in one run; 0 where there are none
    seconds: Vec<f64>, // [runs]
}

/// What was measured, for table and JSON.
struct Outcome<'a> {
    args: &'a BenchArgs,
    encoder: Encoder,
    names: Vec<String>,
    positions: usize,
    rows: Vec<Row>,
    peaks: Vec<Peak>,
    warnings: Vec<Warning>,
}

/// Runs the command.
pub fn run(args: &BenchArgs) -> Result<String> {
    let rules = (DecodeOptions::default(), Resample::default());
    let drawing;
    let images = match args.image.is_empty() {
        false => inputs::sources(&args.image, &rules.0)?,
        true => {
            drawing = drawn()?;
            vec![ImageSource::Named("a drawing".into(), drawing.as_slice().into())]
        }
    };
    let names = images.iter().map(|image| image.name()).collect();
    let checkpoint = Checkpoint::open(&args.model)?;
    let planner = Planner::new(Tokenizer::from_dir(&args.model)?, checkpoint.config().clone())?;
    let running = RunningArgs {
        device: args.device,
        threads: args.threads,
        saturate: args.saturate,
        feature_cache: None,
        feature_cache_size: None,
    };
    let encoder = encode::load(&running, &checkpoint, planner, rules, None)?;
    encoder.warm_up(&[images.len()])?;

    let outcome = measure(args, encoder, &images, names)?;
    warn(&outcome.warnings);
    if args.json {
        return Ok(json_line(&outcome.json()));
    }
    Ok(outcome.table())
}

/// A picture as a file, so that there is something to decode.
fn drawn() -> Result<Vec<u8>> {
    let mut png = Vec::new();
    let picture = draw(DRAWING.0, DRAWING.1, SCENES[1].1);
    picture.write_png(&mut png).map_err(|e| Error::Internal(format!("a PNG could not be made: {e}")))?;
    Ok(png)
}

/// Encodes once without a clock, then `repeat` times with one.
fn measure<'a>(
    args: &'a BenchArgs,
    encoder: Encoder,
    images: &[ImageSource<'_>],
    names: Vec<String>,
) -> Result<Outcome<'a>> {
    let config = encoder.config().clone();
    let segments = vec![TokenSegment::Image; images.len()];
    let length = LengthOptions::new().max_length(images.len() * config.patches);
    let plan = plan_tokens(&segments, &config, length)?;
    let mut sequence = SequenceBuffer::new();
    let is_cpu = encoder.describe().starts_with("cpu");
    let stages = is_cpu.then(Stages::new).transpose()?;

    let count = images.len() as u64;
    let all: u64 = Op::ALL.iter().map(|op| count * op.flop(&config)).sum();
    let row = |name, flop| Row { name, flop, seconds: Vec::new() };
    let mut before = [row("decode", 0), row("resize", 0)];
    let mut ops = Op::ALL.map(|op| row(op.name(), count * op.flop(&config)));
    let mut after = [row("rest", 0), row("encode", all), row("whole", all)];
    let mut fastest = [0f64; 2]; // multiply-adds, tiles
    let mut warnings = encoder.warnings().to_vec();

    let bar = Progress::bar("measuring");
    for run in 0..=args.repeat {
        if let Some(stages) = &stages {
            let peaks = in_threads(args.threads, || {
                [peak(|| stages.multiply_adds(STEPS)), peak(|| stages.tile_products(STEPS >> 6))]
            })?;
            fastest = std::array::from_fn(|i| fastest[i].max(peaks[i]));
        }
        let mut spent = [Duration::ZERO; Op::ALL.len()];
        let start = Instant::now();
        let report = encoder.encode_timed(&plan, images, &mut sequence, &mut |op, time| {
            spent[op as usize] += time;
        })?;
        let whole = start.elapsed();
        sequence.verify()?;
        bar.set((run + 1) as f32 / (args.repeat + 1) as f32);
        if run == 0 {
            warnings.extend(report.warnings);
            continue;
        }
        let rest = report.encode.saturating_sub(spent.iter().sum());
        let push = |rows: &mut [Row], times: &[Duration]| {
            rows.iter_mut().zip(times).for_each(|(row, time)| row.seconds.push(time.as_secs_f64()));
        };
        push(&mut before, &[report.decode, report.resize]);
        push(&mut ops, &spent);
        push(&mut after, &[rest, report.encode, whole]);
    }
    drop(bar);

    // Where the device does not tell its steps, there is no rest either.
    let is_told = ops.iter().any(|row| row.seconds.iter().any(|&time| time > 0.0));
    let steps = ops.into_iter().filter(|_| is_told);
    let after = after.into_iter().skip(usize::from(!is_told));
    let rows = before.into_iter().chain(steps).chain(after).collect();
    let [fma, tiles] = fastest;
    let fma = Peak { name: "fma", what: "f32 multiply-adds", flops: fma };
    let tiles = Peak {
        name: "tiles",
        what: "fp16 products in tiles (by bf16 weights half as many again)",
        flops: tiles,
    };
    let peaks = [fma, tiles].into_iter().filter(|peak| peak.flops > 0.0).collect();
    Ok(Outcome { args, encoder, names, positions: plan.len(), rows, peaks, warnings })
}

/// The fastest of some looks at `work`, which returns the operations it did: operations a second.
fn peak(work: impl Fn() -> f64) -> f64 {
    let look = |_| {
        let start = Instant::now();
        let flop = work();
        flop / start.elapsed().as_secs_f64()
    };
    (0..LOOKS).map(look).fold(0.0, f64::max)
}

impl Row {
    fn best(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::MAX, f64::min)
    }

    fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// Operations a second, of the median; `None` where there are none to count.
    fn flops(&self) -> Option<f64> {
        let median = self.median();
        (self.flop > 0 && median > 0.0).then(|| self.flop as f64 / median)
    }
}

/// A time for people; small models have small ones.
fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s => show::time(Duration::from_secs_f64(s)),
    }
}

/// The middle of some numbers, or the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (lower, upper) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    (lower + upper) / 2.0
}

impl Outcome<'_> {
    /// The time of a row that is always there.
    fn median_of(&self, name: &str) -> f64 {
        self.rows.iter().find(|row| row.name == name).map_or(f64::NAN, Row::median)
    }

    /// The object that `--json` prints.
    fn json(&self) -> Value {
        let row = |row: &Row| {
            let flops = row.flops();
            let shares: Map<String, Value> =
                self.peaks.iter().map(|p| (p.name.to_owned(), json!(flops.map(|f| f / p.flops)))).collect();
            json!({
                "name": row.name,
                "median_s": row.median(),
                "best_s": row.best(),
                "seconds": row.seconds,
                "flop": row.flop,
                "flops": flops,
                "shares": shares,
            })
        };
        let peaks = self.peaks.iter().map(|peak| json!({ "name": peak.name, "flops": peak.flops }));
        json!({
            "model": self.args.model.to_string_lossy(),
            "device": self.encoder.describe(),
            "config": self.encoder.config(),
            "images": self.names,
            "positions": self.positions,
            "repeat": self.args.repeat,
            "peaks": peaks.collect::<Vec<_>>(),
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "images_per_s": self.names.len() as f64 / self.median_of("whole"),
            "peak_bytes": show::peak_bytes(),
            "warnings": self.warnings,
            "fingerprint": self.encoder.fingerprint(),
        })
    }

    /// What is printed otherwise: a line for each step, shares of the peaks and of the encode.
    fn table(&self) -> String {
        let (images, runs) = (show::count(self.names.len(), "image"), show::count(self.args.repeat, "run"));
        let mut out =
            format!("{runs} of {images} on {}: {}\n", self.encoder.describe(), self.names.join(", "));
        for Peak { what, flops, .. } in &self.peaks {
            let _ = writeln!(out, "{what} reach {:.1} GFLOP/s", flops / 1e9);
        }
        let _ = write!(out, "\n{:<18}{:>11}{:>11}{:>11}", "", "median", "best", "GFLOP/s");
        for peak in &self.peaks {
            let _ = write!(out, "{:>11}", format!("of {}", peak.name));
        }
        out += "  of encode\n";
        let encode = self.median_of("encode");
        for row in &self.rows {
            if row.name == "encode" {
                out.push('\n');
            }
            let (median, best) = (time(row.median()), time(row.best()));
            let _ = write!(out, "{:<18}{median:>11}{best:>11}", row.name.replace('_', " "));
            let flops = row.flops();
            let cell = |value: Option<String>| format!("{:>11}", value.unwrap_or_default());
            out += &cell(flops.map(|flops| format!("{:.1}", flops / 1e9)));
            for peak in &self.peaks {
                out += &cell(flops.map(|flops| format!("{:.0} %", 100.0 * flops / peak.flops)));
            }
            let inside = !matches!(row.name, "decode" | "resize" | "whole");
            out += &cell(inside.then(|| format!("{:.1} %", 100.0 * row.median() / encode)));
            out.truncate(out.trim_end().len());
            out.push('\n');
        }
        let memory =
            show::peak_bytes().map_or(String::new(), |n| format!("; peak memory {}", show::bytes(n)));
        let rate = self.names.len() as f64 / self.median_of("whole");
        let _ = writeln!(
            out,
            "\n{rate:.2} images/s; {} verified{memory}",
            show::count(self.args.repeat + 1, "sequence")
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_counts_by_its_median() {
        let row = Row { name: "x", flop: 600, seconds: vec![3.0, 1.0, 2.0, 9.0] };
        assert_eq!((row.median(), row.best(), row.flops()), (2.5, 1.0, Some(240.0)));
        assert_eq!(median(&[5.0]), 5.0);
        assert_eq!([0.0000123, 0.0123, 1.23].map(time), ["12 µs", "12.3 ms", "1.230 s"]);
        assert_eq!(Row { flop: 0, ..row }.flops(), None);
    }
}
