//! Layouts as table, strip and JSON; sizes and times for people.

use std::fmt::Write as _;
use std::time::Duration;

use imagehere::config::ModelConfig;
use imagehere::encoder::EncodeReport;
use imagehere::prompt::{SegmentKind, SequencePlan};
use imagehere::sequence::SlotReport;
use serde_json::{Value, json};

/// Cells of the strip, if no more segments than that want one each.
const STRIP: usize = 72;
/// Characters of a text that the table shows.
const PREVIEW: usize = 44;

/// Draws a layout: a line of sums, a table of segments, a strip to scale.
pub fn layout(plan: &SequencePlan, config: &ModelConfig, names: &[String], colour: bool) -> String {
    let mut out = String::new();
    let length = plan.input_ids.len();
    let rows: usize = plan.slots.iter().map(|slot| slot.len).sum();
    let _ = writeln!(
        out,
        "{length} positions = {rows} in {} + {} of text; fp16 [{length}, {}], {}",
        count(plan.slots.len(), "image"),
        length - rows,
        config.hidden_size,
        bytes((length * config.hidden_size * 2) as u64),
    );
    let _ = writeln!(out, "\n   begin      end     rows  what");
    for segment in &plan.segments {
        let (mark, what) = match segment.kind {
            SegmentKind::Image(i) => (
                paint(&format!(" {} ", i + 1), Some(i), colour),
                format!("image {}  {}", i + 1, names.get(i).map_or("", String::as_str)),
            ),
            _ => (paint(" · ", None, colour), preview(&segment.text)),
        };
        let (begin, end) = (segment.offset, segment.offset + segment.len);
        let _ = writeln!(out, "{begin:>8} {end:>8} {:>8}  {mark} {what}", segment.len);
    }
    for (i, _) in plan.slots.iter().enumerate().filter(|(_, slot)| slot.len == 0) {
        let name = names.get(i).map_or("", String::as_str);
        let _ = writeln!(out, "{:>8} {:>8} {:>8}      image {}  {name}", "-", "-", 0, i + 1);
    }
    let _ = write!(out, "\n{}", strip(plan, colour));
    let limits = [
        ("max_length, where upstream cuts", config.max_length),
        ("max_position_embeddings", config.max_position_embeddings),
    ];
    let known: Vec<_> = limits.iter().filter_map(|(what, n)| n.map(|n| format!("{n} ({what})"))).collect();
    if !known.is_empty() {
        let _ = writeln!(out, "\nlimits of the model: {}", known.join(", "));
    }
    out
}

/// Draws the sequence to scale on one line or more: `·` for text, digits for images.
///
/// Every segment has at least one cell, so that a marker's neighbours never vanish beside 1225 rows.
fn strip(plan: &SequencePlan, colour: bool) -> String {
    let length = plan.input_ids.len().max(1);
    let mut cells = Vec::new(); // [about STRIP]
    for segment in &plan.segments {
        let image = match segment.kind {
            SegmentKind::Image(i) => Some(i),
            _ => None,
        };
        cells.extend(std::iter::repeat_n(image, (segment.len * STRIP / length).max(1)));
    }
    let mut out = String::new();
    for line in cells.chunks(STRIP + STRIP / 4) {
        for run in line.chunk_by(|a, b| a == b) {
            let glyph = run[0].map_or("·".to_owned(), |i| ((i + 1) % 10).to_string());
            out += &paint(&glyph.repeat(run.len()), run[0], colour);
        }
        out.push('\n');
    }
    out
}

/// Colours a text as image `i`, or as text.
fn paint(text: &str, image: Option<usize>, colour: bool) -> String {
    match image {
        _ if !colour => text.to_owned(),
        None => format!("\x1b[2m{text}\x1b[0m"),
        // Black on green, yellow, blue, magenta, cyan, in turn.
        Some(i) => format!("\x1b[30;{}m{text}\x1b[0m", 42 + i % 5),
    }
}

/// The beginning of a text on one line, and its end if there is more.
fn preview(text: &str) -> String {
    let shown: Vec<char> = text.escape_debug().collect();
    // What escape_debug does to quotes and apostrophes helps nobody here.
    let shown = shown.iter().collect::<String>().replace("\\\"", "\"").replace("\\'", "'");
    let chars: Vec<char> = shown.chars().collect();
    if chars.len() <= PREVIEW {
        return shown;
    }
    let (head, tail) = (&chars[..PREVIEW / 2 - 1], &chars[chars.len() - (PREVIEW / 2 - 2)..]);
    format!("{} … {}", head.iter().collect::<String>(), tail.iter().collect::<String>())
}

/// A layout as JSON: `length`, `hidden_size`, `input_ids`, `slots`, `segments`.
pub fn layout_json(plan: &SequencePlan, config: &ModelConfig, names: &[String]) -> Value {
    let segments: Vec<Value> = plan
        .segments
        .iter()
        .map(|segment| {
            let (begin, end) = (segment.offset, segment.offset + segment.len);
            match segment.kind {
                SegmentKind::Image(i) => {
                    json!({ "kind": "image", "begin": begin, "end": end, "image": i, "name": names.get(i) })
                }
                _ => json!({ "kind": "text", "begin": begin, "end": end, "text": segment.text }),
            }
        })
        .collect();
    let slots: Vec<[usize; 2]> =
        plan.slots.iter().map(|slot| [slot.offset, slot.offset + slot.len]).collect();
    json!({
        "length": plan.input_ids.len(),
        "hidden_size": config.hidden_size,
        "input_ids": plan.input_ids,
        "slots": slots,
        "segments": segments,
    })
}

/// The slots of a finished sequence as JSON, each with the name of its image; `slots` has those of `plan`.
pub fn slots_json(plan: &SequencePlan, slots: &[SlotReport], names: &[String]) -> Value {
    let images = plan.slots.iter().zip(slots).zip(names).map(|((slot, report), name)| {
        let (begin, end) = (slot.offset, slot.offset + slot.len);
        json!({ "name": name, "slot": [begin, end], "mean_norm": report.mean_norm })
    });
    json!(images.collect::<Vec<_>>())
}

/// The time that each step took, in seconds, as JSON.
pub fn timings_json(open: Duration, report: &EncodeReport, write: Duration) -> Value {
    json!({
        "open_s": open.as_secs_f64(),
        "decode_s": report.decode.as_secs_f64(),
        "resize_s": report.resize.as_secs_f64(),
        "encode_s": report.encode.as_secs_f64(),
        "write_s": write.as_secs_f64(),
    })
}

/// Two lines: the time that each step took; the device and the memory. `placed` images came from files of features.
pub fn costs(open: Duration, report: &EncodeReport, placed: usize, write: Duration, device: &str) -> String {
    let mut images = count(report.images_encoded, "image");
    for (n, whence) in [(report.images_cached, "from the cache"), (placed, "from features")] {
        match (n, report.images_encoded) {
            (0, _) => {}
            (n, 0) => images = format!("{} {whence}", count(n, "image")),
            (n, _) => images += &format!(", {n} {whence}"),
        }
    }
    let peak = peak_bytes().map_or(String::new(), |n| format!("; peak memory {}", bytes(n)));
    format!(
        "\nopen {}, decode {}, resize {}, encode {} ({images}), write {}\ndevice: {device}{peak}\n",
        time(open),
        time(report.decode),
        time(report.resize),
        time(report.encode),
        time(write),
    )
}

/// A size for people: `21.4 MB`.
pub fn bytes(n: u64) -> String {
    let scaled = |unit: f64| n as f64 / unit;
    match n {
        0..1_000 => format!("{n} B"),
        1_000..1_000_000 => format!("{:.1} kB", scaled(1e3)),
        1_000_000..1_000_000_000 => format!("{:.1} MB", scaled(1e6)),
        _ => format!("{:.2} GB", scaled(1e9)),
    }
}

/// A duration for people: `1.204 s`, `3.1 ms`.
pub fn time(t: Duration) -> String {
    match t.as_secs_f64() {
        s if s < 0.1 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.3} s"),
    }
}

/// `1 image`, `2 images`.
pub fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// The most memory this process had resident so far, in bytes, where the system says.
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_read_well() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(21_389_312), "21.4 MB");
        assert_eq!(bytes(1_408_419_840), "1.41 GB");
        assert_eq!(time(Duration::from_micros(3140)), "3.1 ms");
        assert_eq!(time(Duration::from_millis(1204)), "1.204 s");
        assert_eq!((count(1, "image"), count(2, "image")), ("1 image".into(), "2 images".into()));
    }

    #[test]
    fn a_preview_stays_on_one_line_and_keeps_both_ends() {
        assert_eq!(preview("a \"b\"\n"), "a \"b\"\\n");
        let long = format!("begin{}end", "x".repeat(200));
        let short = preview(&long);
        assert!(short.starts_with("begin") && short.ends_with("end") && short.chars().count() <= PREVIEW);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_covers_what_was_touched() {
        let touched = vec![1u8; 64 << 20];
        assert!(peak_bytes().unwrap() > touched.iter().filter(|&&x| x == 1).count() as u64);
    }
}
