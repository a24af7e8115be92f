//! The containerd shim `io.containerd.agentcube.v1`.
