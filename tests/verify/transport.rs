//! The connection to the registry: credentials, certificates, mirrors, proxies.

use support::hostile_registry::{ConnectProxy, HostileRegistry, Place, Trick, mumble};
use support::policy::RegistriesConf;

use super::*;

#[tokio::test]
async fn causes_of_a_failed_fetch_are_distinguished() {
    let mut node = Node::new().await;
    let pushed = node.signed().await;
    let (spec, zeros) = (pushed.pullspec(), "0".repeat(64));

    for missing in [format!("{}/{REPO}@sha256:{zeros}", pushed.host), format!("{}/none@{}", pushed.host, pushed.digest)]
    {
        let outcome = node.verify(&missing).await;
        assert!(outcome.refused(Reason::ManifestMissing).contains(&missing), "{outcome:?}");
    }
    let outcome = node.verify_with(&spec, &[("REBASE_AGENT_CERT_DIR", "")]).await;
    let said = outcome.refused(Reason::RegistryUntrusted);
    assert!(said.contains("unknown authority") && said.contains("certs.d"), "{said}");

    node.registry.stop();
    let outcome = node.verify(&spec).await;
    assert!(outcome.refused(Reason::RegistryUnreachable).contains("connection refused"), "{outcome:?}");

    for (bytes, why) in [
        (b"HTTP/1.1 302 Found\r\nLocation: http://portal.example/\r\n\r\n".as_slice(), "HTTP response to HTTPS client"),
        (b"SSH-2.0-OpenSSH_9\r\n", "first record does not look like a TLS handshake"),
        (b"", "EOF"),
    ] {
        let (address, task) = mumble(bytes).await.unwrap();
        node.policy(&Policy::new([node.requirement()]));
        let outcome = node.verify(&format!("{address}/{REPO}@{}", pushed.digest)).await;
        assert!(outcome.refused(Reason::RegistryUnreachable).contains(why), "{outcome:?}");
        task.abort();
    }
    let outcome = node.verify(&format!("no.such.host.invalid/{REPO}@{}", pushed.digest)).await;
    outcome.refused(Reason::RegistryUnreachable);
}

/// Only the first of the ostree auth files is used, as the pull does; users' own credentials are ignored.
#[tokio::test]
async fn credentials_come_from_the_first_ostree_auth_file() {
    let node = Node::with(Some(Credentials::PULLER)).await;
    let pushed = node.signed().await;
    let host = node.registry.host();
    let good = Credentials::PULLER.auth_file(&host).to_string();
    let wrong = good.replace("cHVsbGVyOnJlYmFzZQ==", "cHVsbGVyOndyb25n");
    assert_ne!(good, wrong);
    let other = Credentials::PULLER.auth_file("other.example").to_string();
    let set = |file: &str, content: &str| {
        let path = node.path("root").join(file).join("ostree/auth.json");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };

    // Files in which users and other tools keep credentials.
    let home = node.path("home");
    for file in [".docker/config.json", ".config/containers/auth.json", "containers/auth.json"] {
        fs::create_dir_all(home.join(file).parent().unwrap()).unwrap();
        fs::write(home.join(file), &good).unwrap();
    }
    let outcome = node
        .verify_with(
            &pushed.pullspec(),
            &[
                ("HOME", text(&home)),
                ("XDG_RUNTIME_DIR", text(&home)),
                ("XDG_CONFIG_HOME", text(&home.join(".config"))),
                ("DOCKER_CONFIG", text(&home.join(".docker"))),
                ("REGISTRY_AUTH_FILE", text(&home.join("containers/auth.json"))),
            ],
        )
        .await;
    let said = outcome.refused(Reason::RegistryDenied);
    assert!(said.contains("authentication required") && said.contains("no ostree auth file"), "{said}");

    set("usr/lib", &good);
    node.verify(&pushed.pullspec()).await.facts();
    set("etc", &wrong);
    let outcome = node.verify(&pushed.pullspec()).await;
    assert!(outcome.refused(Reason::RegistryDenied).contains("/etc/ostree/auth.json"), "{outcome:?}");
    set("etc", &good);
    set("usr/lib", &wrong);
    node.verify(&pushed.pullspec()).await.facts();
    set("run", &other);
    node.verify(&pushed.pullspec()).await.refused(Reason::RegistryDenied);
    set("run", "no JSON");
    let outcome = node.verify(&pushed.pullspec()).await;
    assert!(outcome.refused(Reason::RegistryDenied).contains("run/ostree/auth.json"), "{outcome:?}");
    // Formats that only other tools understand.
    let helper = format!(r#"{{"auths":{{}},"credHelpers":{{"{host}":"nowhere"}}}}"#);
    let (store, old) = (r#"{"auths":{},"credsStore":"nowhere"}"#, good.strip_prefix("{\"auths\":").unwrap());
    let old = old.strip_suffix('}').unwrap();
    for (content, why) in [
        (other.as_str(), format!("run/ostree/auth.json has no entry for {host}")),
        (&wrong, format!("with the entry for {host} in ")),
        (store, "credential store (credsStore), which is not run here".to_owned()),
        (&helper, "credential helper (credHelpers), which is not run here".to_owned()),
        (old, "in the old form of .dockercfg".to_owned()),
    ] {
        set("run", content);
        let outcome = node.verify(&pushed.pullspec()).await;
        let said = outcome.refused(Reason::RegistryDenied);
        assert!(said.contains(&why), "{content}: {said}");
    }
    set("run", &good);
    set("etc", &wrong);
    node.verify(&pushed.pullspec()).await.facts();
}

/// An untrusted CA is only one of the possible faults of a certificate.
#[tokio::test]
async fn faults_of_a_registry_certificate_are_distinguished() {
    const DAY: i64 = 24 * 3600;
    let node = Node::new().await;
    let pushed = node.signed().await;
    node.policy(&Policy::new([node.requirement()]));
    let pki = Pki::new();
    for (ca, from, until, why) in [
        (pki.ca_pem(), -2 * DAY, -DAY, "; renew it, or correct this node's clock"),
        (pki.ca_pem(), DAY, 2 * DAY, "; renew it, or correct this node's clock"),
        (node.tls.ca_pem.clone(), -DAY, DAY, "; add its CA to certs.d"),
    ] {
        let (cert_pem, key_pem) = pki.server_valid(&[], from, until);
        let tls = ServerTls { cert_pem, key_pem, ca_pem: node.tls.ca_pem.clone() };
        let host = node.registry.host();
        let registry = HostileRegistry::start(&tls, &host, Place::Ping, Trick::Honest).await.unwrap();
        let trusted = node.path("trusted");
        fs::create_dir_all(&trusted).unwrap();
        fs::write(trusted.join("ca.crt"), ca).unwrap();
        let spec = format!("{}/{REPO}@{}", registry.host(), pushed.digest);
        let outcome = node.verify_with(&spec, &[("REBASE_AGENT_CERT_DIR", text(&trusted))]).await;
        let said = outcome.refused(Reason::RegistryUntrusted);
        assert!(said.ends_with(why), "{said}");
    }
}

/// The proxy variables of the unit's drop-in reach the engine, in both spellings; other variables do not.
#[tokio::test]
async fn proxy_variables_reach_the_engine() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let port = pushed.host.rsplit_once(':').unwrap().1;
    let named = format!("{NAMED}:{port}");
    node.policy(&Policy::reject_by_default().scope(
        &named,
        [Requirement::sigstore_key_path(&node.key()).identity(&Identity::ExactRepository(pushed.repository()))],
    ));
    node.attachments(&RegistriesD::new().attachments(&named, true));
    let spec = format!("{named}/{REPO}@{}", pushed.digest);
    node.verify(&spec).await.refused(Reason::RegistryUnreachable);
    for name in ["HTTPS_PROXY", "https_proxy"] {
        let proxy = ConnectProxy::start().await.unwrap();
        node.verify_with(&spec, &[(name, &proxy.url())]).await.facts();
        assert!(!proxy.asked().is_empty() && proxy.asked().iter().all(|asked| *asked == named), "{:?}", proxy.asked());
        for exempt in ["NO_PROXY", "no_proxy"] {
            node.verify_with(&spec, &[(name, &proxy.url()), (exempt, NAMED)])
                .await
                .refused(Reason::RegistryUnreachable);
        }
    }
    // MCO's format. The agent and the engine ignore all other variables in that file.
    let proxy = ConnectProxy::start().await.unwrap();
    let file = node.path("root/etc/mco/proxy.env");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let elsewhere = node.path("elsewhere");
    Policy::accept_by_default().write(&elsewhere).unwrap();
    let lines = format!(
        "HTTPS_PROXY={}\nNO_PROXY=.cluster.local\nREBASE_AGENT_POLICY={}\nLD_PRELOAD=/nowhere.so\nPATH=/nowhere\n",
        proxy.url(),
        elsewhere.display()
    );
    fs::write(&file, lines).unwrap();
    node.verify_with(&spec, &[("HTTPS_PROXY", "http://127.0.0.1:1")]).await.facts();
    assert!(!proxy.asked().is_empty(), "the proxy of proxy.env was not used");
    let environment = node.path("environment");
    let engine = node
        .engine("spy", &format!("env > {0}.$$; echo \"$*\" > {0}-args.$$; exec $REAL \"$@\"", environment.display()));
    // The spy has to write, so the test starts it in the way the agent does.
    let seen = tools::run(
        {
            let mut command = node.command(&spec);
            command.env("REBASE_AGENT_SKOPEO", &engine).env("REBASE_AGENT_SCRATCH", node.dir.path());
            command.env("LD_LIBRARY_PATH", "/nowhere").env("SSL_CERT_FILE", "/nowhere").env("CONTAINERS_CONF", "/x");
            command
        },
        Duration::from_secs(30),
    );
    seen.await.unwrap();
    let files = || fs::read_dir(node.dir.path()).unwrap().flatten().map(|entry| entry.path());
    let environment = files().find(|path| text(path).contains("/environment.")).unwrap();
    let environment = fs::read_to_string(environment).unwrap();
    let mut names: Vec<_> = environment.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    names.retain(|name| !["PWD", "_", "SHLVL", "OLDPWD"].contains(name));
    names.sort_unstable();
    assert_eq!(names, ["HOME", "HTTPS_PROXY", "NO_PROXY", "PATH", "TMPDIR"], "{environment}");
    assert!(environment.contains("HOME=/nonexistent\n"), "{environment}");
    // All other settings come from the node, registries.conf above all.
    let args = files().filter(|path| text(path).contains("/environment-args."));
    let mut args: Vec<_> = args.map(|path| fs::read_to_string(path).unwrap()).collect();
    args.sort();
    let (version, proxy) = (&args[1], args[0].split_once("/fd/").unwrap());
    assert_eq!((version.as_str(), proxy.0), ("--version\n", "--policy /proc/self"));
    let (_, rest) = proxy.1.split_once(' ').unwrap();
    let (registries_d, certificates) = (node.path("registries.d"), node.registry.cert_dir());
    assert_eq!(
        rest.trim(),
        format!(
            "--registries.d {} experimental-image-proxy --no-creds --cert-dir {}",
            registries_d.display(),
            certificates.display()
        )
    );
}

/// The engine needs a proxy for this registry and misreads its URL.
#[tokio::test]
async fn malformed_proxy_is_named_without_its_password() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    node.policy(&Policy::new([node.requirement()]));
    let spec = format!("{NAMED}/{REPO}@{}", pushed.digest);
    for (url, why) in [
        ("http://node:s3cret%@proxy.example:1", "it has a raw `%`"),
        ("http://node:s3cret#@proxy.example:1", "it has a raw `#`"),
        ("http://node:s3cret@proxy.example:port", "it is not a URL"),
        ("ftp://node:s3cret@proxy.example", "its scheme is not http"),
    ] {
        let outcome = node.verify_with(&spec, &[("HTTPS_PROXY", url)]).await;
        let said = outcome.refused(Reason::RegistryConfigInvalid);
        assert!(
            said.starts_with("HTTPS_PROXY in the environment of rebase-agent.service is not a usable proxy"),
            "{said}"
        );
        assert!(said.contains(why) && said.contains("`#` as %23") && !said.contains("s3cret"), "{said}");
        // A registry that needs no proxy can still be reached.
        node.verify_with(&pushed.pullspec(), &[("HTTPS_PROXY", url)]).await.facts();
    }
    let file = node.path("root/etc/mco/proxy.env");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "HTTPS_PROXY=http://node:s3cret#@proxy.example:1\n").unwrap();
    let outcome = node.verify(&spec).await;
    let said = outcome.refused(Reason::RegistryConfigInvalid);
    assert!(said.starts_with(&format!("HTTPS_PROXY in {} is not a usable proxy", file.display())), "{said}");
    assert!(said.contains("oc edit proxy.config/cluster") && !said.contains("s3cret"), "{said}");
    // A list of hosts is not a URL.
    fs::write(&file, "NO_PROXY=100%,#\n").unwrap();
    node.verify(&spec).await.refused(Reason::RegistryUnreachable);
}

/// `registries.conf` is the node's own: the agent passes no other, and the engine follows it.
#[tokio::test]
async fn policy_applies_to_the_source_name_of_mirrored_images() {
    let node = Node::new().await;
    let pushed = node.signed().await;
    let logical = "quay.test.example/team/os";
    let mirror = pushed.repository();
    let conf = node.path("root/etc/containers/registries.conf");
    let engine = node.engine("configured", &format!("exec $REAL --registries-conf {} \"$@\"", conf.display()));
    let env = [("REBASE_AGENT_SKOPEO", text(&engine))];
    let spec = format!("{logical}@{}", pushed.digest);
    let mirrors = |at: &[&str]| {
        RegistriesConf::new().mirrors(logical, at.iter().copied()).write(&conf).unwrap();
    };
    mirrors(&[&mirror]);
    let rule = Requirement::sigstore_key_path(&node.key()).identity(&Identity::ExactRepository(mirror.clone()));
    node.policy(&Policy::reject_by_default().scope("quay.test.example/team", [rule.clone()]));
    let facts = node.verify_with(&spec, &env).await.facts();
    assert_eq!(facts.vouched_by, "docker \"quay.test.example/team\"");
    assert_eq!(facts.image.to_string(), spec);

    // An unreachable mirror is skipped.
    mirrors(&["127.0.0.1:1/ns/os", &mirror]);
    node.verify_with(&spec, &env).await.facts();

    // Signatures are read from the place that served the image: attachments of the logical name do not help.
    node.attachments(&RegistriesD::new().attachments("quay.test.example", true));
    let outcome = node.verify_with(&spec, &env).await;
    let said = outcome.refused(Reason::SignatureMissing);
    assert!(said.contains(&format!("the mirror {mirror}; the sigstore signature that is attached there")), "{said}");
    node.attachments(&RegistriesD::new().attachments(&node.registry.host(), true));

    // A rule for the mirror does not cover the logical name.
    node.policy(&Policy::accept_by_default().scope(&node.registry.host(), [rule.clone()]));
    node.verify_with(&spec, &env).await.refused(Reason::PolicyAcceptsAnything);

    node.policy(&Policy::new([rule]));
    let zeros = format!("{logical}@sha256:{}", "0".repeat(64));
    let outcome = node.verify_with(&zeros, &env).await;
    assert!(outcome.refused(Reason::ManifestMissing).contains(&format!("the mirror {mirror} has no")), "{outcome:?}");
    let gone = RegistriesConf::new().mirrors(&format!("{}/gone", node.registry.host()), [mirror.as_str()]);
    gone.write(&conf).unwrap();
    let zeros = format!("{}/gone@sha256:{}", node.registry.host(), "0".repeat(64));
    node.verify_with(&zeros, &env).await.refused(Reason::ManifestMissing);
    RegistriesConf::new().blocked("quay.test.example").write(&conf).unwrap();
    let outcome = node.verify_with(&spec, &env).await;
    assert!(outcome.refused(Reason::RegistryConfigInvalid).contains("is blocked"), "{outcome:?}");
}

/// Go's runtime probes IPv6 by binding a port, which Landlock denies; IPv6 must work anyway. Only a proxy can be named
/// by its IPv6 address.
#[tokio::test]
async fn engine_may_use_ipv6() {
    let node = Node::new().await;
    let Ok(listener) = tokio::net::TcpListener::bind("[::1]:0").await else {
        return support::skip::skip("this machine has no ::1");
    };
    let proxy = format!("http://{}", listener.local_addr().unwrap());
    node.policy(&Policy::new([node.requirement()]));
    let accepted = tokio::spawn(async move { listener.accept().await.map(drop) });
    let spec = format!("quay.test.example/team/os@sha256:{}", "0".repeat(64));
    let outcome = node.verify_with(&spec, &[("HTTPS_PROXY", &proxy)]).await;
    let said = outcome.refused(Reason::RegistryUnreachable);
    assert!(accepted.is_finished(), "the engine did not ask {proxy}: {said}");
}
