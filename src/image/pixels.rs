//! Samples to RGB8, by Pillow's rules: the arithmetic that several formats share.

/// `x / 255` rounded to nearest, for x up to 255 * 255.
///
/// # Source
/// Jim Blinn's division, which Pillow uses throughout; exact on that range.
pub(super) fn div255(x: u32) -> u8 {
    let x = x + 128;
    (((x >> 8) + x) >> 8) as u8
}

/// CMYK (0 = no ink) to RGB: what is left of the paper's light after black, then after each ink.
pub(super) fn cmyk_to_rgb([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let light = 255 - k;
    [c, m, y].map(|ink| light - div255(u32::from(ink) * u32::from(light)))
}

/// Premultiplied colour to straight colour; nothing at all where alpha is 0.
pub(super) fn unpremultiply(rgb: [u8; 3], alpha: u8) -> [u8; 3] {
    match u32::from(alpha) {
        0 => [0; 3],
        255 => rgb,
        a => rgb.map(|c| (u32::from(c) * 255 / a).min(255) as u8),
    }
}

/// A sample of more than 8 bits, without alpha beside it: clipped to 0…255, not scaled.
pub(super) fn clip<T: PartialOrd + Into<f64>>(value: T) -> u8 {
    // `as` truncates, saturates and sends NaN to 0: i32, u32 and f32 fit into an f64 exactly
    value.into() as u8
}

/// The factor that stretches a grey of `bits` bits (1, 2, 4 or 8) over 0…255.
pub(super) fn grey_factor(bits: u8) -> u8 {
    match bits {
        1 => 255,
        2 => 85,
        4 => 17,
        _ => 1,
    }
}

/// Unpacks samples of 1, 2, 4 or 8 bits, most significant first, one to a byte, unscaled.
///
/// `packed` holds at least as many samples as `out`.
pub(super) fn unpack_bits(packed: &[u8], bits: u8, out: &mut [u8]) {
    match bits {
        8 => out.copy_from_slice(&packed[..out.len()]),
        bits => {
            let per_byte = usize::from(8 / bits);
            let mask = (1u16 << bits) as u8 - 1;
            for (group, &byte) in out.chunks_mut(per_byte).zip(packed) {
                for (i, sample) in group.iter_mut().enumerate() {
                    *sample = byte >> (8 - bits as usize * (i + 1)) & mask;
                }
            }
        }
    }
}

/// 256 colours; those that the file does not give are black.
#[derive(Clone, Debug)]
pub(super) struct Palette(pub [[u8; 3]; 256]);

impl Palette {
    /// The palette of an image that has none: greys.
    pub fn grey() -> Self {
        Self(std::array::from_fn(|i| [i as u8; 3]))
    }

    /// Colours in the file's order; what is beyond 256 is ignored.
    pub fn new(colours: impl IntoIterator<Item = [u8; 3]>) -> Self {
        let mut palette = Self([[0; 3]; 256]);
        for (slot, colour) in palette.0.iter_mut().zip(colours) {
            *slot = colour;
        }
        palette
    }

    /// Looks up one row.
    pub fn row(&self, indices: &[u8], rgb: &mut [u8]) {
        for (pixel, &index) in rgb.chunks_exact_mut(3).zip(indices) {
            pixel.copy_from_slice(&self.0[usize::from(index)]);
        }
    }
}

/// One row of greys to RGB.
pub(super) fn grey_row(grey: impl IntoIterator<Item = u8>, rgb: &mut [u8]) {
    for (pixel, grey) in rgb.chunks_exact_mut(3).zip(grey) {
        pixel.fill(grey);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn division_by_255_rounds_to_nearest() {
        for x in 0..=255 * 255u32 {
            assert_eq!(u32::from(div255(x)), (2 * x + 255) / 510, "{x}");
        }
    }

    #[test]
    fn bits_unpack_most_significant_first() {
        let mut out = [0; 8];
        unpack_bits(&[0b1011_0001], 1, &mut out);
        assert_eq!(out, [1, 0, 1, 1, 0, 0, 0, 1]);
        let mut out = [0; 3];
        unpack_bits(&[0b11_01_00_10], 2, &mut out);
        assert_eq!(out, [3, 1, 0]);
        unpack_bits(&[0x5a, 0xf0], 4, &mut out);
        assert_eq!(out, [5, 10, 15]);
    }

    #[test]
    fn wide_samples_are_clipped() {
        assert_eq!([clip(-1), clip(0), clip(255), clip(70_000)], [0, 0, 255, 255]);
        assert_eq!([clip(-0.5f32), clip(254.9f32), clip(f32::NAN), clip(f32::INFINITY)], [0, 254, 0, 255]);
    }

    #[test]
    fn ink_takes_light_away() {
        assert_eq!(cmyk_to_rgb([0, 0, 0, 0]), [255; 3]);
        assert_eq!(cmyk_to_rgb([255, 0, 0, 0]), [0, 255, 255]);
        assert_eq!(cmyk_to_rgb([10, 20, 30, 255]), [0; 3]);
        assert_eq!(unpremultiply([100, 200, 0], 100), [255, 255, 0]);
        assert_eq!(unpremultiply([100, 50, 0], 200), [127, 63, 0]);
    }
}
