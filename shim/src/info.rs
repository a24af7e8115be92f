//! What the shim tells containerd of itself (`-info`): its version, and the features of the OCI runtime below it.

use std::{path::Path, process::Command};

use containerd_shim::protos::{
    protobuf::{MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use oci_spec::runtime::Features;

use crate::options::{Options, OptionsError};

/// The type that containerd knows OCI features by.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// Tells which CRIU was found.
const CRIU_VERSION: &str = "agentcube.volcano.sh/criu-version";

/// Why the features of the OCI runtime are not known.
#[derive(Debug, thiserror::Error)]
enum FeaturesError {
    #[error("cannot run {binary} features: {source}")]
    Run { binary: String, source: std::io::Error },
    #[error("{binary} features ended with {status}")]
    Failed { binary: String, status: std::process::ExitStatus },
    #[error("{binary} features gave no OCI features: {source}")]
    Parse { binary: String, source: serde_json::Error },
}

/// Answers `-info`.
///
/// # Errors
/// When the options that came with the question are wrong.
pub fn runtime_info(runtime_id: &str, options: Option<&Any>) -> Result<RuntimeInfo, OptionsError> {
    let parsed = Options::from_any(options)?;
    let mut info = RuntimeInfo {
        name: runtime_id.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        options: MessageField::from_option(options.cloned()),
        ..Default::default()
    };
    match features(&parsed.runc_binary) {
        Ok(value) => {
            let any = Any { type_url: FEATURES.to_owned(), value, ..Default::default() };
            info.features = MessageField::some(any);
        }
        // containerd goes on without; it only takes user namespaces as missing.
        Err(error) => eprintln!("{runtime_id}: {error}"),
    }
    if let Some(version) = criu_version(&parsed.criu_binary) {
        info.annotations.insert(CRIU_VERSION.to_owned(), version);
    }
    Ok(info)
}

/// The features of the OCI runtime, less those that the shim does not pass on.
fn features(binary: &Path) -> Result<Vec<u8>, FeaturesError> {
    let name = || binary.display().to_string();
    let output = Command::new(binary)
        .arg("features")
        .output()
        .map_err(|source| FeaturesError::Run { binary: name(), source })?;
    if !output.status.success() {
        return Err(FeaturesError::Failed { binary: name(), status: output.status });
    }
    let parse = |source| FeaturesError::Parse { binary: name(), source };
    let features: Features = serde_json::from_slice(&output.stdout).map_err(parse)?;
    serde_json::to_vec(&without_idmap(features)).map_err(parse)
}

/// The shim mounts the root file system itself and cannot map its ids, which containerd asks about before it uses
/// user namespaces.
fn without_idmap(mut features: Features) -> Features {
    let idmap = features
        .linux_mut()
        .as_mut()
        .and_then(|linux| linux.mount_extensions_mut().as_mut())
        .and_then(|extensions| extensions.idmap_mut().as_mut());
    if let Some(idmap) = idmap {
        idmap.set_enabled(Some(false));
    }
    features
}

fn criu_version(binary: &Path) -> Option<String> {
    let output = Command::new(binary).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().find_map(|line| line.strip_prefix("Version: ")).map(|version| version.trim().to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_a_runtime_still_gets_an_answer() {
        let toml = "runc_binary = \"/nonexistent/runc\"\ncriu_binary = \"/nonexistent/criu\"";
        let mut value = vec![3 << 3 | 2, u8::try_from(toml.len()).unwrap()];
        value.extend(toml.as_bytes());
        let any = Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Default::default() };
        let info = runtime_info("io.containerd.agentcube.v1", Some(&any)).unwrap();
        assert_eq!(info.name, "io.containerd.agentcube.v1");
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        assert!(info.features.is_none() && info.annotations.is_empty());
    }

    #[test]
    fn idmapped_mounts_are_not_promised() {
        let json = r#"{"ociVersionMin":"1.0.0","ociVersionMax":"1.2.0","linux":{"mountExtensions":{"idmap":{"enabled":true}}}}"#;
        let features = without_idmap(serde_json::from_str(json).unwrap());
        let text = serde_json::to_string(&features).unwrap();
        assert!(text.contains("\"enabled\":false"), "{text}");
    }
}
