//! Programs that the compiler must refuse, because they change a host without a verified image. rustc must report
//! exactly the expected error for each; the correct control program must compile.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "runs the compiler on programs that it writes"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const USES: &str = "#![allow(unused, dead_code)]
    use rebase_agent::host::{Cancel, Host};
    use rebase_agent::model::{ImageFacts, PinnedImage};
    use rebase_agent::trust::VerifiedImage;";

const CONTROL: &str = "fn control(host: &Host, image: &VerifiedImage, cancel: &mut Cancel) {
    drop(host.fetch(image, cancel, &|_| {}));
    drop(host.stage(image, cancel, &|_| {}));
    drop(host.set_kernel_arguments(image, &[], &[], cancel));
    drop(host.reboot(image));
    let (_, _): (&PinnedImage, &ImageFacts) = (image.image(), image.facts());
}";

/// Function bodies that must not compile, and the only error of each.
const REFUSED: &[(&str, &str)] = &[
    (
        "E0451",
        "fn forge(facts: ImageFacts) -> VerifiedImage {
            VerifiedImage { facts, default_is_insecure: false, vouchers: String::new() }
        }",
    ),
    ("E0616", "fn swap(mut verified: VerifiedImage, other: ImageFacts) { verified.facts = other; }"),
    ("E0594", "fn write(mut verified: VerifiedImage, other: PinnedImage) { *verified.image() = other; }"),
    ("E0599", "fn make() -> VerifiedImage { VerifiedImage::default() }"),
    ("E0277", "fn convert(image: PinnedImage) -> VerifiedImage { image.into() }"),
    (
        "E0308",
        "fn fetch(host: &Host, image: &PinnedImage, cancel: &mut Cancel) { drop(host.fetch(image, cancel, &|_| {})); }",
    ),
    (
        "E0308",
        "fn stage(host: &Host, image: &PinnedImage, cancel: &mut Cancel) { drop(host.stage(image, cancel, &|_| {})); }",
    ),
    (
        "E0308",
        "fn set(host: &Host, image: &PinnedImage, cancel: &mut Cancel) {
            drop(host.set_kernel_arguments(image, &[], &[], cancel));
        }",
    ),
    ("E0308", "fn reboot(host: &Host, image: &PinnedImage) { drop(host.reboot(image)); }"),
    ("E0061", "fn reboot(host: &Host) { drop(host.reboot()); }"),
];

/// The compiler next to the cargo that runs the test.
fn compiler() -> PathBuf {
    let beside = std::env::var_os("CARGO").map(|cargo| Path::new(&cargo).with_file_name("rustc"));
    beside.filter(|path| path.exists()).unwrap_or_else(|| PathBuf::from("rustc"))
}

/// The error codes of `program`, and the compiler's whole output.
fn compile(library: &Path, program: &str) -> (bool, BTreeSet<String>, String) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("program.rs");
    std::fs::write(&source, format!("{USES}\n{program}\n")).unwrap();
    let output = Command::new(compiler())
        .args(["--edition", "2024", "--crate-type", "lib", "--emit", "metadata", "--out-dir"])
        .arg(dir.path())
        .arg("-L")
        .arg(format!("dependency={}", library.parent().unwrap().display()))
        .arg("--extern")
        .arg(format!("rebase_agent={}", library.display()))
        .arg(&source)
        .output()
        .expect("the compiler starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let codes = said.split("error[").skip(1).filter_map(|rest| rest.split_once(']')).map(|(code, _)| code.to_owned());
    (output.status.success(), codes.collect(), said)
}

/// The library that this test is linked with: the newest that the control compiles with, because a target directory may
/// keep those of other builds.
fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let mut found: Vec<PathBuf> = std::fs::read_dir(test.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.starts_with("librebase_agent-") && name.ends_with(".rlib")
        })
        .collect();
    found.sort_by_key(|path| std::fs::metadata(path).unwrap().modified().unwrap());
    let mut last = "no library was built".to_owned();
    for path in found.into_iter().rev() {
        match compile(&path, CONTROL) {
            (true, ..) => return path,
            (false, _, said) => last = said,
        }
    }
    panic!("the control does not compile: {last}");
}

#[test]
fn no_host_is_changed_without_a_verified_image() {
    let library = library();
    for (expected, program) in REFUSED {
        let (compiled, codes, said) = compile(&library, program);
        assert!(!compiled, "this compiles:\n{program}");
        assert_eq!(codes, BTreeSet::from([(*expected).to_owned()]), "{program}\n{said}");
    }
}
