//! `tokenizer.json`: read by `tokenizers`, less its added tokens, which are matched by this crate.

use std::path::Path;

use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{AddedVocabulary, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper};

use super::literals::{self, Literal, Literals};
use super::{Engine, Tokenizer, check_not_lfs};
use crate::error::{Error, Result};

/// Makes a tokenizer from the bytes of a `tokenizer.json`; `path` appears in messages only.
pub(super) fn load(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
    check_not_lfs(bytes, path)?;
    let refuse = |problem: String| {
        Error::checkpoint(path, problem, "Put upstream's tokenizer.model beside it; it is preferred")
    };
    // Where the JSON itself is broken, or nested too deep, inside a decoder, `tokenizers` panics: this looks before.
    if let Err(error) = serde_json::from_slice::<serde_json::Value>(bytes) {
        return Err(refuse(format!("it is no JSON: {error}")));
    }
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)
        .map_err(|error| refuse(format!("it is no tokenizer.json that `tokenizers` can read: {error}")))?;

    // Those with `normalized` are matched after normalisation, in what the others leave. Where normalisation
    // changes nothing but spaces, that is the same as matching them in the text itself.
    let only_spaces = match tokenizer.get_normalizer() {
        None => true,
        Some(NormalizerWrapper::Replace(replace)) => {
            serde_json::to_value(replace).is_ok_and(|value| value["pattern"]["String"] == " ")
        }
        Some(_) => false,
    };
    let (mut specials, mut user_defined) = (Vec::new(), Vec::new());
    let mut largest = None;
    for (id, token) in tokenizer.get_added_tokens_decoder() {
        let what = token.content.escape_debug();
        if token.lstrip || token.rstrip || token.single_word {
            return Err(refuse(format!(
                "added token `{what}` has lstrip, rstrip or single_word, which is not supported"
            )));
        }
        if token.normalized && (!only_spaces || token.content.contains(' ')) {
            return Err(refuse(format!(
                "added token `{what}` is matched in normalised text, which is not supported"
            )));
        }
        let control = token.special || literals::is_control(&token.content);
        let list = if token.normalized { &mut user_defined } else { &mut specials };
        list.push(Literal { text: token.content, id, control });
        largest = largest.max(Some(id));
    }
    largest = largest.max(tokenizer.get_vocab(false).into_values().max());
    let bos_id = tokenizer.token_to_id("<s>").ok_or_else(|| refuse("it has no token `<s>`".into()))?;

    // Texts between added tokens are given to `tokenizers` one by one, each of which it would take for the first.
    let mut spaced = false;
    match tokenizer.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::Metaspace(space)) if space.get_prepend_scheme() == PrependScheme::First => {
            let mut space = space.clone();
            space.set_prepend_scheme(PrependScheme::Never);
            tokenizer.with_pre_tokenizer(Some(space));
            spaced = true;
        }
        Some(PreTokenizerWrapper::Sequence(all)) => {
            let spaces = |one: &PreTokenizerWrapper| matches!(one, PreTokenizerWrapper::Metaspace(space) if space.get_prepend_scheme() == PrependScheme::First);
            if all.as_ref().iter().any(spaces) {
                return Err(refuse("its pre-tokenizer puts a space in front of the first text and is one of several, which is not supported".into()));
            }
        }
        _ => {}
    }

    tokenizer.with_added_vocabulary(AddedVocabulary::new());
    tokenizer.with_post_processor(None::<PostProcessorWrapper>);
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| refuse(error.to_string()))?;
    Ok(Tokenizer {
        path: path.to_owned(),
        engine: Engine::Json { tokenizer: Box::new(tokenizer), spaced },
        specials: Literals::new(specials),
        user_defined: Literals::new(user_defined),
        vocab_size: largest.map_or(0, |id| id as usize + 1),
        bos_id,
    })
}
