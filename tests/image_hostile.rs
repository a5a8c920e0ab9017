//! Broken, cut and absurd image files: an error that helps, never a panic, never a wrong picture, never much memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use imagehere::image::decode::decode;
use imagehere::image::{DecodeOptions, ImageSource, Limits};
use imagehere::{Error, ImageProblem};
use proptest::prelude::*;

/// The system's allocator, noting the largest request.
struct Noting;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every request is handed to the system's allocator as it is.
unsafe impl GlobalAlloc for Noting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(ptr, layout, size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Noting = Noting;

/// One test at a time: they look at what the whole process allocates.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn goldens() -> Vec<(String, Vec<u8>)> {
    let directory: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/image");
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| !matches!(path.extension().and_then(|e| e.to_str()), Some("py" | "json") | None))
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect();
    files.sort();
    assert!(files.len() > 200);
    files
}

fn pixels(bytes: &[u8], options: &DecodeOptions) -> imagehere::Result<(u32, u32, Vec<u8>)> {
    let decoded = decode(0, &ImageSource::from(bytes), options)?;
    let image = decoded.into_image();
    Ok((image.width, image.height, image.data))
}

#[test]
fn a_cut_file_is_an_error_or_the_whole_picture() {
    let _turn = alone();
    let options = DecodeOptions::default();
    let (mut errors, mut wholes) = (0, 0);
    for (name, bytes) in goldens() {
        let Ok(whole) = pixels(&bytes, &options) else { continue };
        if name == "exif_8_late.png" {
            continue; // its orientation follows its pixels: without it, it is another picture, and nobody can tell
        }
        let step = bytes.len().div_ceil(60);
        let cuts = (0..bytes.len()).filter(|cut| cut % step == 0 || cut + 24 > bytes.len());
        for cut in cuts {
            match pixels(&bytes[..cut], &options) {
                Ok(got) => {
                    assert!(got == whole, "{name} cut to {cut} of {} bytes is another picture", bytes.len());
                    wholes += 1;
                }
                Err(_) => errors += 1,
            }
        }
    }
    assert!(errors > 10_000 && wholes > 300, "{errors} errors, {wholes} whole pictures");
}

#[test]
fn flipped_bits_never_panic() {
    let _turn = alone();
    // small limits, so that a flipped size does not cost minutes
    let limits = Limits::default().with_pixels(1 << 20).with_alloc_bytes(64 << 20);
    let options = DecodeOptions::default().with_limits(limits);
    let mut state = 88_172_645_463_325_252u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let (mut decoded, mut refused) = (0, 0);
    for (_, bytes) in goldens() {
        for round in 0..60 {
            let mut bytes = bytes.clone();
            for _ in 0..1 + round % 4 {
                // headers deserve more of it than pixels
                let reach = if round % 2 == 0 { bytes.len() } else { bytes.len().min(120) };
                let at = random(reach);
                if round % 3 == 0 {
                    bytes[at] = random(256) as u8;
                } else {
                    bytes[at] ^= 1 << random(8);
                }
            }
            match pixels(&bytes, &options) {
                Ok((width, height, data)) => {
                    assert_eq!(data.len(), 3 * width as usize * height as usize);
                    decoded += 1;
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(decoded > 1000 && refused > 1000, "{decoded} decoded, {refused} refused");
}

#[test]
fn a_broken_jpeg_prints_nothing() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let _turn = alone();
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }));
    let results: Vec<_> = goldens()
        .into_iter()
        .filter(|(name, _)| name.ends_with(".jpg"))
        .flat_map(|(_, bytes)| {
            (20..bytes.len())
                .step_by(97)
                .map(move |cut| pixels(&bytes[..cut], &DecodeOptions::default()).is_err())
        })
        .collect();
    std::panic::set_hook(before);
    assert!(results.iter().filter(|&&failed| failed).count() > 100);
    assert_eq!(CALLS.load(Ordering::Relaxed), 0, "the panic hook was called");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_never_panic(format in 0usize..9, tail in prop::collection::vec(any::<u8>(), 0..400)) {
        let magic: [&[u8]; 9] = [
            b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"RIFF\x08\0\0\0WEBPVP8L", b"RIFF\x08\0\0\0WEBPVP8 ",
            b"GIF89a", b"BM", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08",
        ];
        let limits = Limits::default().with_pixels(1 << 20).with_alloc_bytes(64 << 20);
        let _ = pixels(&[magic[format], &tail].concat(), &DecodeOptions::default().with_limits(limits));
    }
}

#[test]
fn absurd_headers_cost_nothing() {
    let _turn = alone();
    for (name, bytes) in goldens().into_iter().filter(|(name, _)| name.starts_with("huge.")) {
        assert!(bytes.len() < 20_000);
        LARGEST.store(0, Ordering::Relaxed);
        let start = Instant::now();
        let error = pixels(&bytes, &DecodeOptions::default()).expect_err(&name);
        assert!(start.elapsed() < Duration::from_millis(50), "{name} took {:?}", start.elapsed());
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(largest < 200_000, "{name} asked for {largest} bytes");
        assert!(matches!(error, Error::Image { problem: ImageProblem::TooLarge(_), .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("60000x60000 = 3600000000 pixels; the limit is 178956970"), "{text}");
    }
}

#[test]
fn every_limit_holds_at_its_edge() {
    let _turn = alone();
    let limits = Limits::default();
    let read = |name: &str| goldens().into_iter().find(|(n, _)| n == name).unwrap().1;
    let try_with =
        |bytes: &[u8], limits: Limits| pixels(bytes, &DecodeOptions::default().with_limits(limits));
    for name in ["rgb_8.png", "rgb_24.bmp", "plain.gif", "lossless.webp", "rgb.tiff", "exif_2.jpg"] {
        let bytes = read(name);
        let (width, height, _) = try_with(&bytes, limits).unwrap_or_else(|error| panic!("{error}"));
        let (size, area) = (bytes.len() as u64, u64::from(width) * u64::from(height));
        assert!(try_with(&bytes, limits.with_file_bytes(size)).is_ok(), "{name}");
        assert!(try_with(&bytes, limits.with_pixels(area).with_side(width.max(height))).is_ok(), "{name}");
        for (limits, says) in [
            (limits.with_file_bytes(size - 1), "bytes; the limit is"),
            (limits.with_pixels(area - 1), "pixels; the limit is"),
            (limits.with_side(width.max(height) - 1), "on a side"),
            (limits.with_alloc_bytes(area), "bytes of memory; the limit is"),
        ] {
            let error = try_with(&bytes, limits).expect_err(name);
            let too_large = matches!(error, Error::Image { problem: ImageProblem::TooLarge(_), .. });
            assert!(too_large && error.to_string().contains(says), "{name}, {limits:?}: {error}");
        }
    }
}

#[test]
fn decoding_holds_no_more_than_it_says() {
    let _turn = alone();
    // a picture of zeros, whose file is small
    let (width, height) = (2000, 1500);
    let mut file = Vec::new();
    let image = imagehere::image::RgbImage { width, height, data: vec![0; 3 * 2000 * 1500] };
    image.write_png(&mut file).unwrap();
    let need = 4 * u64::from(width) * u64::from(height);
    let within = DecodeOptions::default().with_limits(Limits::default().with_alloc_bytes(need));
    LARGEST.store(0, Ordering::Relaxed);
    pixels(&file, &within).unwrap();
    assert!(LARGEST.load(Ordering::Relaxed) as u64 <= need);
    let below = DecodeOptions::default().with_limits(Limits::default().with_alloc_bytes(need - 1));
    LARGEST.store(0, Ordering::Relaxed);
    pixels(&file, &below).unwrap_err();
    assert!(LARGEST.load(Ordering::Relaxed) < 200_000, "it was refused, but the memory was asked for");
}
