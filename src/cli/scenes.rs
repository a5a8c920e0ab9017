//! Pictures drawn on the spot, for demonstration and measurement.

use imagehere::image::RgbImage;

/// A colour in units of 1.
type Rgb = [f32; 3];

/// A colour at every point (x, y) of a frame 4 wide and 3 high, y downwards.
pub type Scene = fn(f32, f32) -> Rgb;

/// The scenes, and what their files are called.
pub const SCENES: [(&str, Scene); 2] = [("sunset.png", sunset), ("house.png", house)];

/// Draws a scene. Four samples per pixel keep edges smooth.
pub fn draw(width: u32, height: u32, scene: Scene) -> RgbImage {
    let mut data = Vec::with_capacity(3 * (width * height) as usize); // [height, width, 3]
    for y in 0..height {
        for x in 0..width {
            let mut sum = [0.0; 3];
            for (dx, dy) in [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)] {
                let (x, y) = ((x as f32 + dx) * 4.0 / width as f32, (y as f32 + dy) * 3.0 / height as f32);
                let colour = scene(x, y);
                (0..3).for_each(|c| sum[c] += colour[c] / 4.0);
            }
            data.extend(sum.map(|value| (value.clamp(0.0, 1.0) * 255.0).round() as u8));
        }
    }
    RgbImage { width, height, data }
}

/// From `a` (t = 0) to `b` (t = 1).
fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    [0, 1, 2].map(|c| a[c] + (b[c] - a[c]) * t.clamp(0.0, 1.0))
}

/// A low sun over the sea, and its light on the waves.
fn sunset(x: f32, y: f32) -> Rgb {
    let from_sun = (x - 2.0).hypot(y - 1.5);
    match y {
        y if y < 2.0 && from_sun < 0.45 => [1.0, 0.93, 0.62],
        y if y < 2.0 => {
            mix(mix([1.0, 0.55, 0.25], [0.16, 0.2, 0.45], (2.0 - y) / 2.0), [1.0, 0.8, 0.4], 0.5 - from_sun)
        }
        _ => {
            let wave = ((y - 2.0) * 40.0 + (x * 9.0).sin()).sin();
            let glitter = wave > 0.2 && (x - 2.0).abs() < 0.2 + (y - 2.0) * 0.5;
            if glitter { [1.0, 0.78, 0.42] } else { mix([0.2, 0.22, 0.4], [0.05, 0.08, 0.2], y - 2.0) }
        }
    }
}

/// A house with a red roof, a door and two windows, on grass under a clear sky.
fn house(x: f32, y: f32) -> Rgb {
    let within =
        |left: f32, right: f32, top: f32, bottom: f32| x >= left && x < right && y >= top && y < bottom;
    if within(1.85, 2.2, 1.75, 2.4) {
        [0.35, 0.2, 0.1]
    } else if within(1.35, 1.65, 1.55, 1.85) || within(2.4, 2.7, 1.55, 1.85) {
        [0.65, 0.85, 1.0]
    } else if within(1.1, 2.95, 1.25, 2.4) {
        [0.95, 0.9, 0.75]
    } else if (0.5..1.25).contains(&y) && (x - 2.025).abs() < (y - 0.5) * 1.5 {
        [0.75, 0.15, 0.12]
    } else if y >= 2.2 {
        mix([0.35, 0.65, 0.25], [0.2, 0.45, 0.15], (y - 2.2) / 0.8)
    } else {
        mix([0.35, 0.6, 0.95], [0.8, 0.9, 1.0], y / 2.2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pictures_are_different_and_not_flat() {
        let (a, b) = (draw(64, 48, sunset), draw(64, 48, house));
        assert_eq!(a.data.len(), 64 * 48 * 3);
        let colours = |image: &RgbImage| image.data.chunks(3).collect::<std::collections::HashSet<_>>().len();
        assert!(colours(&a) > 100 && colours(&b) > 30);
        assert_ne!(a, b);
    }
}
