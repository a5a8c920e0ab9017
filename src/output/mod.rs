//! See the modules' map in the crate's documentation.
