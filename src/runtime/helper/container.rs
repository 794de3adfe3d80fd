//! A cold start: pid 1 made by libcontainer, then everything that has to be done from outside before it runs.

use super::super::config::SandboxMounts;
use super::super::devices::DEVICE_NODES;
use super::super::layout::SandboxFolder;
use super::super::network::InnerNetwork;
use super::super::rootfs::{RootError, RootPlan, STAGE, enter_stage, mount_root};
use super::super::volumes::VolumeBind;
use super::bundle::{Places, describe};
use super::criu::place;
use super::volumes::{attach_inside, fitted};
use super::{HelperStep, Later, Operation};
use crate::model::{ProcessRef, SandboxId};
use crate::sys::mount::{attach, clone_mount};
use crate::sys::netns::Netns;
use crate::sys::process::start_ticks;
use crate::sys::userns::{FilesystemIdentity, in_user_namespace};
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Where libcontainer looks for cgroups.
const CGROUP_MOUNT: &str = "/sys/fs/cgroup";
/// Open files per process inside, where the host allows it.
pub(super) const OPEN_FILES_MAX: u64 = 1 << 20;
/// When the host runs out of memory, sandboxes go before the host's own programs.
const OOM_SCORE: &str = "300";

/// Starts pid 1 on a new mount of its root.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct ColdStart {
    /// Whose.
    pub(crate) id: SandboxId,
    /// The root to mount first.
    pub(crate) root: RootPlan,
    /// The cgroup's folders, made and limited; this process moves into them.
    pub(crate) cgroup_folders: Vec<PathBuf>,
    /// The cgroup, from each hierarchy's root.
    pub(crate) cgroup_path: PathBuf,
    /// The way out.
    pub(crate) network: InnerNetwork,
    /// What the agent's first init must carry.
    pub(crate) control_secret: String,
    /// What root inside may mount.
    pub(crate) mounts: SandboxMounts,
    /// Terminals at once.
    pub(crate) ptys_max: u32,
    /// Volumes, mounted before pid 1 goes on.
    pub(crate) volumes: Vec<VolumeBind>,
    /// What the kernel counts per namespace.
    pub(crate) limits: Limits,
}

/// Bounds that belong to a sandbox's user namespace. Not kept in dumps: set at every start.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub(crate) struct Limits {
    /// inotify instances at once.
    pub(crate) inotify_instances_max: u32,
}

impl Operation for ColdStart {
    const VERB: &'static str = "create";
    type Answer = ProcessRef;

    fn folder(&self) -> &SandboxFolder {
        &self.root.folder
    }

    fn run(&self, _: &mut Later) -> Result<ProcessRef, HelperStep> {
        start(self)
    }
}

/// Mounts the root and starts the agent in it. What a failure leaves behind is found by the sandbox's id: processes by
/// its cgroup, mounts by its folder.
fn start(request: &ColdStart) -> Result<ProcessRef, HelperStep> {
    let userns = mount_root(&request.root)?;
    stage_root(&request.root.folder.root_mount()).map_err(HelperStep::wrap("preparing the container's root"))?;
    join(&request.cgroup_folders).map_err(HelperStep::wrap("joining the cgroup"))?;
    prepare_this_process();
    let mut container = build(request, &userns)?;
    let pid = container.pid().ok_or_else(|| HelperStep::new("starting the container", "libcontainer names no pid"))?.as_raw();
    place_devices(&Path::new(STAGE).join("root"), request.root.uid_base).map_err(HelperStep::wrap("making its devices"))?;
    limit_namespace(&userns, &request.limits).map_err(HelperStep::wrap("limiting its user namespace"))?;
    Netns::of_process(pid).and_then(|netns| request.network.open()?.attach(&netns)).map_err(HelperStep::wrap("connecting its network"))?;
    let volumes = fitted(&request.volumes, userns.as_fd()).map_err(HelperStep::wrap("opening its volumes"))?;
    attach_inside(volumes, pid, request.root.uid_base).map_err(HelperStep::wrap("mounting its volumes"))?;
    container.start().map_err(HelperStep::wrap("starting pid 1"))?;
    let start_ticks = start_ticks(pid).map_err(HelperStep::wrap("looking at pid 1"))?;
    Ok(ProcessRef { pid, start_ticks })
}

impl From<RootError> for HelperStep {
    fn from(error: RootError) -> Self {
        HelperStep::wrap("mounting its root file system")(error)
    }
}

/// Puts the root where the container's first process, which is nobody on the host, can reach it: the data folder is
/// root's alone.
fn stage_root(root: &Path) -> io::Result<()> {
    let root = clone_mount(root)?;
    enter_stage()?;
    for name in ["root", "state", "bundle"] {
        fs::create_dir(Path::new(STAGE).join(name))?;
    }
    attach(root, &Path::new(STAGE).join("root"))
}

/// Moves this process into the sandbox's cgroups, for its children to start there.
///
/// libcontainer would move them once more, into the same ones, in a way that costs an RCU grace period for each v1
/// hierarchy: so it is shown a machine without any. On v2 that is one write.
fn join(cgroup_folders: &[PathBuf]) -> io::Result<()> {
    for folder in cgroup_folders {
        place::join(folder)?;
    }
    if statfs(CGROUP_MOUNT)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
        umount2(CGROUP_MOUNT, MntFlags::MNT_DETACH)?;
        mount(Some("tmpfs"), CGROUP_MOUNT, Some("tmpfs"), MsFlags::MS_RDONLY, None::<&str>)?;
    }
    Ok(())
}

/// Limits and scores are inherited. All of it is best effort: without CAP_SYS_RESOURCE the host's limits stay.
pub(super) fn prepare_this_process() {
    if setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES_MAX, OPEN_FILES_MAX).is_err()
        && let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, nix::sys::resource::RLIM_INFINITY);
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
}

fn build(request: &ColdStart, userns: &OwnedFd) -> Result<Container, HelperStep> {
    let stage = Path::new(STAGE);
    let places = Places {
        root: &stage.join("root"),
        cgroup: &request.cgroup_path,
        // libcontainer's children share this descriptor: they are forked, not executed.
        userns: &PathBuf::from(format!("/proc/self/fd/{}", userns.as_raw_fd())),
        mounts: request.mounts,
        ptys_max: request.ptys_max,
    };
    let description = describe(&places).map_err(HelperStep::wrap("reading config/seccomp.json"))?;
    fs::write(stage.join("bundle/config.json"), description.to_string()).map_err(HelperStep::wrap("writing the bundle"))?;
    let secret = secret_pipe(&request.control_secret).map_err(HelperStep::wrap("handing over the control secret"))?;
    let log = agent_log(&request.root.folder.agent_log()).map_err(HelperStep::wrap("opening the agent's log"))?;
    let errors = log.try_clone().map_err(HelperStep::wrap("opening the agent's log"))?;
    let making = HelperStep::wrap("making the container");
    ContainerBuilder::new(request.id.to_string(), SyscallType::default())
        .with_root_path(stage.join("state"))
        .map(|builder| builder.with_stdin(secret).with_stdout(log).with_stderr(errors))
        .and_then(|builder| builder.validate_id())
        .and_then(|builder| builder.as_init(stage.join("bundle")).with_systemd(false).with_detach(true).build())
        .map_err(making)
}

/// The reading end of a pipe that holds the secret and a newline, and then ends.
fn secret_pipe(secret: &str) -> io::Result<OwnedFd> {
    let (reader, mut writer) = io::pipe()?;
    writer.write_all(format!("{secret}\n").as_bytes())?;
    Ok(reader.into())
}

/// A file and not /dev/null: libcontainer would reopen that for reading, on standard output too.
fn agent_log(path: &Path) -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().append(true).create(true).mode(0o600).open(path)?.into())
}

/// Puts real nodes in the place of the bind mounts that libcontainer makes of the host's devices. Removing a file here,
/// in another mount namespace, also removes what is mounted on it inside; the nodes then travel with the disk, and a
/// restore finds them there.
fn place_devices(root: &Path, uid_base: u32) -> io::Result<()> {
    let dev = root.join("dev");
    let _identity = FilesystemIdentity::assume(uid_base)?;
    for node in DEVICE_NODES {
        let path = dev.join(node.name);
        remove_file(&path)?;
        let device = makedev(u64::from(node.major), u64::from(node.minor));
        mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), device)?;
        // mknod's mode is cut by the umask.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    }
    // A link to the host's memory image, harmless but useless.
    remove_file(&dev.join("kcore"))
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Sets the bounds from inside, where root may.
pub(super) fn limit_namespace(userns: &OwnedFd, limits: &Limits) -> io::Result<()> {
    let instances = limits.inotify_instances_max.to_string();
    in_user_namespace(userns, || fs::write("/proc/sys/user/max_inotify_instances", &instances))
}

/// The user namespace of a process.
pub(in crate::runtime) fn userns_of(pid: i32) -> io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
}
