//! Generates the messages in `proto`: `cri.proto` is k8s.io/cri-api's of Kubernetes 1.36, as it was published. The calls
//! themselves are made in `src/kubelet/grpc.rs`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use protobuf_codegen::{Codegen, Customize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    // The parser does not know this option, which is for logs in Go.
    let cri = fs::read_to_string("proto/cri.proto")?.replace("[debug_redact = true]", "");
    fs::write(out.join("cri.proto"), cri)?;
    Codegen::new()
        .pure()
        .includes([Path::new("proto"), &out])
        .inputs([&out.join("cri.proto"), Path::new("proto/health.proto")])
        .out_dir(&out)
        // No reflection: nobody asks for it.
        .customize(Customize::default().lite_runtime(true).generate_accessors(false).gen_mod_rs(false))
        .run()?;
    // `include!` refuses inner attributes and inner doc comments (rust-lang/rust issue 18810).
    for name in ["cri.rs", "health.rs"] {
        let path = out.join(name);
        let text: String = fs::read_to_string(&path)?
            .lines()
            .filter(|line| !line.starts_with("#!") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(path, text)?;
    }
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
