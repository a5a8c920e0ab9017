//! A picture to draw on: rectangles, images, strokes, with smooth edges.

use crate::image::{RgbImage, RgbView};

/// A colour, one byte a channel.
pub type Rgb = [u8; 3];

/// A rectangle in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rect {
    /// Left edge.
    pub x: f32,
    /// Upper edge.
    pub y: f32,
    /// Width.
    pub w: f32,
    /// Height.
    pub h: f32,
}

/// Pixels, drawn over one another; what lies outside is not drawn.
#[derive(Debug)]
pub struct Canvas {
    image: RgbImage,
}

impl Canvas {
    /// Starts with one colour.
    pub fn new(width: u32, height: u32, colour: Rgb) -> Self {
        Self { image: RgbImage { width, height, data: colour.repeat((width * height) as usize) } }
    }

    /// Returns what was drawn.
    pub fn into_image(self) -> RgbImage {
        self.image
    }

    /// Fills a rectangle with round corners.
    pub fn fill(&mut self, rect: Rect, radius: f32, colour: Rgb) {
        let radius = radius.min(rect.w / 2.0).min(rect.h / 2.0);
        let (cx, cy) = (rect.x + rect.w / 2.0, rect.y + rect.h / 2.0);
        let (hw, hh) = (rect.w / 2.0 - radius, rect.h / 2.0 - radius);
        self.cover([rect.x, rect.y, rect.x + rect.w, rect.y + rect.h], colour, |x, y| {
            let (dx, dy) = ((x - cx).abs() - hw, (y - cy).abs() - hh);
            let outside = dx.max(0.0).hypot(dy.max(0.0)) + dx.max(dy).min(0.0);
            0.5 + radius - outside
        });
    }

    /// Draws lines with round ends as one shape, `radius` pixels to each side.
    pub fn strokes(&mut self, lines: &[[(f32, f32); 2]], radius: f32, colour: Rgb) {
        let Some(&[first, _]) = lines.first() else { return };
        let mut bounds = [first.0, first.1, first.0, first.1];
        for &(x, y) in lines.iter().flatten() {
            bounds = [bounds[0].min(x), bounds[1].min(y), bounds[2].max(x), bounds[3].max(y)];
        }
        let [left, top, right, bottom] = bounds;
        self.cover([left - radius, top - radius, right + radius, bottom + radius], colour, |x, y| {
            let nearest = lines.iter().map(|line| distance((x, y), *line)).fold(f32::MAX, f32::min);
            0.5 + radius - nearest
        });
    }

    /// Copies an image, its upper left corner at `(x, y)`.
    pub fn paste(&mut self, x: u32, y: u32, image: RgbView<'_>) {
        for row in 0..image.height().min(self.image.height.saturating_sub(y)) {
            let width = image.width().min(self.image.width.saturating_sub(x)) as usize;
            let at = 3 * ((y + row) as usize * self.image.width as usize + x as usize);
            self.image.data[at..at + 3 * width].copy_from_slice(&image.row(row)[..3 * width]);
        }
    }

    /// Mixes a colour in, as much as `share` says of each pixel's centre, over the pixels that `bounds` (left, top, right,
    /// bottom) touch.
    fn cover(&mut self, bounds: [f32; 4], colour: Rgb, share: impl Fn(f32, f32) -> f32) {
        let [left, top, right, bottom] = bounds;
        let clip = |value: f32, most: u32| value.clamp(0.0, most as f32) as u32;
        let (width, height) = (self.image.width, self.image.height);
        for y in clip((top - 1.0).floor(), height)..clip((bottom + 1.0).ceil(), height) {
            for x in clip((left - 1.0).floor(), width)..clip((right + 1.0).ceil(), width) {
                let share = share(x as f32 + 0.5, y as f32 + 0.5).clamp(0.0, 1.0);
                let at = 3 * (y as usize * width as usize + x as usize);
                for (old, new) in self.image.data[at..at + 3].iter_mut().zip(colour) {
                    let mixed = f32::from(*old) + (f32::from(new) - f32::from(*old)) * share;
                    *old = mixed.round() as u8;
                }
            }
        }
    }
}

/// The distance of a point from a line between two points.
fn distance((x, y): (f32, f32), [a, b]: [(f32, f32); 2]) -> f32 {
    let (dx, dy) = (b.0 - a.0, b.1 - a.1);
    let length = dx * dx + dy * dy;
    let along = if length > 0.0 { (((x - a.0) * dx + (y - a.1) * dy) / length).clamp(0.0, 1.0) } else { 0.0 };
    (x - a.0 - along * dx).hypot(y - a.1 - along * dy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pixel(canvas: &Canvas, x: usize, y: usize) -> Rgb {
        let at = 3 * (y * canvas.image.width as usize + x);
        [0, 1, 2].map(|c| canvas.image.data[at + c])
    }

    #[test]
    fn a_rectangle_has_the_pixels_it_says_and_half_of_those_it_halves() {
        let mut canvas = Canvas::new(8, 8, [0; 3]);
        canvas.fill(Rect { x: 2.0, y: 2.0, w: 3.5, h: 4.0 }, 0.0, [200; 3]);
        assert_eq!((pixel(&canvas, 2, 2), pixel(&canvas, 4, 5)), ([200; 3], [200; 3]));
        assert_eq!(pixel(&canvas, 5, 3), [100; 3]);
        assert_eq!(
            (pixel(&canvas, 1, 2), pixel(&canvas, 6, 3), pixel(&canvas, 2, 6)),
            ([0; 3], [0; 3], [0; 3])
        );
    }

    #[test]
    fn what_lies_outside_is_not_drawn() {
        let mut canvas = Canvas::new(4, 4, [9; 3]);
        let image = RgbImage { width: 3, height: 3, data: vec![7; 27] };
        canvas.paste(2, 3, image.view());
        canvas.paste(9, 9, image.view());
        canvas.fill(Rect { x: -9.0, y: -9.0, w: 5.0, h: 5.0 }, 2.0, [1; 3]);
        canvas.strokes(&[[(-5.0, 2.0), (-3.0, 2.0)]], 1.0, [1; 3]);
        canvas.strokes(&[], 1.0, [1; 3]);
        let sevens = canvas.image.data.iter().filter(|&&byte| byte == 7).count();
        assert_eq!((sevens, canvas.image.data.iter().filter(|&&byte| byte == 9).count()), (6, 42));
    }

    #[test]
    fn a_dot_is_round() {
        let mut canvas = Canvas::new(9, 9, [0; 3]);
        canvas.strokes(&[[(4.5, 4.5), (4.5, 4.5)]], 3.0, [255; 3]);
        assert_eq!(
            (pixel(&canvas, 4, 4), pixel(&canvas, 4, 2), pixel(&canvas, 1, 1)),
            ([255; 3], [255; 3], [0; 3])
        );
    }
}
