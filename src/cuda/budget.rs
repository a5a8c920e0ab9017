//! What ptxas said of every kernel, on every architecture, against `kernels/budgets.txt`.
//!
//! build.rs keeps the reports beside the fat binaries, so this costs nothing. A line of the table:
//!
//! ```text
//! kernel                architecture   registers   dynamic shared memory, in bytes
//! linear_bias_128x128   sm_80          168         65536
//! layer_norm            *              64          0
//! ```
//!
//! `*` is every architecture without a line of its own; `#` begins a comment.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::launch::Entry;

/// Architectures of the portable kernels (build/nvcc.rs), and their most shared memory: sm_86's 99 KB.
const PORTABLE: &[&str] = &["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];
const PORTABLE_SHARED: u32 = 101_376;

/// The same of `*_sm90.cu`.
const HOPPER: &[&str] = &["sm_90a"];
const HOPPER_SHARED: u32 = 232_448;

/// ptxas' words on one kernel and architecture.
#[derive(Debug, Default, PartialEq)]
struct Usage {
    registers: u32,
    stack: u32,  // bytes
    spills: u32, // bytes stored and loaded
    shared: u32, // bytes, static
}

/// Reads a report: kernels and their usage, and the lines that are warnings.
fn read_report(report: &str) -> (BTreeMap<String, Usage>, Vec<String>) {
    let (mut kernels, mut warnings) = (BTreeMap::<String, Usage>::new(), Vec::new());
    let mut current = String::new();
    for line in report.lines() {
        let words: Vec<&str> = line.split([' ', ',', '\'']).filter(|word| !word.is_empty()).collect();
        // The number before the first of the words `after`.
        let number = |after: &[&str]| {
            let at = words.windows(after.len()).position(|w| w == after);
            at.and_then(|at| at.checked_sub(1)).and_then(|at| words[at].parse().ok()).unwrap_or(0)
        };
        if let Some(at) =
            words.iter().position(|word| *word == "function").filter(|_| line.contains("Compiling"))
        {
            current = words.get(at + 1).copied().unwrap_or_default().to_owned();
            kernels.entry(current.clone()).or_default();
        } else if let Some(usage) = kernels.get_mut(&current) {
            if line.contains("stack frame") {
                usage.stack = number(&["bytes", "stack"]);
                usage.spills = number(&["bytes", "spill", "stores"]) + number(&["bytes", "spill", "loads"]);
            } else if line.contains("Used") {
                usage.registers = number(&["registers"]);
                usage.shared = number(&["bytes", "smem"]);
            }
        }
        if !line.starts_with("ptxas info") && !line.starts_with("    ") || line.contains("C75") {
            warnings.push(line.to_owned());
        }
    }
    (kernels, warnings)
}

/// A line of the table: kernel and architecture, to registers and shared memory.
type Budgets = BTreeMap<(String, String), (u32, u32)>;

fn read_budgets(text: &str) -> Result<Budgets, String> {
    let mut budgets = Budgets::new();
    for line in text.lines().map(|line| line.split('#').next().unwrap_or_default()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.is_empty() {
            continue;
        }
        let parsed = match words[..] {
            [kernel, arch, registers, shared] => registers
                .parse()
                .ok()
                .zip(shared.parse().ok())
                .map(|limits| budgets.insert((kernel.to_owned(), arch.to_owned()), limits)),
            _ => None,
        };
        match parsed {
            None => return Err(format!("not `kernel architecture registers shared`: {line:?}")),
            Some(Some(_)) => return Err(format!("twice: {line:?}")),
            Some(None) => {}
        }
    }
    Ok(budgets)
}

/// What is wrong with one kernel on one architecture.
fn judge(kernel: &str, arch: &str, usage: &Usage, dynamic: Option<u32>, budgets: &Budgets) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut refuse = |problem: String| wrong.push(format!("{kernel} on {arch}: {problem}"));
    if usage.stack > 0 || usage.spills > 0 {
        refuse(format!("{} bytes of stack, {} bytes of spills", usage.stack, usage.spills));
    }
    if usage.shared > 0 {
        refuse(format!("{} bytes of static shared memory", usage.shared));
    }
    let budget = [arch, "*"].iter().find_map(|a| budgets.get(&(kernel.to_owned(), (*a).to_owned())));
    let Some(&(registers, shared)) = budget else {
        refuse("no line in kernels/budgets.txt".into());
        return wrong;
    };
    if usage.registers > registers {
        refuse(format!("{} registers, budget {registers}", usage.registers));
    }
    if let Some(dynamic) = dynamic.filter(|dynamic| *dynamic > shared) {
        refuse(format!("launched with {dynamic} bytes of shared memory, budget {shared}"));
    }
    let most = if PORTABLE.contains(&arch) { PORTABLE_SHARED } else { HOPPER_SHARED };
    if shared > most {
        refuse(format!("a budget of {shared} bytes of shared memory; the architecture has {most}"));
    }
    wrong
}

/// Names of the entry points in a kernel's source.
fn entry_points(source: &str) -> BTreeSet<String> {
    let entries = source.lines().filter(|line| line.starts_with("extern \"C\" __global__"));
    let name = |line: &str| {
        let before = line.rsplit_once('(').map_or(line, |(before, _)| before);
        // Without a parenthesis at its end the line breaks inside the list; names are followed by `(` in any
        // case.
        let word = |text: &str| text.rsplit([' ', '*']).next().unwrap_or_default().to_owned();
        match before.rsplit_once(") ") {
            Some((_, rest)) => word(rest.split('(').next().unwrap_or_default()),
            None => word(before.split('(').next().unwrap_or_default()),
        }
    };
    entries.map(name).collect()
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn every_kernel_keeps_its_budget_on_every_architecture() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let reports = PathBuf::from(concat!(env!("OUT_DIR"), "/kernels"));
    let budgets = read_budgets(&fs::read_to_string(kernels.join("budgets.txt")).unwrap()).unwrap();
    let dynamic: BTreeMap<&str, u32> =
        super::entries().iter().map(|Entry { name, shared, .. }| (*name, *shared)).collect();
    let (mut wrong, mut seen) = (Vec::new(), BTreeSet::new());
    for image in super::images::IMAGES {
        let hopper = image.name.ends_with("_sm90");
        let (first, architectures) = if hopper { ("compute_90a", HOPPER) } else { ("compute_80", PORTABLE) };
        let report =
            |arch: &str| fs::read_to_string(reports.join(format!("{}.{arch}.txt", image.name))).unwrap();
        let said = report(first);
        if !said.trim().is_empty() {
            wrong.push(format!("nvcc about {}.cu: {said}", image.name));
        }
        let entries = entry_points(&fs::read_to_string(kernels.join(format!("{}.cu", image.name))).unwrap());
        assert!(!entries.is_empty(), "{}.cu has no entry points", image.name);
        for arch in architectures {
            let (compiled, warnings) = read_report(&report(arch));
            wrong.extend(warnings.into_iter().map(|line| format!("{} on {arch}: {line}", image.name)));
            assert_eq!(
                compiled.keys().cloned().collect::<BTreeSet<_>>(),
                entries,
                "{} on {arch}",
                image.name
            );
            for (kernel, usage) in &compiled {
                wrong.extend(judge(kernel, arch, usage, dynamic.get(kernel.as_str()).copied(), &budgets));
            }
        }
        seen.extend(entries);
    }
    let unknown = budgets.keys().filter(|(kernel, _)| !seen.contains(kernel));
    wrong.extend(unknown.map(|(kernel, _)| format!("{kernel} has a budget, but is in no kernel file")));
    let missing = dynamic.keys().filter(|kernel| !seen.contains(**kernel));
    wrong.extend(missing.map(|kernel| format!("{kernel} has a launcher, but is in no kernel file")));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Names of instructions with all their parts, by kernel, as nvdisasm lists them.
fn read_listing(listing: &str) -> BTreeMap<String, BTreeSet<String>> {
    let (mut kernels, mut current) = (BTreeMap::<String, BTreeSet<String>>::new(), None);
    for line in listing.lines() {
        let text = line.trim_start();
        if text.starts_with(".section") {
            current = None;
        } else if let Some(name) = text.strip_prefix(".text.").and_then(|name| name.strip_suffix(':')) {
            current = Some(kernels.entry(name.to_owned()).or_default());
        } else if let (Some(kernel), Some((_, words))) = (&mut current, text.split_once("*/")) {
            // Before the name may stand a predicate, `@!P0` or `@UP1`.
            let name = words.split_whitespace().find(|word| !word.starts_with('@'));
            let name = name.map(|name| name.trim_end_matches(';')).filter(|name| !name.starts_with("/*"));
            kernel.extend(name.map(str::to_owned));
        }
    }
    kernels
}

/// What one of Hopper's kernels must be made of, and must not.
fn judge_instructions(kernel: &str, instructions: &BTreeSet<String>) -> Vec<String> {
    let has = |parts: &[&str]| {
        let all = |name: &&String| parts.iter().all(|part| name.split('.').any(|of| of == *part));
        instructions.iter().find(all)
    };
    let mut needs: Vec<&[&str]> = vec![&["HGMMA"], &["UTMALDG"], &["USETMAXREG"]];
    if kernel.ends_with("_c2") {
        needs.push(&["UTMALDG", "MULTICAST"]);
    }
    let missing = needs.into_iter().filter(|parts| has(parts).is_none());
    let mut wrong: Vec<String> =
        missing.map(|parts| format!("{kernel} has no {}", parts.join("..."))).collect();
    let local = [["LDL"], ["STL"]].into_iter().filter_map(|name| has(&name));
    wrong.extend(local.map(|name| format!("{kernel} has {name}: local memory")));
    wrong
}

#[test]
#[cfg_attr(
    not(has_nvdisasm),
    ignore = "there was no nvdisasm beside nvcc: bash kernels/fetch-nvcc brings one"
)]
fn hoppers_kernels_are_made_of_hoppers_instructions() {
    let Some(nvdisasm) = option_env!("IMAGEHERE_NVDISASM") else { panic!("build.rs names it") };
    let mut wrong = Vec::new();
    let hopper: Vec<_> = super::images::IMAGES.iter().filter(|image| image.name.ends_with("_sm90")).collect();
    assert!(!hopper.is_empty());
    for image in hopper {
        let cubin = format!(concat!(env!("OUT_DIR"), "/kernels/{}.sm_90a.cubin"), image.name);
        let output = std::process::Command::new(nvdisasm).args(["-c", &cubin]).output().unwrap();
        assert!(output.status.success(), "{cubin}: {}", String::from_utf8_lossy(&output.stderr));
        let listed = read_listing(&String::from_utf8_lossy(&output.stdout));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("kernels/{}.cu", image.name));
        let entries = entry_points(&fs::read_to_string(source).unwrap());
        assert_eq!(listed.keys().cloned().collect::<BTreeSet<_>>(), entries, "{}", image.name);
        wrong.extend(listed.iter().flat_map(|(kernel, has)| judge_instructions(kernel, has)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn reads_what_nvdisasm_writes() {
    let listing = "\t.section\t.text.a_c2,\"ax\",@progbits\n\
        .text.a_c2:\n\
        \x20       /*0000*/                   LDC R1, c[0x0][0x28] ;\n\
        .L_x_0:\n\
        \x20       /*0010*/              @P0  HGMMA.64x256x16.F32 R24, gdesc[UR4], R24, gsb0 ;\n\
        \x20       /*0020*/              @!UP0 UTMALDG.2D.MULTICAST [UR8], [UR6], UR9 ;\n\
        \x20       /*0030*/                   USETMAXREG.DEALLOC.CTAPOOL 0x38 ;\n\
        \x20       /*0040*/                   EXIT ;\n\
        \t.section\t.text.b,\"ax\",@progbits\n\
        .text.b:\n\
        \x20       /*0000*/                   LDL.64 R2, [R1] ;\n";
    let listed = read_listing(listing);
    let expected =
        ["EXIT", "HGMMA.64x256x16.F32", "LDC", "USETMAXREG.DEALLOC.CTAPOOL", "UTMALDG.2D.MULTICAST"];
    assert_eq!(listed["a_c2"], BTreeSet::from(expected.map(String::from)));
    assert!(listed.len() == 2 && judge_instructions("a_c2", &listed["a_c2"]).is_empty());
    let wrong = judge_instructions("b_c2", &listed["b"]);
    assert_eq!(wrong.len(), 5, "{wrong:?}");
    assert_eq!(wrong[4], "b_c2 has LDL.64: local memory");
}

#[test]
fn reads_what_ptxas_writes() {
    let report = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'a' for 'sm_90'\n\
        ptxas info    : Function properties for a\n\
        \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Used 106 registers, used 1 barriers, 32 bytes smem, 400 bytes cmem[0]\n\
        ptxas info    : Compiling entry function 'b' for 'sm_90'\n\
        ptxas info    : Function properties for b\n\
        \x20   48 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads\n\
        ptxas info    : Used 255 registers\n";
    let (kernels, warnings) = read_report(report);
    assert_eq!(kernels["a"], Usage { registers: 106, stack: 0, spills: 0, shared: 32 });
    assert_eq!(kernels["b"], Usage { registers: 255, stack: 48, spills: 36, shared: 0 });
    assert!(warnings.is_empty() && kernels.len() == 2, "{warnings:?}");

    let serialised =
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized";
    let other = "ptxas /tmp/x.ptx, line 3; warning : something";
    for line in [serialised, other] {
        assert_eq!(read_report(&format!("{report}{line}\n")).1, [line]);
    }
}

#[test]
fn judges_against_the_table() {
    let budgets = read_budgets("# kernel\na * 64 0\na sm_90 96 1024 # more\n\nb sm_80 10 200000\n").unwrap();
    let usage = |registers| Usage { registers, ..Usage::default() };
    assert!(judge("a", "sm_80", &usage(64), Some(0), &budgets).is_empty());
    assert!(judge("a", "sm_90", &usage(96), Some(1024), &budgets).is_empty());
    assert_eq!(judge("a", "sm_80", &usage(65), None, &budgets), ["a on sm_80: 65 registers, budget 64"]);
    assert!(judge("a", "sm_80", &usage(1), Some(16), &budgets)[0].contains("launched with 16 bytes"));
    assert!(
        judge("a", "sm_80", &Usage { spills: 4, ..usage(1) }, None, &budgets)[0]
            .contains("4 bytes of spills")
    );
    assert!(
        judge("a", "sm_80", &Usage { stack: 8, ..usage(1) }, None, &budgets)[0].contains("8 bytes of stack")
    );
    assert!(
        judge("a", "sm_80", &Usage { shared: 8, ..usage(1) }, None, &budgets)[0]
            .contains("8 bytes of static")
    );
    assert!(judge("b", "sm_80", &usage(1), None, &budgets)[0].contains("the architecture has 101376"));
    assert!(judge("c", "sm_80", &usage(1), None, &budgets)[0].contains("no line"));
    assert!(read_budgets("a * 64").is_err() && read_budgets("a * 64 x").is_err());
    assert!(read_budgets("a * 1 2\na * 3 4").is_err());
}

#[test]
fn finds_entry_points() {
    let source = "\
        extern \"C\" __global__ void __launch_bounds__(Big::THREADS, BIG_BLOCKS) linear_bias_128x128(\n\
        \x20   const __grid_constant__ LinearArgs args) {\n\
        extern \"C\" __global__ void __launch_bounds__(128) layer_norm(fp16 *y, const fp16 *x) {\n\
        extern \"C\" __global__ void __launch_bounds__(f(1), g(2)) third(int a) {\n\
        extern \"C\" __global__ void plain(int a) {\n";
    let expected = ["linear_bias_128x128", "layer_norm", "third", "plain"].map(String::from);
    assert_eq!(entry_points(source), BTreeSet::from(expected));
}
