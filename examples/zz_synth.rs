//! x
fn main() {
    let n: usize = std::env::args().nth(1).unwrap().parse().unwrap();
    std::fs::write(std::env::args().nth(2).unwrap(), imagehere::tokenizer::synthetic(n)).unwrap();
}
