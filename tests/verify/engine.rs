//! The engine as a program: unfit, hanging, replaced or orphaned engines, and the environment that an engine gets.

use rebase_agent::trust::{Engine, Settings, reference, verify};
use support::hostile_registry::{HostileRegistry, Place, Trick};
use support::skip::skip;
use tokio::task::JoinSet;

use super::*;

/// A script that answers `--version` itself; `otherwise` handles every other call.
pub fn claims(version: &str, otherwise: &str) -> String {
    format!("case \"$*\" in --version) echo 'skopeo version {version}'; exit;; esac\n{otherwise}")
}

#[tokio::test]
async fn engine_that_does_not_enforce_is_refused() {
    let node = Node::new().await;
    // An engine that does not enforce opens even an unsigned image.
    let pushed = node.push(&ImageSpec::default()).await;
    let mut engines = vec![
        (node.path("missing"), "No such file"),
        (node.path("registries.d"), "Permission denied"),
        (node.engine("mute", "exit 0"), "does not report its version"),
        (node.engine("broken", "echo 'cannot load library' >&2; exit 127"), "cannot load library"),
        (node.engine("other", "echo 'podman version 5.4.0'"), "podman version"),
        (node.engine("ignores-policy", &claims("1.13.3", "exec $REAL \"$@\"")), "1.13 does not enforce"),
        (node.engine("ancient", &claims("0.1.41", "exec $REAL \"$@\"")), "0.1 does not enforce"),
        (node.engine("early", &claims("1.18.0", "echo boom >&2; exit 7")), "exit status: 7"),
        (node.engine("killed", &claims("1.18.0", "kill -9 $$")), "signal: 9"),
        (node.engine("babbles", &claims("1.18.0", "echo x >&0; exit 0")), "does not start"),
    ];
    match tools::unenforcing_skopeo() {
        Some(old) => {
            let lies = claims("1.18.0", &format!("exec {} \"$@\"", old.display()));
            engines.push((node.engine("lies", &lies), "protocol 0.2.3 does not enforce"));
            engines.push((old, "skopeo 1.9 does not enforce"));
        }
        None => skip("no skopeo here evaluates no policy; on Debian, tests/support/install fetches one"),
    }
    for (engine, why) in engines {
        let outcome = node.verify_with(&pushed.pullspec(), &[("REBASE_AGENT_SKOPEO", text(&engine))]).await;
        let said = outcome.refused(Reason::EngineUnfit);
        assert!(said.contains(why) && said.contains(text(&engine)), "{engine:?}: {said}");
    }
}

#[tokio::test]
async fn hanging_engine_is_killed() {
    let mut tasks = JoinSet::new();
    let slow = "case \"$*\" in --version) sleep 2; echo 'skopeo version 1.18.0'; exit;; esac\nexec sleep 300";
    for (name, body, deadline, seconds) in [
        ("no-version", "exec sleep 300".to_owned(), "1", 1..=4),
        ("no-answer", claims("1.18.0", "exec sleep 300"), "1", 1..=4),
        ("slow", slow.to_owned(), "3", 3..=7),
    ] {
        tasks.spawn(async move {
            let node = Node::new().await;
            let engine = node.engine(name, &body);
            let spec = format!("{}/{REPO}@sha256:{}", node.registry.host(), "0".repeat(64));
            let env = [("REBASE_AGENT_SKOPEO", text(&engine)), ("REBASE_AGENT_VERIFY_TIMEOUT", deadline)];
            let outcome = node.verify_with(&spec, &env).await;
            assert!(outcome.refused(Reason::EngineUnfit).contains(name), "{outcome:?}");
            assert!(seconds.contains(&outcome.took.as_secs()), "{name}: {:?}", outcome.took);
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

/// A killed agent cannot stop its engine; the kernel does.
#[tokio::test]
async fn engine_dies_with_the_agent() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    node.policy(&Policy::new([node.requirement()]));
    let hostile = HostileRegistry::start(&node.tls, &node.registry.host(), Place::Manifest, Trick::Hang).await.unwrap();
    let mut command = node.command(&format!("{}/{REPO}@{}", hostile.host(), pushed.digest));
    let mut agent = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    // An engine without a running request would exit by itself.
    while hostile.played() == 0 {
        assert!(started.elapsed() < Duration::from_secs(20), "no engine was started");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!node.engines().is_empty());
    agent.kill().await.unwrap();
    let left = node.engines_after(Duration::from_secs(5)).await;
    assert!(left.is_empty(), "{left:?}");
}

/// Waits without end in the script's only process, as skopeo does during a request, and reads no socket.
const WAIT: &str = "test -p $0.pipe || mkfifo $0.pipe\nread -r nothing <$0.pipe";

/// A retarget drops a verification and its engine long before the deadline.
#[tokio::test]
async fn dropped_verifications_leave_at_most_one_engine() {
    const RETARGETS: usize = 77;
    let node = Node::new().await;
    let image = reference::parse(&node.signed().await.pullspec()).unwrap();
    let count = node.path("count");
    let body = claims("1.18.0", &format!("echo >> {}\n{WAIT}", count.display()));
    let engine = Engine::new(settings(&node, node.engine("stuck", &body), 120));
    let begun = || fs::read_to_string(&count).unwrap_or_default().len();
    let (started, mut most) = (Instant::now(), 0);
    for retarget in 1..=RETARGETS {
        // Dropped only after its own engine started; the previous one may still be exiting.
        tokio::select! {
            result = verify(&engine, &image) => panic!("{result:?}"),
            () = async { while begun() < retarget { tokio::time::sleep(Duration::from_millis(5)).await } } => {}
        }
        most = most.max(node.engines().len());
    }
    let left = node.engines_after(Duration::from_secs(10)).await;
    assert!(left.is_empty() && started.elapsed() < Duration::from_secs(110), "{left:?}");
    eprintln!("{RETARGETS} retargets: at most {most} processes, {:?}", started.elapsed());
    // The last engine, and one that is exiting.
    assert!(most <= 2, "{most} processes");
    while let Some(zombie) = dead_engine() {
        assert!(started.elapsed() < Duration::from_secs(115), "not reaped: {zombie}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A child of this process that has exited and was not reaped.
fn dead_engine() -> Option<String> {
    let parent = format!(" Z {} ", std::process::id());
    let stats = fs::read_dir("/proc").unwrap().flatten();
    let mut stats = stats.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    stats.find(|stat| stat.contains("(stuck)") && stat.contains(&parent))
}

/// Two callers take turns with the engine.
#[tokio::test]
async fn engines_run_one_at_a_time() {
    let node = Node::new().await;
    let image = reference::parse(&node.signed().await.pullspec()).unwrap();
    let running = node.path("running");
    let body = format!("mkdir {0} || exit 9\n$REAL \"$@\"\nrmdir {0}", running.display());
    let engine = Engine::new(Settings {
        cert_dir: Some(node.registry.cert_dir()),
        ..settings(&node, node.engine("alone", &body), 60)
    });
    let (one, other) = tokio::join!(verify(&engine, &image), verify(&engine, &image));
    assert!(one.is_ok() && other.is_ok(), "{one:?} {other:?}");
}

/// A node without free processes proves nothing about the engine.
#[tokio::test]
async fn verification_is_retried_when_the_node_lacks_resources() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    for (name, body) in [
        (
            "memoryless",
            "echo 'error while loading shared libraries: libgpgme.so.11: cannot create shared object descriptor: \
             Cannot allocate memory' >&2; exit 127"
                .to_owned(),
        ),
        (
            "threadless",
            claims("1.18.0", "echo 'runtime: failed to create new OS thread (have 2 already; errno=11)' >&2; exit 2"),
        ),
    ] {
        let engine = node.engine(name, &body);
        let outcome = node.verify_with(&pushed.pullspec(), &[("REBASE_AGENT_SKOPEO", text(&engine))]).await;
        let said = outcome.refused(Reason::ResourcesExhausted);
        assert!(said.contains(name) && said.starts_with("this node has no file descriptor"), "{said}");
    }
}

fn settings(node: &Node, skopeo: PathBuf, seconds: u64) -> Settings {
    Settings {
        policy: node.path("policy.json"),
        registries_d: node.path("registries.d"),
        skopeo,
        cert_dir: None,
        auth_files: vec![],
        etc: node.path("root/etc"),
        scratch: None,
        deadline: Duration::from_secs(seconds),
    }
}

#[tokio::test]
async fn replaced_engine_is_checked_again() {
    let node = Node::new().await;
    let image = reference::parse(&node.signed().await.pullspec()).unwrap();
    let (count, path) = (node.path("count"), node.path("engine"));
    let script = |version: &str| format!("echo >> {}\n{}", count.display(), claims(version, "exit 1"));
    let asked = || fs::read_to_string(&count).unwrap_or_default().len();
    node.engine("engine", &script("1.18.0"));
    let engine = Engine::new(settings(&node, path.clone(), 10));
    let mut before = 0;
    // The first call asks for the version and starts; the second only starts.
    for calls in [2, 1] {
        let why = verify(&engine, &image).await.unwrap_err().to_string();
        assert!(why.contains("exit status: 1"), "{why}");
        assert_eq!(asked() - before, calls);
        before = asked();
    }
    // Replaced as by `rpm-ostree usroverlay` or a layered update, with the old file's time stamp, as ostree keeps it.
    let stamp = fs::metadata(&path).unwrap().modified().unwrap();
    node.engine("new", &script("1.9.3"));
    fs::File::open(node.path("new")).unwrap().set_modified(stamp).unwrap();
    fs::rename(node.path("new"), &path).unwrap();
    let why = verify(&engine, &image).await.unwrap_err();
    assert!(why.reason() == Reason::EngineUnfit && why.to_string().contains("1.9 does not enforce"), "{why}");
    // Replaced in place.
    node.engine("engine", &script("1.8.0"));
    fs::File::open(&path).unwrap().set_modified(stamp).unwrap();
    let why = verify(&engine, &image).await.unwrap_err().to_string();
    assert!(why.contains("1.8 does not enforce"), "{why}");
    node.engine("engine", &script("1.18.0"));
    assert!(verify(&engine, &image).await.unwrap_err().to_string().contains("exit status: 1"));
}

/// Gate and engine see the same bytes, even if the file or the descriptor changes in between.
#[tokio::test]
async fn policy_change_does_not_affect_a_running_verification() {
    let node = Node::new().await;
    let (signed, unsigned) = (node.signed().await, node.push(&ImageSpec::new("unsigned")).await);
    let (seen, refused) = (node.path("seen"), node.path("refused"));
    let body = |policy: &str| {
        format!(
            "case $1 in --policy)\ncat $2 >> {}\n(echo '{policy}' > $2) 2> {}\n(echo '{policy}' >> $2) 2>> {1}\n\
             echo '{policy}' > {};;\nesac\nexec $REAL \"$@\"",
            seen.display(),
            refused.display(),
            node.path("policy.json").display()
        )
    };
    // The engine may write to scratch space only; this one needs it to change the policy.
    let env = |engine: &Path| {
        [("REBASE_AGENT_SKOPEO", text(engine).to_owned()), ("REBASE_AGENT_SCRATCH", text(node.dir.path()).to_owned())]
    };
    for (policy, pushed, reason) in [
        (r#"{"default":[{"type":"insecureAcceptAnything"}]}"#, &unsigned, Some(Reason::SignatureMissing)),
        (r#"{"default":[{"type":"reject"}]}"#, &signed, None),
    ] {
        node.require([node.requirement()]);
        let original = fs::read(node.path("policy.json")).unwrap();
        let _ = fs::remove_file(&seen);
        let engine = node.engine("changer", &body(policy));
        let env = env(&engine);
        let env: Vec<_> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let outcome = node.verify_with(&pushed.pullspec(), &env).await;
        match reason {
            Some(reason) => drop(outcome.refused(reason).to_owned()),
            None => drop(outcome.facts()),
        }
        assert_eq!(fs::read_to_string(node.path("policy.json")).unwrap().trim(), policy);
        // A refused image without a signature is read once more, only for the message.
        let look: &[u8] = if reason.is_some() { br#"{"default":[{"type":"insecureAcceptAnything"}]}"# } else { b"" };
        assert_eq!(fs::read(&seen).unwrap(), [original.as_slice(), look].concat());
        let refused = fs::read_to_string(&refused).unwrap();
        assert!(refused.contains("not permitted") && refused.contains("I/O error"), "{refused}");
    }
}

/// The agent's confinement covers the engine; a verification leaves no file behind.
#[tokio::test]
async fn engine_cannot_write() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let (here, there) = (node.path("written"), std::env::temp_dir().join(format!("written-{}", std::process::id())));
    let engine = node.engine("writer", &format!("touch {0} {1}; exec $REAL \"$@\"", here.display(), there.display()));
    node.verify_with(&pushed.pullspec(), &[("REBASE_AGENT_SKOPEO", text(&engine))]).await.facts();
    assert!(!here.exists() && !there.exists(), "Landlock is absent, or the engine escaped it");
}

/// Variables that would change the engine or the crate that talks to it.
#[tokio::test]
async fn agent_environment_does_not_weaken_the_engine() {
    let node = Node::new().await;
    let pushed = node.push(&ImageSpec::default()).await;
    let accepting = node.path("home/.config/containers/policy.json");
    Policy::accept_by_default().write(&accepting).unwrap();
    let home = node.path("home");
    let env = [
        ("HOME", text(&home)),
        ("XDG_CONFIG_HOME", text(&home)),
        ("CONTAINERS_POLICY_JSON", text(&accepting)),
        ("CONTAINERS_IMAGE_PROXY_DEBUG", "1"),
    ];
    node.verify_with(&pushed.pullspec(), &env).await.refused(Reason::SignatureMissing);
}
