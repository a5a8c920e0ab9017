//! Features to colours: the first three principal components of an image's rows, or their norms.
//!
//! ```text
//!   rows [P, H] ─ centre ─▶ X ─┬─▶ Y = X Vᵀ [P, K] ─▶ V = Yᵀ X [K, H] ─ orthonormal ─┐     subspace iteration
//!                              └──────────────◀── turned to the axes of YᵀY ◀────────┘     until 3 variances stand still
//! ```
//!
//! # Numerics
//! Products are f32 in a fixed order, whatever the number of threads; what decides about directions is f64. The same rows
//! make the same colours.

use half::f16;
use rayon::prelude::*;

use super::canvas::Rgb;

/// Components that are shown: red, green, blue.
const SHOWN: usize = 3;
/// Directions that are followed; more than are shown, so that those which are converge fast.
const FOLLOWED: usize = 8;
/// Rounds, at most.
const ROUNDS: usize = 40;
/// Channels of H that a task takes at a time.
const BLOCK: usize = 256;
/// The share of patches at either end that is drawn as the end, so that a few patches do not take all colours.
const TAIL: f64 = 0.01;

/// The principal components of an image's rows.
#[derive(Debug)]
pub struct Components {
    /// Where each row lies along each component, `[P][3]`; the patch farthest out along one has a positive value.
    pub scores: Vec<[f64; SHOWN]>,
    /// What part of the rows' variance the three have together, from 0 to 1.
    pub share: f64,
}

/// Finds the first three principal components of `rows`, shape `[P, H]`.
pub fn components(rows: &[f16], hidden: usize) -> Components {
    let count = rows.len() / hidden;
    let centred = centre(rows, hidden); // [P, H]
    let total = sum_of_squares(&centred);
    let followed = FOLLOWED.min(hidden).min(count);
    let mut scores = vec![[0.0; SHOWN]; count];
    if followed == 0 || total <= 0.0 || !total.is_finite() {
        return Components { scores, share: 0.0 };
    }

    let mut directions = start(followed, hidden); // [K, H]
    orthonormalise(&mut directions, hidden);
    let mut variances = vec![0.0; followed]; // [K], greatest first
    let mut along = Vec::new(); // [P, K]
    for _ in 0..ROUNDS {
        along = project(&centred, &directions, hidden);
        let (found, axes) = eigen(gram(&along, followed), followed);
        turn(&mut along, &axes, followed);
        let moved = found.iter().zip(&variances).take(SHOWN).map(|(new, old)| (new - old).abs() / total);
        let still = moved.fold(0.0, f64::max) < 1e-7;
        variances = found;
        if still {
            break;
        }
        directions = back(&centred, &along, hidden, followed);
        orthonormalise(&mut directions, hidden);
    }
    for component in 0..SHOWN.min(followed) {
        // Less than this is rounding, not variance.
        if variances[component] <= 1e-9 * total {
            continue;
        }
        let column = || along.iter().skip(component).step_by(followed).copied();
        let farthest = column().fold(0.0f32, |most, x| if x.abs() > most.abs() { x } else { most });
        for (scores, x) in scores.iter_mut().zip(column()) {
            scores[component] = f64::from(x * farthest.signum());
        }
    }
    let share = variances.iter().take(SHOWN).sum::<f64>() / total;
    Components { scores, share: share.clamp(0.0, 1.0) }
}

/// Colours of the patches: each component a channel, spread over its range.
pub fn component_colours(components: &Components) -> Vec<Rgb> {
    let spreads: [Spread; SHOWN] =
        std::array::from_fn(|c| Spread::of(components.scores.iter().map(|scores| scores[c])));
    let colour = |scores: &[f64; SHOWN]| -> Rgb {
        std::array::from_fn(|c| (20.0 + 225.0 * spreads[c].place(scores[c])).round() as u8)
    };
    components.scores.iter().map(colour).collect()
}

/// The norm of each row, `[P]`.
pub fn norms(rows: &[f16], hidden: usize) -> Vec<f64> {
    let norm = |row: &[f16]| row.iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>().sqrt();
    rows.par_chunks_exact(hidden).map(norm).collect()
}

/// Colours of norms, from the least (dark) to the greatest (bright).
pub fn norm_colours(norms: &[f64]) -> Vec<Rgb> {
    let spread = Spread::of(norms.iter().copied());
    norms.iter().map(|&norm| heat(spread.place(norm))).collect()
}

/// A colour for each place from 0 to 1: dark to bright, so that it can be read in grey, too.
pub fn heat(place: f64) -> Rgb {
    const STOPS: [[f64; 3]; 6] = [
        [13.0, 14.0, 46.0],
        [76.0, 29.0, 122.0],
        [168.0, 44.0, 112.0],
        [233.0, 90.0, 64.0],
        [251.0, 169.0, 62.0],
        [253.0, 244.0, 190.0],
    ];
    let at = place.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let from = (at as usize).min(STOPS.len() - 2);
    let t = at - from as f64;
    std::array::from_fn(|c| (STOPS[from][c] * (1.0 - t) + STOPS[from + 1][c] * t).round() as u8)
}

/// The range of values that colours are spread over.
struct Spread {
    low: f64,
    high: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.filter(|x| x.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let tail = (sorted.len() as f64 * TAIL) as usize;
        match (sorted.get(tail), sorted.len().checked_sub(1 + tail).and_then(|i| sorted.get(i))) {
            (Some(&low), Some(&high)) => Self { low, high },
            _ => Self { low: 0.0, high: 0.0 },
        }
    }

    /// Where a value lies, from 0 to 1; in the middle where all values are the same.
    fn place(&self, value: f64) -> f64 {
        match self.high - self.low {
            range if range > 0.0 && value.is_finite() => ((value - self.low) / range).clamp(0.0, 1.0),
            _ => 0.5,
        }
    }
}

/// Takes the mean row away from every row; `[P, H]`.
fn centre(rows: &[f16], hidden: usize) -> Vec<f32> {
    let count = (rows.len() / hidden).max(1);
    let mut mean = vec![0.0f64; hidden]; // [H]
    for row in rows.chunks_exact(hidden) {
        mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.to_f64());
    }
    mean.iter_mut().for_each(|sum| *sum /= count as f64);
    let mean: Vec<f32> = mean.into_iter().map(|x| x as f32).collect();
    let mut centred = vec![0.0; rows.len()];
    centred.par_chunks_exact_mut(hidden).zip(rows.par_chunks_exact(hidden)).for_each(|(to, row)| {
        to.iter_mut().zip(row).zip(&mean).for_each(|((to, x), mean)| *to = x.to_f32() - mean);
    });
    centred
}

fn sum_of_squares(values: &[f32]) -> f64 {
    values.chunks(BLOCK).map(|block| f64::from(dot(block, block))).sum()
}

/// Directions to begin with: any will do that are not at right angles to what is sought; `[K, H]`.
fn start(followed: usize, hidden: usize) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..followed * hidden).map(|_| next()).collect()
}

/// Makes directions of length 1 at right angles, in their order; one that others leave nothing of becomes 0.
fn orthonormalise(directions: &mut [f32], hidden: usize) {
    let count = directions.len() / hidden;
    for i in 0..count {
        let (before, rest) = directions.split_at_mut(i * hidden);
        let this = &mut rest[..hidden];
        let length = sum_of_squares(this).sqrt();
        // Twice: rounding leaves something of the others after the first time.
        for _ in 0..2 {
            for other in before.chunks_exact(hidden) {
                let common: f64 =
                    this.chunks(BLOCK).zip(other.chunks(BLOCK)).map(|(a, b)| f64::from(dot(a, b))).sum();
                this.iter_mut().zip(other).for_each(|(x, y)| *x -= common as f32 * y);
            }
        }
        let left = sum_of_squares(this).sqrt();
        let scale = if left > 1e-6 * length { (1.0 / left) as f32 } else { 0.0 };
        this.iter_mut().for_each(|x| *x *= scale);
    }
}

/// `X Vᵀ`, `[P, K]`.
fn project(centred: &[f32], directions: &[f32], hidden: usize) -> Vec<f32> {
    let followed = directions.len() / hidden;
    let mut along = vec![0.0; centred.len() / hidden * followed];
    along.par_chunks_exact_mut(followed).zip(centred.par_chunks_exact(hidden)).for_each(|(along, row)| {
        along
            .iter_mut()
            .zip(directions.chunks_exact(hidden))
            .for_each(|(y, direction)| *y = dot(row, direction));
    });
    along
}

/// `Yᵀ X`, `[K, H]`.
fn back(centred: &[f32], along: &[f32], hidden: usize, followed: usize) -> Vec<f32> {
    let mut directions = vec![0.0; followed * hidden];
    let blocks: Vec<Vec<f32>> = (0..hidden.div_ceil(BLOCK))
        .into_par_iter()
        .map(|block| {
            let channels = block * BLOCK..hidden.min((block + 1) * BLOCK);
            let mut sums = vec![0.0f32; followed * channels.len()]; // [K, block]
            for (row, along) in centred.chunks_exact(hidden).zip(along.chunks_exact(followed)) {
                for (sums, &y) in sums.chunks_exact_mut(channels.len()).zip(along) {
                    sums.iter_mut().zip(&row[channels.clone()]).for_each(|(sum, x)| *sum += y * x);
                }
            }
            sums
        })
        .collect();
    for (block, sums) in blocks.iter().enumerate() {
        let width = sums.len() / followed;
        for (k, sums) in sums.chunks_exact(width).enumerate() {
            directions[k * hidden + block * BLOCK..][..width].copy_from_slice(sums);
        }
    }
    directions
}

/// `YᵀY`, `[K, K]`.
fn gram(along: &[f32], followed: usize) -> Vec<f64> {
    let mut gram = vec![0.0; followed * followed];
    for along in along.chunks_exact(followed) {
        for (i, &a) in along.iter().enumerate() {
            for (j, &b) in along.iter().enumerate() {
                gram[i * followed + j] += f64::from(a) * f64::from(b);
            }
        }
    }
    gram
}

/// Eigenvalues of a symmetric matrix `[K, K]`, greatest first, and their vectors as rows `[K, K]`: Jacobi's rotations.
fn eigen(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors: Vec<f64> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
    for _ in 0..30 {
        for p in 0..n {
            for q in p + 1..n {
                let off = a[p * n + q];
                if off.abs() <= 1e-15 * (a[p * n + p] * a[q * n + q]).abs().sqrt() {
                    continue;
                }
                let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * off);
                let t = 1f64.copysign(theta) / (theta.abs() + theta.hypot(1.0));
                let c = 1.0 / t.hypot(1.0);
                let s = t * c;
                for k in 0..n {
                    let (x, y) = (a[k * n + p], a[k * n + q]);
                    (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..n {
                    let (x, y) = (a[p * n + k], a[q * n + k]);
                    (a[p * n + k], a[q * n + k]) = (c * x - s * y, s * x + c * y);
                    let (x, y) = (vectors[p * n + k], vectors[q * n + k]);
                    (vectors[p * n + k], vectors[q * n + k]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| a[j * n + j].total_cmp(&a[i * n + i]));
    let values = order.iter().map(|&i| a[i * n + i]).collect();
    (values, order.iter().flat_map(|&i| vectors[i * n..][..n].to_vec()).collect())
}

/// Turns every row of `along`, `[P, K]`, to new axes, which are the rows of `[K, K]`.
fn turn(along: &mut [f32], axes: &[f64], followed: usize) {
    for along in along.chunks_exact_mut(followed) {
        let old: Vec<f64> = along.iter().map(|&x| f64::from(x)).collect();
        for (x, axis) in along.iter_mut().zip(axes.chunks_exact(followed)) {
            *x = axis.iter().zip(&old).map(|(a, b)| a * b).sum::<f64>() as f32;
        }
    }
}

/// The sum of products, in 16 chains.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0f32; 16];
    for (a, b) in a.zip(b) {
        (0..16).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows that vary along three directions at right angles, the first most, and a little along all others.
    fn rows(count: usize, hidden: usize) -> (Vec<f16>, Vec<[f64; 3]>) {
        let mut noise = start(1, count * hidden).into_iter();
        let scores: Vec<[f64; 3]> = (0..count)
            .map(|i| {
                let t = i as f64 / count as f64 * std::f64::consts::TAU;
                [10.0 * t.cos(), 5.0 * (2.0 * t).sin(), 2.5 * (3.0 * t).cos()]
            })
            .collect();
        let mut rows = Vec::new();
        for scores in &scores {
            for channel in 0..hidden {
                let direction = |k: usize| if channel % 3 == k { (3.0 / hidden as f64).sqrt() } else { 0.0 };
                let signal: f64 = (0..3).map(|k| scores[k] * direction(k)).sum();
                let noise = f64::from(noise.next().unwrap()) * 0.02;
                rows.push(f16::from_f64(7.0 + signal + noise));
            }
        }
        (rows, scores)
    }

    #[test]
    fn finds_the_directions_that_the_rows_were_made_of() {
        let (rows, made) = rows(100, 300);
        let made: [Vec<f64>; 3] = std::array::from_fn(|k| made.iter().map(|scores| scores[k]).collect());
        let found = components(&rows, 300);
        assert!(found.share > 0.98, "{}", found.share);
        for (k, made) in made.iter().enumerate() {
            let product = |a: &dyn Fn(usize) -> f64, b: &dyn Fn(usize) -> f64| {
                (0..100).map(|i| a(i) * b(i)).sum::<f64>()
            };
            let (x, y) = (|i: usize| found.scores[i][k], |i: usize| made[i]);
            let cosine = product(&x, &y) / (product(&x, &x) * product(&y, &y)).sqrt();
            assert!(cosine.abs() > 0.999, "component {k}: {cosine}");
            let farthest =
                (0..100).map(x).fold(0.0, |most: f64, x| if x.abs() > most.abs() { x } else { most });
            assert!(farthest > 0.0);
        }
    }

    #[test]
    fn eigenvectors_are_those_of_the_matrix() {
        let matrix = vec![4.0, 1.0, -2.0, 1.0, 3.0, 0.5, -2.0, 0.5, 1.0];
        let (values, vectors) = eigen(matrix.clone(), 3);
        assert!(values[0] >= values[1] && values[1] >= values[2]);
        for (value, vector) in values.iter().zip(vectors.chunks_exact(3)) {
            for i in 0..3 {
                let image: f64 = (0..3).map(|j| matrix[i * 3 + j] * vector[j]).sum();
                assert!((image - value * vector[i]).abs() < 1e-12, "{values:?} {vectors:?}");
            }
        }
    }

    #[test]
    fn rows_that_say_nothing_are_grey_and_few_rows_are_no_trouble() {
        for count in [0, 1, 2, 5] {
            let same = vec![f16::from_f32(0.3); count * 7];
            let found = components(&same, 7);
            assert_eq!((found.scores.len(), found.share), (count, 0.0));
            assert!(component_colours(&found).iter().all(|c| c == &component_colours(&found)[0]));
        }
        // Two rows differ along one direction, and no more.
        let two = [1.0, 2.0, 3.0, 3.0, 2.0, 2.0].map(f16::from_f32);
        let found = components(&two, 3);
        assert!(found.share > 0.999_999);
        assert!(found.scores.iter().all(|s| s[0].abs() > 1.0 && s[1] == 0.0 && s[2] == 0.0), "{found:?}");
    }

    #[test]
    fn threads_change_no_bit() {
        let (rows, _) = rows(60, 700);
        let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        let one = pool(1).install(|| components(&rows, 700));
        let three = pool(3).install(|| components(&rows, 700));
        assert_eq!(one.scores, three.scores);
    }

    #[test]
    fn heat_grows_brighter() {
        let brightness = |place: usize| heat(place as f64 / 20.0).iter().map(|&c| u32::from(c)).sum::<u32>();
        assert!((0..20).all(|i| brightness(i) < brightness(i + 1)));
        let rows = [3.0, 4.0, 0.0, 0.0].map(f16::from_f32);
        assert_eq!(norms(&rows, 2), [5.0, 0.0]);
        assert_eq!(norm_colours(&[5.0, 0.0]), [heat(1.0), heat(0.0)]);
    }
}
