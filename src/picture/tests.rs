//! Whole pictures: where things are, what is shown of what is missing, what is refused.

use super::*;
use crate::config::{ModelConfig, ModelSizes};
use crate::prompt::{LengthOptions, TokenSegment, plan_tokens};

/// Images of 3 × 3 patches with some text around each, rows of 4 elements, squares of one colour each.
struct Scene {
    plan: SequencePlan,
    rows: Vec<f16>, // [L, 4]
    names: Vec<String>,
    pixels: Vec<RgbImage>,
}

impl Scene {
    fn new(images: usize, length: LengthOptions) -> Self {
        let sizes = ModelSizes {
            image_size: 6,
            patch_size: 2,
            width: 64,
            layers: 1,
            mlp_width: 64,
            projector_width: 64,
            hidden_size: 4,
            vocab_size: 100,
        };
        let mut config = ModelConfig::from_sizes(sizes).unwrap();
        (config.max_length, config.max_position_embeddings) = (Some(20), Some(10_000));
        let mut segments = vec![TokenSegment::Text(vec![1, 2, 3])];
        for _ in 0..images {
            segments.extend([TokenSegment::Image, TokenSegment::Text(vec![4])]);
        }
        let plan = plan_tokens(&segments, &config, length).unwrap();
        let rows = (0..plan.len() * 4).map(|i| f16::from_f32((i * i % 23) as f32 - 9.0)).collect();
        let square =
            |i: usize| RgbImage { width: 6, height: 6, data: [(10 + 20 * (i % 12)) as u8; 3].repeat(36) };
        let names = (0..images).map(|i| format!("{i}.png")).collect();
        Self { plan, rows, names, pixels: (0..images).map(square).collect() }
    }

    fn record(&self) -> PictureRecord<'_> {
        PictureRecord {
            plan: &self.plan,
            inputs_embeds: &self.rows,
            hidden: 4,
            grid: 3,
            names: &self.names,
            pixels: &self.pixels,
            map: Map::Components,
        }
    }
}

fn at(image: &RgbImage, x: u32, y: u32) -> Rgb {
    let row = image.view().row(y);
    std::array::from_fn(|c| row[3 * x as usize + c])
}

fn colours(image: &RgbImage) -> Vec<Rgb> {
    let mut all: Vec<Rgb> = image.data.chunks_exact(3).map(|c| [c[0], c[1], c[2]]).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Where the first card begins, in pixels.
const FIRST: (u32, u32) = (MARGIN as u32, (MARGIN + SIZES[0] + 22.0) as u32);

#[test]
fn pixels_and_map_stand_side_by_side_and_a_patch_is_a_square_of_one_colour() {
    let scene = Scene::new(2, LengthOptions::default());
    let picture = draw(&scene.record()).unwrap();
    assert_eq!(picture, draw(&scene.record()).unwrap());
    let (x, y) = FIRST;
    assert_eq!((at(&picture, x, y), at(&picture, x + 215, y + 215)), ([10; 3], [10; 3]));
    assert_eq!(at(&picture, x - 1, y), PAPER);
    let second = x + 2 * 216 + SEAM as u32 + MARGIN as u32;
    assert_eq!(at(&picture, second + 100, y + 100), [30; 3]);

    let found = maps::component_colours(&maps::components(&scene.rows[3 * 4..][..9 * 4], 4));
    for (patch, colour) in found.into_iter().enumerate() {
        let (left, top) = (x + 216 + SEAM as u32 + 72 * (patch as u32 % 3), y + 72 * (patch as u32 / 3));
        for (dx, dy) in [(0, 0), (71, 0), (0, 71), (71, 71), (30, 30)] {
            assert_eq!(at(&picture, left + dx, top + dy), colour, "patch {patch}");
        }
    }
    let seen = colours(&picture);
    assert!([PAPER, INK, FAINT, MARKS[0], MARKS[1], strip::TEXT].iter().all(|c| seen.contains(c)));
    assert!(!seen.contains(&MARKS[3]) && !seen.contains(&HOLLOW));
}

#[test]
fn norms_have_the_colours_of_heat() {
    let scene = Scene::new(1, LengthOptions::default());
    let picture = draw(&PictureRecord { map: Map::Norm, ..scene.record() }).unwrap();
    let seen = colours(&picture);
    assert!(seen.contains(&maps::heat(0.0)) && seen.contains(&maps::heat(1.0)));
    assert_ne!(picture, draw(&scene.record()).unwrap());
}

#[test]
fn what_a_cut_took_is_hollow() {
    // 20 positions: 3 of text, 9 rows, 1, 7 rows of the second image, nothing of the third.
    let scene = Scene::new(3, LengthOptions::new().truncate(true));
    assert_eq!(scene.plan.slots.iter().map(|slot| slot.len).collect::<Vec<_>>(), [9, 7, 0]);
    let picture = draw(&scene.record()).unwrap();
    let (x, y) = FIRST;
    let second = x + 2 * (2 * 216 + SEAM as u32) - 216 + MARGIN as u32;
    assert_ne!(at(&picture, second + 10, y + 150), HOLLOW, "row 7");
    assert_eq!((at(&picture, second + 80, y + 150), at(&picture, second + 210, y + 210)), (HOLLOW, HOLLOW));
    let third = (x + 216 + SEAM as u32, y + 216 + CAPTION as u32);
    assert_eq!(
        (at(&picture, third.0, third.1), at(&picture, third.0 + 215, third.1 + 215)),
        (HOLLOW, HOLLOW)
    );
}

#[test]
fn images_wrap_into_rows_and_need_no_pixels_or_names() {
    let size = |images: usize, alone: bool| {
        let scene = Scene::new(images, LengthOptions::default());
        let record = scene.record();
        let record = if alone { PictureRecord { pixels: &[], names: &[], ..record } } else { record };
        let picture = draw(&record).unwrap();
        (picture.width, picture.height)
    };
    let sizes = [1, 2, 4, 5, 12].map(|images| size(images, false));
    assert!(sizes.iter().all(|&(width, _)| width >= 940), "{sizes:?}");
    assert_eq!(sizes[2].1 - sizes[1].1, 216 + CAPTION as u32, "a second row");
    assert!(sizes[3].0 > sizes[2].0 && sizes[4].0 > sizes[3].0);
    assert!(size(2, true).0 >= 940 && size(30, true).0 >= 940);
    assert_eq!(size(0, false).0, 940);
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let scene = Scene::new(2, LengthOptions::default());
    let record = scene.record();
    let cases = [
        (PictureRecord { inputs_embeds: &scene.rows[1..], ..record }, "for a plan of 23 positions of 4"),
        (PictureRecord { hidden: 0, ..record }, "positions of 0"),
        (PictureRecord { names: &scene.names[..1], ..record }, "1 names for 2 images"),
        (PictureRecord { pixels: &scene.pixels[..1], ..record }, "1 squares of pixels for 2 images"),
        (PictureRecord { grid: 2, ..record }, "a slot of 9 rows for images of 2×2 patches"),
    ];
    for (record, part) in cases {
        let message = draw(&record).unwrap_err().to_string();
        assert!(message.contains(part) && message.ends_with("of one encode"), "{message}");
    }
}
