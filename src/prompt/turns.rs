//! A request as the turns of a chat: what a server gets that has a template of its own.

use serde::Serialize;

use super::request::Request;
use super::template::meta_text;
use crate::config::Profile;
use crate::error::{Error, Result};

/// Who says a [`Turn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The operator: the meta instruction.
    System,
    /// The user: a query.
    User,
    /// The model: an answer.
    Assistant,
}

/// One text of a chat, split at its markers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn<'r> {
    /// Who says it.
    pub role: Role,
    /// Texts and images in their order; no text is empty.
    pub parts: Vec<TurnPart<'r>>,
}

/// A piece of a [`Turn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnPart<'r> {
    /// What stands before, between or after markers, as it is.
    Text(&'r str),
    /// An image, by its index in the prompt.
    Image(usize),
}

impl Request {
    /// Returns meta instruction, history and query as turns, without template: the images are numbered in the order of
    /// their markers, which are those of `profile`, as slots are. A meta instruction that is empty is no turn.
    ///
    /// # Errors
    /// [`Error::Argument`] in raw mode, where the prompt has its own template in it.
    ///
    /// # Examples
    /// ```
    /// use imagehere::prompt::{Meta, Request, TurnPart};
    ///
    /// let request = Request::new("<ImageHere>What is it?").meta_instruction(Meta::None);
    /// let turns = request.turns(&imagehere::config::XCOMPOSER2)?;
    /// assert_eq!(turns[0].parts, [TurnPart::Image(0), TurnPart::Text("What is it?")]);
    /// # Ok::<(), imagehere::Error>(())
    /// ```
    pub fn turns(&self, profile: &Profile) -> Result<Vec<Turn<'_>>> {
        if self.raw {
            return Err(Error::argument(
                "a raw prompt has a chat template in it, and a server would put its own around that",
                "Do without raw mode",
            ));
        }
        let meta = meta_text(self, &profile.template);
        let mut texts = Vec::new();
        if !meta.is_empty() {
            texts.push((Role::System, meta));
        }
        for (query, answer) in &self.history {
            texts.extend([(Role::User, query.as_str()), (Role::Assistant, answer.as_str())]);
        }
        texts.push((Role::User, self.query.as_str()));

        let mut images = 0;
        let mut turns = Vec::new();
        for (role, text) in texts {
            let mut parts = Vec::new();
            for (i, text) in text.split(profile.marker).enumerate() {
                if i > 0 {
                    parts.push(TurnPart::Image(images));
                    images += 1;
                }
                if !text.is_empty() {
                    parts.push(TurnPart::Text(text));
                }
            }
            turns.push(Turn { role, parts });
        }
        Ok(turns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::XCOMPOSER2;
    use crate::prompt::{DEFAULT_META_INSTRUCTION, Meta};

    #[test]
    fn images_are_numbered_through_all_texts() {
        let request = Request::new("<ImageHere><ImageHere> and?")
            .meta_instruction(Meta::Text("See <ImageHere>".to_owned()))
            .history(vec![("a".to_owned(), "<ImageHere>".to_owned()), (String::new(), "b".to_owned())]);
        use TurnPart::{Image, Text};
        let turns = request.turns(&XCOMPOSER2).unwrap();
        let parts: Vec<_> = turns.iter().map(|turn| (turn.role, turn.parts.as_slice())).collect();
        assert_eq!(
            parts,
            [
                (Role::System, [Text("See "), Image(0)].as_slice()),
                (Role::User, &[Text("a")]),
                (Role::Assistant, &[Image(1)]),
                (Role::User, &[]),
                (Role::Assistant, &[Text("b")]),
                (Role::User, &[Image(2), Image(3), Text(" and?")]),
            ]
        );
    }

    #[test]
    fn the_default_is_upstreams_and_raw_is_refused() {
        let request = Request::new("q");
        assert_eq!(request.turns(&XCOMPOSER2).unwrap()[0].parts, [TurnPart::Text(DEFAULT_META_INSTRUCTION)]);
        let message = request.raw(true).turns(&XCOMPOSER2).unwrap_err().to_string();
        assert!(message.contains("without raw mode"), "{message}");
    }
}
