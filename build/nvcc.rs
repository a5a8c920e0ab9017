//! From `kernels/*.cu` to one fat binary each, by nvcc.
//!
//! ```text
//!   x_sm80.cu ─ nvcc -ptx ─▶ x_sm80.compute_80.ptx ─┬─ ptxas ─▶ sm_80 cubin, report ─┐
//!                                                   ├─ ptxas ─▶ sm_86 cubin, report  ├─▶ x_sm80.fatbin
//!                                                   └─ …                             ┘
//! ```
//!
//! The front end runs once per file; the portable kernels' PTX is that of compute_80, and goes along for
//! architectures that come later. `*_sm90.cu` has 9.0a's own instructions and is compiled for nothing else.
//! Jobs are single files and architectures, as many at a time as cargo allows (`NUM_JOBS`).
//!
//! Every result lies beside the hash of all it came from, in OUT_DIR, and is made again when that changes:
//! the kernel, any header, the compiler, or an option here. ptxas' reports stay beside them for the test
//! that compares them with `kernels/budgets.txt`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The oldest release that knows all of [`PORTABLE`].
const OLDEST: (u32, u32) = (12, 8);

/// Real architectures of the portable kernels, and what their PTX is compiled for.
const PORTABLE: (&str, &[&str]) = ("compute_80", &["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]);

/// The same of `*_sm90.cu`. No PTX goes along: 9.0a runs on 9.0 alone.
const HOPPER: (&str, &[&str]) = ("compute_90a", &["sm_90a"]);

/// Options of every compilation. The host compiler only preprocesses: any version will do.
const OPTIONS: &[&str] = &["-std=c++17", "-O3", "-allow-unsupported-compiler"];

/// How to get an nvcc; ends every message about not having one.
const REMEDY: &str =
    "Run `bash kernels/fetch-nvcc` in the checkout, or point NVCC or CUDA_HOME to CUDA 12.8 or later";

/// A compiler that answered.
pub struct Nvcc {
    path: PathBuf,
    version: String, // all that `nvcc --version` says
}

impl Nvcc {
    /// Another tool of the same toolkit: beside nvcc, beside what nvcc is a link to, or wherever PATH says.
    fn beside(&self, tool: &str) -> PathBuf {
        let link = self.path.canonicalize().unwrap_or_default();
        let here = [&self.path, &link].map(|path| path.with_file_name(tool));
        here.into_iter().find(|path| path.is_file()).unwrap_or_else(|| tool.into())
    }

    /// NVIDIA's disassembler, where it came along and runs.
    pub fn disassembler(&self) -> Option<PathBuf> {
        let path = self.beside("nvdisasm");
        let answers =
            Command::new(&path).arg("--version").output().is_ok_and(|output| output.status.success());
        answers.then_some(path)
    }
}

/// One kernel file, compiled.
pub struct Image {
    /// The file's stem: `linear_sm80`.
    name: String,
    fatbin: PathBuf,
}

/// Looks for nvcc in NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and what `kernels/fetch-nvcc` makes.
///
/// The first that is new enough wins; `NVCC=none` builds without kernels. An NVCC that does not work is an
/// error, others are passed over with a warning.
pub fn find(root: &Path) -> Result<Option<Nvcc>, String> {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=kernels");
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(path) = variable("NVCC") {
        if path == "none" {
            return Ok(None);
        }
        let path = PathBuf::from(path);
        return ask(&path)
            .map(Some)
            .map_err(|problem| format!("NVCC={}: {problem}. {REMEDY}", path.display()));
    }
    let file = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };
    let homes =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).map(|p| Path::new(&p).join("bin"));
    let path = variable("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = homes.chain(std::env::split_paths(&path)).collect();
    folders.push("/usr/local/cuda/bin".into());
    folders.push(root.join(".nvcc/nvidia/cu13/bin"));
    for path in folders.into_iter().map(|folder| folder.join(file)).filter(|path| path.is_file()) {
        match ask(&path) {
            Ok(nvcc) => {
                println!("cargo::rerun-if-changed={}", path.display());
                return Ok(Some(nvcc));
            }
            Err(problem) => println!("cargo::warning=passing over {}: {problem}", path.display()),
        }
    }
    Ok(None)
}

/// Asks a compiler for its version, and checks it.
fn ask(path: &Path) -> Result<Nvcc, String> {
    let output =
        Command::new(path).arg("--version").output().map_err(|error| format!("cannot run it: {error}"))?;
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    let release = version.split_once("release ").and_then(|(_, rest)| {
        let (major, rest) = rest.split_once('.')?;
        let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    match release {
        None => Err(format!("it does not say which release it is: {version:?}")),
        Some(release) if release < OLDEST => Err(format!(
            "it is release {}.{}, the kernels need {}.{}",
            release.0, release.1, OLDEST.0, OLDEST.1
        )),
        Some(_) => Ok(Nvcc { path: path.into(), version }),
    }
}

/// Compiles every `.cu` of `kernels` into `out`, sorted by name. Runs nothing for what has not changed.
pub fn compile_all(nvcc: &Nvcc, kernels: &Path, out: &Path) -> Result<Vec<Image>, String> {
    let fail = |what: &str, error: std::io::Error| format!("cannot {what}: {error}");
    fs::create_dir_all(out).map_err(|error| fail("make OUT_DIR/kernels", error))?;
    let mut sources = BTreeMap::new();
    let mut headers = Hash::new();
    for text in [&nvcc.version, OPTIONS.join(" ").as_str()] {
        headers.add(text.as_bytes());
    }
    let mut entries: Vec<_> = fs::read_dir(kernels)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(|error| fail("list kernels/", error))?;
    entries.sort();
    for path in entries {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_owned();
        if extension == "cu" || extension == "cuh" {
            let text = fs::read(&path).map_err(|error| fail(&format!("read {}", path.display()), error))?;
            if extension == "cu" {
                sources.insert(stem, (path, text));
            } else {
                headers.add(stem.as_bytes());
                headers.add(&text);
            }
        }
    }

    let mut builds = Vec::new();
    for (name, (path, text)) in sources {
        let (virtual_arch, real) = if name.ends_with("_sm90") { HOPPER } else { PORTABLE };
        let mut hash = headers;
        hash.add(name.as_bytes());
        hash.add(&text);
        hash.add(format!("{virtual_arch} {}", real.join(" ")).as_bytes());
        let image = Image { fatbin: out.join(format!("{name}.fatbin")), name };
        let key_file = out.join(format!("{}.key", image.name));
        let key = format!("{:032x}", hash.0);
        let fresh = image.fatbin.is_file() && fs::read_to_string(&key_file).is_ok_and(|old| old == key);
        if !fresh {
            let _ = fs::remove_file(&key_file); // until all of it is there
        }
        builds.push(Build { image, source: path, out, virtual_arch, real, key_file, key, fresh });
    }
    let stale: Vec<&Build> = builds.iter().filter(|build| !build.fresh).collect();
    in_parallel(&stale, |build| build.to_ptx(nvcc))?;
    let pairs: Vec<(&Build, &str)> =
        stale.iter().flat_map(|&build| build.real.iter().map(move |&arch| (build, arch))).collect();
    in_parallel(&pairs, |(build, arch)| build.to_cubin(nvcc, arch))?;
    for build in stale {
        build.join(nvcc)?;
        fs::write(&build.key_file, &build.key).map_err(|error| fail("write a hash", error))?;
    }
    Ok(builds.into_iter().map(|build| build.image).collect())
}

/// The Rust source of the table of images.
pub fn table(images: &[Image]) -> String {
    let mut text = String::from("/// Every kernel file that this build compiled, by stem.\n");
    text.push_str("pub(crate) static IMAGES: &[Image] = &[\n");
    for Image { name, fatbin } in images {
        let fatbin = fatbin.to_string_lossy();
        let _ =
            writeln!(text, "    Image {{ name: {name:?}, bytes: &Aligned(*include_bytes!({fatbin:?})).0 }},");
    }
    text.push_str("];\n");
    text
}

/// What is to be done for one kernel file.
struct Build<'a> {
    image: Image,
    source: PathBuf,
    out: &'a Path,
    virtual_arch: &'static str,
    real: &'static [&'static str],
    key_file: PathBuf,
    key: String,
    fresh: bool,
}

impl Build<'_> {
    /// Where a step's result goes: `linear_sm80.sm_86.cubin`.
    fn path(&self, arch: &str, extension: &str) -> PathBuf {
        self.out.join(format!("{}.{arch}.{extension}", self.image.name))
    }

    fn to_ptx(&self, nvcc: &Nvcc) -> Result<(), String> {
        let mut command = Command::new(&nvcc.path);
        command.arg("-ptx").args(OPTIONS).arg(format!("-arch={}", self.virtual_arch));
        command.arg("-o").arg(self.path(self.virtual_arch, "ptx")).arg(&self.source);
        let said = run(command)?;
        fs::write(self.path(self.virtual_arch, "txt"), said).map_err(|error| error.to_string())
    }

    fn to_cubin(&self, nvcc: &Nvcc, arch: &str) -> Result<(), String> {
        let mut command = Command::new(&nvcc.path);
        command.arg("-cubin").arg(format!("-gencode=arch={},code={arch}", self.virtual_arch));
        command.args(["-Xptxas", "-v", "-o"]).arg(self.path(arch, "cubin"));
        command.arg(self.path(self.virtual_arch, "ptx"));
        let said = run(command)?;
        fs::write(self.path(arch, "txt"), said).map_err(|error| error.to_string())
    }

    fn join(&self, nvcc: &Nvcc) -> Result<(), String> {
        let mut command = Command::new(nvcc.beside("fatbinary"));
        command.args(["-64", "--compress-all"]).arg(option("--create=", &self.image.fatbin));
        let images = self.real.iter().map(|arch| ("elf", *arch, "cubin"));
        let portable = self.virtual_arch == PORTABLE.0;
        for (kind, arch, extension) in images.chain(portable.then_some(("ptx", self.virtual_arch, "ptx"))) {
            let (_, number) = arch.split_once('_').unwrap_or_default();
            command
                .arg(option(&format!("--image3=kind={kind},sm={number},file="), &self.path(arch, extension)));
        }
        run(command).map(|_| ())
    }
}

/// `prefix` and a path as one argument, whatever bytes the path has.
fn option(prefix: &str, path: &Path) -> OsString {
    let mut option = OsString::from(prefix);
    option.push(path);
    option
}

/// Runs a command to its end and returns what it said; an error has the command and all of that.
fn run(mut command: Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    if output.status.success() {
        Ok(said)
    } else {
        Err(format!("{command:?} failed, {}:\n{said}", output.status))
    }
}

/// Does `job` for all items, as many at a time as cargo allows; the first error of them in order.
fn in_parallel<T: Copy + Sync>(
    items: &[T],
    job: impl Fn(T) -> Result<(), String> + Sync,
) -> Result<(), String> {
    let jobs: usize = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(2);
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(items.len()) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&item) = items.get(i) else { break };
                    if let Err(error) = job(item) {
                        next.store(items.len(), Ordering::Relaxed);
                        failed.lock().expect("no job panics").insert(i, error);
                    }
                }
            });
        }
    });
    failed.into_inner().expect("no job panics").into_values().next().map_or(Ok(()), Err)
}

/// FNV-1a of 128 bits, over pieces with their lengths. Tells changes, not attackers.
#[derive(Clone, Copy)]
struct Hash(u128);

impl Hash {
    fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    fn add(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_le_bytes();
        for byte in length.iter().chain(bytes) {
            self.0 = (self.0 ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}
