//! The `imagehere` command.

fn main() {}
