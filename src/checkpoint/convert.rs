//! bf16, f16 and f32 to fp16: rounded to nearest even, checked against fp16's range, counted.
//!
//! Weights are converted in blocks that stay in the first-level cache: widen to f32 (exact), round with the
//! machine's own conversion where there is one, then look at the block once more for what rounding did to
//! it. Only a block whose largest magnitude does not fit is looked at value by value.

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use serde::Serialize;

use super::dtype::DType;

/// Largest finite fp16 value.
pub(crate) const F16_MAX: f32 = 65504.0;
/// Values converted at a time: 16 kB of f32, 8 kB of fp16.
pub(crate) const BLOCK: usize = 4096;

/// What to do with a weight beyond fp16's range, ±65504.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RangePolicy {
    /// [`Error::ValueOutOfRange`](crate::Error::ValueOutOfRange), naming tensor, index and value.
    #[default]
    Refuse,
    /// The nearest value in range, ±65504, counted; infinities too. A NaN is an error all the same: it is
    /// no magnitude that could be cut, but damage.
    Saturate,
}

/// What a run of values looks like in fp16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ValueStats {
    /// Values looked at.
    pub elements: u64,
    /// Largest magnitude as stored, NaN left out.
    pub largest: f32,
    /// Values that fp16 holds as subnormals, below 2⁻¹⁴ ≈ 6.1e-5: kept to a multiple of 2⁻²⁴ ≈ 6.0e-8.
    pub subnormal: u64,
    /// Values that were not zero and became zero: at most 2⁻²⁵ ≈ 3.0e-8.
    pub zeroed: u64,
    /// Values beyond ±65504, infinities included.
    pub out_of_range: u64,
    /// Values that are not a number.
    pub nan: u64,
}

impl ValueStats {
    /// Adds another run's counts to these.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.elements += other.elements;
        self.largest = self.largest.max(other.largest);
        self.subnormal += other.subnormal;
        self.zeroed += other.zeroed;
        self.out_of_range += other.out_of_range;
        self.nan += other.nan;
    }
}

/// A value that was refused: its index in the run, and itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Offender {
    pub index: usize,
    pub value: f32,
}

/// Converts at most [`BLOCK`] values to fp16, and counts what rounding did to them.
///
/// `src` holds `out.len()` little-endian values of `dtype`.
///
/// # Errors
/// The first [`Offender`] that `policy` refuses; `out` is then undefined.
pub(crate) fn convert_block(
    dtype: DType,
    src: &[u8],
    out: &mut [f16], // [n]
    policy: RangePolicy,
) -> std::result::Result<ValueStats, Offender> {
    let mut wide = [0.0; BLOCK];
    let wide = &mut wide[..out.len()]; // [n], as stored
    let stats = round_block(dtype, src, wide, out);
    if stats.out_of_range > 0 || stats.nan > 0 {
        for (index, (&value, rounded)) in wide.iter().zip(out).enumerate() {
            if fits(value) {
                continue;
            }
            if policy == RangePolicy::Refuse || value.is_nan() {
                return Err(Offender { index, value });
            }
            *rounded = if value > 0.0 { f16::MAX } else { f16::MIN };
        }
    }
    Ok(stats)
}

/// Counts what fp16 would do to at most [`BLOCK`] values, and refuses none; otherwise as [`convert_block`].
pub(crate) fn survey_block(dtype: DType, src: &[u8]) -> ValueStats {
    let n = src.len() / dtype.size();
    let (mut wide, mut out) = ([0.0; BLOCK], [f16::ZERO; BLOCK]);
    round_block(dtype, src, &mut wide[..n], &mut out[..n])
}

/// False for NaN as well.
fn fits(value: f32) -> bool {
    value.abs() <= F16_MAX
}

/// Widens `src` into `wide`, rounds that into `out`, and looks at both.
fn round_block(dtype: DType, src: &[u8], wide: &mut [f32], out: &mut [f16]) -> ValueStats {
    debug_assert!(wide.len() == out.len() && src.len() == out.len() * dtype.size());
    match dtype {
        DType::Bf16 => {
            for (wide, &bytes) in wide.iter_mut().zip(src.as_chunks::<2>().0) {
                *wide = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
            }
            out.convert_from_f32_slice(wide);
        }
        DType::F32 => {
            for (wide, &bytes) in wide.iter_mut().zip(src.as_chunks::<4>().0) {
                *wide = f32::from_le_bytes(bytes);
            }
            out.convert_from_f32_slice(wide);
        }
        DType::F16 => {
            for (out, &bytes) in out.iter_mut().zip(src.as_chunks::<2>().0) {
                *out = f16::from_le_bytes(bytes);
            }
            out.convert_to_f32_slice(wide);
        }
    }
    look(wide, out)
}

/// Counts what became of `wide` in `out`. The loops have no branch, so that they become vector code.
fn look(wide: &[f32], out: &[f16]) -> ValueStats {
    // Magnitudes order as their bits do. Counters of one block fit into the lanes they count in.
    let (mut top, mut nonzero) = (0i32, 0u32);
    for value in wide {
        let magnitude = (value.to_bits() & 0x7fff_ffff) as i32;
        top = top.max(magnitude);
        nonzero += u32::from(magnitude != 0);
    }
    let (mut kept, mut subnormal) = (0u16, 0u16);
    for rounded in out {
        let magnitude = rounded.to_bits() & 0x7fff;
        kept += u16::from(magnitude != 0);
        subnormal += u16::from(magnitude.wrapping_sub(1) < 0x03ff);
    }
    let mut stats = ValueStats {
        elements: wide.len() as u64,
        largest: f32::from_bits(top as u32),
        subnormal: u64::from(subnormal),
        zeroed: u64::from(nonzero - u32::from(kept)),
        ..ValueStats::default()
    };
    if !fits(stats.largest) {
        stats.nan = wide.iter().filter(|value| value.is_nan()).count() as u64;
        stats.out_of_range = wide.iter().filter(|value| !fits(**value)).count() as u64 - stats.nan;
        stats.largest = wide.iter().fold(0.0, |top, value| top.max(value.abs())); // `max` skips NaN
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(dtype: DType, values: &[f32]) -> Vec<u8> {
        let bytes = |value: &f32| match dtype {
            DType::Bf16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
            DType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            DType::F32 => value.to_le_bytes().to_vec(),
        };
        values.iter().flat_map(bytes).collect()
    }

    /// fp16 by the definition: the nearest of all finite fp16 values, the one with an even last bit of two
    /// equally near. `table` holds them in order, so its indices are the bits.
    fn by_definition(table: &[f64], value: f32) -> u16 {
        let magnitude = f64::from(value.abs());
        let above = table.partition_point(|&half| half < magnitude);
        let bits = match above {
            0 => 0,
            _ if above == table.len() => table.len() - 1,
            _ => {
                let (low, high) = (magnitude - table[above - 1], table[above] - magnitude);
                if low < high || (low == high && (above - 1) % 2 == 0) { above - 1 } else { above }
            }
        };
        bits as u16 | if value.is_sign_negative() { 0x8000 } else { 0 }
    }

    fn finite_halves() -> Vec<f64> {
        let half = |bits: u16| match (bits >> 10, f64::from(bits & 0x3ff)) {
            (0, fraction) => fraction * 2f64.powi(-24),
            (exponent, fraction) => (1024.0 + fraction) * 2f64.powi(i32::from(exponent) - 25),
        };
        (0..0x7c00).map(half).collect()
    }

    /// Converts one value in a block of its own, and one long block, so that both the vector path and its
    /// remainder are seen.
    fn check_all(dtype: DType, values: &[f32]) {
        let table = finite_halves();
        for block in values.chunks(BLOCK) {
            let mut out = vec![f16::NAN; block.len()];
            let stats = convert_block(dtype, &encode(dtype, block), &mut out, RangePolicy::Refuse).unwrap();
            let (mut subnormal, mut zeroed) = (0, 0);
            for (value, rounded) in block.iter().zip(&out) {
                assert_eq!(rounded.to_bits(), by_definition(&table, *value), "{dtype:?} {value:e}");
                zeroed += u64::from(*value != 0.0 && rounded.to_f32() == 0.0);
                subnormal += u64::from(rounded.to_f32() != 0.0 && rounded.to_f32().abs() < 2f32.powi(-14));
            }
            let largest = block.iter().fold(0f32, |top, value| top.max(value.abs()));
            let elements = block.len() as u64;
            let expected = ValueStats { elements, largest, subnormal, zeroed, ..ValueStats::default() };
            assert_eq!(stats, expected);
        }
    }

    #[test]
    fn every_bf16_value_that_fits_is_rounded_to_nearest_even() {
        let all = (0..=u16::MAX).map(|bits| half::bf16::from_bits(bits).to_f32());
        let values: Vec<f32> = all.filter(|value| fits(*value)).collect();
        assert_eq!(values.len(), 2 * 0x4780);
        check_all(DType::Bf16, &values);
    }

    #[test]
    fn every_finite_f16_value_is_kept() {
        let all = (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32());
        let values: Vec<f32> = all.filter(|value| value.is_finite()).collect();
        assert_eq!(values.len(), 2 * 0x7c00);
        check_all(DType::F16, &values);
    }

    #[test]
    fn f32_values_are_rounded_to_nearest_even_around_every_half() {
        // Every fp16 value, every tie between two of them, and the f32 neighbours of both.
        let table = finite_halves();
        let mut values = Vec::new();
        for pair in table.windows(2) {
            let tie = ((pair[0] + pair[1]) / 2.0) as f32;
            for value in [pair[0] as f32, tie] {
                values.extend([value, value.next_up(), value.next_down().abs(), -value]);
            }
        }
        values.push(F16_MAX);
        check_all(DType::F32, &values);
    }

    #[test]
    fn the_first_value_out_of_range_is_named() {
        for dtype in [DType::Bf16, DType::F32] {
            let mut values = vec![1.0f32; 100];
            values[97] = f32::INFINITY;
            values[41] = -65536.0;
            let mut out = vec![f16::ZERO; 100];
            let refused = convert_block(dtype, &encode(dtype, &values), &mut out, RangePolicy::Refuse);
            assert_eq!(refused, Err(Offender { index: 41, value: -65536.0 }));

            let stats =
                convert_block(dtype, &encode(dtype, &values), &mut out, RangePolicy::Saturate).unwrap();
            assert_eq!((stats.out_of_range, stats.nan, stats.largest), (2, 0, f32::INFINITY));
            assert_eq!((out[41], out[97], out[0]), (f16::MIN, f16::MAX, f16::ONE));
        }
        // 65504 is the limit itself; the next f32 above it is beyond, though it would round back.
        let above = F16_MAX.next_up();
        let refused = convert_block(
            DType::F32,
            &encode(DType::F32, &[F16_MAX, above]),
            &mut [f16::ZERO; 2],
            RangePolicy::Refuse,
        );
        assert_eq!(refused, Err(Offender { index: 1, value: above }));
    }

    #[test]
    fn a_nan_is_refused_by_both_policies() {
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            for policy in [RangePolicy::Refuse, RangePolicy::Saturate] {
                let bytes = encode(dtype, &[0.0, 2.0, f32::NAN]);
                let offender = convert_block(dtype, &bytes, &mut [f16::ZERO; 3], policy).unwrap_err();
                assert!(offender.index == 2 && offender.value.is_nan());
            }
            let stats = survey_block(dtype, &encode(dtype, &[0.5, f32::NAN, f32::NEG_INFINITY, 1e-30]));
            assert_eq!((stats.nan, stats.out_of_range, stats.largest), (1, 1, f32::INFINITY));
            assert_eq!(stats.zeroed, u64::from(dtype != DType::F16), "1e-30 is zero in an f16 file already");
        }
    }
}
