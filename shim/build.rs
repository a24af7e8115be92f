//! How the shim is linked: one runs for each pod.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Relocations in the compact form take a tenth of the room.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    let is = |variable, value| env::var(variable).is_ok_and(|found| found == value);
    // Functions that are the same in all but their name are kept once. Only LLD can do that, which is the linker here.
    if is("PROFILE", "release") && is("TARGET", "x86_64-unknown-linux-gnu") {
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
        // Nothing unwinds in a program that aborts when it panics; debuggers do without this index of their tables.
        println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
}
