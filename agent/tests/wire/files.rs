//! GET and POST /files and compose, as HTTP clients see them.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use flate2::Compression;
use flate2::read::{GzDecoder, GzEncoder};
use serde_json::{Value, json};

use crate::http::{Answer, Reply};
use crate::support::{Agent, wait_for};

fn form(parts: &[(&str, &str)]) -> String {
    let part = |(filename, content): &(&str, &str)| {
        format!(
            "--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{filename}\"\r\nContent-Type: text/plain\r\n\r\n{content}\r\n"
        )
    };
    parts.iter().map(part).collect::<String>() + "--B--\r\n"
}

fn upload(agent: &Agent, target: &str, body: impl AsRef<[u8]>) -> Answer {
    agent.authorized("POST", target).header("Content-Type", "multipart/form-data; boundary=B").send(body)
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut compressed = Vec::new();
    GzEncoder::new(content, Compression::fast()).read_to_end(&mut compressed).unwrap();
    compressed
}

fn error(status: u16, message: &str) -> Value {
    json!({ "code": status, "message": message })
}

#[test]
fn a_file_is_the_users_and_so_are_its_new_parents() {
    let agent = Agent::start();
    let answer = upload(&agent, "/files", form(&[("new/dir/a b.txt", "content")]));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json(), json!([{ "name": "a b.txt", "path": "/home/user/new/dir/a b.txt", "type": "file" }]));
    for (path, mode) in [("/home/user/new", 0o755), ("/home/user/new/dir", 0o755), ("/home/user/new/dir/a b.txt", 0o644)] {
        let found = fs::metadata(agent.outside(path)).unwrap();
        assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (mode, 1000, 1000), "{path}");
    }
    assert_eq!(agent.get("/files?path=new/dir/a%20b.txt").text(), "content");
}

#[test]
fn both_kinds_of_body_come_plain_or_gzipped() {
    let agent = Agent::start();
    let content = "text ".repeat(100_000);
    assert_eq!(agent.put("raw", &content).json()[0]["path"], "/home/user/raw");
    let raw = agent.authorized("POST", "/files?path=raw.gz").header("Content-Type", "application/octet-stream");
    assert_eq!(raw.header("Content-Encoding", "gzip").send(gzip(content.as_bytes())).status, 200);
    let form = form(&[("x", &content)]);
    assert_eq!(upload(&agent, "/files?path=form", &form).json()[0]["name"], "form", "the query names a single file");
    let zipped = agent.authorized("POST", "/files?path=form.gz").header("Content-Type", "multipart/form-data; boundary=B");
    assert_eq!(zipped.header("Content-Encoding", "gzip").send(gzip(form.as_bytes())).status, 200);
    for name in ["raw", "raw.gz", "form", "form.gz"] {
        assert!(fs::read_to_string(agent.outside(&format!("/home/user/{name}"))).unwrap() == content, "{name}");
    }
}

#[test]
fn a_body_may_come_in_chunks_of_unknown_number() {
    let agent = Agent::start();
    let request = agent.authorized("POST", "/files?path=chunked").header("Content-Type", "application/octet-stream");
    let mut socket = request.header("Transfer-Encoding", "chunked").open();
    for chunk in ["one ", "two ", "three"] {
        write!(socket, "{:x}\r\n{chunk}\r\n", chunk.len()).unwrap();
    }
    write!(socket, "0\r\n\r\n").unwrap();
    assert_eq!(Reply::read(socket).status, 200);
    assert_eq!(agent.get("/files?path=chunked").text(), "one two three");
}

#[test]
fn several_parts_are_several_files_and_a_path_counts_once() {
    let agent = Agent::start();
    let answer = upload(&agent, "/files", form(&[("a", "1"), ("/home/user/b", "2")]));
    let paths: Vec<String> = answer.json().as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap().to_owned()).collect();
    assert_eq!(paths, ["/home/user/a", "/home/user/b"]);
    let answer = upload(&agent, "/files", form(&[("c", "first"), ("~/c", "second")]));
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("multiple files to the same path '/home/user/c'"), "{}", answer.text());
    assert!(answer.text().contains("these files were uploaded: /home/user/c"), "{}", answer.text());
    assert_eq!(agent.get("/files?path=c").text(), "first");
}

#[test]
fn an_existing_file_is_overwritten_in_place_and_keeps_its_mode() {
    let agent = Agent::start();
    let path = agent.outside("/home/user/script");
    fs::write(&path, "a much longer old content").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let before = fs::metadata(&path).unwrap();
    assert_eq!(agent.put("script", "new").status, 200);
    let after = fs::metadata(&path).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    assert_eq!((after.ino(), after.mode(), after.uid()), (before.ino(), before.mode(), 1000));
}

#[test]
fn what_cannot_be_uploaded_is_refused_with_the_reason() {
    let agent = Agent::start();
    fs::create_dir(agent.outside("/home/user/d")).unwrap();
    fs::write(agent.outside("/home/user/f"), "").unwrap();
    assert_eq!(agent.put("d", "x").json(), error(400, "path is a directory: /home/user/d"));
    assert_eq!(agent.put("f/x", "x").json(), error(400, "error ensuring directories: path is a file: /home/user/f"));
    assert_eq!(agent.put("x&username=nobody", "x").json(), error(401, "invalid username: 'nobody'"));
    assert_eq!(agent.put(&"x".repeat(300), "x").status, 400);
    let raw = agent.authorized("POST", "/files").header("Content-Type", "application/octet-stream").send("x");
    assert_eq!(raw.json(), error(400, "path query parameter is required for raw body upload"));
    let other = agent.authorized("POST", "/files?path=x").header("Content-Type", "text/plain").send("x");
    assert!(other.status == 400 && other.text().contains("unsupported content type: text/plain"), "{}", other.text());
    let coded = agent.authorized("POST", "/files?path=x").header("Content-Type", "application/octet-stream");
    assert_eq!(coded.header("Content-Encoding", "br").send("x").status, 400);
    let torn = agent.authorized("POST", "/files?path=x").header("Content-Type", "application/octet-stream");
    assert_eq!(torn.header("Content-Encoding", "gzip").send(&gzip(b"content")[..15]).status, 400);
    assert_eq!(upload(&agent, "/files", &form(&[("x", "content")])[..100]).status, 400);
    assert!(!agent.outside("/home/user/x").exists(), "a refused upload leaves no file");
}

#[test]
fn metadata_is_kept_replaced_and_cleared_with_its_file() {
    let agent = Agent::start();
    let put = |headers: &[(&str, &str)]| {
        let request = agent.authorized("POST", "/files?path=f").header("Content-Type", "application/octet-stream");
        request.headers(headers).send("x")
    };
    let stat = || agent.ok("filesystem.Filesystem/Stat", &json!({ "path": "f" }))["entry"]["metadata"].clone();
    let answer = put(&[("X-Metadata-Author", "Mish"), ("x-metadata-b", "2")]);
    assert_eq!(answer.json()[0]["metadata"], json!({ "author": "Mish", "b": "2" }));
    assert_eq!(stat(), json!({ "author": "Mish", "b": "2" }));
    put(&[("X-Metadata-B", "3")]);
    assert_eq!(stat(), json!({ "b": "3" }));
    assert_eq!(put(&[]).json(), json!([{ "name": "f", "path": "/home/user/f", "type": "file" }]));
    assert_eq!(stat(), Value::Null);
    assert_eq!(put(&[("X-Metadata-K", "\u{e9}")]).status, 400);
    assert_eq!(put(&[(&format!("X-Metadata-{}", "k".repeat(247)), "")]).status, 400);
    assert_eq!(put(&[("X-Metadata-K", &"v".repeat(4096))]).status, 400);
}

#[test]
fn a_full_disk_is_507_and_leaves_nothing_unexplained() {
    let agent = Agent::start();
    let content = vec![b'x'; 3 << 20];
    let full = agent.put("/home/full/new", &content);
    assert_eq!(full.json(), error(507, "attempted to write 3145728 bytes: not enough disk space available"));
    assert_eq!(agent.get("/files?path=/home/full/new").status, 404, "what was begun is removed");
    agent.put("/home/full/old", "old");
    let full = agent.put("/home/full/old", &content);
    assert_eq!(full.status, 507);
    assert!(full.text().contains("'/home/full/old' was overwritten and holds the first"), "{}", full.text());
}

#[test]
fn an_upload_that_is_cut_off_leaves_no_new_file() {
    let agent = Agent::start();
    let path = agent.outside("/home/user/cut");
    let request = agent.authorized("POST", "/files?path=cut").header("Content-Type", "application/octet-stream");
    let mut socket = request.header("Content-Length", "1000").open();
    socket.write_all(&[b'x'; 500]).unwrap();
    wait_for("the upload to begin", || path.exists());
    drop(socket);
    wait_for("the file to go", || !path.exists());
}

#[test]
fn a_large_upload_passes_through_in_little_memory() {
    let agent = Agent::start();
    const MEBIBYTES: usize = 256;
    let request = agent.authorized("POST", "/files?path=large").header("Content-Type", "application/octet-stream");
    let mut socket = request.header("Content-Length", &(MEBIBYTES << 20).to_string()).open();
    let chunk = vec![7; 1 << 20];
    for _ in 0..MEBIBYTES {
        socket.write_all(&chunk).unwrap();
    }
    assert_eq!(Reply::read(socket).status, 200);
    assert_eq!(fs::metadata(agent.outside("/home/user/large")).unwrap().len(), 256 << 20);
    let peak_kib = agent.memory_kib("status", "VmHWM:");
    assert!(peak_kib < 32 << 10, "the agent took {peak_kib} KiB");
}

#[test]
fn memory_that_a_burst_took_is_given_back() {
    let agent = Agent::start();
    let content = vec![7; 8 << 20];
    std::thread::scope(|scope| {
        for number in 0..24 {
            let (agent, content) = (&agent, &content);
            scope.spawn(move || {
                agent.put(&format!("f{number}"), content);
                agent.get(&format!("/files?path=f{number}"));
            });
        }
    });
    let private_kib = || agent.memory_kib("smaps_rollup", "Private_Dirty:");
    wait_for("the agent to be small again", || private_kib() < 4 << 10);
}

#[test]
fn a_download_says_what_it_is() {
    let agent = Agent::start();
    agent.put("new%20file.txt", "content");
    let answer = agent.get("/files?path=new%20file.txt");
    assert_eq!((answer.status, answer.text().as_str()), (200, "content"));
    assert_eq!(answer.header("content-length"), Some("7"));
    assert_eq!(answer.header("content-disposition"), Some("inline; filename=\"new file.txt\""));
    assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(answer.header("vary"), Some("Accept-Encoding"));
    assert_eq!(agent.get("/files?path=nothing").json(), error(404, "path '/home/user/nothing' does not exist"));
    assert_eq!(agent.get("/files").json(), error(400, "path '/home/user' is a directory"));
    assert_eq!(agent.get("/files?path=~root/x").status, 400);
}

#[test]
fn gzip_is_sent_to_those_who_ask_and_where_it_pays() {
    let agent = Agent::start();
    let text = "text ".repeat(100_000);
    let mut noise = vec![0; 500_000];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut noise).unwrap();
    agent.put("text", &text);
    agent.put("noise", &noise);
    let get =
        |path: &str, accepted: &str| agent.authorized("GET", &format!("/files?path={path}")).header("Accept-Encoding", accepted).send("");
    let answer = get("text", "br, gzip");
    assert_eq!(answer.header("content-encoding"), Some("gzip"));
    let mut decoded = String::new();
    GzDecoder::new(answer.body.as_slice()).read_to_string(&mut decoded).unwrap();
    assert!(decoded == text);
    assert_eq!(get("text", "gzip;q=0").header("content-encoding"), None);
    let answer = get("noise", "gzip");
    assert_eq!((answer.header("content-encoding"), answer.body == noise), (None, true));
    assert_eq!(get("text", "br, identity;q=0").status, 406);
}

#[test]
fn parts_and_conditions_are_honoured() {
    let agent = Agent::start();
    agent.put("f", "0123456789");
    let get = |name: &str, value: &str| agent.authorized("GET", "/files?path=f").header(name, value).send("");
    let part = get("Range", "bytes=2-4");
    assert_eq!((part.status, part.text().as_str()), (206, "234"));
    assert_eq!(part.header("content-range"), Some("bytes 2-4/10"));
    let outside = get("Range", "bytes=10-");
    assert_eq!((outside.status, outside.header("content-range")), (416, Some("bytes */10")));
    let modified = part.header("last-modified").unwrap();
    let unchanged = get("If-Modified-Since", modified);
    assert_eq!((unchanged.status, unchanged.body.len()), (304, 0));
    let both = agent.authorized("GET", "/files?path=f").header("Range", "bytes=0-1").header("Accept-Encoding", "gzip");
    assert_eq!(both.send("").text(), "01", "a part is never gzipped");
    let refused = agent.authorized("GET", "/files?path=f").header("Range", "bytes=0-1");
    assert_eq!(refused.header("Accept-Encoding", "identity;q=0, gzip").send("").status, 406);
}

#[test]
fn files_of_procfs_that_call_themselves_empty_have_content() {
    let agent = Agent::start();
    assert_eq!(agent.get("/files?path=/proc/sys/kernel/random/uuid").body.len(), 37);
    let zipped = agent.authorized("GET", "/files?path=/proc/self/status").header("Accept-Encoding", "gzip").send("");
    let mut decoded = String::new();
    GzDecoder::new(zipped.body.as_slice()).read_to_string(&mut decoded).unwrap();
    assert!(decoded.starts_with("Name:"), "{decoded}");
    agent.put("empty", "");
    assert_eq!(agent.get("/files?path=empty").header("content-length"), Some("0"));
}

#[test]
fn a_signature_stands_in_for_the_token() {
    let agent = Agent::start();
    agent.put("hello.txt", "hello");
    // The contract's vector: path hello.txt, read, user `user`, no expiry.
    let signature = "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E";
    let signed = |query: &str| agent.request("GET", &format!("/files?{query}")).send("");
    let answer = signed(&format!("path=hello.txt&username=user&signature={signature}"));
    assert_eq!((answer.status, answer.text().as_str()), (200, "hello"));
    assert_eq!(signed(&format!("path=hello.txt&signature={signature}")).json(), error(401, "invalid signature"));
    assert_eq!(signed("path=hello.txt").json(), error(401, "missing signature query parameter"));
    // sha256("hello.txt:read:user:<token>:1000000000")
    let expired = "v1_YVzN2mb6yVrwn1WrS3YWGh5bkP/0WtevoEaVa//Ri3g";
    let query = format!("path=hello.txt&username=user&signature_expiration=1000000000&signature={expired}");
    assert_eq!(signed(&query).json(), error(401, "signature is already expired"));
    let malformed = signed("path=hello.txt&signature_expiration=soon");
    assert_eq!((malformed.status, &malformed.json()["code"]), (400, &json!(400)));
}

#[test]
fn a_wrong_token_is_not_saved_by_a_signature() {
    let agent = Agent::start();
    let target = "/files?path=hello.txt&username=user&signature=v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E";
    let answer = agent.request("GET", target).header("X-Access-Token", "other").send("");
    assert_eq!(answer.json(), error(401, "access token present in header but does not match"));
    let compose = agent.request("POST", "/files/compose").header("Content-Type", "application/json").send("{}");
    assert_eq!(compose.status, 401, "composing has no signatures");
}

#[test]
fn pieces_are_composed_in_order_and_go() {
    let agent = Agent::start();
    for (name, content) in [("p1", "one "), ("p2", "two "), ("p3", "three")] {
        agent.put(name, content);
    }
    let compose = |body: Value| {
        let request = agent.authorized("POST", "/files/compose").header("Content-Type", "application/json");
        request.send(body.to_string())
    };
    let answer = compose(json!({ "source_paths": ["p1", "~/p2", "/home/user/p3"], "destination": "new/whole" }));
    assert_eq!(answer.json(), json!({ "name": "whole", "path": "/home/user/new/whole", "type": "file" }));
    assert_eq!(agent.get("/files?path=new/whole").text(), "one two three");
    let whole = fs::metadata(agent.outside("/home/user/new/whole")).unwrap();
    assert_eq!((whole.mode() & 0o7777, whole.uid()), (0o644, 1000));
    assert!(!agent.outside("/home/user/p1").exists());

    assert_eq!(compose(json!({ "source_paths": [], "destination": "x" })).status, 400);
    assert_eq!(compose(json!({ "source_paths": ["x"] })).status, 400);
    assert_eq!(compose(json!({ "source_paths": ["x"], "destination": "x" })).status, 400);
    assert_eq!(compose(json!({ "source_paths": ["new"], "destination": "x" })).status, 400);
    assert_eq!(compose(json!({ "source_paths": ["nothing"], "destination": "x" })).status, 404);
    let missing = compose(json!({ "source_paths": ["new/whole", "nothing"], "destination": "x" }));
    assert_eq!((missing.status, agent.outside("/home/user/new/whole").exists()), (404, true));
}
