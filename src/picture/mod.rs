//! A sequence as a picture for people: each image beside a map of its features, over the layout of all positions.
//!
//! ```text
//!   2608 positions = 2450 in 2 images + 158 of text
//!   ┌────────┬────────┐  ┌────────┬────────┐
//!   │ pixels │  map   │  │ pixels │  map   │     a square of the map is a row of the sequence: a patch of the image
//!   └────────┴────────┘  └────────┴────────┘
//!    1  before.jpg        2  after.jpg
//!   ▒▒▒▒▒ 1 ████████████▒▒▒ 2 ██████████████▒   the positions, to scale but for a least width
//!   0    142           1367                2608
//! ```
//!
//! | file | what it knows |
//! |---|---|
//! | `maps` | features to colours |
//! | `strip` | where the positions go |
//! | `canvas`, `font` | rectangles and strokes; letters made of these |

use half::f16;

use crate::error::{Error, Result};
use crate::image::{Resample, RgbImage, resize};
use crate::prompt::{SegmentKind, SequencePlan, Slot};

mod canvas;
mod font;
mod maps;
mod strip;

use canvas::{Canvas, Rect, Rgb};

const PAPER: Rgb = [255, 255, 255];
const INK: Rgb = [31, 36, 48];
const FAINT: Rgb = [107, 114, 128];
const HOLLOW: Rgb = [236, 238, 242]; // where there is nothing to show
/// What images are marked with, in turn.
const MARKS: [Rgb; 6] =
    [[37, 99, 200], [214, 105, 20], [22, 140, 96], [170, 62, 140], [128, 96, 24], [20, 132, 160]];

/// Around everything, and between cards, in pixels.
const MARGIN: f32 = 28.0;
/// Between an image and its map, in pixels.
const SEAM: f32 = 6.0;
/// Below an image and its map: badge, name, rows.
const CAPTION: f32 = 56.0;
/// Capitals of the head line, of names, of all else, in pixels.
const SIZES: [f32; 3] = [14.0, 12.0, 10.0];

/// How an image's features become colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Map {
    /// The first three principal components of the image's rows, as red, green and blue.
    #[default]
    Components,
    /// The norm of each row, from dark to bright.
    Norm,
}

/// What a picture shows.
#[derive(Clone, Copy, Debug)]
pub struct PictureRecord<'a> {
    /// The plan that was encoded.
    pub plan: &'a SequencePlan,
    /// The encoded sequence, row-major, shape `[L, H]`.
    pub inputs_embeds: &'a [f16],
    /// **H**, in elements.
    pub hidden: usize,
    /// Patches per side of an image.
    pub grid: usize,
    /// What the images are called; `[N]`, empty where nothing is known.
    pub names: &'a [String],
    /// The squares that the tower saw; `[N]`, or empty where there are none: then the maps stand alone.
    pub pixels: &'a [RgbImage],
    /// What the maps show.
    pub map: Map,
}

/// Draws a sequence; the same record makes the same pixels.
///
/// At least 940 pixels wide; up to four images stand in rows of two, up to nine in rows of three, more in rows of four.
/// A cut image's map shows the rows that it has.
///
/// # Errors
/// [`Error::Argument`] if the parts of the record do not fit one another; the message says which.
pub fn draw(record: &PictureRecord<'_>) -> Result<RgbImage> {
    check(record)?;
    let sheet = Sheet::new(record);
    let mut canvas = Canvas::new(sheet.width as u32, sheet.height as u32, PAPER);
    let mut y = MARGIN;
    font::write(&mut canvas, (MARGIN, y), SIZES[0], INK, &head(record));
    y += SIZES[0] + 22.0;
    for (i, slot) in record.plan.slots.iter().enumerate() {
        let (row, column) = ((i / sheet.columns) as f32, (i % sheet.columns) as f32);
        let at = (MARGIN + column * (sheet.card + MARGIN), y + row * (sheet.side as f32 + CAPTION));
        card(&mut canvas, record, &sheet, i, *slot, at);
    }
    y += sheet.rows as f32 * (sheet.side as f32 + CAPTION);
    let segments: Vec<_> = record.plan.segments.iter().map(|s| (s.offset, s.len, image_of(s.kind))).collect();
    y = strip::draw(&mut canvas, &segments, (MARGIN, y), sheet.width - 2.0 * MARGIN);
    legend(&mut canvas, record, (MARGIN, y), sheet.width - 2.0 * MARGIN);
    Ok(canvas.into_image())
}

/// The sizes of everything, in pixels.
struct Sheet {
    width: f32,
    height: f32,
    side: usize, // of an image, and of its map: whole pixels to a patch
    card: f32,
    columns: usize,
    rows: usize,
}

impl Sheet {
    fn new(record: &PictureRecord<'_>) -> Self {
        let images = record.plan.slots.len();
        let squares = if record.pixels.is_empty() { 1 } else { 2 };
        let (columns, about) = match (images, squares) {
            (0 | 1, _) => (1, 432),
            (2..=4, 1) => (2, 432),
            (2..=4, _) => (2, 216),
            (5..=9, _) => (3, 216),
            _ => (4, 216),
        };
        let side = record.grid * (about / record.grid).max(1);
        let card = (squares * side) as f32 + (squares - 1) as f32 * SEAM;
        let rows = images.div_ceil(columns);
        let width = (columns as f32 * (card + MARGIN) + MARGIN).max(940.0).ceil();
        let room = width - 2.0 * MARGIN;
        let below = strip::height(record.plan.segments.len(), room) + SIZES[2] + MARGIN;
        let height = MARGIN + SIZES[0] + 22.0 + rows as f32 * (side as f32 + CAPTION) + below;
        Self { width, height: height.ceil(), side, card, columns, rows }
    }
}

/// One image, its map, and what is to be said about them.
fn card(
    canvas: &mut Canvas,
    record: &PictureRecord<'_>,
    sheet: &Sheet,
    i: usize,
    slot: Slot,
    (x, y): (f32, f32),
) {
    let side = sheet.side as u32;
    let mut left = x;
    if let Some(pixels) = record.pixels.get(i) {
        let seen = resize::resize(pixels.view(), side, side, Resample::Pillow);
        canvas.paste(left as u32, y as u32, seen.view());
        left += side as f32 + SEAM;
    }
    let rows = &record.inputs_embeds[slot.offset * record.hidden..][..slot.len * record.hidden];
    let (colours, about) = match record.map {
        _ if slot.len == 0 => (vec![], "cut off".to_owned()),
        Map::Components => {
            let found = maps::components(rows, record.hidden);
            let share = format!("{:.0} % of the variance", 100.0 * found.share);
            (maps::component_colours(&found), share)
        }
        Map::Norm => {
            let norms = maps::norms(rows, record.hidden);
            let (least, most) =
                norms.iter().fold((f64::MAX, 0f64), |(least, most), &n| (least.min(n), most.max(n)));
            (maps::norm_colours(&norms), format!("norm {least:.1} … {most:.1}"))
        }
    };
    let map = enlarge(&colours, record.grid, sheet.side);
    canvas.paste(left as u32, y as u32, map.view());

    let (line, mark) = (y + side as f32 + 12.0, MARKS[i % MARKS.len()]);
    let number = (i + 1).to_string();
    let badge = Rect { x, y: line, w: font::width(&number, SIZES[1]) + 14.0, h: SIZES[1] + 10.0 };
    canvas.fill(badge, 4.0, mark);
    font::write(canvas, (x + 7.0, line + 5.0), SIZES[1], PAPER, &number);
    let after = x + badge.w + 10.0;
    let end = x + sheet.card;
    let right = font::width(&about, SIZES[2]);
    font::write(canvas, (end - right, line + 6.0), SIZES[2], FAINT, &about);
    let positions = match slot.len {
        0 => String::new(),
        len => format!("{} - {}", slot.offset, slot.offset + len),
    };
    let name = record.names.get(i).map_or("", String::as_str);
    // The name gets what the numbers leave; the positions go where both have room.
    let name = font::fit(name, SIZES[1], end - after - right - 16.0);
    font::write(canvas, (after, line + 5.0), SIZES[1], INK, &name);
    let used = after + font::width(&name, SIZES[1]) + 14.0;
    if used + font::width(&positions, SIZES[2]) + 16.0 < end - right {
        font::write(canvas, (used, line + 6.0), SIZES[2], FAINT, &positions);
    }
}

/// Makes squares of patches, row by row, `side` pixels in all; hollow where there is none.
fn enlarge(colours: &[Rgb], grid: usize, side: usize) -> RgbImage {
    let cell = side / grid;
    let colour = |x: usize, y: usize| colours.get(y / cell * grid + x / cell).copied().unwrap_or(HOLLOW);
    let data = (0..side).flat_map(|y| (0..side).flat_map(move |x| colour(x, y))).collect();
    RgbImage { width: side as u32, height: side as u32, data }
}

/// What the colours mean.
fn legend(canvas: &mut Canvas, record: &PictureRecord<'_>, (x, y): (f32, f32), room: f32) {
    let size = SIZES[2];
    let mut pen = x;
    let mut item = |canvas: &mut Canvas, colours: &[Rgb], text: &str| {
        let swatch = if colours.len() > 3 { 8.0 } else { 12.0 };
        let taken = colours.len() as f32 * swatch + 8.0 + font::width(text, size);
        if pen + taken > x + room {
            return;
        }
        for (i, &colour) in colours.iter().enumerate() {
            let at = Rect { x: pen + i as f32 * swatch, y: y - 1.0, w: swatch, h: 12.0 };
            canvas.fill(at, 0.0, colour);
        }
        font::write(canvas, (pen + colours.len() as f32 * swatch + 8.0, y), size, FAINT, text);
        pen += taken + 26.0;
    };
    item(canvas, &[strip::TEXT], "text");
    let slots = record.plan.slots.len();
    if slots == 0 {
        return;
    }
    item(canvas, &MARKS[..slots.min(3)], "image slots");
    match record.map {
        Map::Components => {
            let channels = [[224, 72, 72], [72, 184, 88], [76, 104, 232]];
            item(canvas, &channels, "an image's first three principal components, a patch each square");
        }
        Map::Norm => {
            let ramp: Vec<Rgb> = (0..9).map(|i| maps::heat(f64::from(i) / 8.0)).collect();
            item(canvas, &ramp, "the norm of each row, from an image's least to its greatest");
        }
    }
}

/// The line above all.
fn head(record: &PictureRecord<'_>) -> String {
    let images = record.plan.slots.len();
    let (length, rows) = (record.plan.len(), record.plan.slots.iter().map(|slot| slot.len).sum::<usize>());
    let plural = if images == 1 { "" } else { "s" };
    let (text, hidden) = (length - rows, record.hidden);
    let kept = if images > 0 && record.pixels.is_empty() {
        "   ·   from kept features, without pixels"
    } else {
        ""
    };
    format!(
        "{length} positions = {rows} in {images} image{plural} + {text} of text   ·   fp16 [{length}, {hidden}]{kept}"
    )
}

fn image_of(kind: SegmentKind) -> Option<usize> {
    match kind {
        SegmentKind::Image(i) => Some(i),
        _ => None,
    }
}

/// Checks that the parts of a record fit one another.
fn check(record: &PictureRecord<'_>) -> Result<()> {
    let PictureRecord { plan, inputs_embeds, hidden, grid, names, pixels, .. } = *record;
    let images = plan.slots.len();
    let remedy = "Give the plan, the rows and the images of one encode";
    let refuse = |problem| Err(Error::Argument { problem, remedy: remedy.to_owned() });
    plan.check().or_else(refuse)?;
    if hidden == 0 || inputs_embeds.len() != plan.len() * hidden {
        return refuse(format!(
            "a sequence of {} elements for a plan of {} positions of {hidden}",
            inputs_embeds.len(),
            plan.len()
        ));
    }
    for (what, count) in [("names", names.len()), ("squares of pixels", pixels.len())] {
        if count != 0 && count != images {
            return refuse(format!("{count} {what} for {images} images"));
        }
    }
    let most = plan.slots.iter().map(|slot| slot.len).max().unwrap_or(0);
    if grid == 0 || grid > 2048 || most > grid * grid {
        return refuse(format!("a slot of {most} rows for images of {grid}×{grid} patches"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
