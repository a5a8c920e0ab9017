//! Decoding each format and resizing to the tower's 490 pixels, on one thread. Throughput counts source pixels.
//!
//! The pictures are drawn here and the decoded pixels are checked first. JPEG needs a photo: those of
//! `../shared/data/photos`, where they are at hand.

use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use imagehere::image::decode::decode;
use imagehere::image::resize::Resizer;
use imagehere::image::{DecodeOptions, ImageSource, Resample, RgbImage};

/// Side of the tower's image, in pixels.
const SIDE: u32 = 490;

/// A picture with smooth parts, edges and some noise.
fn draw(width: u32, height: u32) -> RgbImage {
    let mut noise = 1u32;
    let mut data = Vec::with_capacity(3 * (width * height) as usize); // [height, width, 3]
    for y in 0..height {
        for x in 0..width {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let edge = if (x / 97 + y / 61) % 2 == 0 { 60 } else { 0 };
            data.extend(
                [x * 150 / width + edge, y * 150 / height + edge, edge].map(|v| (v + (noise >> 29)) as u8),
            );
        }
    }
    RgbImage { width, height, data }
}

fn decoding(c: &mut Criterion) {
    let options = DecodeOptions::default();
    let mut group = c.benchmark_group("decode");
    group.sample_size(20);
    let mut bench = |name: &str, file: &[u8], expected: Option<&RgbImage>| {
        let source = ImageSource::Bytes(file.into());
        let decoded = decode(0, &source, &options).expect("a good file").into_image();
        if let Some(expected) = expected {
            assert_eq!(&decoded, expected, "{name}");
        }
        group.throughput(Throughput::Elements(u64::from(decoded.width * decoded.height)));
        group.bench_function(name, |b| b.iter(|| decode(0, black_box(&source), &options)));
    };
    let picture = draw(1600, 1200);
    let mut png = Vec::new();
    picture.write_png(&mut png).expect("a vector takes it");
    bench("png_2mp", &png, Some(&picture));
    let photos = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/photos");
    for (name, file) in [("jpeg_photo", "cars1.jpg"), ("webp_photo", "image1.webp")] {
        if let Ok(bytes) = std::fs::read(Path::new(photos).join(file)) {
            bench(name, &bytes, None);
        }
    }
    group.finish();
}

fn resizing(c: &mut Criterion) {
    let mut group = c.benchmark_group("resize");
    group.sample_size(20);
    let mut out = vec![0; 3 * (SIDE * SIDE) as usize]; // [SIDE, SIDE, 3]
    let mut resizer = Resizer::default();
    let same = draw(SIDE, SIDE);
    resizer.resize_into(same.view(), SIDE, SIDE, Resample::Pillow, &mut out);
    assert_eq!(out, same.data, "the same size is the same picture");
    for (name, width, height) in [
        ("half_mp", 816, 612),
        ("2mp", 1600, 1200),
        ("hd", 1920, 1080),
        ("12mp", 4000, 3000),
        ("up", 245, 245),
    ] {
        let picture = draw(width, height);
        group.throughput(Throughput::Elements(u64::from(width * height)));
        group.bench_function(name, |b| {
            b.iter(|| resizer.resize_into(black_box(picture.view()), SIDE, SIDE, Resample::Pillow, &mut out));
        });
    }
    group.finish();
}

criterion_group!(benches, decoding, resizing);
criterion_main!(benches);
