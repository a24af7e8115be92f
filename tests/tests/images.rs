//! Images that are not what they were: whatever is done to a file of one, the wake is refused with the file's name, the
//! agent and its pod stay, and with the right files it wakes as it was.

#![allow(clippy::unwrap_used)]

mod sleeper;

use std::fs;
use std::io::IoSliceMut;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use agentcube_tests::node::Node;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::ReadWriteFlags;
use sleeper::{Remembering, SOON, assert_refused, configured, on_node, python, run, start, start_with};

/// Asleep, with the checksums of its pages.
fn asleep(agent: &Remembering<'_>) -> PathBuf {
    agent.sleeps();
    let image = agent.image();
    agent.node.wait_until("the checksums", SOON, || Ok(image.join("pages.sums").exists())).unwrap();
    image
}

/// The files of an image: the manifest, the checksums, and what CRIU wrote.
fn files(image: &Path) -> Vec<PathBuf> {
    let inside = fs::read_dir(image.join("img")).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        inside.chain(["manifest.json", "pages.sums"].map(|name| image.join(name))).collect();
    files.sort();
    files
}

/// Does something to a file, sees the wake refused by its name and with these words, and puts the file back.
fn refused_with(agent: &Remembering<'_>, file: &Path, words: &[&str], change: impl FnOnce(&Path)) {
    let aside = file.parent().unwrap().parent().unwrap().join("aside");
    // The same file comes back, not a copy: what is changed is a copy.
    fs::rename(file, &aside).unwrap();
    fs::copy(&aside, file).unwrap();
    change(file);
    let refused = agent.wake();
    let _ = fs::remove_file(file).or_else(|_| fs::remove_dir_all(file));
    fs::rename(&aside, file).unwrap();
    let name = file.file_name().unwrap().to_str().unwrap();
    assert_refused(&refused, &[&["cannot wake", name][..], words].concat());
    agent.assert_state("asleep");
}

fn flip(file: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

fn resize(file: &Path, length: u64) {
    fs::File::options().write(true).open(file).unwrap().set_len(length).unwrap();
}

fn length(file: &Path) -> u64 {
    fs::metadata(file).unwrap().len()
}

/// The agent has lost nothing by all of that.
fn assert_unharmed(agent: &mut Remembering<'_>, shim: u64, image: &Path) {
    assert_eq!(agent.shim_pid(), shim);
    assert_eq!(agent.image(), image);
    agent.assert_running_for_containerd();
    agent.assert_state("asleep");
    agent.wakes();
    assert_eq!(agent.last_error(), "");
    agent.sleeps();
    agent.wakes();
}

#[test]
fn a_flipped_bit_in_any_file_is_refused_by_the_files_name() {
    let node = start();
    let mut agent = run(&node, &python("a").env("BALLAST_MIB", &4));
    let image = asleep(&agent);
    let shim = agent.shim_pid();
    for file in files(&image) {
        let bytes = length(&file);
        if bytes > 0 {
            for at in [0, bytes / 2, bytes - 1] {
                refused_with(&agent, &file, &[], |file| flip(file, at));
            }
        }
    }
    // Which page it is.
    let pages = image.join("img/pages-1.img");
    let words = ["altered at byte 8192", "not the one that was dumped"];
    refused_with(&agent, &pages, &words, |file| flip(file, 8192 + 4095));
    assert_unharmed(&mut agent, shim, &image);
}

#[test]
fn a_file_of_another_length_or_kind_is_refused_by_its_name() {
    let node = start();
    let mut agent = run(&node, &python("a"));
    let image = asleep(&agent);
    let shim = agent.shim_pid();
    for file in files(&image) {
        let bytes = length(&file);
        if bytes > 0 {
            refused_with(&agent, &file, &[], |file| resize(file, bytes - 1));
            refused_with(&agent, &file, &[], |file| resize(file, 0));
        }
        refused_with(&agent, &file, &[], |file| resize(file, bytes + 1));
        // Neither read nor allocated: a TiB with nothing in it.
        refused_with(&agent, &file, &[], |file| resize(file, 1 << 40));
        refused_with(&agent, &file, &[], |file| fs::remove_file(file).unwrap());
        refused_with(&agent, &file, &[], |file| {
            fs::remove_file(file).unwrap();
            mknodat(CWD, file, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        });
        refused_with(&agent, &file, &[], |file| {
            fs::remove_file(file).unwrap();
            fs::create_dir(file).unwrap();
        });
        // A link to the right contents, beside the file and out of the image.
        for target in ["aside", "../aside", "/etc/passwd"] {
            refused_with(&agent, &file, &[], |file| {
                fs::remove_file(file).unwrap();
                symlink(target, file).unwrap();
            });
        }
    }
    assert_unharmed(&mut agent, shim, &image);
}

/// Exchanges two files.
fn exchange(one: &Path, other: &Path) {
    rustix::fs::renameat_with(CWD, one, CWD, other, rustix::fs::RenameFlags::EXCHANGE).unwrap();
}

#[test]
fn files_of_another_container_are_refused_and_go_back_to_their_owners() {
    let node = start();
    let mut agents: Vec<_> = ["a", "b"].map(|id| run(&node, &python(id).env("BALLAST_MIB", &2))).into();
    let images: Vec<_> = agents.iter().map(asleep).collect();
    for name in [
        "img/core-1.img",
        "img/pages-1.img",
        "img/pagemap-1.img",
        "img/mm-1.img",
        "manifest.json",
        "pages.sums",
    ] {
        exchange(&images[0].join(name), &images[1].join(name));
        for agent in &agents {
            let file = name.rsplit('/').next().unwrap();
            assert_refused(&agent.wake(), &["cannot wake", file]);
            agent.assert_state("asleep");
        }
        exchange(&images[0].join(name), &images[1].join(name));
    }
    // All of CRIU's files at once, and all there is.
    for name in ["img", ""] {
        let folders = [images[0].join(name), images[1].join(name)];
        exchange(&folders[0], &folders[1]);
        for agent in &agents {
            assert_refused(&agent.wake(), &["cannot wake", "not the directory that the dump wrote"]);
            agent.assert_state("asleep");
        }
        exchange(&folders[0], &folders[1]);
    }
    for agent in &mut agents {
        agent.wakes();
    }
}

#[test]
fn files_of_another_generation_are_refused() {
    let node = start();
    let mut agent = run(&node, &python("a").env("BALLAST_MIB", &2));
    let image = asleep(&agent);
    // An older self, as a backup would have it.
    let kept = on_node(&node, "/var/lib/agentcube").join("kept");
    fs::create_dir(&kept).unwrap();
    for file in files(&image) {
        fs::copy(&file, kept.join(file.file_name().unwrap())).unwrap();
    }
    agent.wakes();
    let image = asleep(&agent);
    let shim = agent.shim_pid();
    for name in ["img/pages-1.img", "pages.sums", "manifest.json", "img/core-1.img"] {
        let file = image.join(name);
        refused_with(&agent, &file, &[], |file| {
            fs::copy(kept.join(file.file_name().unwrap()), file).unwrap();
        });
    }
    assert_unharmed(&mut agent, shim, &image);
    fs::remove_dir_all(&kept).unwrap();
}

/// Mounts a file system of its own for images, and gives back the options that name it.
fn image_disk(node: &Node, mebibytes: u32) -> String {
    node.sh(&format!("mkdir /mnt/images && mount -t tmpfs -o mode=700,size={mebibytes}M none /mnt/images"))
        .unwrap();
    let path = "/etc/agentcube/disk.toml";
    node.write_file(path, "ignore_missing_controllers = true\nimage_dir = \"/mnt/images\"\n").unwrap();
    path.to_owned()
}

#[test]
fn a_disk_that_fills_up_while_pages_are_written_costs_nothing_but_the_sleep() {
    let node = start();
    let disk = image_disk(&node, 160);
    let mut agent = run(&node, &configured(python("a").env("BALLAST_MIB", &120), &disk));
    // Full after the first page, in the middle, and near the end of 120 MiB and more.
    for used in [158, 100, 45] {
        node.sh(&format!("head -c {used}M /dev/zero > /mnt/images/filler")).unwrap();
        assert_refused(&agent.sleep(), &["cannot put a to sleep", "full", "no space left"]);
        agent.assert_state("running");
        agent.assert_running_for_containerd();
        agent.assert_whole();
        // What was written is gone: the others on this disk have their space back.
        assert_eq!(node.sh("cd /mnt/images && find . -type f ! -name filler").unwrap(), "");
    }
    node.sh("rm /mnt/images/filler").unwrap();
    agent.sleeps();
    agent.wakes();
}

/// Whether the beginning of a file can be read without waiting for the disk.
fn is_cached(file: &Path) -> bool {
    let file = fs::File::open(file).unwrap();
    let mut byte = [0];
    let read = rustix::io::preadv2(&file, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT);
    read.is_ok_and(|length| length == 1)
}

#[test]
fn an_image_leaves_the_page_cache_when_that_is_wanted_and_wakes_all_the_same() {
    let node = start_with("image_cache_seconds = 1\n");
    let mut agent = run(&node, &python("a").env("BALLAST_MIB", &32));
    let pages = asleep(&agent).join("img/pages-1.img");
    node.wait_until("the page cache to be given back", SOON, || Ok(!is_cached(&pages))).unwrap();
    agent.wakes();
    agent.sleeps();
    agent.wakes();
}

#[test]
fn zero_pages_take_no_space_in_an_image() {
    let node = start();
    let zeros = "import os
zeros = bytearray(64 << 20)
zeros[::4096] = b'x' * (16 << 10)
zeros[:32 << 20] = bytes(32 << 20)
exec(open('/agent.py').read())";
    let mut agent = run(&node, &python("a").args(&["/usr/bin/python3", "-c", zeros]));
    let image = asleep(&agent);
    let pages = image.join("img/pages-1.img");
    let sizes = || fs::metadata(&pages).map(|file| (file.len(), file.blocks() * 512)).unwrap();
    node.wait_until("the space to be given back", SOON, || Ok(sizes().0 - sizes().1 > 31 << 20)).unwrap();
    assert!(sizes().0 > 64 << 20);
    agent.wakes();
}
