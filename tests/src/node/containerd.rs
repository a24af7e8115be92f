//! containerd's configuration on a node. Starting and restarting it is in [`super::Node`].

/// Where containerd reads its configuration.
pub(super) const CONFIG: &str = "/etc/containerd/config.toml";

/// Where the shim's options are, for `ctr run --runtime-config-path`.
pub const SHIM_TOML: &str = "/etc/agentcube/shim.toml";

/// The socket on which containerd answers.
pub(super) const SOCKET: &str = "/run/containerd/containerd.sock";

/// The network of pods that CRI starts.
pub(super) const CNI: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [{
    "type": "bridge",
    "bridge": "cni0",
    "isGateway": true,
    "ipMasq": false,
    "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.88.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }] }
  }]
}
"#;

/// Where [`CNI`] goes.
pub(super) const CNI_PATH: &str = "/etc/cni/net.d/10-pods.conflist";

/// runc for nodes whose cgroups lack controllers. It insists on any limit that it is given, and the CRI gives some to
/// every container; the shim of this project leaves them out by itself.
pub(super) const RUNC: &str = r#"#!/bin/sh
# runc, without the limits that this node cannot enforce.
bundle= verb= previous=
for word; do
    case $previous in --bundle) bundle=$word ;; esac
    case $word in create | run | update) verb=${verb:-$word} ;; esac
    previous=$word
done
case $verb in
update) exit 0 ;;
create | run)
    jq 'del(.linux.resources | .cpu, .memory, .pids, .hugepageLimits, .unified)' "$bundle/config.json" >"$bundle/config.new"
    mv "$bundle/config.new" "$bundle/config.json"
    ;;
esac
exec runc "$@"
"#;

/// Where [`RUNC`] goes.
pub(super) const RUNC_PATH: &str = "/usr/local/bin/runc-without-limits";

/// containerd's configuration: both runtimes, with the shim's options as they would stand on a real node.
pub(super) fn config(shim_toml: &str, log_level: &str, has_controllers: bool) -> String {
    let runc = if has_controllers { "runc" } else { RUNC_PATH };
    format!(
        r#"version = 3

[debug]
level = "{log_level}"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "localhost/pause:1"

[plugins."io.containerd.cri.v1.runtime"]
# Where CAP_SYS_RESOURCE or a controller is missing, pods run all the same.
restrict_oom_score_adj = true
disable_hugetlb_controller = true
tolerate_missing_hugetlb_controller = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "/etc/cni/net.d"

[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{runc}"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.agentcube]
runtime_type = "io.containerd.agentcube.v1"
pod_annotations = ["agentcube.volcano.sh/*"]

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.agentcube.options]
{shim_toml}
"#
    )
}

/// The last `count` lines of containerd's log, without those that every start repeats.
pub(super) fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.contains("loading plugin\"")).collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_last_lines_that_say_something() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a\nmsg=\"loading plugin\" x\n", 2), "a");
        assert_eq!(tail("", 2), "");
    }
}
