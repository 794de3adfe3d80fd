//! Roots made ahead: disks copied and mounted, overlays put over them, for sandboxes that nobody has asked for yet.

use super::super::disk::copy_image;
use super::super::rootfs::{RootPlan, mount_root};
use super::{HelperStep, Later, Operation, criu, make_lock};
use crate::runtime::disk::make_private;
use crate::runtime::layout::SandboxFolder;
use crate::sys::process::yield_to_others;
use std::path::PathBuf;

/// Makes several roots, one after the other, whenever nobody else wants the CPU or the disk.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Prepare {
    /// The folder that they are in.
    pub(crate) place: SandboxFolder,
    /// Each in a folder of its own, which does not exist yet.
    pub(crate) roots: Vec<NewRoot>,
}

/// One of them.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct NewRoot {
    /// What its disk is a copy of.
    pub(crate) image: PathBuf,
    /// CRIU's images, of the same dump.
    pub(crate) images: PathBuf,
    /// The rest.
    pub(crate) plan: RootPlan,
}

impl Operation for Prepare {
    const VERB: &'static str = "prepare";
    type Answer = ();

    fn folder(&self) -> &SandboxFolder {
        &self.place
    }

    /// What a failure leaves behind is found by its folder.
    fn run(&self, _: &mut Later) -> Result<(), HelperStep> {
        yield_to_others();
        self.roots.iter().try_for_each(make)
    }
}

fn make(root: &NewRoot) -> Result<(), HelperStep> {
    let folder = &root.plan.folder;
    let (work, uid_base) = (folder.work(), root.plan.uid_base);
    make_private(&work).and_then(|()| make_lock(folder)).map_err(HelperStep::wrap("making the folder of a root"))?;
    criu::make_ahead(&root.images, &work, uid_base).map_err(HelperStep::wrap("preparing the images of a root"))?;
    copy_image(&root.image, &folder.disk_image()).map_err(HelperStep::wrap("copying the disk of a root"))?;
    // CRIU makes the user namespace anew when it restores; this one was needed for its map.
    drop(mount_root(&root.plan)?);
    Ok(())
}
