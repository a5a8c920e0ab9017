//! Letters as strokes: a small typeface of this project's own, drawn at any size with smooth edges.
//!
//! ```text
//!   14 ┤ capitals, ascenders        a stroke is a run of points `x,y`; a point alone, twice, is a dot
//!   10 ┤ lower case                 after `~` the points are corners that a curve rounds: from the first point, touching
//!    0 ┼ baseline                   the middle of every side, to the last
//!   -4 ┤ descenders
//! ```

use super::canvas::{Canvas, Rgb};

/// The height of capitals, in units.
const CAPITAL: f32 = 14.0;
/// The room between two letters, in units; strokes are as thick as half of it.
const GAP: f32 = 4.2;
/// Half the thickness of a stroke, in units.
const RADIUS: f32 = 1.0;
/// The room of a space, in units.
const SPACE: f32 = 4.0;

/// A letter that is not here: an empty box.
const UNKNOWN: &str = "0,0 7,0 7,13 0,13 0,0";

/// The printable characters of ASCII, from the space on.
const GLYPHS: [&str; 95] = [
    "",                                                                             // space
    "1,14 1,5|1,0 1,0",                                                             // !
    "0,14 0,10|4,14 4,10",                                                          // "
    "2,0 4,14|7,0 9,14|0,5 10,5|1,9 11,9",                                          // #
    "~9,11 8,13 5,13 0,13 0,7 5,7 10,7 10,1 5,1 1,1 0,3|5,15 5,-1",                 // $
    "1,0 10,14|~2,14 0,14 0,9 4,9 4,14 2,14|~9,5 7,5 7,0 11,0 11,5 9,5",            // %
    "~10,7 9,0 4,0 0,0 0,5 3,7 7,9 7,14 4,14 1,14 1,10 4,7 10,0",                   // &
    "0,14 0,10",                                                                    // '
    "~3,16 0,12 0,1 3,-3",                                                          // (
    "~0,16 3,12 3,1 0,-3",                                                          // )
    "4,13 4,6|1,11 7,8|7,11 1,8",                                                   // *
    "4,10 4,2|0,6 8,6",                                                             // +
    "1,1 0,-3",                                                                     // ,
    "0,5 5,5",                                                                      // -
    "0,0 0,0",                                                                      // .
    "0,-2 6,15",                                                                    // /
    "~4,14 0,14 0,7 0,0 8,0 8,7 8,14 4,14",                                         // 0
    "1,11 4,14 4,0",                                                                // 1
    "~0,11 0,14 4,14 8,14 8,9 6,6 0,0|0,0 8,0",                                     // 2
    "~0,12 1,14 4,14 8,14 8,8 4,8 3,8|~3,8 4,8 8,8 8,0 4,0 1,0 0,2",                // 3
    "6,0 6,14 0,4 9,4",                                                             // 4
    "8,14 1,14 0,8|~0,8 2,9 4,9 8,9 8,0 4,0 1,0 0,2",                               // 5
    "~7,13 5,14 4,14 0,14 0,6 0,4|~4,9 0,9 0,0 8,0 8,9 4,9",                        // 6
    "0,14 8,14 3,0",                                                                // 7
    "~4,14 1,14 1,8 7,8 7,14 4,14|~4,8 0,8 0,0 8,0 8,8 4,8",                        // 8
    "~4,14 0,14 0,5 8,5 8,14 4,14|~8,10 8,8 8,0 4,0 3,0 1,1",                       // 9
    "0,9 0,9|0,1 0,1",                                                              // :
    "1,9 1,9|1,1 0,-3",                                                             // ;
    "7,11 0,6 7,1",                                                                 // <
    "0,8 8,8|0,4 8,4",                                                              // =
    "0,11 7,6 0,1",                                                                 // >
    "~0,11 0,14 4,14 8,14 8,9 4,8 4,4|4,0 4,0",                                     // ?
    "~9,7 9,10 4,10 4,4 9,4 9,7|~9,9 9,4 13,4 13,14 0,14 0,-2 9,-2 11,-1",          // @
    "0,0 5,14 10,0|2,5 8,5",                                                        // A
    "4,8 0,8 0,14 4,14|0,8 0,0 4,0|~4,14 9,14 9,8 4,8|~4,8 10,8 10,0 4,0",          // B
    "~9,11 8,14 5,14 0,14 0,7 0,0 5,0 8,0 9,3",                                     // C
    "4,14 0,14 0,0 4,0|~4,14 10,14 10,7 10,0 4,0",                                  // D
    "8,14 0,14 0,0 8,0|0,7 7,7",                                                    // E
    "8,14 0,14 0,0|0,7 7,7",                                                        // F
    "~9,11 8,14 5,14 0,14 0,7 0,0 5,0 9,0 10,4 10,6|10,6 6,6",                      // G
    "0,0 0,14|9,0 9,14|0,7 9,7",                                                    // H
    "0,0 0,14",                                                                     // I
    "~6,14 6,7 6,0 3,0 0,0 0,3",                                                    // J
    "0,0 0,14|9,14 0,5|3,8 9,0",                                                    // K
    "0,14 0,0 7,0",                                                                 // L
    "0,0 0,14 6,4 12,14 12,0",                                                      // M
    "0,0 0,14 9,0 9,14",                                                            // N
    "~5,14 0,14 0,7 0,0 10,0 10,7 10,14 5,14",                                      // O
    "0,0 0,14 4,14|~4,14 9,14 9,7 4,7|4,7 0,7",                                     // P
    "~5,14 0,14 0,7 0,0 10,0 10,7 10,14 5,14|6,4 10,-1",                            // Q
    "0,0 0,14 4,14|~4,14 9,14 9,7 4,7|4,7 0,7|5,7 9,0",                             // R
    "~9,12 8,14 5,14 0,14 0,7 5,7 10,7 10,0 5,0 1,0 0,3",                           // S
    "0,14 10,14|5,14 5,0",                                                          // T
    "~0,14 0,7 0,0 9,0 9,7 9,14",                                                   // U
    "0,14 5,0 10,14",                                                               // V
    "0,14 3,0 7,11 11,0 14,14",                                                     // W
    "0,0 9,14|0,14 9,0",                                                            // X
    "0,14 5,7 10,14|5,7 5,0",                                                       // Y
    "0,14 9,14 0,0 9,0",                                                            // Z
    "3,16 0,16 0,-3 3,-3",                                                          // [
    "0,15 6,-2",                                                                    // \
    "0,16 3,16 3,-3 0,-3",                                                          // ]
    "0,9 4,14 8,9",                                                                 // ^
    "0,-2 8,-2",                                                                    // _
    "0,14 3,12",                                                                    // `
    "~1,8 2,10 4,10 8,10 8,6|8,6 8,0|~8,6 5,6 4,6 0,6 0,0 4,0 7,0 8,3",             // a
    "0,14 0,0|~4,10 0,10 0,0 8,0 8,10 4,10",                                        // b
    "~7,8 6,10 4,10 0,10 0,0 4,0 6,0 7,2",                                          // c
    "8,14 8,0|~4,10 0,10 0,0 8,0 8,10 4,10",                                        // d
    "0,5 8,5|~8,5 8,10 4,10 0,10 0,0 4,0 7,0 8,2",                                  // e
    "~6,14 2,14 2,10|2,10 2,0|0,10 5,10",                                           // f
    "~4,10 0,10 0,0 8,0 8,10 4,10|~8,10 8,0 8,-4 4,-4 1,-4 0,-2",                   // g
    "0,14 0,0|~0,6 0,10 4,10 8,10 8,6|8,6 8,0",                                     // h
    "0,10 0,0|0,14 0,14",                                                           // i
    "3,10 3,-1|~3,-1 3,-4 0,-4|3,14 3,14",                                          // j
    "0,14 0,0|7,10 0,4|3,6 7,0",                                                    // k
    "0,14 0,0",                                                                     // l
    "0,10 0,0|~0,6 0,10 3,10 6,10 6,6|6,6 6,0|~6,6 6,10 9,10 12,10 12,6|12,6 12,0", // m
    "0,10 0,0|~0,6 0,10 4,10 8,10 8,6|8,6 8,0",                                     // n
    "~4,10 0,10 0,0 8,0 8,10 4,10",                                                 // o
    "0,10 0,-4|~4,10 0,10 0,0 8,0 8,10 4,10",                                       // p
    "8,10 8,-4|~4,10 0,10 0,0 8,0 8,10 4,10",                                       // q
    "0,10 0,0|~0,6 0,10 3,10 5,10",                                                 // r
    "~7,8 6,10 4,10 0,10 0,5 4,5 8,5 8,0 4,0 1,0 0,2",                              // s
    "2,13 2,3|~2,3 2,0 5,0|0,10 5,10",                                              // t
    "~0,10 0,5 0,0 4,0 8,0 8,4|8,10 8,0",                                           // u
    "0,10 4,0 8,10",                                                                // v
    "0,10 3,0 6,8 9,0 12,10",                                                       // w
    "0,10 7,0|7,10 0,0",                                                            // x
    "0,10 4,0|~8,10 4,0 2,-4 0,-4",                                                 // y
    "0,10 7,10 0,0 7,0",                                                            // z
    "~4,16 1,16 2,12 2,9 0,6|~0,6 2,4 2,0 1,-3 4,-3",                               // {
    "0,16 0,-3",                                                                    // |
    "~0,16 3,16 2,12 2,9 4,6|~4,6 2,4 2,0 3,-3 0,-3",                               // }
    "~0,5 1,8 4,8 6,4 8,4 9,7",                                                     // ~
];

/// The strokes of a character.
fn strokes(c: char) -> &'static str {
    match c {
        '×' => "1,9 7,3|1,3 7,9",
        '·' => "1,6 1,6",
        '…' => "0,0 0,0|4,0 4,0|8,0 8,0",
        _ => (c as usize).checked_sub(32).and_then(|i| GLYPHS.get(i)).unwrap_or(&UNKNOWN),
    }
}

/// A straight piece of a stroke, in units.
type Piece = [(f32, f32); 2];

/// Takes a glyph apart into straight pieces.
fn pieces(strokes: &str) -> Vec<Piece> {
    let mut all = Vec::new();
    for stroke in strokes.split('|').filter(|stroke| !stroke.is_empty()) {
        let (curved, points) = stroke.strip_prefix('~').map_or((false, stroke), |points| (true, points));
        let corners: Vec<(f32, f32)> = points
            .split(' ')
            .filter_map(|point| point.split_once(','))
            .filter_map(|(x, y)| Some((x.parse().ok()?, y.parse().ok()?)))
            .collect();
        let line = if curved { rounded(&corners) } else { corners };
        all.extend(line.windows(2).map(|pair| [pair[0], pair[1]]));
    }
    all
}

/// Points along the curve that `corners` describe.
fn rounded(corners: &[(f32, f32)]) -> Vec<(f32, f32)> {
    let (Some(&first), Some(&last)) = (corners.first(), corners.last()) else { return Vec::new() };
    let (mut line, mut from) = (vec![first], first);
    for i in 1..corners.len().saturating_sub(1) {
        let (corner, next) = (corners[i], corners[i + 1]);
        let is_end = i + 2 == corners.len();
        let to = if is_end { last } else { ((corner.0 + next.0) / 2.0, (corner.1 + next.1) / 2.0) };
        for step in 1..=6 {
            let t = step as f32 / 6.0;
            let mix =
                |a: f32, b: f32, c: f32| (1.0 - t) * ((1.0 - t) * a + t * b) + t * ((1.0 - t) * b + t * c);
            line.push((mix(from.0, corner.0, to.0), mix(from.1, corner.1, to.1)));
        }
        from = to;
    }
    line
}

/// The room that a glyph takes, in units.
fn advance(pieces: &[Piece]) -> f32 {
    pieces.iter().flatten().map(|point| point.0).fold(if pieces.is_empty() { SPACE } else { 0.0 }, f32::max)
        + GAP
}

/// Returns the width of a text whose capitals are `size` pixels high, in pixels.
pub fn width(text: &str, size: f32) -> f32 {
    let units: f32 = text.chars().map(|c| advance(&pieces(strokes(c)))).sum();
    (units - GAP + 2.0 * RADIUS).max(0.0) * size / CAPITAL
}

/// Writes a text from `x` on, capitals between `top` and `top + size` pixels.
pub fn write(canvas: &mut Canvas, (x, top): (f32, f32), size: f32, colour: Rgb, text: &str) {
    let unit = size / CAPITAL;
    let (mut pen, baseline) = (x + RADIUS * unit, top + size);
    for c in text.chars() {
        let pieces = pieces(strokes(c));
        let room = advance(&pieces) * unit;
        let placed = |(px, py): (f32, f32)| (pen + px * unit, baseline - py * unit);
        let lines: Vec<Piece> = pieces.iter().map(|&[a, b]| [placed(a), placed(b)]).collect();
        canvas.strokes(&lines, (RADIUS * unit).max(0.6), colour);
        pen += room;
    }
}

/// Shortens a text in the middle until it is at most `room` pixels wide.
pub fn fit(text: &str, size: f32, room: f32) -> String {
    if width(text, size) <= room {
        return text.to_owned();
    }
    let chars: Vec<char> = text.chars().collect();
    // The end says more than the beginning: it has a file's name.
    let shortened = |keep: usize| {
        let (head, tail) = (keep / 3, keep - keep / 3);
        let (head, tail) = (&chars[..head], &chars[chars.len() - tail..]);
        head.iter().chain(&['…']).chain(tail).collect::<String>()
    };
    let kept = (1..chars.len()).rev().map(shortened).find(|text| width(text, size) <= room);
    kept.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_has_its_own_strokes_inside_its_box() {
        let mut seen = std::collections::HashSet::new();
        for c in (' '..='~').chain("×·…".chars()) {
            let found = pieces(strokes(c));
            assert_eq!(found.is_empty(), c == ' ', "{c:?}");
            for &(x, y) in found.iter().flatten() {
                assert!((0.0..=14.0).contains(&x) && (-4.0..=16.0).contains(&y), "{c:?} has {x},{y}");
            }
            // l, I and | differ in their height alone, and l and I not even in that, as in much that is printed.
            assert!(seen.insert(strokes(c)) || c == 'l', "{c:?} looks like another");
        }
        assert_eq!(strokes('界'), UNKNOWN);
    }

    #[test]
    fn a_curve_begins_and_ends_where_it_says_and_touches_its_sides() {
        let line = rounded(&[(4.0, 10.0), (0.0, 10.0), (0.0, 0.0), (8.0, 0.0), (8.0, 10.0), (4.0, 10.0)]);
        assert_eq!((line[0], line[line.len() - 1]), ((4.0, 10.0), (4.0, 10.0)));
        for touched in [(0.0, 5.0), (4.0, 0.0), (8.0, 5.0)] {
            assert!(line.contains(&touched), "{line:?}");
        }
    }

    #[test]
    fn what_is_too_long_is_shortened_and_keeps_its_end() {
        assert_eq!(fit("a.png", 10.0, 500.0), "a.png");
        let short = fit("a/very/long/way/to/the/picture.png", 10.0, 120.0);
        assert!(short.contains('…') && short.ends_with(".png") && width(&short, 10.0) <= 120.0, "{short}");
        assert_eq!(fit("wide", 10.0, 1.0), "");
        assert!(width("wider", 10.0) > width("wide", 10.0));
        assert_eq!(width("", 10.0), 0.0);
    }
}
