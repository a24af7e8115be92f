#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

/// The header block of a probe, as grpc-go 1.33 writes it for a kubelet of 1.36.
const BLOCK: &[u8] = b"\x83\x86\x45\x95\x62\x6b\x2b\x22\xf3\x94\x74\x26\x75\xfb\x85\x7c\x65\x1d\x09\x9d\x8b\xd3\x94\x9d\x7f\x41\x8b\x08\x9d\x5c\
    \x0b\x81\x70\xdc\x6d\xf7\x02\xdf\x5f\x8b\x1d\x75\xd0\x62\x0d\x26\x3d\x4c\x4d\x65\x64\x7a\x96\xeb\x6c\x65\x5a\xbb\x0f\x19\x58\x0a\xec\xb8\
    \xa4\xd6\x56\x45\xa6\x3b\x01\x5d\x96\x57\x67\x40\x02\x74\x65\x86\x4d\x83\x35\x05\xb1\x1f\x40\x89\x9a\xca\xc8\xb2\x4d\x49\x4f\x6a\x7f\x86\
    \x69\xf7\xde\x7d\xa7\xad";

const PING: u8 = 6;

fn frame(kind: u8, flags: u8, stream: u32, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), content].concat()
}

fn settings() -> Vec<u8> {
    frame(kind::SETTINGS, 0, 0, &[])
}

fn acknowledgement() -> Vec<u8> {
    frame(kind::SETTINGS, flag::ACK, 0, &[])
}

fn asks() -> Vec<u8> {
    frame(kind::HEADERS, flag::END_HEADERS, 1, BLOCK)
}

/// About the service of this name, whose length is less than 128.
fn message(service: &str) -> Vec<u8> {
    let length = u8::try_from(service.len()).unwrap();
    let field = if length == 0 { Vec::new() } else { [&[0x0a, length], service.as_bytes()].concat() };
    [&[0, 0, 0, 0, u8::try_from(field.len()).unwrap()], &*field].concat()
}

fn data(content: &[u8]) -> Vec<u8> {
    frame(kind::DATA, flag::END_STREAM, 1, content)
}

/// All that a kubelet says, frame by frame.
fn probe(service: &str) -> [Vec<u8>; 5] {
    [PREFACE.to_vec(), settings(), acknowledgement(), asks(), data(&message(service))]
}

/// The header block of a request with these fields, none of them coded.
fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

/// What is sent that begins as usual and has these frames.
fn begun(frames: &[Vec<u8>]) -> Vec<u8> {
    [&[PREFACE.to_vec(), settings()], frames].concat().concat()
}

#[test]
fn a_kubelets_call_is_a_probe_once_it_is_whole_and_its_client_is_greeted_before() {
    for service in ["", "liveness"] {
        let probe = probe(service).concat();
        for length in 0..probe.len() {
            let until = if length < PREFACE.len() + HEAD { Verdict::Unclear } else { Verdict::Greet };
            assert_eq!(judge(&probe[..length]), until, "{length}");
        }
        assert_eq!(judge(&probe), Verdict::Probe(Protocol::Grpc));
    }
}

#[test]
fn it_is_a_probe_in_other_words_too() {
    let fields = [
        (":path", "/grpc.health.v1.Health/Check"),
        (":scheme", "http"),
        (":method", "POST"),
        ("user-agent", "kube-probe/1.99"),
        ("content-type", "application/grpc+proto"),
    ];
    let asks = frame(kind::HEADERS, flag::END_HEADERS, 1, &block(&fields));
    let window = frame(kind::WINDOW_UPDATE, 0, 0, &[0, 1, 0, 0]);
    let part = frame(kind::DATA, 0, 1, &message(""));
    for frames in [
        vec![asks.clone(), data(&message("x"))],
        vec![window.clone(), asks.clone(), part, window, data(&[])],
        // The acknowledgement may come late.
        vec![asks, data(&message("x")), acknowledgement()],
    ] {
        assert_eq!(judge(&begun(&frames)), Verdict::Probe(Protocol::Grpc), "{frames:?}");
    }
}

#[test]
fn other_calls_and_what_is_odd_about_a_call_are_for_the_agent() {
    let fields = [
        (":method", "POST"),
        (":path", "/grpc.health.v1.Health/Check"),
        ("content-type", "application/grpc"),
        ("user-agent", "kube-probe/1.36"),
    ];
    let but = |name: &str, value: &'static str| {
        let mut fields = fields;
        fields.iter_mut().filter(|field| field.0 == name).for_each(|field| field.1 = value);
        vec![frame(kind::HEADERS, flag::END_HEADERS, 1, &block(&fields)), data(&message(""))]
    };
    assert_eq!(judge(&begun(&but(":authority", "agent"))), Verdict::Probe(Protocol::Grpc));
    for (why, frames) in [
        ("another method", but(":method", "GET")),
        ("a watch", but(":path", "/grpc.health.v1.Health/Watch")),
        ("another call", but(":path", "/agent.v1.Agent/Ask")),
        ("another client", but("user-agent", "grpc-go/1.72")),
        ("another content", but("content-type", "application/json")),
        ("a method twice", {
            let twice = [&fields[..], &[(":method", "POST")]].concat();
            vec![frame(kind::HEADERS, flag::END_HEADERS, 1, &block(&twice))]
        }),
        ("no fields", vec![frame(kind::HEADERS, flag::END_HEADERS, 1, &[])]),
        ("a broken block", vec![frame(kind::HEADERS, flag::END_HEADERS, 1, &BLOCK[..20])]),
        ("another stream", vec![frame(kind::HEADERS, flag::END_HEADERS, 3, BLOCK)]),
        ("without a message", vec![frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 1, BLOCK)]),
        ("headers in several parts", vec![frame(kind::HEADERS, 0, 1, BLOCK)]),
        ("a padded message", vec![asks(), frame(kind::DATA, 8, 1, &[0])]),
        ("a message of another stream", vec![asks(), frame(kind::DATA, 0, 3, &message(""))]),
        ("an empty message", vec![asks(), data(&[])]),
        ("half a message", vec![asks(), data(&message("service")[..9])]),
        ("two messages", vec![asks(), data(&[message(""), message("")].concat())]),
        ("a compressed message", vec![asks(), data(&[1, 0, 0, 0, 0])]),
        (
            "a second call",
            vec![asks(), data(&message("")), frame(kind::HEADERS, flag::END_HEADERS, 3, BLOCK)],
        ),
        ("a second call in between", vec![asks(), asks()]),
        ("a message first", vec![data(&message(""))]),
        ("a ping", vec![frame(PING, 0, 0, &[0; 8])]),
        ("an end", vec![frame(kind::GOAWAY, 0, 0, &[0; 8])]),
        ("other settings", vec![settings()]),
    ] {
        assert_eq!(judge(&begun(&frames)), Verdict::Other, "{why}");
    }
    let small = [0, 1, 0, 0, 0, 0, 0, 4, 0, 0, 0, 6];
    for (why, sent) in [
        ("HTTP/1 with a strange method", b"POST / HTTP/1.1\r\n\r\n".to_vec()),
        ("no settings first", [PREFACE, &*asks()].concat()),
        ("no room for the answer", [PREFACE, &*frame(kind::SETTINGS, 0, 0, &small)].concat()),
        ("settings of a stream", [PREFACE, &*frame(kind::SETTINGS, 0, 1, &[])].concat()),
        ("half a setting", [PREFACE, &*frame(kind::SETTINGS, 0, 0, &small[..3])].concat()),
    ] {
        assert_eq!(judge(&sent), Verdict::Other, "{why}");
    }
    assert_eq!(judge(&[PREFACE, &*frame(kind::SETTINGS, 0, 0, &small[..6])].concat()), Verdict::Greet);
}

/// What `client` says to an agent that the shim has connected it to after it was greeted.
async fn passed(mut client: &[u8]) -> Vec<u8> {
    let mut agent = Vec::new();
    pass_on(&mut client, &mut agent).await.unwrap();
    io::copy(&mut client, &mut agent).await.unwrap();
    agent
}

#[tokio::test]
async fn all_but_the_first_acknowledgement_reaches_the_agent() {
    let [preface, settings, acknowledgement, asks, data] = probe("liveness");
    let ping = frame(PING, flag::ACK, 0, &[0; 8]);
    let before = [preface, settings, asks].concat();
    let after = [data, ping, acknowledgement.clone(), b"whatever".to_vec()].concat();
    let sent = [&*before, &acknowledgement, &after].concat();
    assert_eq!(passed(&sent).await, [&*before, &after].concat());
    for length in 0..before.len() {
        assert_eq!(passed(&before[..length]).await, before[..length], "it ended early");
    }
}

#[tokio::test]
async fn an_agents_settings_follow_those_of_the_shim_and_say_how_many_streams_there_may_be() {
    let told = async |agent: &[u8]| {
        let (mut agent, mut client) = (agent, Vec::new());
        pass_settings_on(&mut agent, &mut client).await.unwrap();
        io::copy(&mut agent, &mut client).await.unwrap();
        client
    };
    let of = |settings: &[&[u8]]| frame(kind::SETTINGS, 0, 0, &settings.concat());
    let (few, window): (&[u8], &[u8]) = (&[0, 3, 0, 0, 0, 2], &[0, 4, 0, 1, 0, 0]);
    let no_priorities = [0, 9, 0, 0, 0, 1];
    let more = asks();
    for (own, wanted) in [
        (of(&[]), of(&[NO_LIMIT])),
        (of(&[few, &no_priorities, window]), of(&[NO_LIMIT, few, window])),
        // Whatever else it says reaches the client as it is.
        (of(&[few, &window[..3]]), of(&[few, &window[..3]])),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
    ] {
        assert_eq!(told(&[&*own, &more].concat()).await, [&*wanted, &more].concat());
        if own != wanted {
            continue;
        }
        for length in 0..own.len() {
            assert_eq!(told(&own[..length]).await, own[..length]);
        }
    }
}

fn arbitrary_frame() -> impl Strategy<Value = Vec<u8>> {
    let random = (0..11u8, any::<u8>(), 0..4u32, prop::collection::vec(any::<u8>(), 0..40));
    prop_oneof![
        Just(settings()),
        Just(acknowledgement()),
        Just(asks()),
        Just(data(&message(""))),
        random.prop_map(|(kind, flags, stream, content)| frame(kind, flags, stream, &content)),
    ]
}

proptest! {
    /// A client is never judged differently for how its words were cut: nothing is taken for the agent's that would have
    /// become a probe.
    #[test]
    fn a_verdict_does_not_depend_on_how_the_frames_came(
        frames in prop::collection::vec(arbitrary_frame(), 0..8),
        cut: prop::sample::Index,
    ) {
        let sent = begun(&frames);
        let part = judge(&sent[..cut.index(sent.len() + 1)]);
        prop_assert!(part != Verdict::Other || judge(&sent) == Verdict::Other);
    }

    #[test]
    fn any_bytes_are_judged_and_none_that_differs_from_a_probe_within_its_head_is_one(
        at: prop::sample::Index,
        value: u8,
        more: Vec<u8>,
    ) {
        let mut sent = [PREFACE, &more].concat();
        let _ = judge(&sent);
        sent = probe("liveness").concat();
        let at = at.index(PREFACE.len() + HEAD);
        let same = std::mem::replace(&mut sent[at], value) == value;
        prop_assert_eq!(same, judge(&sent) == Verdict::Probe(Protocol::Grpc));
    }

    #[test]
    fn no_more_than_an_acknowledgement_is_kept_from_the_agent(
        frames in prop::collection::vec(arbitrary_frame(), 0..8),
        cut: prop::sample::Index,
    ) {
        let sent = begun(&frames);
        let sent = &sent[..cut.index(sent.len() + 1)];
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let passed = runtime.block_on(passed(sent));
        let missing = sent.len() - passed.len();
        prop_assert!(missing == 0 || missing == HEAD);
        let same = sent.iter().zip(&passed).take_while(|(sent, passed)| sent == passed).count();
        prop_assert_eq!(&sent[same + missing..], &passed[same..]);
    }
}
