//! `systemd/cluster/` on a real kube-apiserver: it is applied as README.md says, the agent's and MCC's writes pass, and
//! forged ones are denied.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "helpers of tests fail the test")]
#![allow(clippy::disallowed_methods, reason = "tests may make calls that the agent must not")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use support::controlplane::{Client, ControlPlane, Options};
use support::pki::Pki;
use support::skip::skip;
use support::tools;

/// Until the server's policy controllers have seen the policies.
const ACTIVATION: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);
const KUBECTL: Duration = Duration::from_secs(120);

const MERGE: &str = "application/merge-patch+json";
const APPLY: &str = "application/apply-patch+yaml";
const MCNS: &str = "/apis/machineconfiguration.openshift.io/v1/machineconfignodes";
const MOSC: &str = "/apis/machineconfiguration.openshift.io/v1/machineosconfigs";
const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
/// A group that may patch every Node, as the accounts of many DaemonSets.
const PATCHERS: &str = "example:patchers";
const IMAGE: &str = "quay.example.com/org/os@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The directory of the control plane's programs; `None` if they are not built, which CI=true does not accept.
fn programs() -> Option<PathBuf> {
    let must = std::env::var("CI").is_ok_and(|value| value == "true");
    let mut build = std::process::Command::new(root().join("tests/support/controlplane/build"));
    let output = build.args((!must).then_some("--find")).output().unwrap();
    assert!(output.status.success() || !must, "{}", String::from_utf8_lossy(&output.stderr));
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().into())
}

struct Cluster {
    plane: ControlPlane,
    pki: Pki,
}

impl Cluster {
    fn client(&self, user: &str, groups: &[&str]) -> Client {
        Client::new(&self.plane.url(), &self.pki, user, groups).unwrap()
    }

    fn node(&self, name: &str) -> Client {
        self.client(&format!("system:node:{name}"), &["system:nodes"])
    }

    async fn kubectl(&self, programs: &Path, args: &[&str]) -> String {
        let mut command = tokio::process::Command::new(programs.join("kubectl"));
        command.arg("--kubeconfig").arg(self.plane.kubeconfig()).args(args).current_dir(root());
        tools::run_ok(command, KUBECTL).await.unwrap()
    }

    /// Nodes and MachineConfigNodes, and accounts that may patch every Node, as those of many DaemonSets.
    async fn furnish(&self) {
        let admin = self.plane.admin();
        for name in ["worker-0", "worker-1"] {
            let metadata = json!({ "name": name });
            let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata});
            admin.create("/api/v1/nodes", &node).await.unwrap();
            let spec = json!({
                "node": {"name": name}, "pool": {"name": "worker"}, "configVersion": {"desired": "rendered-worker-1"},
            });
            let mcn = json!({
                "apiVersion": "machineconfiguration.openshift.io/v1", "kind": "MachineConfigNode", "metadata": metadata,
                "spec": spec,
            });
            admin.create(MCNS, &mcn).await.unwrap();
        }
        for namespace in ["openshift-monitoring", "openshift-machine-config-operator"] {
            let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
            admin.create("/api/v1/namespaces", &object).await.unwrap();
        }
        // The CRD itself belongs to OpenShift's monitoring.
        let schema = json!({"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}});
        let crd = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": "alertingrules.monitoring.openshift.io"},
            "spec": {
                "group": "monitoring.openshift.io", "scope": "Namespaced",
                "names": {"kind": "AlertingRule", "plural": "alertingrules", "singular": "alertingrule"},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": schema}],
            },
        });
        admin.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &crd).await.unwrap();
        let rule = json!({"apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["get", "patch"]});
        let role = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "patches-nodes"},
            "rules": [rule],
        });
        admin.create(&format!("{RBAC}/clusterroles"), &role).await.unwrap();
        let subject = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": PATCHERS});
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": "patches-nodes"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "patches-nodes"},
            "subjects": [subject],
        });
        admin.create(&format!("{RBAC}/clusterrolebindings"), &binding).await.unwrap();
    }
}

/// Changes annotations of a Node, with the prefixes `mco:` and `agent:`; returns the status and the message.
async fn annotate(client: &Client, path: &str, annotations: &[(&str, Option<&str>)]) -> (u16, String) {
    let key = |key: &str| match key.split_once(':').unwrap() {
        ("mco", name) => format!("machineconfiguration.openshift.io/{name}"),
        ("agent", name) => format!("rebase-agent.openshift.io/{name}"),
        _ => panic!("{key}"),
    };
    let pairs: serde_json::Map<String, Value> =
        annotations.iter().map(|(name, value)| (key(name), value.map_or(Value::Null, Value::from))).collect();
    patch(client, &format!("/api/v1/nodes/{path}"), MERGE, &json!({"metadata": {"annotations": pairs}})).await
}

async fn patch(client: &Client, path: &str, kind: &str, body: &Value) -> (u16, String) {
    let answer = client.send(Method::PATCH, path, Some((kind, body))).await.unwrap();
    (answer.status, answer.body["message"].as_str().unwrap_or_default().to_owned())
}

/// The agent's apply of a MachineConfigNode's status.
async fn apply_status(client: &Client, name: &str) -> (u16, String) {
    let updated = json!({
        "type": "Updated", "status": "True", "reason": "Updated", "message": "x",
        "lastTransitionTime": "2026-11-29T00:00:00Z",
    });
    let body = json!({
        "apiVersion": "machineconfiguration.openshift.io/v1", "kind": "MachineConfigNode", "metadata": {"name": name},
        "status": {
            "configVersion": {"current": "rendered-worker-1", "desired": "rendered-worker-1"}, "conditions": [updated],
        },
    });
    patch(client, &format!("{MCNS}/{name}/status?fieldManager=rebase-agent&force=true"), APPLY, &body).await
}

#[track_caller]
fn passes(what: &str, (status, message): (u16, String)) {
    assert_eq!(status, 200, "{what}: {message}");
}

#[track_caller]
fn is_denied(what: &str, (status, message): (u16, String), why: &str) {
    assert!(status == 403 && message.contains(why), "{what}: {status} {message}");
}

#[tokio::test]
async fn applied_manifests_let_only_the_right_writers_pass() {
    let Some(programs) = programs() else {
        return skip(
            "the control plane is not built, so no server checks systemd/cluster: tests/support/controlplane/build",
        );
    };
    let (directory, pki) = (tempfile::tempdir().unwrap(), Pki::new());
    let options = Options { programs: programs.clone(), gated: false };
    let plane = ControlPlane::start(directory.path(), &pki, options).await.unwrap();
    let cluster = Cluster { plane, pki };
    cluster.furnish().await;
    policies(&cluster, &programs).await;
    daemon_leaves_labelled_nodes(&cluster, &programs).await;
}

async fn policies(cluster: &Cluster, programs: &Path) {
    const NODE_POLICY: &str = "rebase-agent-nodes";
    const MCN_POLICY: &str = "rebase-agent-machineconfignodes";
    let (zero, one) = (cluster.node("worker-0"), cluster.node("worker-1"));
    // A service account's name may be too long for a certificate.
    let mcc = async |pairs: &[&str]| {
        const ACCOUNT: &str = "--as=system:serviceaccount:openshift-machine-config-operator:machine-config-controller";
        let group = format!("--as-group={PATCHERS}");
        let args = [&[ACCOUNT, &group, "annotate", "--overwrite", "node", "worker-0"], pairs].concat();
        cluster.kubectl(programs, &args).await;
    };
    let other = cluster.client("system:serviceaccount:example:daemonset", &[PATCHERS]);
    let person = cluster.client("jo", &[PATCHERS]);

    let admin = cluster.plane.admin();

    // Before: any account with RBAC on Nodes directs them, and no node reads a MachineConfigNode.
    passes("another account sets an image", annotate(&other, "worker-0", &[("mco:desiredImage", Some(IMAGE))]).await);
    passes("and removes it", annotate(&other, "worker-0", &[("mco:desiredImage", None)]).await);
    assert_eq!(zero.get(&format!("{MCNS}/worker-0")).await.unwrap().status, 403);

    for _ in 0..2 {
        cluster.kubectl(programs, &["apply", "-k", "systemd/cluster"]).await;
    }
    let began = Instant::now();
    loop {
        let (node, _) = annotate(&other, "worker-1", &[("agent:hold", Some("x"))]).await;
        let (mcn, _) = apply_status(&zero, "worker-1").await;
        if (node, mcn) == (403, 403) {
            break;
        }
        assert!(began.elapsed() < ACTIVATION, "the policies are not in force: {node}, {mcn}");
        tokio::time::sleep(POLL).await;
    }
    passes("an administrator lifts a hold", annotate(admin, "worker-1", &[("agent:hold", None)]).await);

    // MachineConfigNodes and MachineOSConfigs.
    assert_eq!(zero.get(&format!("{MCNS}/worker-0")).await.unwrap().status, 200);
    passes("own status", apply_status(&zero, "worker-0").await);
    is_denied("another's status", apply_status(&zero, "worker-1").await, MCN_POLICY);
    let spec = json!({"spec": {"configVersion": {"desired": "rendered-worker-9"}}});
    is_denied("own spec", patch(&zero, &format!("{MCNS}/worker-0"), MERGE, &spec).await, "cannot patch");
    // The policy holds also where a role grants more.
    let more = ["create", "clusterrole", "more", "--verb=patch,delete"];
    let more = [&more[..], &["--resource=machineconfignodes.machineconfiguration.openshift.io"]].concat();
    cluster.kubectl(programs, &more).await;
    let bind = ["create", "clusterrolebinding", "more", "--clusterrole=more", "--group=system:nodes"];
    cluster.kubectl(programs, &bind).await;
    let began = Instant::now();
    let denied = loop {
        let denied = patch(&zero, &format!("{MCNS}/worker-0"), MERGE, &spec).await;
        if !denied.1.contains("cannot patch") {
            break denied;
        }
        assert!(began.elapsed() < ACTIVATION, "the role is not in force");
        tokio::time::sleep(POLL).await;
    };
    is_denied("own spec with more rights", denied, MCN_POLICY);
    let deleted = zero.send(Method::DELETE, &format!("{MCNS}/worker-0"), None).await.unwrap();
    assert_eq!(deleted.status, 403, "{}", deleted.body);
    passes("MCO writes the spec", patch(admin, &format!("{MCNS}/worker-0"), MERGE, &spec).await);
    assert_eq!(zero.get(&format!("{MOSC}/worker")).await.unwrap().status, 404, "reading one by name is allowed");
    assert_eq!(zero.get(MOSC).await.unwrap().status, 403, "listing is not");

    // The first boot, once and for the own Node.
    let first = [
        ("mco:currentConfig", Some("rendered-worker-1")),
        ("mco:desiredConfig", Some("rendered-worker-1")),
        ("mco:currentImage", Some(IMAGE)),
        ("mco:desiredImage", Some(IMAGE)),
        ("mco:state", Some("Done")),
        ("mco:firstPivotConfig", Some("rendered-worker-1")),
    ];
    is_denied("first boot of another Node", annotate(&one, "worker-0", &first).await, "worker-0");
    let held = [("mco:currentConfig", Some("r")), ("agent:hold", Some("x"))];
    is_denied("first boot with a hold", annotate(&zero, "worker-0", &held).await, NODE_POLICY);
    is_denied("first boot by another account", annotate(&other, "worker-0", &first).await, NODE_POLICY);
    passes("first boot", annotate(&zero, "worker-0", &first).await);
    for (key, value) in [
        ("mco:desiredImage", Some("quay.example.com/evil@sha256:0")),
        ("mco:desiredImage", None),
        ("mco:desiredConfig", Some("rendered-worker-0")),
        ("mco:lastAppliedDrain", Some("drain-rendered-worker-1")),
        ("mco:currentConfig", None),
        ("mco:currentConfig", Some("")),
        ("agent:hold", Some("")),
        ("agent:prefetch", Some(IMAGE)),
    ] {
        for path in ["worker-0", "worker-0/status"] {
            is_denied(key, annotate(&zero, path, &[(key, value)]).await, NODE_POLICY);
            is_denied(key, annotate(&other, path, &[(key, value)]).await, NODE_POLICY);
        }
    }

    // An update, as MCC, the agent and the kubelet write it.
    mcc(&[
        "machineconfiguration.openshift.io/desiredConfig=rendered-worker-2",
        &format!("machineconfiguration.openshift.io/desiredImage={IMAGE}"),
    ])
    .await;
    let working = [("mco:state", Some("Working")), ("mco:reason", Some("Staging: x")), ("agent:attempt", Some("{}"))];
    passes("the agent works", annotate(&zero, "worker-0", &working).await);
    passes(
        "the agent asks",
        annotate(&zero, "worker-0", &[("mco:desiredDrain", Some("drain-rendered-worker-2"))]).await,
    );
    mcc(&["machineconfiguration.openshift.io/lastAppliedDrain=drain-rendered-worker-2"]).await;
    let done = [
        ("mco:state", Some("Done")),
        ("mco:reason", Some("")),
        ("mco:currentConfig", Some("rendered-worker-2")),
        ("mco:currentImage", Some(IMAGE)),
        ("agent:attempt", None),
        ("agent:untrusted", None),
    ];
    passes("the agent is done", annotate(&zero, "worker-0", &done).await);
    let kubelet = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    let strategic = "application/strategic-merge-patch+json";
    passes("the kubelet reports", patch(&zero, "/api/v1/nodes/worker-0/status", strategic, &kubelet).await);
    let label = json!({"metadata": {"labels": {"example.com/a": "b"}}});
    passes("another account sets a label", patch(&other, "/api/v1/nodes/worker-0", MERGE, &label).await);
    let hold = [("agent:hold", Some("freeze"))];
    is_denied("a person without the role holds", annotate(&person, "worker-0", &hold).await, NODE_POLICY);
    let bind = ["create", "clusterrolebinding", "jo", "--user=jo", "--clusterrole=rebase-agent-node-directors"];
    cluster.kubectl(programs, &bind).await;
    let began = Instant::now();
    while annotate(&person, "worker-0", &hold).await.0 != 200 {
        assert!(began.elapsed() < ACTIVATION, "the role of the README does not let a person hold");
        tokio::time::sleep(POLL).await;
    }
    passes("the agent goes on", annotate(&zero, "worker-0", &[("mco:reason", Some("Held: freeze"))]).await);

    // A Node that is created again begins without the annotations.
    admin.delete("/api/v1/nodes/worker-1").await.unwrap();
    let mut node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "worker-1"}});
    node["metadata"]["annotations"] = json!({"machineconfiguration.openshift.io/desiredImage": IMAGE});
    let create = async |node: &Value| {
        let answer = one.send(Method::POST, "/api/v1/nodes", Some(("application/json", node))).await.unwrap();
        (answer.status, answer.body["message"].as_str().unwrap_or_default().to_owned())
    };
    is_denied("creation with an image", create(&node).await, NODE_POLICY);
    node["metadata"]["annotations"] = json!({"volumes.kubernetes.io/controller-managed-attach-detach": "true"});
    let (status, message) = create(&node).await;
    assert_eq!(status, 201, "{message}");
}

/// README.md's command on a DaemonSet like MCO's.
async fn daemon_leaves_labelled_nodes(cluster: &Cluster, programs: &Path) {
    let labels = json!({"k8s-app": "machine-config-daemon"});
    let container = json!({"name": "machine-config-daemon", "image": "x"});
    let daemon = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "machine-config-daemon"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    });
    let path = "/apis/apps/v1/namespaces/openshift-machine-config-operator/daemonsets";
    cluster.plane.admin().create(path, &daemon).await.unwrap();
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let command = readme.lines().find(|line| line.contains(" --patch-file ")).unwrap();
    let args: Vec<&str> = command.trim().split(' ').skip(1).collect();
    cluster.kubectl(programs, &args).await;
    let patched = cluster.plane.admin().get(&format!("{path}/machine-config-daemon")).await.unwrap().ok().unwrap();
    let terms = patched.pointer("/spec/template/spec/affinity/nodeAffinity").unwrap().to_string();
    assert!(terms.contains(r#""key":"rebase-agent.openshift.io/managed","operator":"DoesNotExist""#), "{terms}");
    assert_eq!(patched["spec"]["template"]["spec"]["containers"][0]["name"], "machine-config-daemon");
}
