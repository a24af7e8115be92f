//! What a client from a probe's address has sent: is it a probe?

use super::http2;

/// The longest request that may be a probe.
pub(super) const LONGEST: usize = 8 << 10;

/// Begins the user agent of every HTTP and gRPC probe of a kubelet.
pub(super) const USER_AGENT: &[u8] = b"kube-probe/";
const METHOD: &[u8] = b"GET ";
const END_OF_HEAD: &[u8] = b"\r\n\r\n";
/// Headers of requests that have more to them than a head, or want more than an answer.
const TELLTALE: [&[u8]; 4] = [b"content-length", b"transfer-encoding", b"upgrade", b"expect"];

/// What the bytes that came so far are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may become a probe.
    Unclear,
    /// It may become one when its client has the settings of the server.
    Greet,
    /// A whole probe, and nothing but that.
    Probe(Protocol),
    /// Something for the agent.
    Other,
}

/// What a probe is asked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Http,
    Grpc,
}

/// Judges what a client has sent so far.
pub(super) fn judge(sent: &[u8]) -> Verdict {
    let verdict = if sent.starts_with(&http2::PREFACE[..1]) { http2::judge(sent) } else { judge_http(sent) };
    match verdict {
        Verdict::Unclear | Verdict::Greet if sent.len() >= LONGEST => Verdict::Other,
        verdict => verdict,
    }
}

fn judge_http(sent: &[u8]) -> Verdict {
    let compared = sent.len().min(METHOD.len());
    if sent[..compared] != METHOD[..compared] {
        return Verdict::Other;
    }
    match find(sent, END_OF_HEAD) {
        None => Verdict::Unclear,
        Some(end) if end + END_OF_HEAD.len() == sent.len() && is_probe(&sent[..end]) => {
            Verdict::Probe(Protocol::Http)
        }
        Some(_) => Verdict::Other,
    }
}

/// Whether `head`, without the empty line at its end, is that of a probe.
fn is_probe(head: &[u8]) -> bool {
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let request = lines.next().unwrap_or_default();
    if !request.ends_with(b" HTTP/1.1") && !request.ends_with(b" HTTP/1.0") {
        return false;
    }
    let mut from_kubelet = false;
    for line in lines {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { return false };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if TELLTALE.iter().any(|telltale| name.eq_ignore_ascii_case(telltale)) {
            return false;
        }
        from_kubelet |= name.eq_ignore_ascii_case(b"user-agent") && value.starts_with(USER_AGENT);
    }
    from_kubelet
}

fn find(within: &[u8], wanted: &[u8]) -> Option<usize> {
    within.windows(wanted.len()).position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As a kubelet of 1.33 sends it.
    const PROBE: &[u8] = b"GET /health HTTP/1.1\r\nHost: 10.88.0.5:8080\r\nUser-Agent: kube-probe/1.33\r\n\
        Accept: */*\r\nConnection: close\r\n\r\n";

    #[test]
    fn a_kubelets_request_is_a_probe_once_it_is_whole() {
        for length in 0..PROBE.len() {
            assert_eq!(judge(&PROBE[..length]), Verdict::Unclear, "{length}");
        }
        assert_eq!(judge(PROBE), Verdict::Probe(Protocol::Http));
        assert_eq!(
            judge(b"GET / HTTP/1.0\r\nuser-agent:kube-probe/\r\n\r\n"),
            Verdict::Probe(Protocol::Http)
        );
    }

    #[test]
    fn whatever_else_comes_is_for_the_agent() {
        for other in [
            &b"D"[..],
            b"PO",
            b"GEX",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nGET / HTTP/1.1\r\n\r\n          ",
            b"\x16\x03\x01",
            b"GET / HTTP/1.1\r\nUser-Agent: curl/8\r\n\r\n",
            b"GET / HTTP/1.1\r\nX-User-Agent: kube-probe/1.33\r\n\r\n",
            b"GET / HTTP/1.1\r\nUser-Agent: my kube-probe/1.33\r\n\r\n",
            b"GET /kube-probe/ HTTP/1.1\r\n\r\n",
            b"GET /\r\nUser-Agent: kube-probe/1.33\r\n\r\n",
            b"GET / HTTP/1.1\r\nUser-Agent: kube-probe/1.33\r\nContent-Length: 3\r\n\r\n",
            b"GET / HTTP/1.1\r\nUser-Agent: kube-probe/1.33\r\nTransfer-encoding: chunked\r\n\r\n",
            b"GET / HTTP/1.1\r\nUser-Agent: kube-probe/1.33\r\nUpgrade: websocket\r\n\r\n",
            b"GET / HTTP/1.1\r\nUser-Agent: kube-probe/1.33\r\nno header\r\n\r\n",
        ] {
            assert_eq!(judge(other), Verdict::Other, "{}", String::from_utf8_lossy(other));
        }
        assert_eq!(judge(&[PROBE, b"GET"].concat()), Verdict::Other, "a second request");
        for begin in [&b"GET /"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\x1f\xff"] {
            let long = [begin, &[b'a'; LONGEST]].concat();
            assert_eq!(judge(&long[..LONGEST - 1]), Verdict::Unclear);
            assert_eq!(judge(&long), Verdict::Other);
        }
    }

    proptest! {
        /// What is taken for a probe was never, a byte earlier, taken for something else: a client cannot be judged
        /// differently for how its request was cut.
        #[test]
        fn a_verdict_does_not_depend_on_how_the_bytes_came(
            bytes in "(GET )?[a-zA-Z:/\r\n ]{0,60}(\r\n\r\n)?",
            cut: prop::sample::Index,
        ) {
            let bytes = bytes.as_bytes();
            let part = judge(&bytes[..cut.index(bytes.len() + 1)]);
            prop_assert!(part == Verdict::Unclear || part == judge(bytes) || part == Verdict::Probe(Protocol::Http));
        }
    }
}
