//! A world of one's own for a test: a host in a netns, an internet behind it, and sandboxes.

use super::internet;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use stillbox::model::{InstanceId, NetworkPolicy, SandboxId};
use stillbox::runtime::network::{Network, NetworkConfig, NetworkError, SlotLease};
use stillbox::sys::netns::{self, Netns};
use tokio::runtime::Runtime;

/// What the host is called in the internet.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// The host's address towards its private network.
pub(crate) const HOST_LAN: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
/// Machines that answer on port 80 and 443 with the address of who asked, and which of them was asked.
pub(crate) const ONE: Ipv4Addr = Ipv4Addr::new(1, 1, 1, 1);
pub(crate) const EIGHT: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
pub(crate) const NINE: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub(crate) const LAN_MACHINE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 5);
/// A machine that serves nothing until a test does so in its name.
pub(crate) const SECURE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

/// Everything a test may touch. Dropping it removes what was mounted; links and rules go with the namespaces.
#[derive(Debug)]
pub(crate) struct World {
    folder: tempfile::TempDir,
}

/// Runs `test` on threads that live in a host of their own.
pub(crate) fn in_own_world<F: Future<Output = ()>>(test: impl FnOnce(World) -> F + Send + 'static) {
    // What the server logs belongs to the failure.
    let _another_test_was_first = tracing_subscriber::fmt().with_test_writer().with_max_level(tracing::Level::DEBUG).try_init();
    let host = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests need root");
        ip("link set lo up");
        // A new netns takes this over from the machine's first one.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        let world = World::new();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(test(world));
    });
    if let Err(panic) = host.join() {
        std::panic::resume_unwind(panic);
    }
}

impl World {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("net-").tempdir().unwrap();
        let internet = Netns::create_pinned(&folder.path().join("internet")).unwrap();
        let host = nix::unistd::gettid();
        internet
            .run(|| {
                ip("link set lo up");
                ip(&format!("link add wan type veth peer name wan netns {host}"));
                ip("addr add 198.51.100.1/24 dev wan");
                ip("link set wan up");
                ip(&format!("addr add {SECURE}/32 dev lo"));
                for address in [ONE, EIGHT, NINE, METADATA, LAN_MACHINE] {
                    ip(&format!("addr add {address}/32 dev lo"));
                    serve(&format!("{address}:80"));
                    serve(&format!("{address}:443"));
                }
                internet::serve_names();
                internet::serve_socks();
                Ok(())
            })
            .unwrap();
        ip(&format!("addr add {HOST}/24 dev wan"));
        ip(&format!("addr add {HOST_LAN}/24 dev lo"));
        ip("link set wan up");
        ip("route add default via 198.51.100.1");
        ip(&format!("route add {LAN_MACHINE} via 198.51.100.1"));
        Self { folder }
    }

    /// Where the rest of the world is.
    pub(crate) fn internet(&self) -> Netns {
        Netns::open(&self.folder.path().join("internet")).unwrap()
    }

    /// A data folder by name; the same name is the same folder.
    pub(crate) fn data_dir(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) async fn network(&self, instance: &str) -> Network {
        self.network_with(instance, NetworkConfig { pool_slots: 1, dns_upstreams: vec![EIGHT.into()], ..NetworkConfig::default() }).await
    }

    pub(crate) async fn network_with(&self, instance: &str, config: NetworkConfig) -> Network {
        Network::open(config, self.instance(instance), &self.data_dir(instance)).await.unwrap()
    }

    /// A server that can be killed: its network, and the runtime that all of its tasks are on.
    pub(crate) async fn server(&self, instance: &str) -> (Network, Runtime) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (instance, data_dir) = (self.instance(instance), self.data_dir(instance));
        let opening = runtime.spawn(async move { Network::open(NetworkConfig::default(), instance, &data_dir).await });
        (opening.await.unwrap().unwrap(), runtime)
    }

    pub(crate) fn instance(&self, name: &str) -> InstanceId {
        name.parse().unwrap()
    }

    /// A slot, waited for while the last one is being recycled.
    pub(crate) async fn lease(&self, network: &Network, sandbox: SandboxId, policy: &NetworkPolicy) -> SlotLease {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match network.lease(sandbox, policy).await {
                Err(NetworkError::NoSlot { .. }) if Instant::now() < deadline => tokio::time::sleep(POLL).await,
                lease => return lease.unwrap(),
            }
        }
    }

    /// A sandbox as the helper makes it: its netns belongs to a user namespace of its own.
    pub(crate) async fn sandbox(&self, network: &Network, policy: &NetworkPolicy) -> Sandbox {
        let id = SandboxId::random();
        let lease = self.lease(network, id, policy).await;
        // Goes with the thread of its test, whatever happens: it holds the pipes and locks that cargo was given.
        let program = ["--user", "--map-root-user", "--net", "setpriv", "--pdeathsig", "KILL", "sleep", "1000"];
        let init = Command::new("unshare").args(program).spawn().unwrap();
        let own = Netns::current().unwrap();
        let netns = wait_for("a netns of the sandbox's own", || {
            let netns = Netns::of_process(i32::try_from(init.id()).unwrap()).ok()?;
            (!same(&netns, &own)).then_some(netns)
        });
        network.attach(&lease, netns.clone()).await.unwrap();
        Sandbox { id, lease, netns, init }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = |line: &str| Some(PathBuf::from(line.split(' ').nth(4)?)).filter(|path| path.starts_with(self.folder.path()));
        for pin in mounts.lines().filter_map(ours) {
            netns::unpin(&pin).unwrap();
        }
    }
}

fn same(one: &Netns, other: &Netns) -> bool {
    use std::os::fd::{AsFd, AsRawFd};
    let inode = |netns: &Netns| nix::sys::stat::fstat(netns.as_fd().as_raw_fd()).unwrap().st_ino;
    inode(one) == inode(other)
}

/// A process in namespaces of its own, attached to its slot.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) id: SandboxId,
    pub(crate) lease: SlotLease,
    pub(crate) netns: Netns,
    init: Child,
}

impl Sandbox {
    /// What the machine at `address` answers: the address that it was asked from.
    pub(crate) fn ask(&self, address: Ipv4Addr) -> io::Result<Ipv4Addr> {
        self.ask_port(address, 80)
    }

    pub(crate) fn ask_port(&self, address: Ipv4Addr, port: u16) -> io::Result<Ipv4Addr> {
        self.netns.run(|| ask(SocketAddr::from((address, port))))
    }

    /// A connection that stays open.
    pub(crate) fn connect(&self, address: Ipv4Addr) -> io::Result<TcpStream> {
        self.netns.run(|| TcpStream::connect_timeout(&SocketAddr::from((address, 80)), PATIENCE))
    }

    /// Does something in the sandbox's netns that panics when it fails.
    pub(crate) fn inside(&self, work: impl FnOnce() + Send) {
        let work = || {
            work();
            Ok(())
        };
        self.netns.run(work).unwrap();
    }

    /// The sandbox's processes are gone, the slot is not yet given back.
    pub(crate) fn end(self) -> u32 {
        self.lease.slot
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.init.kill().unwrap();
        self.init.wait().unwrap();
    }
}

fn ask(address: SocketAddr) -> io::Result<Ipv4Addr> {
    let answer = say(address, b"?")?;
    let (asker, _asked) = answer.split_once(' ').ok_or_else(|| io::Error::other(answer.clone()))?;
    asker.parse().map_err(io::Error::other)
}

/// All that `address` answers to `words`.
pub(crate) fn say(address: SocketAddr, words: &[u8]) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(words)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Serves in the netns of the calling thread, until the test process ends: answers each question with the asker's
/// address and its own.
pub(crate) fn serve(address: &str) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || answer(stream.unwrap()));
        }
    });
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    assert_ne!(stream.read(&mut [0; 4096])?, 0, "a question");
    let (asker, asked) = (stream.peer_addr()?.ip(), stream.local_addr()?.ip());
    stream.write_all(format!("{asker} {asked}").as_bytes())
}

/// Runs `ip` in the netns of the calling thread.
pub(crate) fn ip(arguments: &str) {
    run("ip", &arguments.split(' ').collect::<Vec<_>>());
}

/// Standard output of a program that has to succeed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Feeds rules to `nft` in the netns of the calling thread.
pub(crate) fn nft(rules: &str) {
    run("nft", &[rules]);
}

/// Polls until there is something; a deadline makes it a failure.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(POLL);
    }
}

/// Everything in the host's kernel and on disk that carries an instance's name, one line each.
pub(crate) fn traces(instance: &str, data_dir: &Path) -> Vec<String> {
    let mentions = |text: String| text.lines().filter(|line| line.contains(instance)).map(str::to_owned).collect::<Vec<_>>();
    let links = run("ip", &["-br", "link"]);
    let mut found = mentions(links.lines().map(|link| format!("{}\n", link.split('@').next().unwrap())).collect());
    found.extend(mentions(run("nft", &["list", "ruleset"])));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    found.extend(mounts.lines().filter(|mount| mount.contains(&*data_dir.to_string_lossy())).map(str::to_owned));
    let files = std::fs::read_dir(data_dir.join("netns")).into_iter().flatten();
    found.extend(files.map(|file| file.unwrap().path().display().to_string()));
    found
}
