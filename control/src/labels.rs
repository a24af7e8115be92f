//! The keys of `Container.labels`: CRI's own annotations, copied as they are.

/// The name of the pod.
pub const POD: &str = "io.kubernetes.cri.sandbox-name";
/// The Kubernetes namespace of the pod (not containerd's).
pub const POD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
/// The uid of the pod.
pub const POD_UID: &str = "io.kubernetes.cri.sandbox-uid";
/// The name of the container in its pod; the pause container has none.
pub const CONTAINER: &str = "io.kubernetes.cri.container-name";
/// The image that the container runs.
pub const IMAGE: &str = "io.kubernetes.cri.image-name";

/// All keys that a shim copies from a container's annotations when they are there.
pub const ALL: [&str; 5] = [POD, POD_NAMESPACE, POD_UID, CONTAINER, IMAGE];
