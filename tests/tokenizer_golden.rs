//! Upstream's own tokenizer.model against ids that SentencePiece made.

use std::path::PathBuf;

use imagehere::tokenizer::{TextPart, Tokenizer};

fn data() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data"))
}

fn upstream() -> Tokenizer {
    Tokenizer::from_dir(data()).unwrap()
}

#[test]
#[cfg_attr(not(has_shared), ignore = "needs ../shared/data")]
fn every_case_of_the_file_is_equal() {
    let tokenizer = upstream();
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos_id()), (92_544, 1));
    let file: serde_json::Value =
        serde_json::from_slice(&std::fs::read(data().join("tokens.json")).unwrap()).unwrap();
    let cases = file["cases"].as_array().unwrap();
    assert!(cases.len() > 50);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let want: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), want, "{text:?}");
    }
}

/// Texts with the ids that SentencePiece 0.2 gives, and `transformers` for `<s>`, `</s>`, `<unk>`.
#[test]
#[cfg_attr(not(has_shared), ignore = "needs ../shared/data")]
fn edges_are_equal() {
    let tokenizer = upstream();
    for (text, ids) in [
        ("", &[][..]),
        ("\0", &[3]),
        ("a\0b", &[264, 3, 260]),
        ("<s></s><unk>", &[1, 2, 0]),
        ("[UNUSED_TOKEN_145]\n", &[92542, 364]),
        ("[UNUSED_TOKEN_0]", &[92397]),
        ("[[UNUSED_TOKEN_14]]", &[336, 92411, 332]),
        ("———", &[92395, 60656]),
        ("▁a", &[395]),
        (" a", &[395]),
        ("<0x41>", &[333, 300, 274, 3263, 330]),
        ("<ImageHere>", &[45910, 8554, 330]),
    ] {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
    }
    assert_eq!(tokenizer.control_token_id("[UNUSED_TOKEN_145]"), Some(92542));
    assert_eq!(tokenizer.control_token_id("[UNUSED_TOKEN_146]"), Some(92543));
}

/// As plain text, a control token is what SentencePiece makes of it where it is no piece of its own.
#[test]
#[cfg_attr(not(has_shared), ignore = "needs ../shared/data")]
fn plain_control_tokens_are_spelled_out() {
    let tokenizer = upstream();
    let plain = |text| tokenizer.encode_parts(&[TextPart { text, live: false }]).unwrap();
    assert_eq!(plain("<s>a</s><unk>"), [43618, 43461, 654, 269, 1936, 3289, 330]);
    // Full-width letters and dashes are user-defined pieces too, but steer nothing: they stay live.
    assert_eq!(plain("ＡＢＣ……——"), [66844, 67676, 67219, 92396, 92395]);
    let spelled = plain("x[UNUSED_TOKEN_146]");
    assert_eq!(spelled[..6], [274, 336, 2010, 15927, 18827, 284]);
    assert!(!spelled.contains(&92543));
}
