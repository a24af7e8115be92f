//! The node's tools: the command line `agentcube`.

pub mod cli;
