//! What decides an image's pixels on their way to the tower, as text that can be kept and compared.

use std::collections::BTreeMap;
use std::fmt;

use crate::config::ModelConfig;
use crate::image::{Alpha, DecodeOptions, Exif, Fit, JPEG_EXACT, Resample};

/// The rules by which files become the square that the tower sees: two calls with the same rules make the same pixels
/// of the same file.
///
/// EXIF, alpha, resize, the JPEG decoder of this build, the model's image and patch size in pixels, and, where images are
/// not stretched to that, how they fit. Limits are not
/// among them: they refuse an image, and change none.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Preprocessing(BTreeMap<String, String>);

/// The rule of how an image becomes a square.
const FIT: &str = "fit";

/// What that rule is called.
fn fit_name(fit: Fit) -> &'static str {
    match fit {
        Fit::Stretch => "stretch",
        Fit::CentreCrop => "centre-crop",
    }
}

/// A rule in which two preprocessings differ.
pub(super) struct Difference {
    /// Its name: that of the command's option, where there is one.
    pub rule: String,
    /// What this one has.
    pub has: String,
    /// What the other one has.
    pub other: String,
}

impl Preprocessing {
    /// Joins the rules of a call and the sizes of its model.
    pub fn new(config: &ModelConfig, decode: &DecodeOptions, resample: Resample) -> Self {
        let exif = match decode.exif {
            Exif::Apply => "apply".to_owned(),
            Exif::Ignore => "ignore".to_owned(),
        };
        let alpha = match decode.alpha {
            Alpha::Drop => "drop".to_owned(),
            Alpha::WHITE => "white".to_owned(),
            Alpha::BLACK => "black".to_owned(),
            Alpha::Over([r, g, b]) => format!("#{r:02x}{g:02x}{b:02x}"),
        };
        let resample = match resample {
            Resample::Pillow => "pillow".to_owned(),
            Resample::Pillow13 => "pillow13".to_owned(),
        };
        let jpeg = if JPEG_EXACT { "exact" } else { "portable" };
        let rules = [
            ("exif", exif),
            ("alpha", alpha),
            ("resample", resample),
            ("jpeg", jpeg.to_owned()),
            ("image_size", config.image_size.to_string()),
            ("patch_size", config.patch_size.to_string()),
        ];
        // Files from before there was a choice do not name it.
        let fit =
            (config.profile.fit != Fit::default()).then(|| (FIT, fit_name(config.profile.fit).to_owned()));
        Self(rules.into_iter().chain(fit).map(|(name, value)| (name.to_owned(), value)).collect())
    }

    /// Reads what [`Preprocessing::to_json`] wrote.
    pub(super) fn from_json(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok().map(Self)
    }

    pub(crate) fn to_json(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// The first rule in which they differ, also one that only one of them knows.
    pub(super) fn difference(&self, other: &Self) -> Option<Difference> {
        let absent = |rule: &str| if rule == FIT { fit_name(Fit::default()) } else { "nothing" };
        let value = |of: &Self, rule: &str| of.0.get(rule).map_or(absent(rule), String::as_str).to_owned();
        let rules = self.0.keys().chain(other.0.keys());
        let mut differences = rules.map(|rule| Difference {
            rule: rule.clone(),
            has: value(self, rule),
            other: value(other, rule),
        });
        differences.find(|found| found.has != found.other)
    }
}

/// `alpha drop, exif apply, image_size 490, …`
impl fmt::Display for Preprocessing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules: Vec<String> = self.0.iter().map(|(name, value)| format!("{name} {value}")).collect();
        f.write_str(&rules.join(", "))
    }
}
