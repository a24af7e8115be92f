//! Generates the messages, client and server of `proto/control.proto`.

use std::{fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("proto");
    fs::create_dir_all(&out)?;
    Codegen::new()
        .inputs(["proto/control.proto"])
        .include("proto")
        .out_dir(&out)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    // `include!` refuses inner attributes and inner doc comments (rust-lang/rust issue 18810).
    for entry in fs::read_dir(&out)? {
        let path = entry?.path();
        let text: String = fs::read_to_string(&path)?
            .lines()
            .filter(|line| !line.starts_with("#!") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(&path, text)?;
    }
    // The generator lists the messages only.
    let mut modules = fs::read_to_string(out.join("mod.rs"))?;
    modules.push_str("pub mod control_ttrpc;\n");
    fs::write(out.join("mod.rs"), modules)?;
    println!("cargo:rerun-if-changed=proto/control.proto");
    Ok(())
}
