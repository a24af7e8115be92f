//! Why an agent wakes.
//!
//! Two ways lead into the actor. What waits below it, as long as the agent sleeps, ends [`Runtime::demand`] with a cause:
//! input, traffic, a timer; or with a probe, which may be no reason to wake. What is asked of the shim comes by message: requests queue themselves with a cause of their
//! own, and anything else calls [`Handle::demand`].
//!
//! [`Runtime::demand`]: crate::runtime::Runtime::demand
//! [`Handle::demand`]: crate::container::Handle::demand

use std::fmt;

/// What a sleeping agent wakes for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WakeCause {
    /// It was asked for as such (`agentcube wake`).
    Request,
    /// A client of the Task API resumed the task.
    Resume,
    /// A client takes a checkpoint of it.
    Checkpoint,
    /// An exec.
    Exec,
    /// A signal, from a client or pending in the kernel.
    Signal,
    /// Bytes on its standard input.
    Input,
    /// A descriptor that it waits for is ready: a connection, a datagram, bytes in a pipe, a file that has changed.
    Traffic,
    /// A time that it waits for has come.
    Timer,
    /// Another container of its sandbox is awake, or could not sleep.
    Sandbox,
}

impl WakeCause {
    /// A stable name for tools and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Resume => "resume",
            Self::Checkpoint => "checkpoint",
            Self::Exec => "exec",
            Self::Signal => "signal",
            Self::Input => "input",
            Self::Traffic => "traffic",
            Self::Timer => "timer",
            Self::Sandbox => "sandbox",
        }
    }
}

impl fmt::Display for WakeCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a sleeping agent is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// To be awake.
    Wake(WakeCause),
    /// To answer a probe, for which it need not wake. Only of one that is frozen.
    Probe,
}
