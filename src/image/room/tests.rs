//! Every golden file, decoded into memory that holds something else, against the heap.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::image::decode::{Decoded, decode, decode_in};
use crate::image::{Alpha, DecodeOptions, Exif, ImageSource, Limits};

/// A room whose memory is full of one byte, between guards.
struct Poisoned {
    byte: u8,
    lent: AtomicUsize, // how often
}

/// Bytes of a guard.
const GUARD: usize = 64;
const GUARD_BYTE: u8 = 0x3c;

struct Between(Vec<u8>);

impl Room for Poisoned {
    fn lend(&self, bytes: usize) -> Option<Box<dyn Held>> {
        self.lent.fetch_add(1, Ordering::Relaxed);
        let mut memory = vec![GUARD_BYTE; GUARD + bytes + GUARD];
        memory[GUARD..GUARD + bytes].fill(self.byte);
        Some(Box::new(Between(memory)))
    }
}

impl Held for Between {
    fn bytes(&self) -> &[u8] {
        &self.0[GUARD..self.0.len() - GUARD]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let end = self.0.len() - GUARD;
        &mut self.0[GUARD..end]
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        let ends = [&self.0[..GUARD], &self.0[self.0.len() - GUARD..]];
        assert!(ends.concat().iter().all(|&byte| byte == GUARD_BYTE), "written beyond the memory");
    }
}

/// Files of `tests/goldens/image`, by name.
fn goldens() -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/image");
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files
        .filter(|path| !matches!(path.extension().and_then(|name| name.to_str()), Some("json" | "py")))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

/// What became of a file, errors in words.
fn told(decoded: crate::Result<Decoded<'_>>) -> Result<(u32, u32, Vec<u8>, Vec<String>), String> {
    let decoded = decoded.map_err(|error| error.to_string())?;
    let warnings = decoded.warnings.iter().map(ToString::to_string).collect();
    let image = decoded.into_image();
    Ok((image.width, image.height, image.data, warnings))
}

/// Decodes to the heap and into two kinds of poison; says whether there was a picture, and how often memory was lent.
fn alike(name: &str, bytes: &[u8], options: &DecodeOptions) -> Option<usize> {
    let source = ImageSource::from(bytes);
    let expected = told(decode(0, &source, options));
    let mut times = 0;
    for byte in [0x00, 0xa5] {
        let room = Poisoned { byte, lent: AtomicUsize::new(0) };
        let mut decoded = decode_in(&room, 0, &source, options);
        if let Ok(decoded) = &mut decoded {
            let pixels = 3 * decoded.view().width() as usize * decoded.view().height() as usize;
            let held = decoded.held::<Between>().unwrap_or_else(|| panic!("{name} lies on the heap"));
            assert_eq!(held.bytes().len(), pixels, "{name}");
            assert_eq!(decoded.clone().view().row(0), decoded.view().row(0), "{name}");
        }
        assert!(told(decoded) == expected, "{name}, {options:?}: memory that held {byte:#x} shows");
        times = room.lent.into_inner();
    }
    expected.is_ok().then_some(times)
}

#[test]
fn every_file_gives_the_same_bytes_in_lent_memory() {
    let plain = DecodeOptions::default();
    let (mut decoded, mut turned) = (0, 0);
    for (name, bytes) in goldens() {
        for options in [plain, plain.with_exif(Exif::Ignore), plain.with_alpha(Alpha::WHITE)] {
            let Some(times) = alike(&name, &bytes, &options) else { continue };
            decoded += 1;
            turned += usize::from(times == 2);
            assert!((1..=2).contains(&times), "{name}: memory was lent {times} times");
            assert!(times == 1 || options.exif == Exif::Apply || name.ends_with(".tiff"), "{name}");
        }
    }
    assert!(decoded > 400 && turned > 10, "{decoded} decoded, {turned} turned");
}

#[test]
fn nothing_shows_through_broken_files() {
    let limits = Limits::default().with_pixels(1 << 18).with_alloc_bytes(16 << 20);
    let options = DecodeOptions::default().with_limits(limits);
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut decoded = 0;
    for (name, bytes) in goldens() {
        for round in 0..12 {
            let mut bytes = bytes.clone();
            let reach = if round % 2 == 0 { bytes.len() } else { bytes.len().min(120) };
            bytes[random(reach)] ^= 1 << random(8);
            decoded += usize::from(alike(&name, &bytes, &options).is_some());
        }
    }
    assert!(decoded > 500, "{decoded} decoded");
}

#[test]
fn where_nothing_is_lent_there_is_the_heap() {
    let mut memory = PixelMemory::new(&Heap, 5);
    assert!(matches!(&memory, PixelMemory::Heap(bytes) if bytes == &[0; 5]));
    memory[4] = 7;
    assert_eq!(memory.clone().into_vec(), [0, 0, 0, 0, 7]);
    let held = PixelMemory::new(&Poisoned { byte: 9, lent: AtomicUsize::new(0) }, 3);
    assert!(matches!(held.clone(), PixelMemory::Heap(_)), "a copy is nobody's");
    assert_eq!(format!("{held:?} {memory:?}"), "3 bytes lent 5 bytes on the heap");
    assert_eq!(held.into_vec(), [9; 3]);
}
