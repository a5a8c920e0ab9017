//! What a tokenizer's file must live up to, whatever its bytes; see [`crate::fuzzing`].

use std::path::Path;
use std::sync::OnceLock;

use super::protobuf::{Fields, put_bytes, put_number};
use super::sentencepiece::{Kind, Pieces};
use super::synthetic::{BYTE_FALLBACK, IDENTITY, MODEL_TYPE, put_settings};
use super::{TextPart, Tokenizer, json};
use crate::fuzzing::check_error;

/// What is encoded with every tokenizer that can be made.
const TEXTS: [&str; 4] = ["", "user \n  a<s>\0", "[UNUSED_TOKEN_145]图片 é</s>", "<0x41>▁ ab"];

/// `tokenizer.model`: the bytes, and the bytes behind the pieces that every model needs, which a fuzzer would not
/// come by in years. A protobuf message behind another is one message.
pub(crate) fn model(bytes: &[u8]) {
    check_model(bytes);
    if Fields::new(bytes).all(|field| field.is_ok()) {
        check_model(&[needed(), bytes].concat());
    }
}

fn check_model(bytes: &[u8]) {
    let tokenizer = match Tokenizer::from_sentencepiece(bytes, Path::new("tokenizer.model")) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return check_error(&error),
    };
    let Pieces(pieces) = Pieces::parse(bytes).expect("it was read before");
    assert_eq!(tokenizer.vocab_size(), pieces.len());
    assert!((tokenizer.bos_id() as usize) < pieces.len());

    // Any text comes back from its ids.
    let own = pieces.iter().rev().take(8).flat_map(|piece| piece.text.chars().take(100));
    let own: String = own.collect();
    for text in TEXTS.into_iter().chain([own.as_str()]) {
        let ids = tokenizer.encode(text).expect("with byte fallback every text has ids");
        let mut spelled = Vec::new();
        for &id in &ids {
            let piece = &pieces[id as usize];
            match piece.kind {
                Kind::Byte => spelled.push(u8::from_str_radix(&piece.text[3..5], 16).expect("two digits")),
                _ => spelled.extend(piece.text.bytes()),
            }
        }
        let expected = text.replace(' ', "▁");
        assert_eq!(String::from_utf8_lossy(&spelled), expected, "{ids:?}");
        check_parts(&tokenizer, text, &ids);
    }
}

/// Where a text is cut into parts makes no difference, as long as all are live.
fn check_parts(tokenizer: &Tokenizer, text: &str, ids: &[u32]) {
    let step = 1 + text.len() / 16;
    for (at, _) in text.char_indices().step_by(step) {
        let (left, right) = text.split_at(at);
        let parts = [TextPart { text: left, live: true }, TextPart { text: right, live: true }];
        assert_eq!(tokenizer.encode_parts(&parts).expect("it was encoded before"), ids, "{text:?} at {at}");
    }
}

/// What every model has: three special pieces, 256 bytes, settings.
fn needed() -> &'static [u8] {
    static NEEDED: OnceLock<Vec<u8>> = OnceLock::new();
    NEEDED.get_or_init(|| {
        let mut model = Vec::new();
        let mut put = |text: &str, kind| {
            let mut piece = Vec::new();
            put_bytes(&mut piece, 1, text.as_bytes());
            put_number(&mut piece, 3, kind);
            put_bytes(&mut model, 1, &piece);
        };
        for (text, kind) in [("<unk>", 2), ("<s>", 3), ("</s>", 3)] {
            put(text, kind);
        }
        (0..=u8::MAX).for_each(|byte| put(&format!("<{byte:#04X}>"), 6));
        put_settings(&mut model, &[(MODEL_TYPE, 2), (BYTE_FALLBACK, 1)], &IDENTITY);
        model
    })
}

/// `tokenizer.json`.
pub(crate) fn json(bytes: &[u8]) {
    let tokenizer = match json::load(bytes, Path::new("tokenizer.json")) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return check_error(&error),
    };
    assert!((tokenizer.bos_id() as usize) < tokenizer.vocab_size());
    for text in TEXTS {
        match tokenizer.encode(text) {
            Err(error) => check_error(&error),
            Ok(ids) => {
                assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()), "{ids:?}");
                check_parts(&tokenizer, text, &ids);
            }
        }
        let _ = tokenizer.control_tokens(text);
    }
}
