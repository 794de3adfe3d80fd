//! POST /init and the log: what the host alone may do.

use serde_json::{Value, json};

use crate::support::{Agent, NEXT_SECRET, SECRET, TOKEN, identity};

/// The files of the sandbox's identity, and whether the one that is bound over the kernel's kept its inode.
const SHOW: &str = "hostname; cat /etc/hostname /etc/hosts /etc/resolv.conf /etc/machine-id /run/stillbox/boot_id /run/stillbox/generation";

fn other_identity() -> Value {
    let mut other = identity();
    for (field, value) in [
        ("controlSecret", json!(NEXT_SECRET)),
        ("sandboxId", json!("iother")),
        ("hostname", json!("other")),
        ("machineId", json!("f".repeat(32))),
        ("bootId", json!("11111111-0000-4000-8000-000000000000")),
        ("hosts", json!("127.0.0.1 other\n")),
        ("resolvConf", json!("")),
        ("generation", json!(2)),
        ("envVars", json!({ "NEW": "1" })),
        ("accessToken", json!("another")),
    ] {
        other[field] = value;
    }
    other
}

#[test]
fn init_names_the_sandbox_and_may_be_repeated() {
    let agent = Agent::start();
    let zeroes = "0".repeat(32);
    let expected =
        format!("itest\nitest\n127.0.0.1 localhost itest\nnameserver 192.0.2.1\n{zeroes}\n00000000-0000-4000-8000-000000000000\n1\n");
    assert_eq!(agent.root_output(SHOW), expected);
    let inode = agent.root_output("stat -c %i /run/stillbox/boot_id");
    agent.root_output("rm /etc/machine-id; mkfifo /etc/machine-id; ln -sf /nowhere /etc/resolv.conf");

    let mut again = other_identity();
    again["accessToken"] = json!(TOKEN);
    assert_eq!(agent.init(SECRET, &again).status, 204);
    let expected = format!("other\nother\n127.0.0.1 other\n{}\n11111111-0000-4000-8000-000000000000\n2\n", "f".repeat(32));
    assert_eq!(agent.root_output(SHOW), expected);
    assert_eq!(agent.root_output("stat -c %i /run/stillbox/boot_id"), inode);
    assert_eq!(agent.root_output("echo $NEW $WHO $E2B_SANDBOX_ID"), "1 template iother\n", "nothing of the former sandbox is left");
}

#[test]
fn each_init_rotates_the_secret_and_the_token() {
    let agent = Agent::start();
    assert_eq!(agent.init(NEXT_SECRET, &other_identity()).status, 401);
    let unsigned = agent.authorized("POST", "/init").send(other_identity().to_string());
    assert_eq!(unsigned.status, 401);
    assert_eq!(agent.get("/envs").status, 200, "a refused init changes nothing");
    assert_eq!(agent.init(SECRET, &other_identity()).status, 204);
    assert_eq!(agent.init(SECRET, &other_identity()).status, 401);
    assert_eq!(agent.get("/envs").status, 401);
    assert_eq!(agent.request("GET", "/envs").header("X-Access-Token", "another").send("").status, 200);
}

#[test]
fn a_bad_init_changes_nothing() {
    let agent = Agent::start();
    let before = agent.root_output(SHOW);
    let mut bad = other_identity();
    bad["entropy"] = json!("short");
    let refused = agent.init(SECRET, &bad);
    assert_eq!((refused.status, refused.json()), (400, json!({ "code": 400, "message": "entropy is not 32 bytes of base64" })));
    let malformed = agent.init(SECRET, &json!({ "sandboxId": 7 }));
    assert_eq!(malformed.status, 400);
    assert!(malformed.text().contains("sandboxId") || malformed.text().contains("invalid type"), "{}", malformed.text());
    assert_eq!(agent.root_output(SHOW), before);
    assert_eq!(agent.init(SECRET, &other_identity()).status, 204, "the secret is still the old one");
}

#[test]
fn a_sandbox_without_a_token_is_open() {
    let agent = Agent::generic();
    let mut open = identity();
    open.as_object_mut().unwrap().remove("accessToken");
    assert_eq!(agent.init(SECRET, &open).status, 204);
    assert_eq!(agent.request("GET", "/envs").send("").status, 200);
}

#[test]
fn an_unwritable_file_costs_a_line_in_the_log_and_not_the_sandbox() {
    let agent = Agent::start();
    agent.root_output("rm /etc/hosts; mkdir /etc/hosts");
    assert_eq!(agent.init(SECRET, &other_identity()).status, 204);
    let logs = agent.logs(NEXT_SECRET, 0);
    let warning: Value = serde_json::from_str(logs.text().lines().next().unwrap_or_else(|| panic!("no log"))).unwrap();
    assert_eq!((&warning["level"], &warning["fields"]["path"]), (&json!("warn"), &json!("/etc/hosts")));
}

#[test]
fn cas_are_added_to_the_images_bundle_and_taken_out_again() {
    let agent = Agent::start();
    let bundle = "/etc/ssl/certs/ca-certificates.crt";
    agent.root_output(&format!("mkdir -p /etc/ssl/certs; printf 'IMAGE\\n' > {bundle}"));
    let pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let mut with_ca = identity();
    with_ca["caBundlePem"] = json!(pem);
    for _ in 0..2 {
        assert_eq!(agent.init(SECRET, &with_ca).status, 204);
        let text = agent.root_output(&format!("cat {bundle}"));
        assert!(text.starts_with("IMAGE\n") && text.matches("AAAA").count() == 1, "{text}");
    }
    assert_eq!(
        agent.root_output("echo $SSL_CERT_FILE $NODE_EXTRA_CA_CERTS; cat $NODE_EXTRA_CA_CERTS"),
        format!("{bundle} /run/stillbox/ca.pem\n{pem}")
    );
    assert_eq!(agent.init(SECRET, &identity()).status, 204);
    assert_eq!(agent.root_output(&format!("cat {bundle}; echo $SSL_CERT_FILE")), "IMAGE\n\n");
}

#[test]
fn the_log_tells_the_host_what_processes_did_and_nobody_else() {
    let agent = Agent::start();
    agent.sh("echo visible; exit 3").collect();
    assert_eq!(agent.logs(NEXT_SECRET, 0).status, 401);
    assert_eq!(agent.get("/stillbox/logs").status, 401);
    let entries =
        |cursor| -> Vec<Value> { agent.logs(SECRET, cursor).text().lines().map(|line| serde_json::from_str(line).unwrap()).collect() };
    crate::support::wait_for("the end to be logged", || entries(0).len() == 3);
    let all = entries(0);
    let messages: Vec<&str> = all.iter().map(|entry| entry["message"].as_str().unwrap()).collect();
    assert_eq!(messages, ["process started", "visible", "process ended"]);
    assert_eq!((&all[1]["fields"]["source"], &all[2]["fields"]["status"]), (&json!("stdout"), &json!("exit status 3")));
    assert_eq!(entries(all[1]["seq"].as_u64().unwrap()), all[2..]);
    assert_eq!(agent.init(SECRET, &other_identity()).status, 204);
    assert_eq!(agent.logs(NEXT_SECRET, 0).text(), "", "a sandbox made from a dump does not show what happened before");
}
