//! The action `delete`: what is left of a container whose shim has died is taken away, but never an image
//! that holds its state.

use std::{path::Path, time::SystemTime};

use criu_hooks::image::{Mode, Store};
use runc::options::DeleteOpts;

use super::{
    create::{Holder, last_record, runc_of, what_holds},
    sleep::remove_images,
};
use crate::{options::Options, reaper::Reaper, rootfs, runtime::ProcessExit};

/// What containerd is told of the container.
pub struct Ended {
    /// Its init process, the last known.
    pub pid: u32,
    /// 137: it was killed, if it was not gone already.
    pub code: u32,
    /// When.
    pub at: SystemTime,
}

/// Ends the container's processes and removes its runtime state and mounts. An image that holds its state stays, and
/// is named on stderr, which goes to containerd's log.
pub async fn cleanup(namespace: &str, id: &str, bundle: &Path, reaper: &Reaper) -> Ended {
    let exit = ProcessExit { code: 137, at: SystemTime::now() };
    let record = last_record(bundle);
    let options = Options::load(bundle).unwrap_or_else(|error| {
        eprintln!("{error}: the defaults are used");
        Options::default()
    });
    match runc_of(&options, namespace, bundle, reaper) {
        Ok(runc) => {
            if let Err(error) = runc.delete(id, Some(&DeleteOpts { force: true })).await
                && !error.to_string().contains("does not exist")
            {
                eprintln!("container {id}: runc delete: {error}");
            }
        }
        Err(error) => eprintln!("container {id}: {error}"),
    }
    if let Err(error) = rootfs::unmount(bundle) {
        eprintln!("container {id}: {error}");
    }
    match record.as_ref().map(|record| what_holds(record)) {
        Some(Holder::Image(image)) => {
            let rest = without(&options, namespace, id);
            eprintln!(
                "container {id} was asleep when its shim died: its state is kept in {}{rest}",
                image.display()
            );
        }
        // An image of its last sleep, which was to go when all memory was filled.
        Some(Holder::Processes) => {
            if let Err(error) = remove_images(&options.image_dir, namespace, id) {
                eprintln!("container {id}: images stay on the disk: {error}");
            }
        }
        Some(Holder::Either) | None => {}
    }
    Ended { pid: record.map_or(0, |record| record.pid), code: exit.code, at: exit.at }
}

/// What was lost with the shim, in words: an image of the fast mode leaves out what lives on in memory.
fn without(options: &Options, namespace: &str, id: &str) -> &'static str {
    let image = Store::open(&options.image_dir).and_then(|store| store.latest(namespace, id));
    match image {
        Ok(Some(image)) if image.manifest().facts.mode == Mode::PodNamespaces => {
            ", without the contents of its tmpfs mounts and of its IPC namespace, which the shim held"
        }
        _ => "",
    }
}
