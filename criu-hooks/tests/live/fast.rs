//! Dumps and restores inside the container's namespaces: when they are made, and that nothing gets lost beside the image.

use std::{
    collections::BTreeMap,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
};

use criu_hooks::{
    engine::{ClassicReason, DumpReport},
    image::Mode,
};

use super::*;

/// Lets the program make mounts and namespaces.
fn with_sys_admin(spec: &mut Value) {
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_SYS_ADMIN"));
    }
}

/// A python program that runs `prepare` and counts, while `check` holds. It may do anything.
async fn python(id: &str, prepare: &str, check: &str) -> Agent {
    let script = format!(
        "import ctypes, itertools, mmap, os, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, target, kind, flags=0, data=None):
    assert libc.mount(source.encode(), target.encode(), kind.encode(), flags, data) == 0, os.strerror(ctypes.get_errno())
{prepare}
for i in itertools.count(1):
    assert {check}
    print(i, flush=True)
    time.sleep(0.02)"
    );
    let args = ["python3", "-c", &script];
    let mut agent = Agent::start(id, &Setup { args: &args, change: &with_sys_admin, whole_root: true });
    agent.count_on(0, 5).await;
    agent
}

/// What a directory of the container holds: types, modes, sizes, times, inodes and contents.
fn contents(agent: &Agent, directory: &str) -> BTreeMap<PathBuf, String> {
    let mut found = listing(&PathBuf::from(format!("/proc/{}/root{directory}", agent.pid)));
    // devpts is made anew.
    found.retain(|path, _| !path.starts_with("pts"));
    found
}

fn listing(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut below = vec![root.to_owned()];
    while let Some(directory) = below.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let stat = fs::symlink_metadata(&path).unwrap();
            let kind = stat.file_type();
            let mut text = format!("{:o} {} {} {}", stat.mode(), stat.uid(), stat.nlink(), stat.mtime());
            if kind.is_file() {
                text.push_str(&image::digest(&fs::read(&path).unwrap()));
            } else if kind.is_dir() {
                below.push(path.clone());
            } else if kind.is_symlink() {
                text.push_str(&fs::read_link(&path).unwrap().display().to_string());
            } else if kind.is_socket() {
                // A bound socket is bound anew.
                text = format!("{:o} socket", stat.mode());
            }
            found.insert(path.strip_prefix(root).unwrap().to_owned(), text);
        }
    }
    found
}

/// The container's mounts without numbers that the kernel chose, and without the devices of what must be made anew.
fn mount_table(agent: &Agent) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{}/mountinfo", agent.pid)).unwrap();
    let mut lines: Vec<String> = text
        .lines()
        .map(|line| {
            let (fields, rest) = line.split_once(" - ").unwrap();
            let is_new = rest.starts_with("proc ") || rest.starts_with("devpts ");
            let kept = fields.split(' ').enumerate().skip(2).filter(|(at, _)| !(is_new && *at == 2));
            let kept: Vec<&str> = kept.map(|(_, field)| field.split(':').next().unwrap_or(field)).collect();
            format!("{} - {rest}", kept.join(" "))
        })
        .collect();
    lines.sort();
    lines
}

fn assert_fast(report: &DumpReport) {
    assert_eq!((report.mode, &report.classic_because), (Mode::PodNamespaces, &None));
}

/// Whether the image has the contents of a tmpfs.
fn has_tmpfs(image: &image::Image) -> bool {
    image.manifest().files.iter().any(|file| file.name.starts_with("tmpfs-"))
}

on_a_node!(a_usual_container_is_dumped_inside_its_namespaces_and_comes_back_as_it_was, async || {
    let mut agent = Agent::start("usual", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    let (mounts, dev) = (mount_table(&agent), contents(&agent, "/dev"));
    for _ in 0..3 {
        let namespaces =
            |pid| ["net", "ipc", "uts", "cgroup"].map(|name| procfs::namespace(pid, name).unwrap());
        let before = namespaces(agent.pid);
        assert_fast(&agent.dump().await.unwrap());
        let image = agent.image();
        assert_eq!(image.manifest().facts.mode, Mode::PodNamespaces);
        assert!(!has_tmpfs(&image));
        agent.restore().await.unwrap();
        image.remove().unwrap();
        assert_eq!(namespaces(agent.pid), before);
        assert_eq!(mount_table(&agent), mounts);
        assert_eq!(contents(&agent, "/dev"), dev);
        last = agent.count_on(last, 5).await;
    }
    agent.delete();
});

on_a_node!(both_modes_take_turns, async || {
    let mut agent = Agent::start("turns", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    for round in 0..6 {
        let mode = if round % 2 == 0 { Mode::Classic } else { Mode::PodNamespaces };
        let report = agent.dump_with(&DumpOptions { mode, ..DumpOptions::default() }).await.unwrap();
        assert_eq!(report.mode, mode);
        assert_eq!(report.classic_because.is_some(), mode == Mode::Classic);
        let image = agent.image();
        assert_eq!(image.manifest().facts.mode, mode);
        assert_eq!(has_tmpfs(&image), mode == Mode::Classic);
        agent.restore().await.unwrap();
        image.remove().unwrap();
        last = agent.count_on(last, 5).await;
    }
    agent.delete();
});

/// Fills /dev/shm with one of everything, and holds on to it.
const SHARED_MEMORY: &str = "
os.makedirs('/dev/shm/a/b')
open('/dev/shm/a/b/file', 'wb').write(os.urandom(300000))
os.symlink('b/file', '/dev/shm/a/link')
os.link('/dev/shm/a/b/file', '/dev/shm/a/second')
os.mkfifo('/dev/shm/fifo')
fifo = os.open('/dev/shm/fifo', os.O_RDWR)
os.write(fifo, b'in the pipe')
server = socket.socket(socket.AF_UNIX); server.bind('/dev/shm/socket'); server.listen()
mapped = open('/dev/shm/mapped', 'wb+'); mapped.truncate(1 << 20)
area = mmap.mmap(mapped.fileno(), 1 << 20)
area[:] = os.urandom(4096) * 256
wanted = bytes(area)
deleted = open('/dev/shm/deleted', 'wb+'); deleted.write(b'ghost' * 1000); deleted.flush()
os.unlink('/dev/shm/deleted')
ring = mmap.mmap(-1, 65536)
ring[:5] = b'anon!'
";

/// Holds while all of it is there.
const SHARED_MEMORY_HOLDS: &str = "bytes(area) == wanted and open('/dev/shm/mapped', 'rb').read() == wanted and deleted.seek(0) == 0 \
     and deleted.read() == b'ghost' * 1000 and ring[:5] == b'anon!'";

on_a_node!(everything_in_shared_memory_comes_back_below_the_limit_and_above_it, async || {
    let mut agent = python("shared", SHARED_MEMORY, SHARED_MEMORY_HOLDS).await;
    let mut last = agent.count_on(5, 1).await;
    let (mounts, shm) = (mount_table(&agent), contents(&agent, "/dev/shm"));
    assert_eq!(shm.len(), 8, "{shm:?}");
    // Twice in memory, twice in the image, and back.
    for limit in [16 << 20, 16 << 20, 1 << 20, 1 << 20, 16 << 20] {
        let report =
            agent.dump_with(&DumpOptions { memory_limit: limit, ..DumpOptions::default() }).await.unwrap();
        assert_fast(&report);
        let in_image = limit < 16 << 20;
        assert_eq!(has_tmpfs(&agent.image()), in_image);
        assert!(report.memory_bytes <= limit);
        assert_eq!(report.memory_bytes > 1 << 20, !in_image, "{}", report.memory_bytes);
        // What is in the image is not in memory, too.
        let kept = agent.kept.mounts.as_ref().unwrap().as_raw_fd();
        let me = rustix::process::getpid();
        let listed = Command::new("nsenter")
            .args([&format!("--mount=/proc/{me}/fd/{kept}"), "ls", "-A", "/dev/shm"])
            .output()
            .unwrap();
        assert_eq!(listed.stdout.is_empty(), in_image, "{listed:?}");
        agent.restore().await.unwrap();
        agent.image().remove().unwrap();
        assert_eq!(contents(&agent, "/dev/shm"), shm);
        if in_image {
            assert_eq!(mount_table(&agent).len(), mounts.len());
        }
        last = agent.count_on(last, 5).await;
    }
    agent.delete();
});

on_a_node!(a_restore_that_fails_half_way_leaves_the_memory_file_systems_alone, async || {
    let prepare = format!("{SHARED_MEMORY}\nopen('/tmp/file', 'w').write('x'); kept = open('/tmp/file')");
    let mut agent = python("failing", &prepare, SHARED_MEMORY_HOLDS).await;
    let last = agent.count_on(5, 1).await;
    let before = contents(&agent, "/dev/shm");
    agent.dump().await.unwrap();
    let before_failures = Census::take();
    let file = agent.container.rootfs.join("tmp/file");
    fs::rename(&file, file.with_extension("away")).unwrap();
    for _ in 0..3 {
        let error = agent.restore().await.unwrap_err();
        assert!(matches!(error, RestoreError::Criu(_)), "{error}");
    }
    // CRIU given up in its middle, by whoever waits no longer.
    for after in 4..24 {
        let cut = tokio::time::timeout(Duration::from_millis(after), agent.restore()).await;
        assert!(!matches!(cut, Ok(Ok(_))));
        while agent.container.cgroup.populated().unwrap() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(Census::take_as_init(), before_failures);
    fs::rename(file.with_extension("away"), &file).unwrap();
    agent.restore().await.unwrap();
    assert_eq!(contents(&agent, "/dev/shm"), before);
    agent.count_on(last, 5).await;
    agent.delete();
});

on_a_node!(mounts_that_the_program_made_come_back, async || {
    let prepare = "
for path in ['/srv/a', '/srv/b', '/srv/hidden', '/srv/bound']:
    os.makedirs(path)
mount('tmpfs', '/srv/a', 'tmpfs', 0, b'size=1m,mode=750')
os.makedirs('/srv/a/inner'); open('/srv/a/inner/file', 'w').write('inner')
mount('/srv/a/inner', '/srv/bound', '', 4096)
mount('tmpfs', '/srv/b', 'tmpfs', 1 | 2 | 4 | 8, b'size=2m')
mount('tmpfs', '/srv/hidden', 'tmpfs'); open('/srv/hidden/below', 'w').write('below')
mount('tmpfs', '/srv/hidden', 'tmpfs'); open('/srv/hidden/above', 'w').write('above')
mount('tmpfs', '/mnt', 'tmpfs', 0, b'size=0'); open('/mnt/unlimited', 'w').write('unlimited')
";
    let check = "open('/srv/bound/file').read() == 'inner' and open('/mnt/unlimited').read() == 'unlimited' \
                 and os.listdir('/srv/hidden') == ['above']";
    let mut agent = python("mounts", prepare, check).await;
    let mut last = agent.count_on(5, 1).await;
    let strip = |table: Vec<String>| -> Vec<String> {
        // These go through the image, so their devices are new.
        let is_remade = |line: &String| line.contains(" /srv/hidden ") || line.contains(" /mnt ");
        table.into_iter().filter(|line| !is_remade(line)).collect()
    };
    let (mounts, a) = (strip(mount_table(&agent)), contents(&agent, "/srv"));
    for _ in 0..3 {
        assert_fast(&agent.dump().await.unwrap());
        agent.restore().await.unwrap();
        agent.image().remove().unwrap();
        assert_eq!(strip(mount_table(&agent)), mounts);
        assert_eq!(contents(&agent, "/srv"), a);
        last = agent.count_on(last, 5).await;
    }
    state_file::update(&agent.state_file(), agent.pid).unwrap();
    assert_eq!(agent.exec(&["sh", "-c", "umount /srv/hidden; cat /srv/hidden/below"]), "below");
    agent.delete();
});

on_a_node!(mounts_that_share_or_are_read_only_in_one_place_are_so_again, async || {
    let prepare = "
for path in ['/srv/shared', '/srv/slave', '/srv/locked', '/srv/dev]:memory-0', '/srv/dev']:
    os.makedirs(path)
mount('tmpfs', '/srv/shared', 'tmpfs', 0, b'size=1m')
mount('none', '/srv/shared', '', 1 << 20)
mount('/srv/shared', '/srv/slave', '', 4096)
mount('none', '/srv/slave', '', 1 << 19)
mount('/srv/shared', '/srv/locked', '', 4096)
mount('none', '/srv/locked', '', 1 << 18)
mount('none', '/srv/locked', '', 4096 | 32 | 1)
open('/srv/shared/file', 'w').write('here')
mount('tmpfs', '/srv/dev', 'tmpfs', 0, b'size=1m'); open('/srv/dev/name', 'w').write('dev')
mount('tmpfs', '/srv/dev]:memory-0', 'tmpfs', 0, b'size=1m'); open('/srv/dev]:memory-0/name', 'w').write('odd')
";
    let check = "open('/srv/slave/file').read() == 'here' and os.statvfs('/srv/locked').f_flag & 1 \
                 and not os.statvfs('/srv/shared').f_flag & 1 and open('/srv/dev/name').read() == 'dev' \
                 and open('/srv/dev]:memory-0/name').read() == 'odd'";
    let mut agent = python("sharing", prepare, check).await;
    let mut last = agent.count_on(5, 1).await;
    let strip = |table: Vec<String>| -> Vec<String> {
        table.into_iter().filter(|line| !line.contains("memory-0")).collect()
    };
    let mounts = strip(mount_table(&agent));
    assert!(mounts.iter().any(|line| line.contains("/srv/slave") && line.contains("master")), "{mounts:?}");
    for _ in 0..3 {
        assert_fast(&agent.dump().await.unwrap());
        agent.restore().await.unwrap();
        agent.image().remove().unwrap();
        assert_eq!(strip(mount_table(&agent)), mounts);
        last = agent.count_on(last, 5).await;
    }
    agent.delete();
});

on_a_node!(a_process_with_mounts_of_its_own_keeps_them, async || {
    // The same place, another file system: the one must not stand in for the other.
    let prepare = "
mount('tmpfs', '/srv', 'tmpfs'); open('/srv/name', 'w').write('parent')
r, w = os.pipe()
if os.fork() == 0:
    os.unshare(os.CLONE_NEWNS)
    mount('none', '/', '', 1 << 18 | 16384)
    mount('tmpfs', '/srv', 'tmpfs'); open('/srv/name', 'w').write('child')
    os.write(w, b'x')
    while open('/srv/name').read() == 'child':
        time.sleep(0.01)
    os._exit(1)
os.read(r, 1)
";
    let check = "open('/srv/name').read() == 'parent' and os.waitpid(-1, os.WNOHANG) == (0, 0)";
    let mut agent = python("nested", prepare, check).await;
    let mut last = agent.count_on(5, 1).await;
    for _ in 0..3 {
        assert_fast(&agent.dump().await.unwrap());
        agent.restore().await.unwrap();
        agent.image().remove().unwrap();
        last = agent.count_on(last, 20).await;
    }
    agent.delete();
});

/// A child that has left a namespace, and ends when it is not in the one that it made.
fn leaves(name: &str, flag: &str) -> String {
    format!(
        "
r, w = os.pipe()
if os.fork() == 0:
    os.unshare(os.{flag})
    if '{name}' == 'uts': socket.sethostname('elsewhere')
    parent = os.stat('/proc/1/ns/{name}').st_ino
    os.write(w, b'x')
    while os.stat('/proc/self/ns/{name}').st_ino != os.stat('/proc/1/ns/{name}').st_ino:
        if '{name}' == 'uts': assert socket.gethostname() == 'elsewhere'
        time.sleep(0.01)
    os._exit(1)
os.read(r, 1)
"
    )
}

on_a_node!(a_process_that_left_the_pod_s_network_is_dumped_outside_of_it, async || {
    let mut agent =
        python("net", &leaves("net", "CLONE_NEWNET"), "os.waitpid(-1, os.WNOHANG) == (0, 0)").await;
    let mut last = agent.count_on(5, 1).await;
    for _ in 0..3 {
        let report = agent.dump().await.unwrap();
        assert_eq!(report.mode, Mode::Classic);
        let reason = report.classic_because;
        assert!(matches!(reason, Some(ClassicReason::LeftNamespace { namespace: "net", .. })), "{reason:?}");
        agent.restore().await.unwrap();
        agent.image().remove().unwrap();
        last = agent.count_on(last, 10).await;
    }
    agent.delete();
});

on_a_node!(a_namespace_that_criu_cannot_dump_fails_the_dump_and_not_the_restore, async || {
    for (name, flag) in [("ipc", "CLONE_NEWIPC"), ("uts", "CLONE_NEWUTS")] {
        let mut agent = python(name, &leaves(name, flag), "os.waitpid(-1, os.WNOHANG) == (0, 0)").await;
        let last = agent.count_on(5, 1).await;
        let error = agent.dump().await.unwrap_err();
        assert_eq!(cause(&error), Cause::UnsupportedNamespace, "{error}");
        agent.assert_running();
        agent.count_on(last, 10).await;
        agent.delete();
    }
});

on_a_node!(a_thread_that_left_a_namespace_of_its_process_blocks, async || {
    for (name, flag) in [("net", "CLONE_NEWNET"), ("uts", "CLONE_NEWUTS"), ("mnt", "CLONE_NEWNS")] {
        let prepare = format!(
            "
def elsewhere():
    os.unshare(os.{flag})
    there.set()
    while True:
        time.sleep(0.01)
there = threading.Event()
threading.Thread(target=elsewhere, daemon=True).start()
there.wait()
"
        );
        let mut agent = python(name, &prepare, "True").await;
        let last = agent.count_on(5, 1).await;
        match agent.dump().await.unwrap_err() {
            DumpError::Blocked(blockers) => {
                let [Blocker::StrayThread { pid, namespace, .. }] = blockers[..] else {
                    panic!("{blockers:?}")
                };
                assert_eq!((pid, namespace), (agent.pid, name));
            }
            other => panic!("{other}"),
        }
        agent.assert_running();
        agent.count_on(last, 10).await;
        agent.delete();
    }
});

const SHM: &str = "
libc.shmat.restype = ctypes.c_void_p
shm = libc.shmget(4242, 65536, 0o1600)
assert shm >= 0
at = libc.shmat(shm, None, 0)
ctypes.memmove(at, b'segment', 7)
";

on_a_node!(system_v_shared_memory_that_is_mapped_is_dumped_and_restored, async || {
    let mut agent = python("mapped", SHM, "ctypes.string_at(at, 7) == b'segment'").await;
    let mut last = agent.count_on(5, 1).await;
    for _ in 0..2 {
        let report = agent.dump().await.unwrap();
        assert!(matches!(report.classic_because, Some(ClassicReason::SharedMemory { .. })));
        agent.restore().await.unwrap();
        agent.image().remove().unwrap();
        last = agent.count_on(last, 5).await;
    }
    agent.delete();
});

on_a_node!(what_is_in_the_ipc_namespace_lives_on_with_it, async || {
    let prepare = format!(
        "{SHM}
libc.shmdt(ctypes.c_void_p(at))
queue = libc.msgget(77, 0o1600)
libc.msgsnd(queue, ctypes.create_string_buffer(b'\\x01' + b'\\0' * 7 + b'hello'), 5, 0)
sem = libc.semget(78, 3, 0o1600)
rt = ctypes.CDLL('libc.so.6')
mq = rt.mq_open(b'/posix', 0o102, 0o600, None)
assert mq >= 0 and rt.mq_send(mq, b'queued', 6, 0) == 0
os.close(mq)
def holds():
    at = libc.shmat(libc.shmget(4242, 0, 0), None, 0)
    held = ctypes.string_at(at, 7) == b'segment'
    libc.shmdt(ctypes.c_void_p(at))
    return held and libc.msgget(77, 0) == queue and libc.semget(78, 0, 0) == sem and b'QSIZE:6' in open('/dev/mqueue/posix', 'rb').read()
# Not mapped for a moment only.
time.sleep(0.1)"
    );
    let mut agent = python("ipc", &prepare, "i % 20 or holds()").await;
    let mut last = agent.count_on(5, 1).await;
    for _ in 0..3 {
        assert_fast(&agent.dump().await.unwrap());
        agent.restore().await.unwrap();
        agent.image().remove().unwrap();
        last = agent.count_on(last, 25).await;
    }
    agent.delete();
});

on_a_node!(an_image_is_restored_in_the_namespaces_of_its_dump_or_not_at_all, async || {
    let mut agent = Agent::start("lost", &Setup::default());
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let kept = std::mem::take(&mut agent.kept);
    let error = agent.restore().await.unwrap_err();
    assert!(matches!(error, RestoreError::NamespaceLost("mount")), "{error}");
    agent.kept = kept.try_clone().unwrap();
    agent.kept.uts = None;
    let error = agent.restore().await.unwrap_err();
    assert!(matches!(error, RestoreError::NamespaceLost("uts")), "{error}");
    agent.kept.uts = Some(fs::File::open("/proc/self/ns/uts").unwrap().into());
    let error = agent.restore().await.unwrap_err();
    assert!(matches!(error, RestoreError::OtherNamespace("uts")), "{error}");
    agent.kept = kept;
    agent.restore().await.unwrap();
    agent.count_on(last, 5).await;
    agent.delete();
});

/// A CRIU that finds nothing in a file of `/proc` when it works inside the container's namespaces, and so fails for a
/// reason that is none of those known, with the processes in its grip.
const FAILS_INSIDE: &str = "#!/bin/sh
if [ \"$(readlink /proc/self/ns/uts)\" != \"$(readlink /proc/1/ns/uts)\" ]; then
    echo >> /run/failures
    exec unshare --mount sh -c 'mount --bind /dev/null \"/proc/$(cat /run/victim)/stat\" && exec \"$@\"' sh /usr/sbin/criu \"$@\"
fi
exec /usr/sbin/criu \"$@\"
";

on_a_node!(a_failure_inside_that_nobody_knows_is_followed_by_a_try_outside, async || {
    let mut agent = Agent::start("unknown", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    let failing = Path::new("/run/failing-criu");
    fs::write(failing, FAILS_INSIDE).unwrap();
    fs::set_permissions(failing, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for tries in 1..=3 {
        fs::write("/run/victim", agent.pid.to_string()).unwrap();
        let whole =
            std::mem::replace(&mut agent.engine, Engine::new(failing, std::sync::Arc::new(LocalSpawner)));
        let report = agent.dump().await.unwrap();
        agent.engine = whole;
        assert_eq!(fs::read("/run/failures").unwrap().len(), tries);
        assert_eq!(report.mode, Mode::Classic);
        assert!(
            matches!(&report.classic_because, Some(ClassicReason::Failed(why)) if why.contains("stat")),
            "{report:?}"
        );
        let image = agent.image();
        assert!(has_tmpfs(&image) && image.manifest().facts.outside.mounts.is_empty());
        agent.restore().await.unwrap();
        image.remove().unwrap();
        last = agent.count_on(last, 5).await;
    }
    agent.delete();
});
