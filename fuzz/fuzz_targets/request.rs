#![no_main]

imagehere_fuzz::target!("request");
