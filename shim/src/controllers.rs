//! Limits that a container asks for and the node cannot keep, because a cgroup v2 controller is missing.
//!
//! Such a container is refused, with names: a limit that is silently not there is worse than none. On nodes that have
//! no controllers on purpose (test machines, some virtual machines) an option strips those limits instead. What is
//! asked for is read from the spec's JSON as it is, so that a spec newer than this code stays whole.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxResources, Spec};
use serde_json::{Map, Value};

/// The controllers that a cgroup can hand on to those below it.
pub type Available = BTreeSet<String>;

/// A limit without its controller.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Missing {
    /// The controller, as in `cgroup.controllers`.
    pub controller: String,
    /// The field of `linux.resources` that needs it.
    pub field: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (for {})", self.controller, self.field)
    }
}

/// Why a spec cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ControllersError {
    /// Controllers are missing.
    #[error(
        "the node lacks cgroup v2 controllers that the container's limits need: {}; enable them on the node, or set ignore_missing_controllers = true in the runtime's options to run without these limits",
        list(.0)
    )]
    Missing(Vec<Missing>),
    /// A file cannot be read.
    #[error("read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The spec is not JSON.
    #[error("{path} is not a container's specification: {source}")]
    Spec {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The spec cannot be written.
    #[error("write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// For messages: everything that is missing, on one line.
pub fn list(missing: &[Missing]) -> String {
    missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The fields of `linux.resources` that make runc write to a cgroup v2 file, by controller. Others (of version 1, or
/// without effect) need none.
const FIELDS: [(&str, &str, &[&str]); 6] = [
    ("memory", "memory", &["limit", "reservation", "swap"]),
    ("cpu", "cpu", &["shares", "quota", "period", "burst", "idle"]),
    ("cpuset", "cpu", &["cpus", "mems"]),
    ("pids", "pids", &["limit"]),
    (
        "io",
        "blockIO",
        &[
            "weight",
            "leafWeight",
            "weightDevice",
            "throttleReadBpsDevice",
            "throttleWriteBpsDevice",
            "throttleReadIOPSDevice",
            "throttleWriteIOPSDevice",
        ],
    ),
    ("rdma", "rdma", &[]),
];

/// Whether a value asks for anything: runc takes zero and empty for "not set".
fn asks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Bool(_) => true,
    }
}

/// The controller of a file in a cgroup, as `unified` names it; `None` for those of the cgroup itself.
fn controller_of(file: &str) -> Option<&str> {
    file.split_once('.').map(|(controller, _)| controller).filter(|controller| *controller != "cgroup")
}

/// Takes each field that asks for a controller which is not `available` out of `resources` (an object as in
/// `linux.resources`), and returns them, sorted. What is left is as it was.
pub fn strip(resources: &mut Value, available: &Available) -> Vec<Missing> {
    let Some(resources) = resources.as_object_mut() else {
        return Vec::new();
    };
    let mut missing = Vec::new();
    for (controller, object, fields) in FIELDS {
        if available.contains(controller) {
            continue;
        }
        // An object whose keys are names of devices, not fields, goes as a whole.
        if fields.is_empty() {
            take(resources, object, controller, "", &mut missing);
        } else if let Some(object_fields) = resources.get_mut(object).and_then(Value::as_object_mut) {
            for field in fields {
                take(object_fields, field, controller, &format!("{object}."), &mut missing);
            }
        }
    }
    if !available.contains("hugetlb") {
        take(resources, "hugepageLimits", "hugetlb", "", &mut missing);
    }
    if let Some(unified) = resources.get_mut("unified").and_then(Value::as_object_mut) {
        let files: Vec<String> = unified.keys().cloned().collect();
        for file in files {
            if let Some(controller) =
                controller_of(&file).filter(|controller| !available.contains(*controller))
            {
                take(unified, &file, controller, "unified.", &mut missing);
            }
        }
    }
    missing.sort();
    missing
}

fn take(
    from: &mut Map<String, Value>,
    key: &str,
    controller: &str,
    prefix: &str,
    missing: &mut Vec<Missing>,
) {
    if from.get(key).is_some_and(asks) {
        from.remove(key);
        missing.push(Missing { controller: controller.into(), field: format!("{prefix}{key}") });
    }
}

/// What `resources` asks for and the node lacks, sorted.
pub fn missing(resources: &Value, available: &Available) -> Vec<Missing> {
    strip(&mut resources.clone(), available)
}

/// Decides about `linux.resources`, of a spec or of an update.
///
/// # Errors
/// [`ControllersError::Missing`] when something is missing and it is not to be ignored. `resources` is as it was then.
pub fn decide(
    resources: &mut Value,
    available: &Available,
    ignore: bool,
) -> Result<Vec<Missing>, ControllersError> {
    let missing = missing(resources, available);
    if missing.is_empty() || ignore {
        return Ok(strip(resources, available));
    }
    Err(ControllersError::Missing(missing))
}

/// Where cgroup v2 is mounted: alone, as runc requires it, or beside version 1 (where a container that asks for
/// anything then fails, with names).
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// The controllers that a new cgroup could have: those of the topmost cgroup, from where runc enables them on the
/// whole way down.
///
/// # Errors
/// When there is no cgroup v2 at any of `mounts`.
fn available(mounts: &[&Path]) -> Result<Available, ControllersError> {
    let files: Vec<PathBuf> = mounts.iter().map(|mount| mount.join("cgroup.controllers")).collect();
    let Some(path) = files.iter().find(|file| file.exists()).or(files.first()).cloned() else {
        return Ok(Available::new());
    };
    let text = fs::read_to_string(&path).map_err(|source| ControllersError::Read { path, source })?;
    Ok(text.split_ascii_whitespace().map(str::to_owned).collect())
}

/// Makes sure that the node can keep the limits of the container in `bundle`, or, with `ignore`, takes those out of
/// its `config.json` that it cannot keep, and warns of them.
///
/// # Errors
/// When something is missing and it is not to be ignored, or the specification cannot be read or written. It is as it
/// was then.
pub fn prepare(bundle: &Path, spec: &Spec, ignore: bool) -> Result<(), ControllersError> {
    if spec.linux().as_ref().is_none_or(|linux| linux.resources().is_none()) {
        return Ok(());
    }
    let stripped = check_bundle(bundle, &available(&MOUNTS.map(Path::new))?, ignore)?;
    if !stripped.is_empty() {
        tracing::warn!(
            bundle = %bundle.display(),
            missing = list(&stripped),
            "the container runs without some of its limits: the node lacks their cgroup controllers"
        );
    }
    Ok(())
}

/// The part of an update that the node can keep: all of it, or with `ignore` what is left without missing controllers.
///
/// # Errors
/// As [`prepare`].
pub fn of_update(resources: &LinuxResources, ignore: bool) -> Result<LinuxResources, ControllersError> {
    let update = |source| ControllersError::Spec { path: PathBuf::from("the update"), source };
    let mut value = serde_json::to_value(resources).map_err(update)?;
    let stripped = decide(&mut value, &available(&MOUNTS.map(Path::new))?, ignore)?;
    if !stripped.is_empty() {
        tracing::warn!(
            missing = list(&stripped),
            "an update is kept in part: the node lacks cgroup controllers"
        );
    }
    serde_json::from_value(value).map_err(update)
}

/// Checks the specification in a bundle, and with `ignore` rewrites it. Returns what was taken out.
fn check_bundle(
    bundle: &Path,
    available: &Available,
    ignore: bool,
) -> Result<Vec<Missing>, ControllersError> {
    let path = bundle.join("config.json");
    let text = fs::read(&path).map_err(|source| ControllersError::Read { path: path.clone(), source })?;
    let mut spec: Value = serde_json::from_slice(&text)
        .map_err(|source| ControllersError::Spec { path: path.clone(), source })?;
    let Some(resources) = spec.pointer_mut("/linux/resources") else { return Ok(Vec::new()) };
    let stripped = decide(resources, available, ignore)?;
    if !stripped.is_empty() {
        let new = bundle.join("config.json.new");
        serde_json::to_vec(&spec)
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&new, text))
            .and_then(|()| fs::set_permissions(&new, fs::metadata(&path)?.permissions()))
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|source| ControllersError::Write { path, source })?;
    }
    Ok(stripped)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const ALL: [&str; 7] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids", "rdma"];

    fn set(names: &[&str]) -> Available {
        names.iter().map(ToString::to_string).collect()
    }

    /// What the kubelet asks for, and more.
    fn resources() -> Value {
        json!({
            "devices": [{"allow": false, "access": "rwm"}],
            "memory": {"limit": 1000, "swap": 1000, "reservation": 0, "disableOOMKiller": false, "swappiness": 5},
            "cpu": {"shares": 2, "quota": 50000, "period": 100_000, "cpus": "0-1", "mems": ""},
            "pids": {"limit": -1},
            "blockIO": {"weight": 0, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "rdma": {"mlx5_1": {"hcaHandles": 3}},
            "unified": {"memory.high": "900", "cgroup.freeze": "0", "misc.max": "x 1"},
            "network": {"classID": 5},
            "fromTheFuture": {"limit": 3}
        })
    }

    fn fields(missing: &[Missing]) -> Vec<String> {
        missing.iter().map(|missing| format!("{}:{}", missing.controller, missing.field)).collect()
    }

    #[test]
    fn what_the_node_lacks_is_named_field_by_field() {
        assert_eq!(
            fields(&missing(&resources(), &set(&[]))),
            [
                "cpu:cpu.period",
                "cpu:cpu.quota",
                "cpu:cpu.shares",
                "cpuset:cpu.cpus",
                "hugetlb:hugepageLimits",
                "io:blockIO.throttleReadBpsDevice",
                "memory:memory.limit",
                "memory:memory.swap",
                "memory:unified.memory.high",
                "misc:unified.misc.max",
                "pids:pids.limit",
                "rdma:rdma",
            ]
        );
        assert_eq!(fields(&missing(&resources(), &set(&ALL))), ["misc:unified.misc.max"]);
        assert!(missing(&json!({}), &set(&[])).is_empty());
        assert!(missing(&json!(null), &set(&[])).is_empty());
        assert!(
            missing(&json!({"memory": {"limit": 0}, "pids": {"limit": 0}, "cpu": {}}), &set(&[])).is_empty()
        );
    }

    #[test]
    fn a_refusal_names_everything_and_the_option() {
        let mut wanted = resources();
        let err = decide(&mut wanted, &set(&["cpu", "cpuset", "io"]), false).unwrap_err().to_string();
        for part in
            ["memory (for memory.limit)", "pids (for pids.limit)", "ignore_missing_controllers = true"]
        {
            assert!(err.contains(part), "{err}");
        }
        assert!(!err.contains("cpu (for"), "{err}");
        assert_eq!(wanted, resources(), "a refused spec was changed");
    }

    #[test]
    fn a_bundle_is_rewritten_only_when_it_must_and_may() {
        let directory = tempfile::tempdir().unwrap();
        let mount = directory.path().join("mount");
        fs::create_dir(&mount).unwrap();
        fs::write(mount.join("cgroup.controllers"), "cpu pids\n").unwrap();
        let some = available(&[Path::new("/nonexistent"), &mount]).unwrap();
        let path = directory.path().join("config.json");
        let spec = json!({"ociVersion": "1.2", "unknown": 1, "linux": {"resources": {"pids": {"limit": 9}, "memory": {"limit": 5}}}});
        fs::write(&path, spec.to_string()).unwrap();

        assert!(matches!(check_bundle(directory.path(), &some, false), Err(ControllersError::Missing(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), spec.to_string());
        let stripped = check_bundle(directory.path(), &some, true).unwrap();
        assert_eq!(fields(&stripped), ["memory:memory.limit"]);
        let now: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let want = json!({"ociVersion": "1.2", "unknown": 1, "linux": {"resources": {"pids": {"limit": 9}, "memory": {}}}});
        assert_eq!(now, want);
        assert!(check_bundle(directory.path(), &some, false).unwrap().is_empty());
        fs::write(&path, "{").unwrap();
        assert!(check_bundle(directory.path(), &some, true).unwrap_err().to_string().contains("config.json"));
        assert!(check_bundle(Path::new("/nonexistent"), &some, true).is_err());
    }

    #[test]
    fn a_node_without_cgroup_v2_is_an_error() {
        let err = available(&[Path::new("/nonexistent/cgroup")]).unwrap_err().to_string();
        assert!(err.contains("/nonexistent/cgroup/cgroup.controllers"), "{err}");
    }

    #[test]
    fn without_resources_the_node_is_not_asked() {
        let spec: Spec = serde_json::from_value(json!({"ociVersion": "1.2.0", "linux": {}})).unwrap();
        prepare(Path::new("/nonexistent"), &spec, false).unwrap();
    }

    fn some_controllers() -> impl Strategy<Value = Available> {
        proptest::sample::subsequence(ALL.to_vec(), 0..=ALL.len()).prop_map(|names| set(&names))
    }

    fn any_resources() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i32>().prop_map(Value::from),
            Just(json!(0)),
            "[0-9,-]{0,4}".prop_map(Value::from),
            Just(json!([1]))
        ];
        let field = prop_oneof![
            "limit",
            "swap",
            "shares",
            "cpus",
            "weight",
            "kernel",
            "memory.high",
            "cpu.max",
            "cgroup.x"
        ];
        let object = proptest::collection::btree_map(field, leaf, 0..6).prop_map(|map| json!(map));
        let name = prop_oneof![
            "memory",
            "cpu",
            "pids",
            "blockIO",
            "rdma",
            "unified",
            "hugepageLimits",
            "devices",
            "other"
        ];
        proptest::collection::btree_map(name, object, 0..8).prop_map(|map| json!(map))
    }

    proptest! {
        #[test]
        fn what_is_left_asks_for_nothing_that_is_missing(mut resources in any_resources(), available in some_controllers()) {
            let before = resources.clone();
            let stripped = strip(&mut resources, &available);
            prop_assert!(missing(&resources, &available).is_empty());
            prop_assert_eq!(missing(&before, &available), stripped.clone());
            prop_assert!(stripped.iter().all(|missing| !available.contains(&missing.controller)));
            prop_assert_eq!(stripped.is_empty(), before == resources);
        }

        #[test]
        fn more_controllers_never_mean_more_missing(resources in any_resources(), available in some_controllers(), more in some_controllers()) {
            let some = missing(&resources, &available);
            let fewer = missing(&resources, &available.union(&more).cloned().collect());
            prop_assert!(fewer.iter().all(|missing| some.contains(missing)));
        }

        #[test]
        fn fields_of_controllers_that_are_there_are_untouched(mut resources in any_resources(), available in some_controllers()) {
            let before = resources.clone();
            let stripped = strip(&mut resources, &available);
            for (object, value) in before.as_object().unwrap() {
                for (field, value) in value.as_object().unwrap() {
                    let taken = stripped.iter().any(|missing| missing.field == format!("{object}.{field}") || missing.field == *object);
                    prop_assert_eq!(resources[object].get(field), (!taken).then_some(value));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn a_bundle_of_arbitrary_bytes_is_refused_and_left_as_it_is(bytes: Vec<u8>, ignore: bool) {
            let bundle = tempfile::tempdir().unwrap();
            let path = bundle.path().join("config.json");
            fs::write(&path, &bytes).unwrap();
            let parsed = serde_json::from_slice::<Value>(&bytes).is_ok();
            prop_assert_eq!(check_bundle(bundle.path(), &Available::default(), ignore).is_ok(), parsed);
            prop_assert_eq!(fs::read(&path).unwrap(), bytes);
        }
    }
}
