//! How the shim is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // One shim runs for each pod: relocations in the compact form take a tenth of the room.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
