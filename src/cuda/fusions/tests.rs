use super::*;

#[test]
fn names_are_read() {
    let parse = |words| Fusions::parse(words).unwrap();
    assert_eq!(parse("all"), Fusions::ALL);
    assert_eq!(parse("none"), Fusions::NONE);
    assert_eq!(parse(""), Fusions::NONE);
    assert_eq!(parse("class_row"), Fusions { class_row: true, ..Fusions::NONE });
    assert_eq!(parse(" layer_norm , query_scale"), Fusions { class_row: false, ..Fusions::ALL });
    let error = Fusions::parse("layernorm").unwrap_err().to_string();
    assert!(error.contains("no fusion `layernorm`") && error.contains("`layer_norm`"), "{error}");
}
