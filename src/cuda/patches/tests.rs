use half::f16;

use super::*;
use crate::cpu::patches::PixelTable;
use crate::cuda::driver::DeviceMemory;
use crate::cuda::testkit::{Bench, Random, bits, poison};
use crate::image::RgbView;

#[test]
fn equals_the_cpu() {
    let bench = Bench::new();
    let table = PixelTable::new();
    let on_device = bench.array(table.values());
    for (grid, patch, extra, pad) in [(1, 1, 0, 5), (3, 4, 5, 0), (2, 14, 1, 4), (5, 7, 0, 13), (1, 16, 0, 0)]
    {
        let (side, len) = (grid * patch, 3 * patch * patch);
        let stride = 3 * side + extra;
        let mut random = Random::new(side as u64);
        let data: Vec<u8> = (0..stride * side).map(|_| random.below(256) as u8).collect();
        let image = RgbView::new(&data, side as u32, side as u32, stride).unwrap();
        let mut expected = poison(grid * grid * len);
        table.cut(image, grid, patch, &mut expected);

        let memory = DeviceMemory::new(&bench.gpu.context, data.len(), "pixels").unwrap();
        // SAFETY: the memory lives to the end of this round.
        let rgb = unsafe { memory.span() };
        bench.stream.upload_and_wait(rgb, &data).unwrap();
        let pitch = (len + pad).next_multiple_of(8);
        let (out_memory, out) = bench.poisoned(grid * grid, len, pitch);
        let patches = &bench.gpu.kernels.patches;
        patches.enqueue(&bench.stream, &out, rgb, stride, on_device.span(), patch).unwrap();
        assert_eq!(
            bits(&bench.rows(&out_memory, &out, f16::ZERO)),
            bits(&expected),
            "grid {grid}, patch {patch}"
        );
    }
}

#[test]
fn refuses_what_breaks_the_contract() {
    let bench = Bench::new();
    let table = bench.array(PixelTable::new().values());
    let memory = DeviceMemory::new(&bench.gpu.context, 12 * 36, "pixels").unwrap();
    // SAFETY: the memory lives to the end of this test.
    let rgb = unsafe { memory.span() };
    let (_out, out) = bench.poisoned(9, 48, 48);
    let refuse = |out: Matrix, pitch: usize, patch: usize, expected: &str| {
        let result = bench.gpu.kernels.patches.enqueue(&bench.stream, &out, rgb, pitch, table.span(), patch);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("launch of patches") && error.contains(expected), "{error}");
    };
    refuse(Matrix { rows: 8, ..out }, 36, 4, "8 patches are no square");
    refuse(out, 36, 5, "48 columns for patches of 5");
    refuse(out, 37, 4, "12 rows of 36 bytes, 37 apart");
    refuse(out, 35, 4, "35 apart");
    refuse(Matrix { rows: 4, pitch: 50, ..out }, 36, 4, "not 16 bytes aligned");
}
