#![no_main]

imagehere_fuzz::target!("tokenizer_model");
