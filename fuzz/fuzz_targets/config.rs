#![no_main]

imagehere_fuzz::target!("config");
