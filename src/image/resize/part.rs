//! A part of a resized image, without the rest of it: what a crop after a resize keeps.

use std::ops::Range;

use super::{Axis, Kernel, Resample, RgbImage, RgbView, Rows};

/// Resizes to `width` × `height` pixels and returns the given columns and rows of the result.
///
/// Every byte is the whole resize's; work and memory are those of the part, whatever the size of the whole.
///
/// # Panics
/// If the part is not inside the result.
pub(in crate::image) fn resize_part(
    src: RgbView<'_>,
    (width, height): (u32, u32),
    columns: Range<u32>,
    lines: Range<u32>,
    rule: Resample,
) -> RgbImage {
    assert!(columns.end <= width && lines.end <= height, "{columns:?} x {lines:?} of {width}x{height}");
    let (across, down) = (columns.len(), lines.len());
    let mut data = vec![0; 3 * across * down]; // [down, across, 3]
    let part = |data| RgbImage { width: across as u32, height: down as u32, data };
    if data.is_empty() {
        return part(data);
    }
    let kernel = Kernel::best();
    let whole = Rows {
        data: src.data,
        stride: src.stride,
        bytes: 3 * src.width as usize,
        count: src.height as usize,
    };
    // An axis that keeps its size is cut, and not resized.
    let cut_across = |rows: Rows<'_>, out: &mut [u8]| {
        let kept = 3 * columns.start as usize..3 * columns.end as usize;
        for (y, out) in out.chunks_exact_mut(3 * across).enumerate() {
            out.copy_from_slice(&rows.row(y)[kept.clone()]);
        }
    };
    let wide = (src.width != width).then(|| Axis::part(src.width, width, columns.clone()));
    let high = (src.height != height).then(|| Axis::part(src.height, height, lines.clone()));
    match (&wide, &high) {
        (None, None) => cut_across(whole.slice(lines.start as usize..lines.end as usize), &mut data),
        (Some(wide), None) => {
            kernel.horizontal(whole.slice(lines.start as usize..lines.end as usize), wide, &mut data);
        }
        (None, Some(high)) => {
            let mut between = vec![0; whole.bytes * down]; // [down, w, 3]
            kernel.vertical(whole, high, 0, &mut between);
            cut_across(Rows::packed(&between, whole.bytes), &mut data);
        }
        (Some(wide), Some(high)) if rule.vertical_first((src.width, src.height), (width, height)) => {
            let mut between = vec![0; whole.bytes * down]; // [down, w, 3]
            kernel.vertical(whole, high, 0, &mut between);
            kernel.horizontal(Rows::packed(&between, whole.bytes), wide, &mut data);
        }
        (Some(wide), Some(high)) => {
            let needed = high.span();
            let mut between = vec![0; 3 * across * needed.len()]; // [needed, across, 3]
            kernel.horizontal(whole.slice(needed.clone()), wide, &mut between);
            kernel.vertical(Rows::packed(&between, 3 * across), high, needed.start, &mut data);
        }
    }
    part(data)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::resize;
    use super::*;

    proptest! {
        #[test]
        fn a_part_is_a_part_of_the_whole(
            from in (1u32..60, 1u32..60), to in (1u32..60, 1u32..60), keep in (any::<bool>(), any::<bool>()),
            cut in (0.0..1.0f64, 0.0..1.0f64, 0.0..1.0f64, 0.0..1.0f64),
            newer in any::<bool>(), extra in 0usize..5, seed in any::<u64>(),
        ) {
            let to = (if keep.0 { from.0 } else { to.0 }, if keep.1 { from.1 } else { to.1 });
            let stride = 3 * from.0 as usize + extra;
            let mut state = seed | 1;
            let data: Vec<u8> = std::iter::repeat_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            }).take(stride * from.1 as usize).collect();
            let src = RgbView::new(&data, from.0, from.1, stride).unwrap();
            let rule = if newer { Resample::Pillow13 } else { Resample::Pillow };
            let range = |size: u32, a: f64, b: f64| {
                let (a, b) = ((f64::from(size) * a) as u32, (f64::from(size) * b) as u32);
                a.min(b)..a.max(b) + 1
            };
            let (columns, lines) = (range(to.0, cut.0, cut.1), range(to.1, cut.2, cut.3));
            let whole = resize(src, to.0, to.1, rule);
            let part = resize_part(src, to, columns.clone(), lines.clone(), rule);
            prop_assert_eq!((part.width, part.height), (columns.len() as u32, lines.len() as u32));
            let rows = lines.flat_map(|y| {
                let row = whole.view().row(y);
                row[3 * columns.start as usize..3 * columns.end as usize].to_vec()
            });
            prop_assert!(part.data.iter().copied().eq(rows));
        }
    }
}
