#![no_main]

imagehere_fuzz::target!("torch_zip");
