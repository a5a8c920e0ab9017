//! Markers and images that do not match: what was found where, and a prompt that would do.

use std::fmt;

use super::request::Request;
use super::template::{MarkerPlace, PromptText};

/// Markers listed one by one in a message; more are only counted.
const LISTED: usize = 24;

/// Markers and images that do not match. [`fmt::Display`] is the whole message, over several lines.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MarkerMismatch {
    /// The marker.
    pub marker: &'static str,
    /// Markers found.
    pub markers: usize,
    /// Images given.
    pub images: usize,
    /// Where each marker stands, in the order of the prompt; shape `[markers]`.
    pub places: Vec<MarkerPlace>,
    /// The images that have no marker, as messages call them: `image 3 (c.jpg)`, counting from 1.
    pub left_over: Vec<String>,
    /// A query with the right number of markers, to copy; none where history and meta instruction alone hold
    /// more markers than there are images, so that no query would do.
    pub corrected: Option<String>,
}

impl MarkerMismatch {
    /// Says what is wrong with a request whose markers stand at `places`.
    pub(super) fn new(request: &Request, places: Vec<MarkerPlace>, marker: &'static str) -> Self {
        let (markers, images) = (places.len(), request.images.len());
        // An absurd image count must not become an absurd list.
        let left_over = (markers..images).take(1024).map(|i| request.images.describe(i)).collect();
        let before = places.iter().filter(|place| place.text != PromptText::Query).count();
        let corrected = (before <= images && images - before <= 1024)
            .then(|| correct(&request.query, before..images, marker));
        Self { marker, markers, images, places, left_over, corrected }
    }
}

/// Writes a query with one labelled marker for each image of `images` before the text of `query`.
fn correct(query: &str, images: std::ops::Range<usize>, marker: &str) -> String {
    let mut corrected = String::new();
    for image in images {
        corrected.push_str(&format!("Image {}: {marker}; ", image + 1));
    }
    corrected.push_str(without_markers(query, marker).trim_start());
    corrected.truncate(corrected.trim_end().len());
    corrected
}

/// Takes the markers out of a text, with the labels (`Image 1:` … `;`) and doubled spaces they would leave.
fn without_markers(text: &str, marker: &str) -> String {
    let mut kept = String::new();
    for (i, mut rest) in text.split(marker).enumerate() {
        if i > 0 {
            if let Some(len) = before_label(&kept) {
                kept.truncate(len);
                rest = rest.trim_start().trim_start_matches([';', ',', '；', '，']);
            }
            // What stood around the marker must not become another one.
            if (1..marker.len()).any(|len| kept.ends_with(&marker[..len])) {
                kept.push(' ');
            }
            if kept.is_empty() || kept.ends_with(char::is_whitespace) {
                rest = rest.trim_start();
            }
        }
        kept.push_str(rest);
    }
    kept
}

/// If `text` ends in a label such as `Image 1: ` or `image2`, returns the length of what precedes it.
fn before_label(text: &str) -> Option<usize> {
    let colon = text.trim_end();
    let number = colon.strip_suffix([':', '：']).unwrap_or(colon).trim_end();
    let word = number.trim_end_matches(|c: char| c.is_ascii_digit());
    let word = (word.len() < number.len()).then(|| word.trim_end())?;
    let start = word.len().checked_sub("image".len())?;
    let label = word.get(start..)?;
    let at_word = !word[..start].ends_with(char::is_alphanumeric);
    (label.eq_ignore_ascii_case("image") && at_word).then_some(start)
}

/// `1 marker`, `2 markers`.
fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

impl fmt::Display for MarkerMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the prompt has {} `{}`, but {} given",
            count(self.markers, "marker"),
            self.marker,
            if self.images == 1 { "1 image is".to_owned() } else { format!("{} images are", self.images) }
        )?;
        for (i, MarkerPlace { text, offset }) in self.places.iter().enumerate().take(LISTED) {
            let matched = if i < self.images { "" } else { ": no image" };
            write!(f, "\n  marker {} at byte {offset} of the {text}{matched}", i + 1)?;
        }
        if let more @ 1.. = self.markers.saturating_sub(LISTED) {
            write!(f, "\n  … and {}", count(more, "more marker"))?;
        }
        for image in self.left_over.iter().take(LISTED) {
            write!(f, "\n  no marker: {image}")?;
        }
        if let more @ 1.. = self.images.saturating_sub(self.markers).saturating_sub(LISTED) {
            write!(f, "\n  … and {}", count(more, "more image"))?;
        }
        let in_history = self
            .places
            .iter()
            .any(|place| matches!(place.text, PromptText::HistoryQuery(_) | PromptText::HistoryAnswer(_)));
        if in_history && self.markers > self.images {
            f.write_str(
                "\nMarkers of earlier turns count: give the images of the whole conversation again.",
            )?;
        }
        match &self.corrected {
            Some(prompt) => {
                f.write_str(if self.images == 0 {
                    "\nGive one image per marker, or take the markers out:"
                } else {
                    "\nWrite one marker per image in the order of the images, for example:"
                })?;
                write!(f, "\n{prompt}")
            }
            None => f.write_str("\nTake the surplus markers out of the history and the meta instruction."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{correct, without_markers};
    use crate::config::MARKER;

    #[test]
    fn labels_and_spaces_go_with_their_markers() {
        for (text, kept) in [
            ("Compare.", "Compare."),
            ("<ImageHere>Compare.", "Compare."),
            ("<ImageHere> <ImageHere>Compare.", "Compare."),
            ("Image 1: <ImageHere>; Image 2: <ImageHere>; Compare.", "Compare."),
            ("Image1 <ImageHere>; IMAGE2 <ImageHere>; Compare.", "Compare."),
            ("Look at <ImageHere> and compare.", "Look at and compare."),
            ("myimage 1: <ImageHere>, ok", "myimage 1: , ok"),
            ("第一张图：<ImageHere>", "第一张图："),
            ("Image 1: <ImageHere>", ""),
            ("é1:<ImageHere>", "é1:"),
            ("<Image<ImageHere>Here>", "<Image Here>"),
        ] {
            assert_eq!(without_markers(text, MARKER).trim_start(), kept, "{text}");
        }
    }

    #[test]
    fn corrected_has_one_marker_per_image() {
        let prompt = correct("Image 1: <ImageHere>; Compare.", 0..3, MARKER);
        assert_eq!(prompt, "Image 1: <ImageHere>; Image 2: <ImageHere>; Image 3: <ImageHere>; Compare.");
        assert_eq!(correct("<ImageHere>", 1..2, MARKER), "Image 2: <ImageHere>;");
        assert_eq!(correct(" What? <ImageHere>", 2..2, MARKER), "What?");
    }
}
