//! Pillow-exact BICUBIC.
