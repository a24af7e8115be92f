//! The files that a cluster's administrator copies from `runtimeclass/` fit each other.
#![allow(clippy::unwrap_used)]

const DROP_IN: &str = include_str!("../../runtimeclass/containerd/agentcube.toml");
const RUNTIME_CLASS: &str = include_str!("../../runtimeclass/runtimeclass.yaml");
const POD: &str = include_str!("../../runtimeclass/example-pod.yaml");

fn runtimes() -> toml::Table {
    let config: toml::Table = DROP_IN.parse().unwrap();
    assert_eq!(config["version"].as_integer(), Some(3));
    let plugin = &config["plugins"]["io.containerd.cri.v1.runtime"];
    plugin["containerd"]["runtimes"].as_table().unwrap().clone()
}

/// The value of a key that occurs once in a YAML file of plain lines.
fn value<'a>(yaml: &'a str, key: &str) -> &'a str {
    let mut values = yaml.lines().filter_map(|line| line.trim().strip_prefix(key)?.strip_prefix(':'));
    let value = values.next().unwrap_or_else(|| panic!("no {key} in {yaml}"));
    assert_eq!(values.next(), None, "{key} occurs twice");
    value.trim().trim_matches('"')
}

#[test]
fn the_drop_in_defines_this_runtime_and_no_other() {
    let runtimes = runtimes();
    assert_eq!(runtimes.keys().collect::<Vec<_>>(), ["agentcube"]);
    assert_eq!(runtimes["agentcube"]["runtime_type"].as_str(), Some("io.containerd.agentcube.v1"));
}

#[test]
fn the_drop_in_names_every_option_of_the_shim() {
    let runtimes = runtimes();
    let options = runtimes["agentcube"]["options"].as_table().unwrap();
    let mut keys: Vec<_> = options.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [
            "criu_binary",
            "ignore_missing_controllers",
            "image_dir",
            "log_level",
            "runc_binary",
            "runc_root",
            "systemd_cgroup"
        ]
    );
}

#[test]
fn the_class_selects_the_runtime_and_the_pod_selects_the_class() {
    assert!(runtimes().contains_key(value(RUNTIME_CLASS, "handler")));
    assert_eq!(value(RUNTIME_CLASS, "name"), value(POD, "runtimeClassName"));
    assert_eq!(value(RUNTIME_CLASS, "agentcube.volcano.sh/ready"), "true");
}

#[test]
fn the_pod_s_annotations_reach_the_runtime() {
    let runtimes = runtimes();
    let patterns = runtimes["agentcube"]["pod_annotations"].as_array().unwrap();
    let prefixes: Vec<_> = patterns.iter().map(|p| p.as_str().unwrap().strip_suffix("*").unwrap()).collect();
    let annotations: Vec<_> =
        POD.lines().map(str::trim).filter(|line| line.starts_with("agentcube.volcano.sh/")).collect();
    assert!(!annotations.is_empty());
    for annotation in annotations {
        let key = annotation.split(':').next().unwrap();
        // As path.Match does: "*" stops at a slash.
        let matches = |prefix: &&str| key.strip_prefix(*prefix).is_some_and(|rest| !rest.contains('/'));
        assert!(prefixes.iter().any(matches), "{key} is dropped by containerd");
    }
}

#[test]
fn yaml_is_indented_by_pairs_of_spaces() {
    for yaml in [RUNTIME_CLASS, POD] {
        for line in yaml.lines() {
            let indent = line.len() - line.trim_start_matches(' ').len();
            assert!(!line.contains('\t') && indent % 2 == 0, "{line:?}");
        }
    }
}
