//! Tokens that are matched in the text as they stand, before any merging.

/// A token and its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Literal {
    pub text: String,
    pub id: u32,
    /// Whether it steers the conversation: `<s>`, `</s>`, `<unk>`, `[UNUSED_TOKEN_n]`, `<|…|>`.
    pub control: bool,
}

/// Literals, sorted by text, so that those with a common prefix are neighbours.
#[derive(Clone, Debug, Default)]
pub(super) struct Literals {
    sorted: Vec<Literal>,
    first: Vec<bool>, // [256], whether a literal begins with this byte
}

impl Literals {
    pub(super) fn new(mut literals: Vec<Literal>) -> Self {
        literals.retain(|literal| !literal.text.is_empty());
        literals.sort_unstable_by(|a, b| a.text.cmp(&b.text));
        let mut first = vec![false; 256];
        for literal in &literals {
            first[usize::from(literal.text.as_bytes()[0])] = true;
        }
        Self { sorted: literals, first }
    }

    /// Returns the literal with this text.
    pub(super) fn get(&self, text: &str) -> Option<&Literal> {
        let at = self.sorted.binary_search_by(|literal| literal.text.as_str().cmp(text)).ok()?;
        Some(&self.sorted[at])
    }

    /// Returns the longest literal that `text` begins with and that `accept` takes.
    pub(super) fn longest(&self, text: &[u8], accept: impl Fn(&Literal) -> bool) -> Option<&Literal> {
        if !self.first[usize::from(*text.first()?)] {
            return None;
        }
        let mut longest = None;
        let mut candidates = &self.sorted[..];
        for (depth, &byte) in text.iter().enumerate() {
            // All candidates share their first `depth` bytes and are longer than that.
            let at = |literal: &Literal| literal.text.as_bytes()[depth];
            let low = candidates.partition_point(|literal| at(literal) < byte);
            let high = candidates.partition_point(|literal| at(literal) <= byte);
            candidates = &candidates[low..high];
            if let Some((literal, longer)) = candidates.split_first()
                && literal.text.len() == depth + 1
            {
                longest = accept(literal).then_some(literal).or(longest);
                candidates = longer;
            }
            if candidates.is_empty() {
                break;
            }
        }
        longest
    }
}

/// Returns whether a literal of the vocabulary steers the conversation: `[UNUSED_TOKEN_n]`, or `<|…|>` of the
/// family's later models.
pub(super) fn is_control(text: &str) -> bool {
    let number = text.strip_prefix("[UNUSED_TOKEN_").and_then(|rest| rest.strip_suffix(']'));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        || (text.len() > 4 && text.starts_with("<|") && text.ends_with("|>"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn literals(texts: &[String]) -> Vec<Literal> {
        let mut texts = texts.to_vec();
        texts.sort();
        texts.dedup();
        (0..).zip(texts).map(|(id, text)| Literal { text, id, control: id % 2 == 0 }).collect()
    }

    proptest! {
        #[test]
        fn longest_is_what_a_plain_search_finds(
            texts in prop::collection::vec("[abé]{1,4}", 0..12),
            text in "[abcé]{0,6}",
            control in any::<bool>(),
        ) {
            let all = literals(&texts);
            let accept = |literal: &Literal| control || !literal.control;
            let plain = all.iter().filter(|l| accept(l) && text.starts_with(&l.text)).max_by_key(|l| l.text.len());
            let sorted = Literals::new(all.clone());
            prop_assert_eq!(sorted.longest(text.as_bytes(), accept), plain);
        }
    }

    #[test]
    fn control_tokens_by_their_spelling() {
        for text in ["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_146]", "<|im_start|>"] {
            assert!(is_control(text), "{text}");
        }
        for text in ["——", "[UNUSED_TOKEN_]", "[UNUSED_TOKEN_1", "[UNUSED_TOKEN_x]", "<||>", "<|>"] {
            assert!(!is_control(text), "{text}");
        }
    }
}
