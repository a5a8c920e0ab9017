use super::*;
use crate::cuda::driver::DeviceMemory;
use crate::cuda::testkit::{Bench, Random};
use crate::image::resize::resize;
use crate::image::{Resample, RgbView};

/// Memory with `values` in it.
fn upload<T: crate::cuda::driver::Pod>(bench: &Bench, values: &[T]) -> DeviceMemory {
    let memory = DeviceMemory::new(&bench.gpu.context, size_of_val(values), "a test").unwrap();
    // SAFETY: the caller keeps the memory.
    let span = unsafe { memory.span() }.cast().unwrap();
    bench.stream.upload_and_wait(span, values).unwrap();
    memory
}

/// The tables of `passes` on the device.
fn tables(bench: &Bench, passes: &Passes) -> (DeviceMemory, DevicePasses) {
    let both = passes.horizontal.iter().chain(&passes.vertical);
    let words: Vec<i32> = both.flat_map(|table| table.words.clone()).collect();
    assert_eq!(words.len(), DevicePasses::words(passes));
    let memory = upload(bench, &words);
    // SAFETY: the caller keeps the memory.
    let span = unsafe { memory.span() }.cast().unwrap();
    (memory, DevicePasses::new(span, passes).unwrap())
}

const MARK: u8 = 0xee;

/// Resizes a random picture and returns it beside the CPU's.
fn both(bench: &Bench, (width, height): (u32, u32), extra: usize, side: u32, rule: Resample) -> [Vec<u8>; 2] {
    let stride = 3 * width as usize + extra;
    let mut random = Random::new(u64::from(width * 31 + height));
    let data: Vec<u8> = (0..stride * height as usize).map(|_| random.below(256) as u8).collect();
    let expected = resize(RgbView::new(&data, width, height, stride).unwrap(), side, side, rule).data;

    let passes = Passes::new((width, height), (side, side), rule);
    let (_tables, tables) = tables(bench, &passes);
    let from_memory = upload(bench, &data);
    let (side, out_pitch) = (side as usize, 3 * side as usize + 2);
    let out_memory = upload(bench, &vec![MARK; side * out_pitch]);
    let between = upload(bench, &vec![MARK; Resize::between_bytes(&passes, width as usize, side)]);
    // SAFETY: the memory lives to the end of this function.
    let [from, out, between] = [&from_memory, &out_memory, &between].map(|memory| unsafe { memory.span() });
    let from = Pixels::new(from, height as usize, width as usize, stride).unwrap();
    let out = Pixels::new(out, side, side, out_pitch).unwrap();
    let resize = &bench.gpu.kernels.resize;
    let result = resize.enqueue(&bench.stream, &out, &from, between, &passes, &tables).unwrap();
    let mut all = vec![0; result.span.len()];
    bench.stream.download_and_wait(result.span, &mut all).unwrap();
    let mut rows = Vec::with_capacity(expected.len());
    for row in all.chunks(result.pitch).take(side) {
        rows.extend_from_slice(&row[..3 * side]);
        let touched = result.pitch == out_pitch && row[3 * side..].iter().any(|x| *x != MARK);
        assert!(!touched, "between the rows");
    }
    [rows, expected]
}

#[test]
fn equals_the_cpu_byte_for_byte() {
    let bench = Bench::new();
    let (old, new) = (Resample::Pillow, Resample::Pillow13);
    for (size, extra, side, rule) in [
        ((40, 30), 0, 14, old),    // smaller
        ((9, 7), 1, 20, old),      // larger
        ((20, 31), 3, 20, old),    // one pass down
        ((31, 20), 0, 20, old),    // one pass across
        ((20, 20), 4, 20, old),    // none
        ((1, 1), 0, 12, old),      // one pixel
        ((150, 170), 5, 131, old), // several blocks across
        ((3, 301), 0, 8, old),     // so tall that the vertical pass comes first
        ((30, 90), 0, 28, new),    // the same by the newer rule
        ((30, 90), 0, 28, old),
    ] {
        let [got, expected] = both(&bench, size, extra, side, rule);
        assert!(got == expected, "{size:?} to {side}, {rule:?}");
    }
}

#[test]
fn bands_are_as_the_whole() {
    let bench = Bench::new();
    let (width, height, side) = (50, 61, 16);
    let data: Vec<u8> = (0..3 * width * height).map(|i| (i * 7 % 251) as u8).collect();
    let view = RgbView::new(&data, width as u32, height as u32, 3 * width).unwrap();
    let expected = resize(view, side as u32, side as u32, Resample::Pillow).data;
    let passes = Passes::new((width as u32, height as u32), (side as u32, side as u32), Resample::Pillow);
    let (_tables, tables) = tables(&bench, &passes);
    let (wide, high) = (tables.horizontal.unwrap(), tables.vertical.unwrap());
    let out = upload(&bench, &vec![0u8; 3 * side * side]);
    let between = upload(&bench, &vec![0u8; 3 * side * passes.needed.len()]);
    // SAFETY: the memory lives to the end of this test.
    let [out, between] = [&out, &between].map(|memory| unsafe { memory.span() });
    let out = Pixels::new(out, side, side, 3 * side).unwrap();
    let between = Pixels::new(between, passes.needed.len(), side, 3 * side).unwrap();
    let resize = &bench.gpu.kernels.resize;
    for first in passes.needed.clone().step_by(17) {
        let rows = 17.min(passes.needed.end - first);
        let band = upload(&bench, &data[first * 3 * width..(first + rows) * 3 * width]);
        // SAFETY: dropping the band waits for its copy.
        let band = Pixels::new(unsafe { band.span() }, rows, width, 3 * width).unwrap();
        let to = between.rows(first - passes.needed.start, rows).unwrap();
        resize.enqueue_horizontal(&bench.stream, &to, &band, &wide).unwrap();
        bench.stream.synchronize().unwrap();
    }
    resize.enqueue_vertical(&bench.stream, &out, &between, &high).unwrap();
    let mut got = vec![0; expected.len()];
    bench.stream.download_and_wait(out.span, &mut got).unwrap();
    assert_eq!(got, expected);
}

#[test]
fn refuses_what_breaks_the_contract() {
    let bench = Bench::new();
    let passes = Passes::new((40, 30), (14, 14), Resample::Pillow);
    let (_tables, tables) = tables(&bench, &passes);
    let memory = upload(&bench, &vec![0u8; 120 * 30]);
    // SAFETY: the memory lives to the end of this test.
    let span = unsafe { memory.span() };
    let from = Pixels::new(span, 30, 40, 120).unwrap();
    let out = Pixels::new(span, 14, 14, 42).unwrap();
    let resize = &bench.gpu.kernels.resize;
    let stream = &bench.stream;
    let (wide, high) = (tables.horizontal.unwrap(), tables.vertical.unwrap());
    let refuse = |result: Result<()>, expected: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("launch of resize_") && error.contains(expected), "{error}");
    };
    refuse(resize.enqueue_horizontal(stream, &out, &from, &wide), "14 rows from 30");
    let narrow = Pixels { width: 39, ..from };
    let tall = Pixels { rows: 30, ..out };
    refuse(resize.enqueue_horizontal(stream, &tall, &narrow, &wide), "looks beyond 39 pixels");
    refuse(
        resize.enqueue_horizontal(stream, &Pixels { pitch: 41, ..tall }, &from, &wide),
        "out does not fit",
    );
    refuse(resize.enqueue_vertical(stream, &out, &from, &high), "14 pixels from 40");
    let low = Pixels { rows: 29, ..tall };
    refuse(resize.enqueue_vertical(stream, &out, &low, &high), "looks beyond 29 rows");
    assert!(Pixels::new(span, 31, 40, 120).is_err() && from.rows(1, 30).is_err());
}
