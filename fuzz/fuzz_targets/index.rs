#![no_main]

imagehere_fuzz::target!("index");
