//! What a bundle's `config.json` says of the container, and the files that the shim itself keeps in a bundle.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;

/// The largest `config.json` that is read; containerd's are some tens of KiB.
const MAX_CONFIG: u64 = 16 << 20;

/// Annotations that name the group whose containers share one shim, the first that is there counts.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", SANDBOX_ID];
/// The id of the pod's sandbox.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// "sandbox" for the pause container, "container" for the others.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// `config.json` cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `config.json` is no OCI runtime specification.
    #[error("{path} is no OCI runtime specification: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// `config.json` is too large to be one.
    #[error("{path} has {size} bytes, more than {MAX_CONFIG}: it is no OCI runtime specification")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
}

/// Reads the bundle's OCI runtime specification.
///
/// # Errors
/// [`BundleError`].
pub fn read_spec(bundle: &Path) -> Result<Spec, BundleError> {
    let path = bundle.join("config.json");
    let read = |source| BundleError::Read { path: path.clone(), source };
    let size = fs::metadata(&path).map_err(read)?.len();
    if size > MAX_CONFIG {
        return Err(BundleError::TooLarge { path, size });
    }
    let text = fs::read(&path).map_err(read)?;
    serde_json::from_slice(&text).map_err(|source| BundleError::Parse { path, source })
}

/// The group of a container: containers of one group share one shim.
pub fn group<'a>(spec: &'a Spec, id: &'a str) -> &'a str {
    let annotations = spec.annotations().as_ref();
    GROUPS.iter().find_map(|key| annotations?.get(*key)).map_or(id, String::as_str)
}

/// Who a container is in Kubernetes; empty outside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// The pod's sandbox.
    pub sandbox_id: String,
    /// Whether it is the pod's pause container.
    pub is_sandbox: bool,
    /// All annotations of the container.
    pub annotations: HashMap<String, String>,
}

impl Identity {
    /// Takes it from a specification.
    pub fn of(spec: &Spec) -> Self {
        let annotations = spec.annotations().clone().unwrap_or_default();
        Self {
            sandbox_id: annotations.get(SANDBOX_ID).cloned().unwrap_or_default(),
            is_sandbox: annotations.get(CONTAINER_TYPE).is_some_and(|kind| kind == "sandbox"),
            annotations,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn spec(annotations: &[(&str, &str)]) -> Spec {
        let mut spec = Spec::default();
        let map = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        spec.set_annotations(Some(map));
        spec
    }

    #[test]
    fn containers_of_a_sandbox_share_its_group_and_others_stand_alone() {
        assert_eq!(group(&spec(&[(SANDBOX_ID, "pod")]), "c1"), "pod");
        assert_eq!(group(&spec(&[("io.containerd.runc.v2.group", "g"), (SANDBOX_ID, "pod")]), "c1"), "g");
        assert_eq!(group(&spec(&[]), "c1"), "c1");
        assert_eq!(group(&Spec::default(), "c1"), "c1");
    }

    #[test]
    fn the_pause_container_is_told_from_the_others() {
        assert!(Identity::of(&spec(&[(CONTAINER_TYPE, "sandbox"), (SANDBOX_ID, "pod")])).is_sandbox);
        assert!(!Identity::of(&spec(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "pod")])).is_sandbox);
    }

    #[test]
    fn a_bundle_without_a_specification_names_the_file() {
        let bundle = tempfile::tempdir().unwrap();
        let missing = read_spec(bundle.path()).unwrap_err();
        assert!(missing.to_string().contains("config.json"), "{missing}");
        fs::write(bundle.path().join("config.json"), b"{\"ociVersion\":").unwrap();
        assert!(matches!(read_spec(bundle.path()), Err(BundleError::Parse { .. })));
    }

    #[test]
    fn a_specification_beyond_measure_is_not_read() {
        let bundle = tempfile::tempdir().unwrap();
        fs::File::create(bundle.path().join("config.json")).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(read_spec(bundle.path()), Err(BundleError::TooLarge { .. })));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_are_no_specification(bytes: Vec<u8>) {
            let bundle = tempfile::tempdir().unwrap();
            fs::write(bundle.path().join("config.json"), bytes).unwrap();
            let refused = matches!(read_spec(bundle.path()), Err(BundleError::Parse { .. }));
            proptest::prop_assert!(refused);
        }

        #[test]
        fn whatever_annotations_say_there_is_a_group(key in "\\PC{0,40}", value in "\\PC{0,40}", id in "[a-z]{1,9}") {
            let spec = spec(&[(&key, &value), (CONTAINER_TYPE, &value), (SANDBOX_ID, &value)]);
            proptest::prop_assert!([&value, &id].contains(&&group(&spec, &id).to_owned()));
            proptest::prop_assert_eq!(Identity::of(&spec).is_sandbox, value == "sandbox");
        }
    }
}
