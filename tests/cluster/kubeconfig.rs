//! Supported contents of a kubeconfig, and the messages for unsupported ones.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use openssl::base64::encode_block;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::symm::Cipher;
use rebase_agent::model::Reason;
use support::proxy::Proxy;

use super::*;

const USER: &str = "system:node:worker-0.example.com";

/// A kubeconfig with these lines in cluster and user.
fn yaml(cluster: &str, user: &str) -> String {
    let indent = |lines: &str| lines.lines().map(|line| format!("    {}\n", line.trim_end())).collect::<String>();
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: k\n  cluster:\n{}users:\n- name: u\n  \
         user:\n{}contexts:\n- name: c\n  context: {{cluster: k, user: u}}\n",
        indent(cluster),
        indent(user)
    )
}

impl Stage {
    fn put(&self, name: &str, text: impl AsRef<[u8]>) -> String {
        let path = self.directory.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    fn cluster(&self, more: &str) -> String {
        let ca = encode_block(self.pki.ca_pem().as_bytes());
        format!("server: {}\ncertificate-authority-data: {ca}\n{more}", self.server.url())
    }

    /// User lines with a good certificate.
    fn user(&self) -> String {
        let pem = self.put("client.pem", self.pki.kubelet_pem(NODE));
        format!("client-certificate: {pem}\nclient-key: {pem}")
    }

    /// The first read with this kubeconfig.
    async fn read(&self, yaml: &str, node: Option<&str>) -> Result<NodeObject, ClusterError> {
        fs::write(self.kubeconfig(), yaml).unwrap();
        Api::new(self.kubeconfig(), node.map(str::to_owned), quick()).metadata().await.map(|(node, _)| node)
    }

    /// The error, checked to be printable and to name the kubeconfig.
    async fn refusal(&self, yaml: &str, node: Option<&str>) -> String {
        let error = self.read(yaml, node).await.expect_err(yaml);
        assert!(matches!(error, ClusterError::Kubeconfig { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with(&self.kubeconfig().display().to_string()), "{text}");
        assert!(text.chars().count() < 600 && !text.chars().any(char::is_control), "{text:?}");
        text
    }
}

fn rsa() -> PKey<Private> {
    PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap()
}

#[tokio::test]
async fn keys_of_every_type_work_inline_and_in_files() {
    let stage = Stage::new();
    let rsa = rsa();
    let rsa_certificate = stage.pki.client_certificate(&rsa, USER, &["system:nodes"], -60, 600);
    let pkcs1 = String::from_utf8(rsa.rsa().unwrap().private_key_to_pem().unwrap()).unwrap();
    assert!(pkcs1.contains("BEGIN RSA PRIVATE KEY"));
    let pkcs8 = String::from_utf8(rsa.private_key_to_pem_pkcs8().unwrap()).unwrap();
    let both = stage.pki.kubelet_pem(NODE);
    let (certificate, sec1) = both.split_at(both.find("-----BEGIN EC PRIVATE KEY").unwrap());
    for (what, certificate, key) in [
        ("SEC1", certificate, sec1),
        ("RSA PKCS#1", &rsa_certificate, &pkcs1),
        ("RSA PKCS#8", &rsa_certificate, &pkcs8),
        ("combined, as the kubelet's", &both, &both),
    ] {
        let (c, k) = (stage.put("c.pem", certificate), stage.put("k.pem", key));
        let files = yaml(&stage.cluster(""), &format!("client-certificate: {c}\nclient-key: {k}"));
        assert_eq!(stage.read(&files, None).await.expect(what).facts.name, NODE);
        let (c, k) = (encode_block(certificate.as_bytes()), encode_block(key.as_bytes()));
        let inline =
            yaml(&stage.cluster(""), &format!("client-certificate-data: {c}\nclient-key-data: {k}\nclient-key: /gone"));
        assert_eq!(stage.read(&inline, None).await.expect(what).facts.name, NODE);
    }
}

#[tokio::test]
async fn authorities_work_inline_in_relative_files_and_as_bundles() {
    let stage = Stage::new();
    let user = stage.user();
    let bundle = format!("# old\n{}# new\n{}", Pki::new().ca_pem(), stage.pki.ca_pem());
    stage.put("ca.crt", &bundle);
    let with = |ca: &str| yaml(&format!("server: {}\n{ca}", stage.server.url()), &user);
    let inline = format!("certificate-authority-data: {}", encode_block(bundle.as_bytes()));
    let empty = "certificate-authority-data: ''\ncertificate-authority: ca.crt";
    for good in [inline.as_str(), "certificate-authority: ./ca.crt", empty] {
        stage.read(&with(good), None).await.expect(good);
    }
    stage.put("other.crt", Pki::new().ca_pem());
    let error = stage.read(&with("certificate-authority: other.crt"), None).await.unwrap_err();
    assert!(matches!(&error, ClusterError::Untrusted(why) if why.contains("signed by another CA")), "{error}");
    stage.put("empty.crt", "");
    for (bad, why) in [
        ("certificate-authority: empty.crt", "certificate-authority empty.crt: it has no certificate"),
        ("certificate-authority: gone.crt", "certificate-authority gone.crt: No such file"),
        ("certificate-authority-data: '?'", "certificate-authority-data: it is not base64"),
        ("", "certificate-authority: it is missing; set"),
    ] {
        let text = stage.refusal(&with(bad), None).await;
        assert!(text.contains(why), "{text}");
    }
}

#[tokio::test]
async fn tokens_need_a_node_name_and_are_read_for_each_request() {
    let stage = Stage::new();
    stage.store.accept_token("one", "system:serviceaccount:x:agent", &["system:masters"]);
    let inline = yaml(&stage.cluster(""), "token: one");
    let text = stage.refusal(&inline, None).await;
    assert!(text.contains("--node-name"), "{text}");
    assert_eq!(stage.read(&inline, Some(NODE)).await.unwrap().facts.name, NODE);
    let text = stage.refusal(&inline, Some("../../secrets")).await;
    assert!(text.contains("is not a valid node name"), "{text}");

    stage.put("token", "one\n");
    fs::write(stage.kubeconfig(), yaml(&stage.cluster(""), "tokenFile: token\ntoken: old")).unwrap();
    let api = Api::new(stage.kubeconfig(), Some(NODE.to_owned()), quick());
    api.metadata().await.unwrap();
    stage.store.revoke_tokens();
    stage.store.accept_token("two", "system:serviceaccount:x:agent", &["system:masters"]);
    assert!(matches!(api.metadata().await, Err(ClusterError::Unauthorized)));
    stage.put("token", "two\n");
    api.metadata().await.unwrap();
    for bad in ["", "a b", "a\u{1}b", "schlüssel"] {
        stage.put("token", bad);
        let text = api.metadata().await.unwrap_err().to_string();
        assert!(text.contains("tokenFile token: it has no bearer token"), "{text}");
    }
}

#[tokio::test]
async fn node_name_and_certificate_must_agree() {
    let stage = Stage::new();
    let good = yaml(&stage.cluster(""), &stage.user());
    stage.read(&good, Some(NODE)).await.unwrap();
    let text = stage.refusal(&good, Some("worker-1")).await;
    assert!(text.contains("--node-name is worker-1"), "{text}");
    let admin = stage.put("admin.pem", stage.pki.client_pem("admin\u{1b}[2J", &["system:masters"], -60, 600));
    let admin = yaml(&stage.cluster(""), &format!("client-certificate: {admin}\nclient-key: {admin}"));
    let text = stage.refusal(&admin, None).await;
    assert!(text.contains("the user is admin\\u{1b}[2J, not system:node:<name>"), "{text}");
    stage.read(&admin, Some(NODE)).await.unwrap();
}

#[tokio::test]
async fn certificate_must_name_the_tls_server_name() {
    let stage = Stage::new();
    let user = stage.user();
    let named = |name: &str| yaml(&stage.cluster(&format!("tls-server-name: {name}")), &user);
    stage.read(&named("api-int.test.example"), None).await.unwrap();
    stage.read(&named("kubernetes"), None).await.unwrap();
    let error = stage.read(&named("other.test.example"), None).await.unwrap_err();
    assert!(matches!(&error, ClusterError::Untrusted(why) if why.contains("for another name")), "{error}");
    for bad in ["10.0.0.1", "'a b'", "'[::1]'", "a/b"] {
        let text = stage.refusal(&named(bad), None).await;
        assert!(text.contains("tls-server-name: it is not a host name"), "{text}");
    }
}

/// The server was reached: the message is about its certificate or the clocks, never about the network.
#[tokio::test]
async fn server_certificate_faults_are_reported() {
    const DAY: i64 = 24 * 3600;
    let stage = Stage::new();
    let good = yaml(&stage.cluster(""), &stage.user());
    let named = yaml(&stage.cluster("tls-server-name: other.test.example"), &stage.user());
    let valid = |pki: &Pki, from, until| pki.server_valid(&["kubernetes"], from, until);
    for (server, yaml, why) in [
        (valid(&stage.pki, DAY, 2 * DAY), &good, "it is not valid yet, so this node's clock is behind"),
        (valid(&stage.pki, -2 * DAY, -DAY), &good, "it has expired, or this node's clock is ahead; renew"),
        (
            valid(&Pki::new(), -DAY, DAY),
            &good,
            "it is signed by another CA than the kubeconfig's certificate-authority",
        ),
        (valid(&stage.pki, -DAY, DAY), &named, "it is for another name than the kubeconfig's server; correct server"),
    ] {
        stage.server.present(&stage.pki, server).unwrap();
        let error = stage.read(yaml, None).await.unwrap_err();
        let said = error.to_string();
        assert_eq!(error.reason(), Reason::ClusterUntrusted, "{said}");
        assert!(said.starts_with("the API server was reached and its certificate is not trusted: "), "{said}");
        assert!(said.contains(why), "{said}");
    }
}

#[tokio::test]
async fn own_expired_certificate_is_reported_inline_and_in_a_file() {
    let stage = Stage::new();
    let pem = stage.pki.kubelet_pem_valid(NODE, -7200, -3600);
    let (file, inline) = (stage.put("old.pem", &pem), encode_block(pem.as_bytes()));
    for (user, place) in [
        (format!("client-certificate: {file}\nclient-key: {file}"), format!("client-certificate {file}")),
        (format!("client-certificate-data: {inline}\nclient-key-data: {inline}"), "client-certificate-data".to_owned()),
    ] {
        let error = stage.read(&yaml(&stage.cluster(""), &user), None).await.unwrap_err();
        let said = error.to_string();
        assert!(said.contains(&format!(": {place} expired at ")) && said.contains(" GMT; "), "{said}");
        assert!(matches!(error, ClusterError::CertificateExpired(_)), "{said}");
    }
}

#[tokio::test]
async fn proxy_of_the_kubeconfig_is_used_with_and_without_password() {
    let stage = Stage::new();
    let user = stage.user();
    let open = Proxy::start(None).await.unwrap();
    let through = |url: &str| yaml(&stage.cluster(&format!("proxy-url: {url}")), &user);
    stage.read(&through(&format!("http://{}", open.address())), None).await.unwrap();
    let target = format!("CONNECT {} HTTP/1.1", stage.server.address());
    assert!(open.heads().iter().all(|head| head.starts_with(&target)) && open.heads().len() == 1, "{:?}", open.heads());

    let locked = Proxy::start(Some(&format!("Basic {}", encode_block(b"node:pa ss")))).await.unwrap();
    stage.read(&through(&format!("http://node:pa%20ss@{}", locked.address())), None).await.unwrap();
    let error = stage.read(&through(&format!("http://node:s3cret@{}", locked.address())), None).await.unwrap_err();
    assert!(matches!(error, ClusterError::Connection(_)) && !error.to_string().contains("s3cret"), "{error}");
    drop(locked);
    let error = stage.read(&through("http://node:s3cret@127.0.0.1:1"), None).await.unwrap_err();
    assert!(matches!(error, ClusterError::Connection(_)) && !error.to_string().contains("s3cret"), "{error}");

    for bad in [
        "https://p:1",
        "socks5://p:1",
        "p:1",
        "http://",
        "'http://u:s3cret@p:x'",
        "'http://u:s3cret%@p:1'",
        "'http://u:s3cret#@p:1'",
    ] {
        let text = stage.refusal(&through(bad), None).await;
        assert!(text.contains("proxy-url: ") && !text.contains("s3cret"), "{text}");
    }
    let both = yaml(&stage.cluster("proxy-url: http://127.0.0.1:1\ntls-server-name: kubernetes"), &user);
    let text = stage.refusal(&both, None).await;
    assert!(text.contains("tls-server-name: not supported together with proxy-url"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxy_variables_are_ignored() {
    let stage = Stage::new();
    let proxy = Proxy::start(None).await.unwrap();
    std::fs::create_dir_all(stage.directory.path().join("run/ostree-booted")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rebase-agent-under-test"));
    command.args(["explain", "--json"]).env("REBASE_AGENT_KUBECONFIG", stage.kubeconfig());
    command.env("REBASE_AGENT_ROOT", stage.directory.path()).env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent");
    for variable in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"] {
        command.env(variable, format!("http://{}", proxy.address()));
    }
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["observed"]["cluster"]["known"]["name"], NODE, "{json:#}");
    assert_eq!(proxy.heads(), [""; 0]);
}

#[tokio::test]
async fn unsupported_fields_are_refused_by_name() {
    let stage = Stage::new();
    let user = stage.user();
    let good = stage.cluster("");
    for (cluster, user, why) in [
        (good.as_str(), "exec: {command: aws, args: [eks, get-token]}", "exec: not supported"),
        (&good, &format!("{user}\nexec:\n  command: aws"), "exec: not supported"),
        (&good, "auth-provider: {name: oidc}", "auth-provider: not supported"),
        (&good, &format!("{user}\nas: system:admin"), "as: not supported"),
        (&good, "username: a\npassword: b", "client-certificate and token: both are missing"),
        (&format!("{good}insecure-skip-tls-verify: true"), &user, "insecure-skip-tls-verify: it is not supported; set"),
        ("server: http://127.0.0.1:1", &user, "server: it must be https://"),
        ("server: https://u:p@127.0.0.1:1", &user, "server: it must be https://"),
        ("server: https://127.0.0.1:1/?x", &user, "server: it must be https://"),
        ("server: 'https://'", &user, "server: "),
    ] {
        let text = stage.refusal(&yaml(cluster, user), None).await;
        assert!(text.contains(why), "{text}");
    }
    let text = stage.refusal(&yaml(&good, &user).replace("user: u}", "user: x}"), None).await;
    assert!(text.contains("there is no user of this name"), "{text}");
}

#[tokio::test]
async fn certificate_and_key_must_be_readable_and_belong_together() {
    let stage = Stage::new();
    let key = rsa();
    let certificate = stage.put("c.pem", stage.pki.client_certificate(&key, USER, &["system:nodes"], -60, 600));
    let locked = key.private_key_to_pem_pkcs8_passphrase(Cipher::aes_256_cbc(), b"x").unwrap();
    let locked = stage.put("locked.pem", locked);
    let foreign = stage.put("foreign.pem", rsa().private_key_to_pem_pkcs8().unwrap());
    for (certificate, key, why) in [
        (&certificate, &locked, "locked.pem: it has no readable key; the key must be PEM and not encrypted"),
        (&certificate, &certificate, "c.pem: it has no readable key"),
        (&certificate, &foreign, "foreign.pem: it is not the key of client-certificate"),
        (&foreign, &foreign, "client-certificate"),
    ] {
        let user = format!("client-certificate: {certificate}\nclient-key: {key}");
        let text = stage.refusal(&yaml(&stage.cluster(""), &user), None).await;
        assert!(text.contains(why), "{text}");
    }
    let gone = format!("client-certificate: {certificate}");
    let text = stage.refusal(&yaml(&stage.cluster(""), &gone), None).await;
    assert!(text.contains("client-key: it is missing"), "{text}");
}

#[tokio::test]
async fn hostile_files_are_refused_quickly_and_without_their_content() {
    let stage = Stage::new();
    let good = yaml(&stage.cluster(""), &stage.user());
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let aliases = vec![format!("*a{}", level - 1); 9].join(", ");
        bomb += &format!("a{level}: &a{level} [{aliases}]\n");
    }
    let half = &good[..good.len() / 2];
    for (what, text) in [
        ("alias bomb", bomb + &good),
        ("two MiB", good.clone() + &"#".repeat(2 << 20)),
        ("depth", format!("{good}x: {}", "[".repeat(100_000))),
        ("control characters", format!("{good}\u{1b}[2J\u{0}\n: :")),
        ("escaped control characters", good.replace("server: ", "server: \"ht\\x1b[2Jtp:\" #")),
        ("path with control characters", good.replace("client-key: ", "client-key: \"/\\x1b[2J\\n\" #")),
        ("half of it", half.to_owned()),
        ("nothing", String::new()),
        ("a list", "- a".to_owned()),
        ("two contexts' worth of nothing", good.replace("current-context: c", "current-context: ''")),
    ] {
        let began = Instant::now();
        stage.refusal(&text, None).await;
        assert!(began.elapsed() < Duration::from_secs(10), "{what} took {:?}", began.elapsed());
    }
    fs::remove_file(stage.kubeconfig()).unwrap();
    let text = stage.api().metadata().await.unwrap_err().to_string();
    assert!(text.contains("the kubelet writes it when the node joins"), "{text}");
    fs::create_dir(stage.kubeconfig()).unwrap();
    assert!(stage.api().metadata().await.is_err());
}

#[tokio::test]
async fn errors_contain_no_secrets() {
    let stage = Stage::new();
    for (what, user) in [
        ("broken line", "token: s3cret-s3cret\n: : :"),
        ("tab", "token: s3cret-s3cret\n\tx: 1"),
        ("quote", "token: \"s3cret-s3cret"),
        ("duplicate", "token: s3cret-s3cret\ntoken: s3cret-s3cret"),
        ("invalid key", "client-certificate-data: czNjcmV0\nclient-key-data: czNjcmV0"),
    ] {
        let text = stage.refusal(&yaml(&stage.cluster(""), user), None).await;
        assert!(!text.contains("s3cret"), "{what}: {text}");
    }
    let api = format!("{:?}", stage.api());
    assert!(!api.contains("PRIVATE") && api.contains("kubeconfig"), "{api}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificate_replaced_during_the_read_is_the_old_or_the_new_one() {
    let stage = Stage::new();
    let pair = [stage.pki.kubelet_pem(NODE), stage.pki.kubelet_pem(NODE)];
    let files = [stage.put("a.pem", &pair[0]), stage.put("b.pem", &pair[1])];
    let (link, next) = (stage.directory.path().join("current.pem"), stage.directory.path().join("next.pem"));
    symlink(&files[0], &link).unwrap();
    let user = format!("client-certificate: {0}\nclient-key: {0}", link.display());
    fs::write(stage.kubeconfig(), yaml(&stage.cluster(""), &user)).unwrap();
    let flipping = Arc::new(AtomicBool::new(true));
    let go_on = flipping.clone();
    let flipper = std::thread::spawn(move || {
        for file in files.iter().cycle() {
            if !go_on.load(Ordering::Relaxed) {
                return;
            }
            symlink(Path::new(file), &next).unwrap();
            fs::rename(&next, &link).unwrap();
        }
    });
    let api = stage.api();
    for _ in 0..100 {
        api.metadata().await.unwrap();
    }
    flipping.store(false, Ordering::Relaxed);
    flipper.join().unwrap();
}
