//! Volumes, foreign mounts, and the namespaces of a sandbox.

use super::*;

/// Adds a bind mount to a specification.
fn volume(spec: &mut Value, source: &str, target: &str) {
    let mount = json!({"destination": target, "type": "bind", "source": source, "options": ["rbind", "rw"]});
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

on_a_node!(volumes_come_back_where_they_were, async || {
    for (name, contents) in
        [("first", "hidden"), ("second", "volume"), ("inner", "inside"), ("token", "secret")]
    {
        fs::create_dir_all(format!("/run/volumes/{name}/sub")).unwrap();
        fs::write(format!("/run/volumes/{name}/file"), contents).unwrap();
    }
    let change = |spec: &mut Value| {
        volume(spec, "/run/volumes/first", "/data");
        // A volume mounted over another, a volume in a volume, one behind a link, and a single file.
        volume(spec, "/run/volumes/second", "/data");
        volume(spec, "/run/volumes/inner", "/data/sub");
        volume(spec, "/run/volumes/token", "/var/run/secrets/token");
        volume(spec, "/run/volumes/token/file", "/etc/single");
    };
    let args = [
        "sh",
        "-c",
        "exec 5</data/file 6>>/data/sub/log; cd /var/run/secrets/token; exec sh -c \"$0\"",
        agent::COUNTER[2],
    ];
    let mut agent = Agent::start("volumes", &Setup { args: &args, change: &change, ..Setup::default() });
    let mut last = agent.count_on(0, 5).await;
    let check = |agent: &Agent| {
        let shown = agent.exec(&["sh", "-c", "cat /data/file /data/sub/file /run/secrets/token/file /etc/single; ls /proc/keys; cat /proc/keys"]);
        assert_eq!(shown, "volumeinsidesecretsecret/proc/keys\n");
    };
    check(&agent);
    for _ in 0..2 {
        agent.dump().await.unwrap();
        // Another file in a volume, written while the agent sleeps, is seen after it.
        fs::write("/run/volumes/second/new", "new").unwrap();
        agent.restore().await.unwrap();
        state_file::update(&agent.state_file(), agent.pid).unwrap();
        check(&agent);
        assert_eq!(agent.exec(&["cat", "/data/new"]), "new");
        last = agent.count_on(last, 5).await;
    }
    agent.dump().await.unwrap();
    fs::rename("/run/volumes/inner", "/run/volumes/away").unwrap();
    let error = agent.restore().await.unwrap_err();
    assert!(error.to_string().contains("/run/volumes/inner"), "{error}");
    fs::rename("/run/volumes/away", "/run/volumes/inner").unwrap();
    agent.restore().await.unwrap();
    agent.count_on(last, 5).await;
    agent.delete();
});

on_a_node!(a_mount_that_the_specification_does_not_name_blocks, async || {
    let change = |spec: &mut Value| volume(spec, "/run/volumes/outer", "/data");
    fs::create_dir_all("/run/volumes/outer/disk").unwrap();
    let ramfs = ["-t", "ramfs", "ramfs", "/run/volumes/outer/disk"];
    assert!(Command::new("mount").args(ramfs).status().unwrap().success());
    let mut agent = Agent::start("mounts", &Setup { change: &change, ..Setup::default() });
    let last = agent.count_on(0, 5).await;
    match agent.dump().await.unwrap_err() {
        DumpError::Blocked(blockers) => {
            let named = |blocker: &Blocker| matches!(blocker, Blocker::ForeignMount { mount_point, .. } if mount_point.ends_with("data/disk"));
            assert!(blockers.iter().any(named), "{blockers:?}");
        }
        other => panic!("{other}"),
    }
    agent.assert_running();
    agent.count_on(last, 5).await;
    agent.delete();
});

on_a_node!(an_unmounted_volume_is_named_before_anything_is_lost, async || {
    fs::create_dir_all("/run/volumes/data").unwrap();
    let change = |spec: &mut Value| volume(spec, "/run/volumes/data", "/var/run/data");
    let mut agent = Agent::start("unmounted", &Setup { change: &change, ..Setup::default() });
    let last = agent.count_on(0, 5).await;
    // The container's own doing: the link on the way leads elsewhere now.
    let link = agent.container.rootfs.join("var/run");
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("/tmp", &link).unwrap();
    let error = agent.dump().await.unwrap_err();
    let lost = matches!(&error, DumpError::Container(container::Error::MountLost(path)) if path.ends_with("run/data"));
    assert!(lost, "{error}");
    agent.assert_running();
    agent.count_on(last, 5).await;
    agent.delete();
});

on_a_node!(a_sandbox_s_namespaces_are_joined_again, async || {
    let mut sandbox = Command::new("unshare")
        .args([
            "--net",
            "--ipc",
            "--uts",
            "sh",
            "-c",
            "hostname sandbox-1; ip link set lo up; echo ready; exec sleep 1000",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Read::read_exact(sandbox.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    let holder = Pid::from_child(&sandbox);
    let change = |spec: &mut Value| {
        spec.as_object_mut().unwrap().remove("hostname");
        for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
            let link = match namespace["type"].as_str().unwrap() {
                "network" => "net",
                "ipc" => "ipc",
                "uts" => "uts",
                _ => continue,
            };
            namespace["path"] = json!(format!("/proc/{holder}/ns/{link}"));
        }
    };
    let args = ["sh", "-c", "nc -l -p 8080 & exec sh -c \"$0\"", agent::COUNTER[2]];
    let mut agent = Agent::start("member", &Setup { args: &args, change: &change, ..Setup::default() });
    let mut last = agent.count_on(0, 5).await;
    for _ in 0..3 {
        let dumped = agent.dump().await.unwrap();
        assert_eq!(dumped.mode, image::Mode::PodNamespaces);
        // agent.kept has what the sandbox does not keep.
        let kept = &agent.kept;
        assert!(kept.network.is_none() && kept.ipc.is_none() && kept.uts.is_none(), "the sandbox keeps them");
        assert!(kept.cgroup.is_some());
        agent.restore().await.unwrap();
        for name in ["net", "ipc", "uts"] {
            let (ours, theirs) = (procfs::namespace(agent.pid, name), procfs::namespace(holder, name));
            assert_eq!(ours.unwrap(), theirs.unwrap(), "{name}");
        }
        state_file::update(&agent.state_file(), agent.pid).unwrap();
        assert_eq!(agent.exec(&["hostname"]), "sandbox-1\n");
        assert!(agent.exec(&["cat", "/proc/net/tcp6"]).contains(":1F90"), "it listens no longer");
        last = agent.count_on(last, 5).await;
    }
    agent.delete();
    sandbox.kill().unwrap();
    sandbox.wait().unwrap();
});
