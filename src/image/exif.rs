//! The tags of TIFF, which EXIF borrows, and the one of them that turns a picture.

use super::raster::Picture;
use super::room::{PixelMemory, Room};

/// The tags of the first directory of a TIFF file or an EXIF block.
///
/// Values are looked up when asked for; an entry that points outside the bytes is as if it were not there.
#[derive(Debug)]
pub(super) struct Tags<'a> {
    data: &'a [u8],
    little_endian: bool,
    entries: Vec<Entry>,
    whole: bool,
}

/// One tag: `count` values of type `kind` at byte `at`.
#[derive(Clone, Copy, Debug)]
struct Entry {
    tag: u16,
    kind: u16,
    count: usize,
    at: usize,
}

impl<'a> Tags<'a> {
    /// Reads the directory; `None` if the bytes have no TIFF header or none is where it says.
    pub fn parse(data: &'a [u8]) -> Option<Self> {
        let (little_endian, big) = match data.get(..4)? {
            // the two middle ones are wrong and met in the wild
            b"II\x2a\x00" | b"II\x00\x2a" => (true, false),
            b"MM\x00\x2a" | b"MM\x2a\x00" => (false, false),
            b"II\x2b\x00" => (true, true),
            b"MM\x00\x2b" => (false, true),
            _ => return None,
        };
        let mut tags = Self { data, little_endian, entries: Vec::new(), whole: false };
        // BigTIFF: 8-byte offsets and counts, 20-byte entries; else 4-byte ones and 12
        let (mut at, number, entry, inline) =
            if big { (tags.unsigned(8, 8)?, 8, 20, 12) } else { (tags.unsigned(4, 4)?, 2, 12, 8) };
        let entries = tags.unsigned(usize::try_from(at).ok()?, number)?;
        at = at.checked_add(number as u64)?;
        let end = entries.checked_mul(entry).and_then(|len| at.checked_add(len));
        tags.whole = end.is_some_and(|end| end <= data.len() as u64);
        for i in 0..entries.min(data.len() as u64 / entry) {
            let Some(at) = at.checked_add(i * entry).and_then(|at| usize::try_from(at).ok()) else { break };
            let width = if big { 8 } else { 4 };
            let (Some(tag), Some(kind), Some(count)) =
                (tags.unsigned(at, 2), tags.unsigned(at + 2, 2), tags.unsigned(at + 4, width))
            else {
                break;
            };
            let Some(bytes) =
                size_of_kind(kind as u16).checked_mul(usize::try_from(count).unwrap_or(usize::MAX))
            else {
                continue;
            };
            let value =
                if bytes <= width { Some((at + inline) as u64) } else { tags.unsigned(at + inline, width) };
            let Some(value) = value.and_then(|value| usize::try_from(value).ok()) else { continue };
            if value.checked_add(bytes).is_some_and(|end| end <= data.len()) {
                tags.entries.push(Entry {
                    tag: tag as u16,
                    kind: kind as u16,
                    count: count as usize,
                    at: value,
                });
            } else if TIFF_TAGS.contains(&tag) && kind != TEXT {
                tags.whole = false;
            }
        }
        Some(tags)
    }

    /// Whether the directory is there to its last entry, and every value of TIFF's own tags, texts aside.
    pub fn whole(&self) -> bool {
        self.whole
    }

    /// Whether numbers are stored least significant byte first.
    pub fn little_endian(&self) -> bool {
        self.little_endian
    }

    /// Returns every value of an integer tag; `None` if it is absent or no integer.
    pub fn integers(&self, tag: u16) -> Option<Vec<u64>> {
        let entry = self.entries.iter().find(|entry| entry.tag == tag)?;
        let bytes = match entry.kind {
            1 | 3 | 4 | 7 | 13 | 16 | 18 => size_of_kind(entry.kind),
            _ => return None,
        };
        (0..entry.count).map(|i| self.unsigned(entry.at + i * bytes, bytes)).collect()
    }

    /// Returns the first value of an integer tag.
    pub fn integer(&self, tag: u16) -> Option<u64> {
        self.integers(tag)?.first().copied()
    }

    /// Returns the bytes of a tag.
    pub fn bytes(&self, tag: u16) -> Option<&'a [u8]> {
        let entry = self.entries.iter().find(|entry| entry.tag == tag)?;
        self.data.get(entry.at..entry.at + entry.count * size_of_kind(entry.kind))
    }

    /// Reads a number of `bytes` bytes.
    fn unsigned(&self, at: usize, bytes: usize) -> Option<u64> {
        let field = self.data.get(at..at.checked_add(bytes)?)?;
        let push = |number: u64, &byte: &u8| number << 8 | u64::from(byte);
        Some(match self.little_endian {
            true => field.iter().rev().fold(0, push),
            false => field.iter().fold(0, push),
        })
    }
}

/// The tags of TIFF 6.0, on which pixels may depend.
const TIFF_TAGS: std::ops::RangeInclusive<u64> = 254..=532;
/// The field type of text.
const TEXT: u64 = 2;

/// Bytes of one value of a TIFF field type; 0 for types that nobody defined.
fn size_of_kind(kind: u16) -> usize {
    match kind {
        1 | 2 | 6 | 7 => 1,
        3 | 8 => 2,
        4 | 9 | 11 | 13 => 4,
        5 | 10 | 12 | 16 | 17 | 18 => 8,
        _ => 0,
    }
}

/// The tag 274 of TIFF and EXIF.
pub(super) const ORIENTATION: u16 = 274;

/// How the stored pixels become the picture: EXIF's numbers, 1 to 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Orientation(u8);

impl Default for Orientation {
    fn default() -> Self {
        Self(1)
    }
}

impl Orientation {
    /// Takes EXIF's number; whatever is not 2 to 8 changes nothing.
    pub fn new(number: u64) -> Self {
        Self(if (2..=8).contains(&number) { number as u8 } else { 1 })
    }

    /// Finds the orientation in an EXIF block, with or without its `Exif\0\0`.
    pub fn from_exif(block: &[u8]) -> Self {
        let block = block.strip_prefix(b"Exif\0\0").unwrap_or(block);
        let number = Tags::parse(block).and_then(|tags| tags.integer(ORIENTATION));
        Self::new(number.unwrap_or(1))
    }

    /// EXIF's number.
    pub fn number(self) -> u8 {
        self.0
    }

    /// What has to be done, in words.
    pub fn verb(self) -> &'static str {
        match self.0 {
            2 => "mirrored left to right",
            3 => "rotated by 180 degrees",
            4 => "mirrored top to bottom",
            5 => "mirrored along its main diagonal",
            6 => "rotated by 90 degrees clockwise",
            7 => "mirrored along its other diagonal",
            8 => "rotated by 90 degrees counterclockwise",
            _ => "left as it is",
        }
    }

    /// Turns an image, into memory from `room`.
    pub fn apply(self, image: Picture, room: &dyn Room) -> Picture {
        let (w, h) = (image.width as usize, image.height as usize);
        // where output pixel (x, y) comes from
        let from = |x: usize, y: usize| match self.0 {
            2 => (w - 1 - x, y),
            3 => (w - 1 - x, h - 1 - y),
            4 => (x, h - 1 - y),
            5 => (y, x),
            6 => (y, h - 1 - x),
            7 => (w - 1 - y, h - 1 - x),
            8 => (w - 1 - y, x),
            _ => (x, y),
        };
        match self.0 {
            2..=4 => permute(&image, w, h, room, from),
            5..=8 => permute(&image, h, w, room, from),
            _ => image,
        }
    }
}

/// Gathers `out_w` × `out_h` pixels in squares, so that a transposition stays within the cache.
fn permute(
    image: &Picture,
    out_w: usize,
    out_h: usize,
    room: &dyn Room,
    from: impl Fn(usize, usize) -> (usize, usize),
) -> Picture {
    const SQUARE: usize = 32; // 32 rows of 96 bytes: 3 KB on either side
    let width = image.width as usize;
    let mut memory = PixelMemory::new(room, image.data.len());
    let (stored, data) = (&*image.data, &mut *memory); // [h, w, 3], [out_h, out_w, 3]
    for top in (0..out_h).step_by(SQUARE) {
        for left in (0..out_w).step_by(SQUARE) {
            let right = (left + SQUARE).min(out_w);
            for y in top..(top + SQUARE).min(out_h) {
                let row = &mut data[3 * (y * out_w + left)..3 * (y * out_w + right)];
                for (x, pixel) in (left..right).zip(row.chunks_exact_mut(3)) {
                    let (from_x, from_y) = from(x, y);
                    let at = 3 * (from_y * width + from_x);
                    pixel.copy_from_slice(&stored[at..at + 3]);
                }
            }
        }
    }
    Picture { width: out_w as u32, height: out_h as u32, data: memory }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::RgbImage;
    use crate::image::room::Heap;

    /// A picture of w × h pixels, each naming its place.
    fn places(w: u8, h: u8) -> RgbImage {
        let data = (0..h).flat_map(|y| (0..w).flat_map(move |x| [x, y, 7])).collect();
        RgbImage { width: w.into(), height: h.into(), data }
    }

    fn turn(number: u64, image: RgbImage) -> RgbImage {
        let RgbImage { width, height, data } = image;
        let picture = Picture { width, height, data: PixelMemory::Heap(data) };
        Orientation::new(number).apply(picture, &Heap).into_image()
    }

    fn pixel(image: &RgbImage, x: usize, y: usize) -> [u8; 2] {
        let at = 3 * (y * image.width as usize + x);
        [image.data[at], image.data[at + 1]]
    }

    #[test]
    fn each_orientation_puts_the_corners_where_exif_says() {
        // EXIF: which stored corner is at the top left, and which at the top right
        let corners = [
            (1, [0, 0], [39, 0]),
            (2, [39, 0], [0, 0]),
            (3, [39, 49], [0, 49]),
            (4, [0, 49], [39, 49]),
            (5, [0, 0], [0, 49]),
            (6, [0, 49], [0, 0]),
            (7, [39, 49], [39, 0]),
            (8, [39, 0], [39, 49]),
        ];
        for (number, top_left, top_right) in corners {
            let turned = turn(number, places(40, 50));
            let (w, h) = if number < 5 { (40, 50) } else { (50, 40) };
            assert_eq!((turned.width, turned.height), (w, h), "orientation {number}");
            assert_eq!(pixel(&turned, 0, 0), top_left, "orientation {number}");
            assert_eq!(pixel(&turned, w as usize - 1, 0), top_right, "orientation {number}");
        }
    }

    #[test]
    fn every_orientation_has_its_inverse() {
        for (number, inverse) in [(2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (7, 7), (8, 6)] {
            let there = turn(number, places(33, 70));
            assert_eq!(turn(inverse, there), places(33, 70), "orientation {number}");
        }
    }

    #[test]
    fn orientations_are_read_in_both_byte_orders() {
        let little = b"II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        let big = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0\0\0\0\0";
        assert_eq!(Orientation::from_exif(little).number(), 6);
        assert_eq!(Orientation::from_exif(big).number(), 8);
    }

    #[test]
    fn broken_blocks_turn_nothing() {
        let block = b"II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        for end in 0..18 {
            assert_eq!(Orientation::from_exif(&block[..end]).number(), 1, "{end} bytes");
        }
        for number in [0, 1, 9, 300, u64::MAX] {
            assert_eq!(Orientation::new(number).number(), 1);
        }
        // entries without end, and a directory beyond the file
        assert_eq!(Orientation::from_exif(b"II\x2a\0\x08\0\0\0\xff\xff\x12\x01\x03\0").number(), 1);
        assert_eq!(Orientation::from_exif(b"II\x2b\0\x08\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff").number(), 1);
    }
}
