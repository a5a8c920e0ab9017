//! What the tokenizer promises, on models of our own; `tests/tokenizer_golden.rs` has upstream's.

#![allow(clippy::type_complexity)] // tables of cases

use std::collections::HashMap;
use std::path::Path;

use proptest::prelude::*;

use super::sentencepiece::{Kind, Pieces};
use super::synthetic::{BYTE_FALLBACK, IDENTITY, MODEL_TYPE, NORMAL, USER_DEFINED, put_piece, put_settings};
use super::{TextPart, Tokenizer, synthetic};

fn load(bytes: &[u8]) -> Result<Tokenizer, String> {
    Tokenizer::from_sentencepiece(bytes, Path::new("tokenizer.model")).map_err(|error| error.to_string())
}

/// SentencePiece's own rule, as plainly as it can be written: cut out user-defined pieces, then join the
/// neighbours that spell the piece of the highest score, the leftmost of equals, until none spells a piece.
struct Plain<'b> {
    pieces: &'b Pieces<'b>,
    ids: HashMap<&'b str, u32>,
}

impl<'b> Plain<'b> {
    fn new(pieces: &'b Pieces<'b>) -> Self {
        let ids = (0..).zip(&pieces.0).map(|(id, piece)| (piece.text, id)).collect();
        Self { pieces, ids }
    }

    fn piece(&self, text: &str, kinds: &[Kind]) -> Option<u32> {
        self.ids.get(text).copied().filter(|&id| kinds.contains(&self.pieces.0[id as usize].kind))
    }

    /// `matched` says which user-defined pieces count as such.
    fn encode(&self, text: &str, matched: impl Fn(&str) -> bool) -> Vec<u32> {
        let text = text.replace(' ', "▁");
        let mut symbols: Vec<(&str, bool)> = Vec::new(); // text, frozen
        let mut rest = text.as_str();
        while let Some(c) = rest.chars().next() {
            let user_defined = self.pieces.0.iter().filter(|piece| piece.kind == Kind::UserDefined);
            let here = user_defined.filter(|piece| rest.starts_with(piece.text) && matched(piece.text));
            let longest = here.map(|piece| piece.text.len()).max();
            let (symbol, behind) = rest.split_at(longest.unwrap_or(c.len_utf8()));
            symbols.push((symbol, longest.is_some()));
            rest = behind;
        }
        loop {
            let mut best: Option<(f32, usize, String)> = None;
            for (i, pair) in symbols.windows(2).enumerate().filter(|(_, pair)| !pair[0].1 && !pair[1].1) {
                let joined = format!("{}{}", pair[0].0, pair[1].0);
                if let Some(id) = self.piece(&joined, &[Kind::Normal]) {
                    let score = self.pieces.0[id as usize].score;
                    if best.as_ref().is_none_or(|best| score > best.0) {
                        best = Some((score, i, joined));
                    }
                }
            }
            let Some((_, i, joined)) = best else { break };
            symbols[i].0 = self.pieces.0[self.ids[joined.as_str()] as usize].text;
            symbols.remove(i + 1);
        }
        let ids = symbols.iter().flat_map(|&(symbol, _)| {
            match self.piece(symbol, &[Kind::Normal, Kind::UserDefined]).filter(|_| symbol != "\0") {
                Some(id) => vec![id],
                None => symbol.bytes().map(|byte| self.ids[format!("<{byte:#04X}>").as_str()]).collect(),
            }
        });
        ids.collect()
    }
}

/// Texts out of a model's own pieces, runs of one, and any characters at all.
fn text_of(pieces: Vec<String>) -> impl Strategy<Value = String> {
    let some = proptest::sample::select(pieces);
    let atom = prop_oneof![
        4 => some.clone(),
        2 => (some, 1usize..7).prop_map(|(piece, times)| piece.repeat(times)),
        1 => "\\PC{0,4}",
        1 => "[ \n\t\0▁é中😀]{1,3}",
        1 => r"\[?UNUSED_TOKEN_1?4?[56]?\]?",
    ];
    proptest::collection::vec(atom, 0..8).prop_map(|atoms| atoms.concat().replace('▁', " "))
}

fn texts_of(bytes: &[u8]) -> Vec<String> {
    let pieces = Pieces::parse(bytes).unwrap();
    pieces.0.iter().filter(|piece| piece.kind != Kind::Byte).map(|piece| piece.text.to_owned()).collect()
}

#[test]
fn merging_is_sentencepieces_rule() {
    // The synthetic vocabulary, small and with the words of two syllables.
    for size in [512, 12_000] {
        let bytes = synthetic(size);
        let (pieces, tokenizer) = (Pieces::parse(&bytes).unwrap(), load(&bytes).unwrap());
        let plain = Plain::new(&pieces);
        proptest!(ProptestConfig::with_cases(300), |(text in text_of(texts_of(&bytes)))| {
            let parts = [TextPart { text: &text, live: false }];
            let not_control = |piece: &str| !super::literals::is_control(piece);
            prop_assert_eq!(tokenizer.encode_parts(&parts).unwrap(), plain.encode(&text, not_control));
            if !["<s>", "</s>", "<unk>"].iter().any(|special| text.contains(special)) {
                prop_assert_eq!(tokenizer.encode(&text).unwrap(), plain.encode(&text, |_| true));
            }
        });
    }
}

/// A model of our byte and special pieces and the given normal pieces, highest score first.
fn model_of(
    normal: &[(String, f32)],
    user_defined: &[&str],
    settings: (&[(u64, u64)], &[(u64, u64)]),
) -> Vec<u8> {
    let base = synthetic(0);
    let mut bytes = Vec::new();
    let pieces = Pieces::parse(&base).unwrap();
    for piece in pieces.0.iter() {
        let kind = match piece.kind {
            Kind::Normal => NORMAL,
            Kind::Unknown => 2,
            Kind::Control => 3,
            Kind::UserDefined => USER_DEFINED,
            Kind::Byte => 6,
        };
        put_piece(&mut bytes, piece.text, piece.score, kind);
    }
    normal.iter().for_each(|(text, score)| put_piece(&mut bytes, text, *score, NORMAL));
    user_defined.iter().for_each(|text| put_piece(&mut bytes, text, 0.0, USER_DEFINED));
    put_settings(&mut bytes, settings.0, settings.1);
    bytes
}

const BPE: &[(u64, u64)] = &[(MODEL_TYPE, 2), (BYTE_FALLBACK, 1)];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any vocabulary in any order of scores: no merge needs a trainer's good sense.
    #[test]
    fn merging_is_sentencepieces_rule_for_any_pieces(
        words in proptest::collection::btree_set("[ab]{2,9}", 0..30),
        shuffle in any::<u64>(),
        texts in proptest::collection::vec("[ab ]{0,40}", 20),
    ) {
        let mut words: Vec<String> = ["a", "b", "▁"].map(String::from).into_iter().chain(words).collect();
        let mut state = shuffle | 1;
        words.sort_by_cached_key(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 16
        });
        let normal: Vec<_> = words.into_iter().enumerate().map(|(i, word)| (word, -(i as f32))).collect();
        let bytes = model_of(&normal, &["aab"], (BPE, &IDENTITY));
        let pieces = Pieces::parse(&bytes).unwrap();
        let Ok(tokenizer) = load(&bytes) else {
            // A word that is also the user-defined piece: refused, as it should be.
            prop_assert!(normal.iter().any(|(word, _)| word == "aab"));
            return Ok(());
        };
        let plain = Plain::new(&pieces);
        for text in texts {
            prop_assert_eq!(tokenizer.encode(&text).unwrap(), plain.encode(&text, |_| true), "{}", text);
        }
    }

    /// How a text is cut into parts of one kind changes nothing.
    #[test]
    fn parts_are_one_text(text in text_of(texts_of(&synthetic(512))), cuts in any::<[u8; 3]>(), live in any::<bool>()) {
        let tokenizer = load(&synthetic(512)).unwrap();
        let mut ends: Vec<usize> = cuts.iter().map(|&cut| text.floor_char_boundary(usize::from(cut))).collect();
        ends.sort_unstable();
        ends.push(text.len());
        let mut start = 0;
        let mut parts = Vec::new();
        for end in ends {
            parts.push(TextPart { text: &text[start..end], live });
            start = end;
        }
        let whole = [TextPart { text: &text, live }];
        prop_assert_eq!(tokenizer.encode_parts(&parts).unwrap(), tokenizer.encode_parts(&whole).unwrap());
    }

    /// A file that was damaged anywhere is refused or read, never a panic.
    #[test]
    fn damage_is_no_panic(at in any::<proptest::sample::Index>(), bit in 0..8u8, end in any::<proptest::sample::Index>()) {
        let mut bytes = synthetic(300);
        let cut = end.index(bytes.len());
        prop_assert!(load(&bytes[..cut]).is_err(), "cut at {}", cut);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(tokenizer) = load(&bytes) {
            tokenizer.encode("[UNUSED_TOKEN_146]user\nWhat is this?").unwrap();
        }
    }
}

#[test]
fn control_tokens_are_tokens_only_where_live() {
    let tokenizer = load(&synthetic(512)).unwrap();
    let encode = |parts: &[(&str, bool)]| {
        let parts: Vec<_> = parts.iter().map(|&(text, live)| TextPart { text, live }).collect();
        tokenizer.encode_parts(&parts).unwrap()
    };
    let end = tokenizer.control_token_id("[UNUSED_TOKEN_145]").unwrap();
    let dash = tokenizer.encode("——").unwrap();
    assert_eq!((end, dash.len()), (510, 1));

    for (token, id) in [("[UNUSED_TOKEN_145]", end), ("<s>", 1), ("</s>", 2), ("<unk>", 0)] {
        assert_eq!(encode(&[(token, true)]), [id]);
        let plain = encode(&[(token, false)]);
        assert!(plain.len() > 1 && !plain.contains(&id), "{token}: {plain:?}");
        // Spelled across a boundary, in any mixture with plain text, it is text all the same.
        for cut in 1..token.len() {
            let (a, b) = token.split_at(cut);
            assert_eq!(encode(&[(a, true), (b, false)]), plain);
            assert_eq!(encode(&[(a, false), (b, true)]), plain);
            assert_eq!(encode(&[(a, true), (b, true)]), [id]);
        }
        // One that is live right beside it still counts.
        assert_eq!(encode(&[(token, false), (token, true)]), [plain.clone(), vec![id]].concat());
        assert_eq!(encode(&[(token, true), (token, false)]), [vec![id], plain].concat());
    }
    // Other user-defined pieces are no control tokens: live in anyone's text, across boundaries too.
    assert_eq!(encode(&[("——", false)]), dash);
    assert_eq!(encode(&[("—", true), ("—", false)]), dash);
}

#[test]
fn plain_control_tokens_do_not_cut_the_text() {
    // `x[` and `]y` are pieces: a cut at the token's edges would keep them from forming.
    let normal: Vec<_> = ["x[", "]y", "x", "[", "]", "y"]
        .map(String::from)
        .into_iter()
        .zip([0., -1., -2., -3., -4., -5.])
        .collect();
    let tokenizer = load(&model_of(&normal, &[], (BPE, &IDENTITY))).unwrap();
    let ids = |text| tokenizer.encode_parts(&[TextPart { text, live: false }]).unwrap();
    let typed = ids("x[UNUSED_TOKEN_145]y");
    assert_eq!((typed[0], *typed.last().unwrap()), (ids("x[")[0], ids("]y")[0]));
}

#[test]
fn control_tokens_are_found_in_order() {
    let tokenizer = load(&synthetic(512)).unwrap();
    let text = "é<s>—— [UNUSED_TOKEN_3][UNUSED_TOKEN_999]</s>";
    assert_eq!(tokenizer.control_tokens(text), [(2, "<s>"), (12, "[UNUSED_TOKEN_3]"), (46, "</s>")]);
    assert_eq!(tokenizer.control_token_id("——"), None);
    assert_eq!(tokenizer.control_token_id("</s>"), Some(2));
}

#[test]
fn what_is_unsupported_is_named() {
    let letters: Vec<_> = ["a", "b", "c"].map(|letter| (letter.to_owned(), -9.0)).to_vec();
    let with = |more: &[(&str, f32)]| {
        let more = more.iter().map(|&(text, score)| (text.to_owned(), score));
        letters.iter().cloned().chain(more).collect::<Vec<_>>()
    };
    let good = with(&[("ab", 0.0), ("bc", -1.0)]);
    assert!(load(&model_of(&good, &[], (BPE, &IDENTITY))).is_ok());
    let mut unused = model_of(&good, &[], (BPE, &IDENTITY));
    put_piece(&mut unused, "zz", 0.0, 5);
    let mut nan = model_of(&good, &[], (BPE, &IDENTITY));
    put_piece(&mut nan, "zz", f32::NAN, NORMAL);
    let mut no_byte = Vec::new();
    put_piece(&mut no_byte, "<s>", 0.0, 3);
    put_settings(&mut no_byte, BPE, &IDENTITY);
    for (bytes, message) in [
        (model_of(&good, &[], (&[(BYTE_FALLBACK, 1)], &IDENTITY)), "model_type is UNIGRAM"),
        (model_of(&good, &[], (&[(MODEL_TYPE, 3), (BYTE_FALLBACK, 1)], &IDENTITY)), "model_type is WORD"),
        (model_of(&good, &[], (&[(MODEL_TYPE, 2)], &IDENTITY)), "byte_fallback = false"),
        (model_of(&good, &[], (BPE, &[(3, 1), (4, 0)])), "add_dummy_prefix = true"),
        (model_of(&good, &[], (BPE, &[(4, 0)])), "add_dummy_prefix = true"),
        (model_of(&good, &[], (BPE, &[(3, 0), (4, 1)])), "remove_extra_whitespaces = true"),
        (model_of(&good, &[], (BPE, &[(3, 0), (4, 0), (5, 0)])), "escape_whitespaces = false"),
        (model_of(&with(&[("ab", 0.0), ("bc", 0.0)]), &[], (BPE, &IDENTITY)), "same score"),
        (model_of(&with(&[("ad", 0.0)]), &[], (BPE, &IDENTITY)), "character `d`"),
        (model_of(&with(&[("ab", 0.0), ("ab", -1.0)]), &[], (BPE, &IDENTITY)), "there twice"),
        (model_of(&with(&[("", 0.0)]), &[], (BPE, &IDENTITY)), "has 0 bytes"),
        (model_of(&with(&[(&"a".repeat(513), 0.0)]), &[], (BPE, &IDENTITY)), "has 513 bytes"),
        (unused, "UNUSED"),
        (nan, "not a number"),
        (no_byte, "0 byte pieces"),
        (Vec::new(), "no pieces"),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "git-lfs pointer"),
    ] {
        let error = load(&bytes).unwrap_err();
        assert!(error.contains(message) && error.starts_with("tokenizer.model: "), "{message}: {error}");
    }
}

#[test]
fn synthetic_vocabularies_have_the_size_and_ids_asked_for() {
    for (size, len) in
        [(0, 261), (261, 261), (300, 300), (406, 406), (511, 511), (512, 512), (92_544, 92_544)]
    {
        let tokenizer = load(&synthetic(size)).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.bos_id()), (len, 1), "{size}");
        let ids = ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"].map(|token| tokenizer.control_token_id(token));
        assert_eq!(ids, [Some(len as u32 - 2), Some(len as u32 - 1)], "{size}");
    }
}

/// A long text takes a moment, not its square: a quadratic merge would take hours.
#[test]
fn long_texts_are_no_trouble() {
    let tokenizer = load(&synthetic(12_000)).unwrap();
    for unit in ["a", " ", "ba", "[UNUSED_TOKEN_", "<s", "\0", "请描述", "Describe the picture. "] {
        let text = unit.repeat((1 << 20) / unit.len());
        assert!(!tokenizer.encode(&text).unwrap().is_empty());
    }
}

mod files {
    use std::fs;

    use super::*;
    use tokenizers::models::bpe::Vocab;
    use tokenizers::normalizers::Replace;
    use tokenizers::{AddedToken, NormalizerWrapper};

    /// The same model as a `tokenizer.json`, as conversion tools write it.
    fn as_json(bytes: &[u8]) -> String {
        let pieces = Pieces::parse(bytes).unwrap();
        let rows = (0u32..).zip(&pieces.0);
        let vocab: Vocab = rows.clone().map(|(id, piece)| (piece.text.to_owned(), id)).collect();
        let mut ranked: Vec<_> = pieces.0.iter().filter(|piece| piece.kind == Kind::Normal).collect();
        ranked.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut merges = Vec::new();
        for piece in ranked {
            for (at, _) in piece.text.char_indices().skip(1) {
                let (left, right) = piece.text.split_at(at);
                if vocab.contains_key(left) && vocab.contains_key(right) {
                    merges.push((left.to_owned(), right.to_owned()));
                }
            }
        }
        let bpe = tokenizers::models::bpe::BPE::builder()
            .vocab_and_merges(vocab, merges)
            .unk_token("<unk>".into())
            .fuse_unk(true)
            .byte_fallback(true)
            .build()
            .unwrap();
        let mut json = tokenizers::Tokenizer::new(bpe);
        let normalizer = NormalizerWrapper::Replace(Replace::new(" ", "▁").unwrap());
        json.with_normalizer(Some(normalizer)).unwrap();
        let specials = pieces.0.iter().filter(|piece| matches!(piece.kind, Kind::Unknown | Kind::Control));
        json.add_special_tokens(specials.map(|piece| AddedToken::from(piece.text, true))).unwrap();
        let user_defined = pieces.0.iter().filter(|piece| piece.kind == Kind::UserDefined);
        json.add_tokens(user_defined.map(|piece| AddedToken::from(piece.text, false))).unwrap();
        json.to_string(false).unwrap()
    }

    #[test]
    fn json_gives_the_same_ids() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = synthetic(600);
        fs::write(dir.path().join("tokenizer.json"), as_json(&bytes)).unwrap();
        let (json, model) = (Tokenizer::from_dir(dir.path()).unwrap(), load(&bytes).unwrap());
        assert!(json.path().ends_with("tokenizer.json"));
        assert_eq!((json.vocab_size(), json.bos_id()), (600, 1));
        assert_eq!(json.control_token_id("[UNUSED_TOKEN_145]"), Some(598));
        proptest!(|(text in text_of(texts_of(&bytes)), end in text_of(texts_of(&bytes)), live in any::<bool>())| {
            let parts = [TextPart { text: &text, live }, TextPart { text: &end, live: true }];
            prop_assert_eq!(json.encode_parts(&parts).unwrap(), model.encode_parts(&parts).unwrap());
            prop_assert_eq!(json.control_tokens(&text), model.control_tokens(&text));
        });
    }

    #[test]
    fn json_that_cannot_be_matched_exactly_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let json = as_json(&synthetic(512));
        let flag = |flag: &str| json.replacen(&format!("\"{flag}\":false"), &format!("\"{flag}\":true"), 1);
        let lower = json.replacen(
            r#"{"type":"Replace","pattern":{"String":" "},"content":"▁"}"#,
            r#"{"type":"Lowercase"}"#,
            1,
        );
        assert_ne!(lower, json);
        for (text, message) in [
            (flag("lstrip"), "lstrip"),
            (flag("rstrip"), "rstrip"),
            (flag("single_word"), "single_word"),
            (lower, "normalised"),
            ("{}".into(), "no tokenizer.json"),
            ("version https://git-lfs.github.com/spec/v1\n".into(), "git-lfs"),
        ] {
            fs::write(&path, text).unwrap();
            let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("tokenizer.json"), "{message}: {error}");
        }
    }

    #[test]
    fn the_model_is_preferred_and_missing_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(missing.contains("no tokenizer.model and no tokenizer.json"), "{missing}");
        fs::write(dir.path().join("tokenizer.json"), "not read").unwrap();
        fs::write(dir.path().join("tokenizer.model"), synthetic(512)).unwrap();
        assert!(Tokenizer::from_dir(dir.path()).unwrap().path().ends_with("tokenizer.model"));
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_dangling_ones_named() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("tokenizer.model");
        std::os::unix::fs::symlink("blob", &model).unwrap();
        fs::write(dir.path().join("tokenizer.json"), as_json(&synthetic(512))).unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.model: cannot read it"), "{error}");
        fs::write(dir.path().join("blob"), synthetic(512)).unwrap();
        assert!(Tokenizer::from_dir(dir.path()).unwrap().path().ends_with("tokenizer.model"));
    }

    #[test]
    fn a_file_that_is_far_too_large_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("tokenizer.model")).unwrap();
        file.set_len(1 << 40).unwrap(); // sparse
        let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("more than 67108864 bytes"), "{error}");
    }
}
