//! Generates the messages in `proto`. The calls themselves are made in `src/kubelet/grpc.rs`.

use std::{fs, path::PathBuf};

use protobuf_codegen::{Codegen, Customize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    Codegen::new()
        .pure()
        .include("proto")
        .inputs(["proto/cri.proto", "proto/health.proto"])
        .out_dir(&out)
        // No reflection: nobody asks for it, and it would take half of the time to compile.
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
