#![allow(clippy::unwrap_used)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;
use crate::{
    proto::{
        control::{ListRequest, ListResponse},
        control_ttrpc::Control,
    },
    server,
};

struct Shim(Vec<Container>);

#[async_trait]
impl Control for Shim {
    async fn list(&self, _: &TtrpcContext, _: ListRequest) -> ttrpc::Result<ListResponse> {
        Ok(ListResponse { containers: self.0.clone(), ..ListResponse::default() })
    }
}

fn container(namespace: &str, sandbox: &str, id: &str) -> Container {
    Container {
        id: id.to_owned(),
        namespace: namespace.to_owned(),
        sandbox_id: sandbox.to_owned(),
        is_sandbox: sandbox == id,
        ..Container::default()
    }
}

/// Serves a sandbox of these containers; the first one names the socket.
async fn shim(root: &Path, namespace: &str, ids: &[&str]) -> Server {
    let listener = socket::listen(root, namespace, ids[0]).unwrap();
    let containers = ids.iter().map(|id| container(namespace, ids[0], id)).collect();
    server::serve(listener, Arc::new(Shim(containers))).await.unwrap()
}

fn quick() -> Timeouts {
    Timeouts { query: Duration::from_millis(300), ..Timeouts::default() }
}

fn survey_of(containers: &[(&str, &str)]) -> Survey {
    Survey {
        containers: containers
            .iter()
            .map(|(namespace, id)| Found {
                endpoint: Endpoint {
                    namespace: (*namespace).to_owned(),
                    name: (*id).to_owned(),
                    path: format!("/r/{namespace}/{id}.sock").into(),
                },
                container: container(namespace, "", id),
            })
            .collect(),
        unreachable: Vec::new(),
    }
}

#[test]
fn an_id_is_found_whole_or_by_its_start() {
    let survey = survey_of(&[("default", "abc"), ("default", "abcd"), ("default", "x1")]);
    assert_eq!(survey.select("abc").unwrap().container.id, "abc", "the whole id wins over a longer one");
    assert_eq!(survey.select("abcd").unwrap().container.id, "abcd");
    assert_eq!(survey.select("x").unwrap().container.id, "x1");
}

#[test]
fn an_unknown_id_an_ambiguous_start_and_an_id_in_two_namespaces_have_their_own_errors() {
    let survey =
        survey_of(&[("default", "abc"), ("default", "abd"), ("default", "same"), ("k8s.io", "same")]);
    let error = |prefix| survey.select(prefix).unwrap_err().to_string();
    assert_eq!(error("z"), "no container or sandbox \"z\": `agentcube ps` lists them");
    assert_eq!(error("ab"), "\"ab\" is the start of several ids: default/abc, default/abd; give more of it");
    let several = "\"same\" exists in the namespaces default, k8s.io: choose one with -n";
    assert_eq!(error("same"), several);
    assert_eq!(error("sa"), several);
    assert!(matches!(survey.select("").unwrap_err(), FindError::Ambiguous { .. }));
}

#[tokio::test]
async fn a_survey_hears_all_shims_and_names_those_that_do_not_answer() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path();
    let _shims = [
        shim(root, "k8s.io", &["pod2", "a"]).await,
        shim(root, "k8s.io", &["pod1", "z", "b"]).await,
        shim(root, "default", &["solo"]).await,
    ];
    drop(socket::listen(root, "k8s.io", "dead").unwrap());
    let _hanging = socket::listen(root, "k8s.io", "hanging").unwrap();

    let survey = survey(root, None, quick()).await.unwrap();
    let ids: Vec<_> = survey.containers.iter().map(|found| found.container.id.as_str()).collect();
    assert_eq!(ids, ["solo", "pod1", "b", "z", "pod2", "a"]);
    let silent: Vec<_> =
        survey.unreachable.iter().map(|shim| (shim.endpoint.name.as_str(), shim.error.name())).collect();
    assert_eq!(silent, [("dead", "unavailable"), ("hanging", "timeout")]);

    let error = survey.select("dead").unwrap_err();
    assert!(matches!(&error, FindError::Unreachable { id, .. } if id == "dead"), "{error}");
    let error = survey.select("nobody").unwrap_err();
    assert!(matches!(error, FindError::NotFound { unreachable: 2, .. }), "{error}");
}

#[tokio::test]
async fn many_hanging_shims_are_waited_for_together() {
    let tmp = tempfile::tempdir().unwrap();
    let listeners: Vec<_> =
        (0..40).map(|i| socket::listen(tmp.path(), "default", &format!("hanging{i}")).unwrap()).collect();
    let _shim = shim(tmp.path(), "default", &["alive"]).await;
    let start = Instant::now();
    let survey = survey(tmp.path(), None, quick()).await.unwrap();
    assert_eq!((survey.containers.len(), survey.unreachable.len()), (1, listeners.len()));
    assert!(start.elapsed() < quick().query * 10, "one after the other would take 40 timeouts");
}

#[tokio::test]
async fn find_looks_in_one_namespace_when_told() {
    let tmp = tempfile::tempdir().unwrap();
    let _shims = [shim(tmp.path(), "k8s.io", &["same"]).await, shim(tmp.path(), "default", &["same"]).await];
    let find = async |namespace| find(tmp.path(), namespace, "same", quick()).await;
    assert!(matches!(find(None).await, Err(FindError::SeveralNamespaces { .. })));
    assert_eq!(find(Some("k8s.io")).await.unwrap().container.namespace, "k8s.io");
    assert!(matches!(find(Some("..")).await, Err(FindError::Socket(_))));
}

#[tokio::test]
async fn a_node_without_sockets_has_no_containers() {
    let tmp = tempfile::tempdir().unwrap();
    let survey = survey(&tmp.path().join("agentcube"), None, quick()).await.unwrap();
    assert!(survey.containers.is_empty() && survey.unreachable.is_empty());
}
