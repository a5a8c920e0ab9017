//! Files to RGB8.
