//! The positions of a sequence as a bar: text and image slots, each as wide as its share, and never too narrow to see.

use super::canvas::{Canvas, Rect, Rgb};
use super::{FAINT, INK, MARKS, PAPER, SIZES, font};

/// The colour of text.
pub const TEXT: Rgb = [208, 213, 222];
/// The least width of a segment, in pixels: room for a number of one or two digits.
const LEAST: f32 = 30.0;
/// Between two segments, in pixels.
const SEAM: f32 = 2.0;
/// The height of the bar, in pixels.
const BAR: f32 = 34.0;
/// From the top of one bar to that of the next, in pixels: bar, two lines of positions, air.
const LINE: f32 = BAR + 52.0;

/// A segment: first position, positions, which image.
pub type Segment = (usize, usize, Option<usize>);

/// The height of a strip of so many segments, in pixels.
pub fn height(segments: usize, room: f32) -> f32 {
    segments.div_ceil(per_line(segments, room)) as f32 * LINE
}

/// Segments on each line: as many lines as are needed, filled alike.
fn per_line(segments: usize, room: f32) -> usize {
    let most = (room / (LEAST + SEAM)).max(1.0) as usize;
    segments.div_ceil(segments.div_ceil(most).max(1)).max(1)
}

/// Draws segments from `(x, y)` on; returns where the strip ends, in pixels from the top.
pub fn draw(canvas: &mut Canvas, segments: &[Segment], (x, y): (f32, f32), room: f32) -> f32 {
    let mut top = y;
    for line in segments.chunks(per_line(segments.len(), room)) {
        let lengths: Vec<usize> = line.iter().map(|segment| segment.1).collect();
        let mut left = x;
        let mut edges = Vec::new(); // a position, and where it is
        for (&(offset, len, image), width) in line.iter().zip(widths(&lengths, room)) {
            let rect =
                Rect { x: left.round(), y: top, w: (left + width).round() - left.round() - SEAM, h: BAR };
            edges.push((offset, rect.x));
            segment(canvas, rect, len, image);
            left += width;
        }
        if let Some(&(offset, len, _)) = line.last() {
            edges.push((offset + len, x + room - SEAM));
        }
        positions(canvas, &edges, top + BAR);
        top += LINE;
    }
    top
}

/// Widths that add up to `room`: to scale, but none below [`LEAST`].
fn widths(lengths: &[usize], room: f32) -> Vec<f32> {
    let least = LEAST + SEAM;
    let mut wide: Vec<bool> = vec![true; lengths.len()];
    loop {
        let narrow = wide.iter().filter(|wide| !**wide).count() as f32;
        let shared: usize = lengths.iter().zip(&wide).filter(|(_, wide)| **wide).map(|(len, _)| len).sum();
        let scale = (room - narrow * least) / shared.max(1) as f32;
        let found = lengths.iter().enumerate().find(|&(i, &len)| wide[i] && len as f32 * scale < least);
        match found {
            Some((i, _)) if wide.iter().filter(|wide| **wide).count() > 1 => wide[i] = false,
            _ => {
                return lengths
                    .iter()
                    .zip(&wide)
                    .map(|(&n, &w)| if w { n as f32 * scale } else { least })
                    .collect();
            }
        }
    }
}

/// One segment, and as much about it as has room.
fn segment(canvas: &mut Canvas, rect: Rect, len: usize, image: Option<usize>) {
    let middle = rect.y + (BAR - SIZES[2]) / 2.0;
    let centred = |canvas: &mut Canvas, colour: Rgb, text: &str| {
        let x = rect.x + (rect.w - font::width(text, SIZES[2])) / 2.0;
        font::write(canvas, (x, middle), SIZES[2], colour, text);
    };
    let (fill, ink, choices) = match image {
        Some(i) => {
            let (number, rows) = (i + 1, if len == 1 { "row" } else { "rows" });
            let all =
                [format!("image {number} · {len} {rows}"), format!("{number} · {len}"), number.to_string()];
            (MARKS[i % MARKS.len()], PAPER, all)
        }
        None => (TEXT, INK, [format!("text {len}"), len.to_string(), String::new()]),
    };
    canvas.fill(rect, 4.0, fill);
    if let Some(text) = choices.iter().find(|text| font::width(text, SIZES[2]) + 8.0 <= rect.w) {
        centred(canvas, ink, text);
    }
}

/// Writes positions under their edges, on two lines where they are close; one that has no room on either is left out.
fn positions(canvas: &mut Canvas, edges: &[(usize, f32)], top: f32) {
    let mut free = [f32::MIN; 2];
    let last = edges.len().saturating_sub(1);
    for (i, &(position, x)) in edges.iter().enumerate() {
        let text = position.to_string();
        let width = font::width(&text, SIZES[2]);
        // The first begins at its edge, the last ends there.
        let left = match i {
            0 => x,
            i if i == last => x - width,
            _ => x - SEAM / 2.0 - width / 2.0,
        };
        let Some(line) = (0..2).find(|&line| free[line] < left) else { continue };
        let y = top + 9.0 + line as f32 * 17.0;
        let tick = Rect { x: x.min(x - SEAM * (i > 0) as u8 as f32), y: top + 3.0, w: 1.0, h: y - top - 6.0 };
        canvas.fill(tick, 0.0, TEXT);
        font::write(canvas, (left, y), SIZES[2], FAINT, &text);
        free[line] = left + width + 8.0;
        if line == 1 {
            // Its tick goes through the first line.
            free[0] = free[0].max(x + 4.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_to_scale_and_never_too_narrow() {
        let found = widths(&[142, 1225, 7, 1225, 9], 880.0);
        assert!((found.iter().sum::<f32>() - 880.0).abs() < 0.01, "{found:?}");
        assert_eq!((found[2], found[4]), (LEAST + SEAM, LEAST + SEAM));
        assert!((found[1] / found[0] - 1225.0 / 142.0).abs() < 0.01 && found[1] == found[3]);
        assert_eq!(widths(&[1], 100.0), [100.0]);
        assert_eq!(widths(&[], 100.0), [0.0; 0]);
        // Where all are narrow, the last one takes what is left.
        assert!((widths(&[1; 4], 128.0).iter().sum::<f32>() - 128.0).abs() < 0.01);
    }

    #[test]
    fn many_segments_take_several_lines_filled_alike() {
        let lines = |segments| (height(segments, 884.0) / LINE) as usize;
        assert_eq!([0, 1, 27, 28, 55, 401].map(lines), [0, 1, 1, 2, 3, 15]);
        assert_eq!([per_line(28, 884.0), per_line(55, 884.0)], [14, 19]);
        let mut canvas = Canvas::new(940, 1400, PAPER);
        let segments: Vec<Segment> = (0..401).map(|i| (i * 3, 3, (i % 2 == 1).then_some(i / 2))).collect();
        assert_eq!(draw(&mut canvas, &segments, (28.0, 10.0), 884.0), 10.0 + height(401, 884.0));
    }
}
