//! What the integration tests share.

use std::io::Write as _;

/// Tells that the running test can't run here, and why. It goes to the terminal even when the test's output is captured.
pub fn skipped(why: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    // Nobody to tell is no reason to fail.
    let _ = writeln!(std::io::stderr(), "test {name} skipped: {why}");
}

/// Makes a test of each function for each runtime: `runtime_tests!([runc, agentcube] counter_prints, …)` for functions
/// that take a [`Runtime`](crate::node::Runtime), whose tests are then called `on_runc::counter_prints` and so on.
#[macro_export]
macro_rules! runtime_tests {
    ([$($runtime:ident),+] $($name:ident),+ $(,)?) => {
        $crate::runtime_tests!(@each [$($runtime),+] [$($name),+]);
    };
    (@each [$($runtime:ident),+] $names:tt) => {
        $($crate::runtime_tests!(@one $runtime $names);)+
    };
    (@one runc [$($name:ident),+]) => {
        mod on_runc {
            $(#[test] fn $name() { super::$name($crate::node::Runtime::Runc); })+
        }
    };
    (@one agentcube [$($name:ident),+]) => {
        mod on_agentcube {
            $(#[test] fn $name() { super::$name($crate::node::Runtime::Agentcube); })+
        }
    };
}
