use super::*;
use crate::cpu::testkit::{Random, poison};

#[test]
fn pixels_become_what_torchvision_makes_of_them() {
    let table = PixelTable::new();
    // Computed in f32 by ToTensor and Normalize, then `.half()`.
    let known = [
        (0, 0, -1.792_262_6f32),
        (0, 255, 1.930_336_4),
        (1, 0, -1.752_097_4),
        (1, 255, 2.074_884),
        (2, 0, -1.480_219_7),
        (2, 255, 2.145_897),
    ];
    for (channel, byte, value) in known {
        let got = table.0[channel][byte];
        assert!((got.to_f32() - value).abs() < 1.1e-3, "{channel} {byte}: {got}");
    }
    for (channel, table) in table.0.iter().enumerate() {
        for (byte, value) in table.iter().enumerate() {
            let exact =
                (byte as f64 / 255.0 - f64::from(PIXEL_MEAN[channel])) / f64::from(PIXEL_STD[channel]);
            let error = (value.to_f64() - exact).abs();
            assert!(error <= exact.abs() * 2f64.powi(-11) + 1e-6, "{channel} {byte}: {value}, not {exact}");
        }
    }
}

#[test]
fn patches_are_channel_y_x() {
    // 3 × 3 patches of 4 pixels, in a buffer whose rows are longer than the image's.
    let (grid, patch) = (3, 4);
    let side = grid * patch;
    let stride = 3 * side + 5;
    let mut random = Random::new(1);
    let data: Vec<u8> = (0..stride * side).map(|_| random.below(256) as u8).collect();
    let image = RgbView::new(&data, side as u32, side as u32, stride).unwrap();
    let table = PixelTable::new();
    let mut patches = poison(grid * grid * 3 * patch * patch);
    table.cut(image, grid, patch, &mut patches);
    for (i, value) in patches.iter().enumerate() {
        let (p, rest) = (i / (3 * patch * patch), i % (3 * patch * patch));
        let (channel, y, x) = (rest / (patch * patch), rest / patch % patch, rest % patch);
        let (row, column) = (p / grid * patch + y, p % grid * patch + x);
        let byte = data[row * stride + 3 * column + channel];
        assert_eq!(
            value.to_bits(),
            table.0[channel][byte as usize].to_bits(),
            "patch {p}, {channel} {y} {x}"
        );
    }
}
