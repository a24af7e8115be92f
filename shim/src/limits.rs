//! Limits written straight to a cgroup v2 directory: how an update reaches an agent that sleeps.
//!
//! The OCI runtime refuses to update a container that has no processes, but the cgroup is there and a limit must hold
//! from the moment it is set. The values are those that runc would write; after the wake runc gets the update, too,
//! so that its own record is right.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

/// One file of a cgroup and what to write to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The file's name.
    pub file: String,
    /// Its new contents.
    pub value: String,
}

/// Why limits could not be set.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// The kernel does not take a value.
    #[error("cannot write {value:?} to {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// Why.
        source: io::Error,
    },
    /// The node has no such controller.
    #[error("{path} does not exist: the node's cgroup v2 lacks the controller {controller}")]
    NoController {
        /// The file.
        path: PathBuf,
        /// The controller that would make it.
        controller: String,
    },
    /// A name that is no file of a cgroup.
    #[error("{0:?} is not the name of a cgroup file")]
    NoFile(String),
    /// The request contradicts itself.
    #[error("the memory and swap limit ({swap} bytes) is below the memory limit ({limit} bytes)")]
    SwapBelowMemory {
        /// Memory and swap together.
        swap: i64,
        /// Memory.
        limit: i64,
    },
}

/// What `resources` asks of a cgroup, in the order in which it is to be written.
///
/// # Errors
/// [`LimitError::SwapBelowMemory`].
pub fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, LimitError> {
    let mut all = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, &mut all);
    }
    if let Some(memory) = resources.memory() {
        memory_settings(memory, &mut all)?;
    }
    if let Some(pids) = resources.pids() {
        set(&mut all, "pids.max", max_or(pids.limit()));
    }
    if let Some(weight) = resources.block_io().as_ref().and_then(oci_spec::runtime::LinuxBlockIo::weight) {
        // From 10..=1000 to 1..=10000, as runc does.
        set(&mut all, "io.weight", (1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990).to_string());
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        // A file of a controller is called like `memory.max`, and never by dots alone.
        let named =
            file.split_once('.').is_some_and(|(controller, name)| !controller.is_empty() && !name.is_empty());
        if file.contains(['/', '\0']) || !named {
            return Err(LimitError::NoFile(file.clone()));
        }
        set(&mut all, file, value.clone());
    }
    Ok(all)
}

fn set(all: &mut Vec<Setting>, file: &str, value: impl Into<String>) {
    all.push(Setting { file: file.to_owned(), value: value.into() });
}

/// Stands for the quota that is in force, in an update of the period alone.
const KEPT: &str = "kept";

/// The quota in force in a `cpu.max`.
fn kept_quota(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().next().unwrap_or("max").to_owned()
}

/// Zero or less means "no limit" in an OCI specification.
fn max_or(limit: i64) -> String {
    if limit > 0 { limit.to_string() } else { "max".to_owned() }
}

fn cpu_settings(cpu: &LinuxCpu, all: &mut Vec<Setting>) {
    if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
        set(all, "cpu.weight", weight_of(shares).to_string());
    }
    let period = cpu.period().filter(|period| *period > 0);
    match (cpu.quota(), period) {
        (None, None) => {}
        (quota, period) => {
            let quota = quota.map_or_else(|| KEPT.to_owned(), max_or);
            set(all, "cpu.max", period.map_or(quota.clone(), |period| format!("{quota} {period}")));
        }
    }
    if let Some(burst) = cpu.burst() {
        set(all, "cpu.max.burst", burst.to_string());
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            set(all, file, value.as_str());
        }
    }
}

/// cgroup v1's shares (2 to 262144) as v2's weight (1 to 10000), by Kubernetes' and runc's linear formula.
fn weight_of(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9999 / 262_142
}

fn memory_settings(memory: &LinuxMemory, all: &mut Vec<Setting>) -> Result<(), LimitError> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        // OCI counts memory and swap together, cgroup v2 swap alone.
        let value = match (swap, limit) {
            (..0, _) => "max".to_owned(),
            (_, Some(limit)) if limit > 0 && swap < limit => {
                return Err(LimitError::SwapBelowMemory { swap, limit });
            }
            (_, Some(limit)) if limit > 0 => (swap - limit).to_string(),
            _ => "max".to_owned(),
        };
        set(all, "memory.swap.max", value);
    }
    if let Some(limit) = limit {
        set(all, "memory.max", max_or(limit));
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        set(all, "memory.low", max_or(reservation));
    }
    Ok(())
}

/// Writes `settings` to the cgroup `dir`.
///
/// # Errors
/// [`LimitError`], for the first that fails; those before it are in force then.
pub fn apply(dir: &Path, settings: &[Setting]) -> Result<(), LimitError> {
    for Setting { file, value } in settings {
        let path = dir.join(file);
        if !path.exists() {
            let controller = file.split('.').next().unwrap_or(file).to_owned();
            return Err(LimitError::NoController { path, controller });
        }
        let value = match value.strip_prefix(KEPT) {
            Some(rest) => kept_quota(&path) + rest,
            None => value.clone(),
        };
        fs::write(&path, &value).map_err(|source| LimitError::Write { path, value, source })?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn of(json: &str) -> Vec<(String, String)> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        settings(&resources).unwrap().into_iter().map(|one| (one.file, one.value)).collect()
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn limits_become_what_runc_writes() {
        assert_eq!(of(r#"{"cpu":{"shares":2}}"#), [pair("cpu.weight", "1")]);
        assert_eq!(of(r#"{"cpu":{"shares":1024}}"#), [pair("cpu.weight", "39")]);
        assert_eq!(of(r#"{"cpu":{"shares":262144}}"#), [pair("cpu.weight", "10000")]);
        assert_eq!(of(r#"{"cpu":{"quota":50000,"period":100000}}"#), [pair("cpu.max", "50000 100000")]);
        assert_eq!(of(r#"{"cpu":{"quota":-1,"period":100000}}"#), [pair("cpu.max", "max 100000")]);
        assert_eq!(
            of(r#"{"memory":{"limit":100,"swap":150}}"#),
            [pair("memory.swap.max", "50"), pair("memory.max", "100")]
        );
        assert_eq!(of(r#"{"memory":{"limit":-1}}"#), [pair("memory.max", "max")]);
        assert_eq!(of(r#"{"pids":{"limit":0}}"#), [pair("pids.max", "max")]);
        assert_eq!(of(r#"{"unified":{"memory.high":"1G"}}"#), [pair("memory.high", "1G")]);
        assert_eq!(of("{}"), []);
    }

    #[test]
    fn an_update_of_the_period_keeps_the_quota() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cpu.max"), "50000 100000").unwrap();
        let resources = serde_json::from_str(r#"{"cpu":{"period":200000}}"#).unwrap();
        apply(dir.path(), &settings(&resources).unwrap()).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("cpu.max")).unwrap(), "50000 200000");
    }

    #[test]
    fn a_file_outside_the_cgroup_is_refused() {
        for name in ["../memory.max", "/etc/passwd", "cgroup", ".", "..", "memory.", "a.\0"] {
            let resources = serde_json::from_value(serde_json::json!({"unified": {name: "1"}})).unwrap();
            assert!(matches!(settings(&resources), Err(LimitError::NoFile(_))), "{name}");
        }
    }

    #[test]
    fn swap_below_memory_is_refused() {
        let resources: LinuxResources =
            serde_json::from_str(r#"{"memory":{"limit":100,"swap":50}}"#).unwrap();
        assert!(matches!(settings(&resources), Err(LimitError::SwapBelowMemory { .. })));
    }

    #[test]
    fn a_missing_controller_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cpu.max"), "max 100000").unwrap();
        apply(dir.path(), &[Setting { file: "cpu.max".to_owned(), value: "1 2".to_owned() }]).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("cpu.max")).unwrap(), "1 2");
        let missing = Setting { file: "memory.max".to_owned(), value: "1".to_owned() };
        let error = apply(dir.path(), &[missing]).unwrap_err();
        assert!(error.to_string().contains("lacks the controller memory"), "{error}");
    }

    proptest::proptest! {
        /// Whatever a request calls a file, it is one of the cgroup's own.
        #[test]
        fn no_name_leads_out_of_the_cgroup(name in "\\PC{0,20}|[a-z./]{1,12}", value in "\\PC{0,20}") {
            let resources = serde_json::from_value(serde_json::json!({"unified": {name: value}})).unwrap();
            if let Ok(all) = settings(&resources) {
                for setting in all {
                    let path = Path::new(&setting.file);
                    proptest::prop_assert_eq!(path.components().count(), 1);
                    proptest::prop_assert_eq!(path.file_name(), Some(path.as_os_str()));
                }
            }
        }

        #[test]
        fn no_content_of_cpu_max_is_more_than_one_word(text in "\\PC{0,40}") {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("cpu.max");
            fs::write(&path, &text).unwrap();
            let quota = kept_quota(&path);
            proptest::prop_assert!(!quota.is_empty() && !quota.contains(char::is_whitespace));
        }
    }
}
