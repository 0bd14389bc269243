//! Compares the scope gate with the real engine: for the same policy and reference, both choose the same scope and
//! reach the same verdict. The engine's debug log names its choice.
//!
//! `REBASE_TEST_CASES` is the number of pairs, 150 by default; `FULL=1` means 2400. `REBASE_TEST_SEED` repeats a run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]
#![allow(clippy::disallowed_methods, reason = "the tests own the disk and start the engine")]
#![allow(clippy::print_stdout, reason = "readers of the log need the seed and the counts")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use containers_image_proxy::{ImageProxy, ImageProxyConfig};
use rebase_agent::trust::gate::{Policy, Verdict};
use rebase_agent::trust::reference;
use serde_json::json;
use support::image::ImageSpec;
use support::pki::Pki;
use support::registry::{Registry, ServerTls};
use support::tools;

const HOSTS: [&str; 12] = [
    "quay.io",
    "registry.a.example.com",
    "registry.a.example.com:5000",
    "a.example.com",
    "example.com",
    "example.com:5000",
    "Example.com",
    "localhost",
    "localhost:5000",
    "10.1.2.3:5000",
    "docker.io",
    "index.docker.io",
];
const PATHS: [&str; 5] = ["os", "ns/os", "ns/team/os", "library/os", "ns.x/te_am/o-s"];
const KINDS: [&str; 4] = ["insecureAcceptAnything", "reject", "sigstoreSigned", "signedBy"];

/// SplitMix64: the same seed gives the same cases everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % end as u64).unwrap()
    }

    fn of<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// Requirements that fail without a signature, fail without reading one, or never fail.
fn requirements(random: &mut Random) -> serde_json::Value {
    let one = |random: &mut Random| match random.of(&KINDS) {
        "sigstoreSigned" => json!({ "type": "sigstoreSigned", "keyPath": "/nonexistent" }),
        "signedBy" => json!({ "type": "signedBy", "keyType": "GPGKeys", "keyPath": "/nonexistent" }),
        kind => json!({ "type": kind }),
    };
    (0..=random.below(2)).map(|_| one(random)).collect()
}

/// Scopes that apply to a reference, nearly apply to it, or look like it; and the empty one.
fn scope(random: &mut Random, name: &str, digest: &str) -> String {
    let (host, path) = name.split_once('/').unwrap();
    let bare = host.split(':').next().unwrap();
    let levels: Vec<_> = path.split('/').collect();
    let depth = random.below(levels.len()) + 1;
    let parent = format!("{host}/{}", levels[..depth].join("/"));
    let after_dot = |count: usize| bare.splitn(count + 1, '.').last().unwrap_or(bare).to_owned();
    match random.below(14) {
        0 => format!("{name}@{digest}"),
        1 => name.to_owned(),
        2 => format!("{name}:tag"),
        3 | 4 => parent,
        5 => host.to_owned(),
        6 => bare.to_owned(),
        7 => format!("{bare}:5000"),
        8 => format!("*.{}", after_dot(1)),
        9 => format!("*.{}", after_dot(2)),
        10 => format!("*.{bare}"),
        11 => parent[..parent.len() - 1].to_owned(),
        12 => String::new(),
        _ => host.to_uppercase(),
    }
}

#[tokio::test]
async fn gate_chooses_the_same_policy_scope_as_the_engine() {
    let full = std::env::var_os("FULL").is_some_and(|full| full == "1");
    let cases = number("REBASE_TEST_CASES", if full { 2400 } else { 150 });
    let seed = number("REBASE_TEST_SEED", u64::from(std::process::id()));
    eprintln!("{cases} cases, REBASE_TEST_SEED={seed}");
    let mut random = Random(seed);

    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let pki = Pki::new();
    let (cert_pem, key_pem) = pki.server(&[]);
    let tls = ServerTls { cert_pem, key_pem, ca_pem: pki.ca_pem() };
    let registry = Registry::start(&path("registry"), tls).await.unwrap();
    let pushed = registry.push("ns/os", "tag", &ImageSpec::default()).await.unwrap();

    // One repository serves every name; scopes apply to the name.
    let mut conf = "unqualified-search-registries = []\n".to_owned();
    for (host, repository) in HOSTS.iter().flat_map(|host| PATHS.map(|path| (host, path))) {
        let at = pushed.repository();
        writeln!(conf, "[[registry]]\nprefix = \"{host}/{repository}\"\nlocation = \"{at}\"").unwrap();
    }
    fs::write(path("registries.conf"), conf).unwrap();
    fs::create_dir(path("registries.d")).unwrap();

    let option = |name: &str, file: &str| format!("--{name}={}", path(file).display());
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "sh", "-c", "log=$1; shift; exec \"$@\" 2>\"$log\"", "sh"]);
    command.arg(path("log")).arg(tools::skopeo().unwrap()).arg("--debug");
    command.arg(option("policy", "policy.json")).arg(option("registries.d", "registries.d"));
    command.arg(option("registries-conf", "registries.conf")).env("HOME", directory.path());
    let mut config = ImageProxyConfig::default();
    config.skopeo_cmd = Some(command);
    config.auth_anonymous = true;
    config.certificate_directory = Some(registry.cert_dir());
    let engine = ImageProxy::new_with_config(config).await.unwrap();

    let (mut compared, mut chosen, mut verdicts) = (0, BTreeMap::new(), BTreeMap::new());
    let mut read = 0;
    for case in 0..cases {
        let spelt = format!("{}/{}@{}", random.of(&HOSTS), random.of(&PATHS), pushed.digest);
        let image = reference::parse(&spelt).unwrap();
        let mut docker = serde_json::Map::new();
        for _ in 0..random.below(7) {
            // Sometimes the scopes of another name.
            let name = if random.below(4) == 0 { random.of(&["quay.io/ns/os", "a.b.c/os"]) } else { image.name() };
            docker.insert(scope(&mut random, name, image.digest().as_str()), requirements(&mut random));
        }
        let mut policy = json!({ "default": requirements(&mut random), "transports": {} });
        for transport in ["docker", "atomic"] {
            if random.below(5) > 0 {
                policy["transports"][transport] = docker.clone().into();
            }
        }
        let policy = policy.to_string();
        fs::write(path("policy.json"), &policy).unwrap();
        // The host gets the canonical spelling; the engine must understand both.
        let named = if random.below(2) == 0 { &spelt } else { &image.to_string() };
        let opened = engine.open_image(&format!("docker://{named}")).await;
        let log = fs::read(path("log")).unwrap();
        let said = String::from_utf8_lossy(&log[read..]).into_owned();
        read = log.len();

        let context = || format!("case {case} of seed {seed}: {spelt}\n{policy}\n{opened:?}\n{said}");
        let gate = Policy::parse(policy.as_bytes()).unwrap().gate(&image);
        let Some(theirs) = scope_in(&said) else {
            // The engine rejected the policy as a whole, for example a scope that is not a name.
            assert!(
                opened.as_ref().is_err_and(|error| error.to_string().contains("invalid policy in")),
                "{}",
                context()
            );
            continue;
        };
        let gate = gate.unwrap();
        assert_eq!(gate.scope, theirs, "{}", context());
        match gate.verdict {
            Verdict::AcceptsAnything => assert!(opened.is_ok(), "{}", context()),
            Verdict::RequiresSignature | Verdict::AlwaysRejects => assert!(opened.is_err(), "{}", context()),
        }
        compared += 1;
        *chosen.entry(theirs.split(['/', '.', ':']).count()).or_insert(0) += 1;
        *verdicts.entry(format!("{:?}", gate.verdict)).or_insert(0) += 1;
    }
    eprintln!("{compared} agreements; by number of parts of the scope: {chosen:?}; verdicts: {verdicts:?}");
    assert!(compared * 10 >= cases * 7, "only {compared} of {cases} could be compared");
    assert_eq!(verdicts.len(), 3, "{verdicts:?}");
    assert!(chosen.len() >= 4, "{chosen:?}");
}

/// The engine's choice from its debug log, spelled as the gate spells it.
fn scope_in(log: &str) -> Option<String> {
    let text = log.replace("\\\"", "\"");
    for line in text.lines() {
        if line.contains("Using default policy section") {
            return Some("default".to_owned());
        }
        if let Some((_, rest)) = line.split_once("Using transport \"docker\" ") {
            let (_, scope) = rest.split_once("policy section \"")?;
            return Some(format!("docker \"{}\"", scope.split('"').next()?));
        }
    }
    None
}
