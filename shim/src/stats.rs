//! placeholder
pub fn metrics_any(_: &std::path::Path) -> containerd_shim::protos::protobuf::well_known_types::any::Any {
    Default::default()
}
pub fn memory_used(_: &std::path::Path) -> (u64, &'static str) {
    (1, "pss")
}
