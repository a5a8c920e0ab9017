//! The file of `--request`: images by name, and the sequences that share them.
//!
//! ```text
//!   bytes ─▶ JSON, field by field ─▶ names ─▶ which sequence uses which image
//!            line and column         sequence   sequence
//! ```
//!
//! What is wrong with it is found here, before a model is opened; each message has one of the two below the line.
//! Nothing of the command line is seen from here: the tests of hostile files are made of this file, too.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use imagehere::prompt::Bos;
use imagehere::{Error, Result};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// The largest file to read, in bytes: texts, no pixels.
pub const FILE_BYTES: u64 = 4 << 20;
/// The most sequences. Each holds a file open until all are written, and systems allow few hundred.
const SEQUENCES: usize = 200;
/// The most images.
const IMAGES: usize = 1000;
/// The longest name of a sequence, in bytes: file systems allow 255, and it gets an ending.
const NAME_BYTES: usize = 200;
/// Names that a message lists; more are only counted.
const LISTED: usize = 8;

/// A request whose names are all known, unique and safe.
pub struct Requests {
    /// Images that some sequence uses, in the order of the file.
    pub images: Vec<Picture>,
    /// The sequences.
    pub sequences: Vec<Sequence>,
    /// Names of images that no sequence uses.
    pub unused: Vec<String>,
}

/// An image of a request.
pub struct Picture {
    /// Its name.
    pub name: String,
    /// Its file, from where the command runs.
    pub path: PathBuf,
}

/// A sequence of a request.
pub struct Sequence {
    /// What messages call it: `sequence 1 ("left")`.
    pub label: String,
    /// The name of its file, or folder.
    pub file: String,
    /// For each of its images, the index among [`Requests::images`].
    pub images: Vec<usize>,
    /// What the file says of it.
    pub entry: Entry,
}

/// A sequence as it stands in the file.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What its file is called.
    pub name: Option<String>,
    /// The query, or with `raw` the whole prompt.
    pub prompt: String,
    #[serde(default)]
    images: Vec<String>,
    /// Given as null: none; not given: the default.
    #[serde(default, deserialize_with = "given")]
    pub meta_instruction: Option<Option<String>>,
    /// Earlier turns.
    #[serde(default)]
    pub history: Vec<(String, String)>,
    /// Whether `prompt` is the whole of it.
    #[serde(default)]
    pub raw: bool,
    bos: Option<Where>,
}

/// Which text segments begin with BOS, as the option spells it.
#[derive(Clone, Copy, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Where {
    PerSegment,
    First,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    images: Named,
    sequences: Entries,
}

/// Images in the order of the file; a name stands once.
#[derive(Default)]
struct Named(Vec<(String, String)>);

struct Entries(Vec<Entry>);

/// An object alone: a plain struct would take an array of its fields, too.
struct Object<T>(T);

/// Takes the bytes of the request `path` apart, and checks all that can be checked without a model. `ending` is that of
/// the sequences' files.
pub fn parse(bytes: &[u8], path: &Path, ending: &str) -> Result<Requests> {
    let Object(document) = serde_json::from_slice::<Object<Document>>(bytes).map_err(|e| {
        argument(
            format!("{} is no request: {e}", path.display()),
            "Write {\"images\": {\"a\": \"a.jpg\", ...}, \"sequences\": [{\"prompt\": \"<ImageHere>?\", \"images\": \
             [\"a\"]}, ...]}",
        )
    })?;
    check(document, path, ending)
}

fn check(document: Document, path: &Path, ending: &str) -> Result<Requests> {
    let (Named(images), Entries(entries)) = (document.images, document.sequences);
    if entries.is_empty() {
        return Err(argument(
            format!("{} has no sequence", path.display()),
            "Write one or more into `sequences`",
        ));
    }
    for (count, most, what) in [(entries.len(), SEQUENCES, "sequences"), (images.len(), IMAGES, "images")] {
        if count > most {
            return Err(argument(
                format!("{} has {count} {what}, and the limit is {most}", path.display()),
                "Split it into several",
            ));
        }
    }
    if let Some((name, _)) = images.iter().find(|(name, file)| name.is_empty() || file.is_empty()) {
        return Err(argument(
            format!("the image {name:?} of {} has no name or no path", path.display()),
            "Give it both: \"images\": {\"a\": \"a.jpg\"}",
        ));
    }

    // Case aside: on some file systems `A` and `a` are one file.
    let mut taken: HashMap<String, String> = HashMap::new(); // file without case, label
    let names: HashSet<&str> = images.iter().map(|(name, _)| name.as_str()).collect();
    let mut used = HashSet::new();
    for (place, entry) in entries.iter().enumerate() {
        let label = label(place, entry);
        let inside = |problem: String, remedy: String| within(&label, argument(problem, remedy));
        if let Some(problem) = entry.name.as_deref().and_then(unsafe_name) {
            return Err(inside(
                format!("its name {problem}"),
                "A file is called so: use letters, digits and any of -_.+=@, after the first of them"
                    .to_owned(),
            ));
        }
        let file = file(place, entry, ending);
        let key = file.to_lowercase();
        if let Some(other) = taken.get(&key) {
            return Err(inside(
                format!("its file would be {file}, and so would that of {other}"),
                "Give them names that differ in more than case".to_owned(),
            ));
        }
        for name in &entry.images {
            if !names.contains(name.as_str()) {
                return Err(inside(format!("there is no image {name:?} in `images`"), known(&images)));
            }
            used.insert(name.clone());
        }
        taken.insert(key, label);
    }

    let (images, unused): (Vec<_>, Vec<_>) = images.into_iter().partition(|(name, _)| used.contains(name));
    let folder = path.parent().unwrap_or(Path::new(""));
    let places: HashMap<&str, usize> = images.iter().map(|(name, _)| name.as_str()).zip(0..).collect();
    let sequences = entries.into_iter().enumerate().map(|(place, entry)| Sequence {
        label: label(place, &entry),
        file: file(place, &entry, ending),
        images: entry.images.iter().filter_map(|name| places.get(name.as_str()).copied()).collect(),
        entry,
    });
    Ok(Requests {
        sequences: sequences.collect(),
        unused: unused.into_iter().map(|(name, _)| name).collect(),
        images: images
            .iter()
            .map(|(name, file)| Picture { name: name.clone(), path: folder.join(file) })
            .collect(),
    })
}

impl Entry {
    /// Which text segments begin with BOS, if it says so.
    pub fn bos(&self) -> Option<Bos> {
        self.bos.map(|bos| match bos {
            Where::PerSegment => Bos::PerSegment,
            Where::First => Bos::First,
        })
    }
}

/// An [`Error::Argument`] from its two halves.
fn argument(problem: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::Argument { problem: problem.into(), remedy: remedy.into() }
}

/// Names the sequence that an error is about.
pub fn within(label: &str, error: Error) -> Error {
    Error::Sequence { sequence: label.to_owned(), source: Box::new(error) }
}

fn label(place: usize, entry: &Entry) -> String {
    match &entry.name {
        Some(name) if name.len() <= NAME_BYTES => format!("sequence {place} ({name:?})"),
        _ => format!("sequence {place}"),
    }
}

fn file(place: usize, entry: &Entry, ending: &str) -> String {
    match &entry.name {
        Some(name) => format!("{name}{ending}"),
        None => format!("{place:03}{ending}"),
    }
}

/// Says why a name must not become that of a file, if so.
fn unsafe_name(name: &str) -> Option<String> {
    let plain = |c: &char| c.is_alphanumeric() || "-_.+=@,".contains(*c);
    match name.chars().next() {
        None => Some("is empty".to_owned()),
        Some(c) if !c.is_alphanumeric() => Some(format!("begins with {c:?}")),
        _ if name.len() > NAME_BYTES => {
            Some(format!("has {} bytes, and {NAME_BYTES} is the limit", name.len()))
        }
        _ => name.chars().find(|c| !plain(c)).map(|c| format!("has {c:?} in it")),
    }
}

fn known(images: &[(String, String)]) -> String {
    let mut names: Vec<_> = images.iter().take(LISTED).map(|(name, _)| format!("{name:?}")).collect();
    match images.len() {
        0 => return "Write it into `images`, which has none".to_owned(),
        n if n > LISTED => names.push(format!("{} more", n - LISTED)),
        _ => {}
    }
    format!("Write it into `images`, or use one of those there: {}", names.join(", "))
}

/// Tells a field that is null from one that is not there.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(Fields(PhantomData))
    }
}

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Named;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of image names and paths")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Named, A::Error> {
                let (mut pairs, mut seen) = (Vec::new(), HashSet::new());
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(de::Error::custom(format!("the image name {name:?} stands twice")));
                    }
                    let path = map.next_value::<String>();
                    pairs.push((
                        name.clone(),
                        path.map_err(|e| inside(&format!("the path of image {name:?}"), e))?,
                    ));
                }
                Ok(Named(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of sequences")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                loop {
                    let place = format!("sequence {}", entries.len());
                    match list.next_element::<Object<Entry>>().map_err(|e| inside(&place, e))? {
                        Some(Object(entry)) => entries.push(entry),
                        None => return Ok(Entries(entries)),
                    }
                }
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// Says where in the document an error is; line and column stay at its end, where they are looked for.
fn inside<E: de::Error>(place: &str, error: E) -> E {
    E::custom(format!("{place}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_safe_and_names_that_are_not() {
        for name in ["a", "A-b_c.d+e=f@g,h", "0", "täglich", "左"] {
            assert_eq!(unsafe_name(name), None, "{name}");
        }
        for name in
            ["", ".", "..", ".hidden", "-x", "a/b", "a\\b", "a b", "a\0", "a\n", "c:d", "a*", "e\u{301}"]
        {
            assert!(unsafe_name(name).is_some(), "{name:?}");
        }
        assert!(unsafe_name(&"x".repeat(NAME_BYTES)).is_none());
        assert!(unsafe_name(&"x".repeat(NAME_BYTES + 1)).is_some());
    }
}
