//! placeholder
pub fn prepare(_: &std::path::Path, _: &oci_spec::runtime::Spec, _: bool) -> Result<(), String> {
    Ok(())
}
