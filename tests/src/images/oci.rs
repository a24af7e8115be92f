//! An image as an OCI layout in a tar file, as `ctr images import` reads it.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write};
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, Header};

use super::ImageError;
use super::layer::Layer;
use crate::cache::hex;

/// Writes the image to `path`, replacing what is there.
pub(super) fn write(
    path: &Path,
    reference: &str,
    layer: &Layer<'_>,
    config: &Value,
) -> Result<(), ImageError> {
    let error = |source: io::Error| ImageError::Io { path: path.into(), source };
    // The layer's digest comes before its bytes, so it is made in memory first.
    let memory = memfd_create("layer", MemfdFlags::CLOEXEC).map_err(|errno| error(errno.into()))?;
    let mut bytes = Hashing { inner: io::BufWriter::new(File::from(memory)), hash: Sha256::new(), size: 0 };
    layer.write(&mut bytes)?;
    let layer_digest = format!("sha256:{}", hex(&bytes.hash.finalize()));
    let layer_size = bytes.size;
    let mut bytes = bytes.inner.into_inner().map_err(|failed| error(failed.into_error()))?;
    bytes.seek(SeekFrom::Start(0)).map_err(error)?;

    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": config,
        // An uncompressed layer is its own content.
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] },
    })
    .to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &digest(&config), config.len() as u64),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer_digest, layer_size)],
    })
    .to_string();
    let mut entry =
        descriptor("application/vnd.oci.image.manifest.v1+json", &digest(&manifest), manifest.len() as u64);
    entry["annotations"] =
        json!({ "io.containerd.image.name": reference, "org.opencontainers.image.ref.name": "1" });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    })
    .to_string();

    let mut tar = Builder::new(io::BufWriter::new(File::create(path).map_err(error)?));
    let mut add = |name: &str, size: u64, content: &mut dyn Read| {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(size);
        tar.append_data(&mut header, name, content).map_err(error)
    };
    let blob = |digest: &str| format!("blobs/{}", digest.replace(':', "/"));
    let layout = r#"{"imageLayoutVersion":"1.0.0"}"#;
    add("oci-layout", layout.len() as u64, &mut layout.as_bytes())?;
    add(&blob(&layer_digest), layer_size, &mut bytes)?;
    add(&blob(&digest(&config)), config.len() as u64, &mut config.as_bytes())?;
    add(&blob(&digest(&manifest)), manifest.len() as u64, &mut manifest.as_bytes())?;
    add("index.json", index.len() as u64, &mut index.as_bytes())?;
    let mut file = tar.into_inner().map_err(error)?;
    file.flush().map_err(error)
}

fn digest(text: &str) -> String {
    format!("sha256:{}", hex(&Sha256::digest(text)))
}

fn descriptor(media_type: &str, digest: &str, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest, "size": size })
}

/// Counts and hashes what passes through.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_blob_has_the_digest_and_the_size_that_lead_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.tar");
        let mut layer = Layer::new(folder.path());
        layer.text("/agent", "text");
        write(&path, "localhost/x:1", &layer, &json!({ "Cmd": ["/agent"] })).unwrap();

        let mut files = std::collections::HashMap::new();
        let mut archive = tar::Archive::new(File::open(&path).unwrap());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            files.insert(entry.path().unwrap().display().to_string(), bytes);
        }
        let follow = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap();
            let bytes = &files[&format!("blobs/{}", digest.replace(':', "/"))];
            assert_eq!(format!("sha256:{}", hex(&Sha256::digest(bytes))), digest);
            assert_eq!(descriptor["size"].as_u64().unwrap(), bytes.len() as u64);
            bytes
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let entry = &index["manifests"][0];
        assert_eq!(entry["annotations"]["io.containerd.image.name"], "localhost/x:1");
        let manifest: Value = serde_json::from_slice(follow(entry)).unwrap();
        let config: Value = serde_json::from_slice(follow(&manifest["config"])).unwrap();
        follow(&manifest["layers"][0]);
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        assert_eq!(config["config"]["Cmd"][0], "/agent");
    }
}
