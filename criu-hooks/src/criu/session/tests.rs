//! The conversation, with shell and python scripts in CRIU's place.
#![allow(clippy::unwrap_used)]

use std::{fs, os::unix::fs::PermissionsExt, sync::atomic::AtomicUsize, sync::atomic::Ordering};

use super::*;
use crate::{criu::hooks::NoHooks, spawn::LocalSpawner};

/// A program that is started as CRIU would be: `$fd` is its end of the socket.
struct Fake {
    directory: tempfile::TempDir,
}

impl Fake {
    fn new(body: &str) -> Fake {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("criu");
        fs::write(&path, format!("#!/bin/bash\nfd=$3\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Fake { directory }
    }

    fn start(&self) -> Session {
        let binary = self.directory.path().join("criu");
        Session::start(&LocalSpawner, Launch::new(&binary)).unwrap()
    }
}

fn request(kind: Criu_req_type) -> Criu_req {
    let mut request = Criu_req::new();
    request.set_type(kind);
    request
}

/// `{type: TYPE, success: OK}` as bytes for printf.
fn answer(kind: u8, ok: u8) -> String {
    format!("printf '\\x08\\x{kind:02x}\\x10\\x{ok:02x}' | {SEND}")
}

/// Sends its input as one message (the shell's own printf would end a message at each newline).
const SEND: &str = "dd bs=64k iflag=fullblock status=none >&$fd";

/// Reads one message, so that the answer does not come before the question.
const READ: &str = "dd bs=64k count=1 <&$fd >/dev/null 2>&1";

#[tokio::test]
async fn an_answer_is_taken_and_the_exit_known() {
    let fake = Fake::new(&format!("{READ}\n{}\nexit 3", answer(10, 1)));
    let mut session = fake.start();
    let answer = session.request(&request(Criu_req_type::VERSION), &mut NoHooks).await.unwrap();
    assert!(answer.success());
    assert_eq!(session.finish().await.unwrap(), Exit::Code(3));
}

#[tokio::test]
async fn a_failure_that_criu_tells_is_an_error() {
    let fake = Fake::new(&format!("{READ}\n{}", answer(1, 0)));
    let error = fake.start().request(&request(Criu_req_type::DUMP), &mut NoHooks).await.unwrap_err();
    assert!(matches!(error, Error::Failed { .. }), "{error}");
}

#[tokio::test]
async fn death_in_mid_request_is_an_error_with_the_exit() {
    let fake = Fake::new(&format!("{READ}\nkill -SEGV $$"));
    let error = fake.start().request(&request(Criu_req_type::DUMP), &mut NoHooks).await.unwrap_err();
    assert!(matches!(error, Error::Died { exit: Exit::Signal(11) }), "{error}");
}

#[tokio::test]
async fn death_is_noticed_while_a_child_of_criu_holds_the_socket() {
    let fake = Fake::new(&format!("{READ}\n(sleep 3) &\nexit 7"));
    let error = fake.start().request(&request(Criu_req_type::DUMP), &mut NoHooks).await.unwrap_err();
    assert!(matches!(error, Error::Died { exit: Exit::Code(7) }), "{error}");
}

#[tokio::test]
async fn noise_is_refused() {
    let fake = Fake::new(&format!("{READ}\nprintf 'noise' >&$fd"));
    let error = fake.start().request(&request(Criu_req_type::DUMP), &mut NoHooks).await.unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error}");
}

#[tokio::test]
async fn a_message_that_is_too_long_is_refused() {
    let fake = Fake::new(&format!("{READ}\nhead -c 100000 /dev/zero | dd bs=100000 iflag=fullblock >&$fd"));
    let error = fake.start().request(&request(Criu_req_type::DUMP), &mut NoHooks).await.unwrap_err();
    assert!(error.to_string().contains("64 KiB"), "{error}");
}

struct Refuse(AtomicUsize);

#[async_trait::async_trait]
impl NotifyHooks for Refuse {
    async fn notify(&mut self, event: Event) -> Result<(), HookError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        assert_eq!(event.name(), "post-dump");
        Err("the agent is wanted".into())
    }
}

#[tokio::test]
async fn a_refusal_reaches_criu_and_comes_back_as_the_reason() {
    // {type: NOTIFY, success: true, notify: {script: "post-dump"}}, then a failed DUMP only if notify_success is false.
    let fake = Fake::new(&format!(
        "{READ}\nprintf '\\x08\\x06\\x10\\x01\\x2a\\x0b\\x0a\\x09post-dump' | {SEND}\n\
         reply=$(dd bs=64k count=1 <&$fd 2>/dev/null | od -An -tx1 | tr -d ' \\n')\n\
         [ \"$reply\" = 08061800 ] || exit 9\n{}",
        answer(1, 0)
    ));
    let mut hooks = Refuse(AtomicUsize::new(0));
    let error = fake.start().request(&request(Criu_req_type::DUMP), &mut hooks).await.unwrap_err();
    assert_eq!(hooks.0.into_inner(), 1);
    assert_eq!(error.to_string(), "given up at post-dump: the agent is wanted");
}

#[tokio::test]
async fn an_unknown_notification_is_acknowledged() {
    let fake = Fake::new(&format!(
        "{READ}\nprintf '\\x08\\x06\\x10\\x01\\x2a\\x05\\x0a\\x03new' | {SEND}\n\
         reply=$(dd bs=64k count=1 <&$fd 2>/dev/null | od -An -tx1 | tr -d ' \\n')\n\
         [ \"$reply\" = 08061801 ] || exit 9\n{}",
        answer(1, 1)
    ));
    let mut session = fake.start();
    session.request(&request(Criu_req_type::DUMP), &mut NoHooks).await.unwrap();
}

#[tokio::test]
async fn dropping_a_session_kills_its_criu() {
    let fake = Fake::new("exec sleep 100");
    let session = fake.start();
    let pid = session.pid();
    drop(session);
    for _ in 0..500 {
        if crate::procfs::stat(pid).is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("CRIU {pid} still runs");
}

#[tokio::test]
async fn a_cancelled_request_kills_its_criu() {
    let fake = Fake::new("exec sleep 100");
    let mut session = fake.start();
    let pid = session.pid();
    let request = request(Criu_req_type::DUMP);
    let cancelled =
        tokio::time::timeout(Duration::from_millis(50), session.request(&request, &mut NoHooks)).await;
    assert!(cancelled.is_err());
    drop(session);
    for _ in 0..500 {
        if crate::procfs::stat(pid).is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("CRIU {pid} still runs");
}

#[tokio::test]
async fn a_missing_program_is_named() {
    let error = Session::start(&LocalSpawner, Launch::new(Path::new("/nonexistent/criu"))).err().unwrap();
    assert!(error.to_string().contains("/nonexistent/criu"), "{error}");
}

#[tokio::test]
async fn a_child_gets_its_own_end_and_what_it_inherits_and_nothing_else() {
    let list = tempfile::NamedTempFile::new().unwrap();
    let fake = Fake::new(&format!("ls -l /proc/$$/fd > {}", list.path().display()));
    let binary = fake.directory.path().join("criu");
    let (kept, _other) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (_leak, inherited) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let key = fs::read_link(format!("/proc/self/fd/{}", inherited.as_raw_fd())).unwrap();
    let secret = fs::read_link(format!("/proc/self/fd/{}", kept.as_raw_fd())).unwrap();
    let mut launch = Launch::new(&binary);
    launch.inherit.push(inherited);
    let session = Session::start(&LocalSpawner, launch).unwrap();
    let mut session = session;
    let _ = session.request(&request(Criu_req_type::VERSION), &mut NoHooks).await;
    let listing = fs::read_to_string(list.path()).unwrap();
    assert!(listing.contains(&*key.to_string_lossy()), "{listing}");
    assert!(!listing.contains(&*secret.to_string_lossy()), "{listing}");
    assert_eq!(listing.matches("socket:").count(), 1, "{listing}");
}
