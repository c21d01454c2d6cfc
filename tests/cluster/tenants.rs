//! Tenants and their tokens: revoked, limited, kept apart.

use std::time::Duration;

use http::Method;
use sluice_client::WaitFor;
use sluice_engine::context::Scope;
use sluice_engine::ids::{DcId, RevocationEpoch, TenantId};
use sluice_node::clock::{Clock, SystemClock};
use sluice_node::token::{TokenGrant, UnverifiedToken};
use sluice_proto::http::{Revoke, RevokedTokens, State, TenantStatus};
use sluice_proto::ingest::{CreateRequest, DeleteRequest, ListRequest, PutRequest};
use uuid::Uuid;

use crate::apart::run_over_grpc;
use crate::bed::{A, B, Bed, C, MIB, TENANT, Web, chunk, eventually, new_file, noise};
use crate::ingest::problem;

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

fn grant() -> TokenGrant {
    let epoch = RevocationEpoch::new(SystemClock.now().number());
    TokenGrant { epoch, ..TokenGrant::everything(TENANT, "test", Duration::from_secs(3600)) }
}

impl Web {
    fn operator(&self) -> String {
        let everything = TokenGrant::everything(TenantId::new(0), "", Duration::from_secs(3600));
        self.mint(&TokenGrant { scopes: vec![Scope::Operate], ..everything })
    }

    async fn revoke(&self, dc: DcId, revoke: &Revoke) -> RevokedTokens {
        let body = serde_json::to_vec(revoke).unwrap();
        let path = "/admin/revocations";
        let answer = self.ask_with(&self.operator(), dc, Method::POST, path, &JSON, body).await.unwrap();
        assert_eq!(answer.status, 200, "{:?}", answer.body);
        answer.json()
    }

    /// The status that a list is answered with.
    async fn lists(&self, dc: DcId, token: &str) -> u16 {
        self.ask_with(token, dc, Method::GET, "/files", &[], "").await.unwrap().status.as_u16()
    }

    /// What a datacenter knows of the tenant.
    async fn tenant(&self, dc: DcId) -> TenantStatus {
        let path = format!("/admin/tenants/{}", TENANT.number());
        let answer = self.ask_with(&self.operator(), dc, Method::GET, &path, &[], "").await.unwrap();
        assert_eq!(answer.status, 200, "{:?}", answer.body);
        answer.json()
    }

    async fn is_refused(&self, dc: DcId, token: &str) {
        eventually("the revocation", async || (self.lists(dc, token).await == 401).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_revoked_anywhere_is_revoked_everywhere_and_for_good() {
    let mut bed = Bed::start(3).await;
    let (one, two) = (bed.mint(&grant()), bed.mint(&grant()));
    for dc in [A, B, C] {
        assert_eq!(bed.lists(dc, &one).await, 200);
        assert_eq!(bed.lists(dc, &two).await, 200);
    }
    // dc-c is away, and a context of the token is in use everywhere.
    bed.cluster.kill(C).await;
    let session = Some(UnverifiedToken::read(&one).unwrap().session.uuid());
    let revoke = Revoke { tenant: TENANT.number(), session, epoch: None };
    let done = bed.revoke(A, &revoke).await;
    assert_eq!((done.session, done.dc.as_str()), (session, "dc-a"));
    // At once where it was said, soon where it was not, and when whoever was away is back; no other token suffers.
    assert_eq!(bed.lists(A, &one).await, 401);
    bed.is_refused(B, &one).await;
    bed.cluster.start(C).await.unwrap();
    bed.is_refused(C, &one).await;
    // Whoever said it need not be there: dc-c has it from its own disk, dc-b tells nobody anything new.
    bed.cluster.kill(A).await;
    bed.cluster.kill(C).await;
    bed.cluster.start(C).await.unwrap();
    assert_eq!(bed.lists(C, &one).await, 401, "from its first request on");
    bed.cluster.start(A).await.unwrap();
    for dc in [A, B, C] {
        assert_eq!(bed.lists(dc, &one).await, 401);
        assert_eq!(bed.lists(dc, &two).await, 200);
    }

    // All of the tenant, and what is minted afterwards.
    let all = Revoke { tenant: TENANT.number(), session: None, epoch: None };
    let done = bed.revoke(B, &all).await;
    for dc in [A, B, C] {
        bed.is_refused(dc, &two).await;
    }
    let newer = bed.mint(&TokenGrant { epoch: RevocationEpoch::new(done.epoch), ..grant() });
    let stranger = bed.mint(&TokenGrant { tenant: TenantId::new(8), ..grant() });
    for dc in [A, B, C] {
        assert_eq!(bed.lists(dc, &newer).await, 200);
        assert_eq!(bed.lists(dc, &stranger).await, 200);
        let status = bed.tenant(dc).await;
        assert_eq!(status.revoked_before, done.epoch);
        assert_eq!(status.revoked_sessions, 0, "covered by that of the tenant");
        assert_eq!((status.stored_bytes, status.files), (0, 0));
    }
    let theirs = bed.ask_with(&newer, A, Method::GET, "/admin/tenants/7", &[], "").await.unwrap();
    assert_eq!((theirs.status.as_u16(), theirs.problem().as_str()), (403, "forbidden"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_bounds_what_is_stored_and_deleting_makes_room() {
    let mut bed = Bed::start(1).await;
    let limited = bed.mint(&TokenGrant { quota: 3 * MIB as u64, ..grant() });
    let ask = async |bed: &Bed, method: Method, path: &str, headers: &[(&str, &str)], body: Vec<u8>| {
        bed.ask_with(&limited, A, method, path, headers, body).await.unwrap()
    };
    let create = async |bed: &Bed, id: Uuid, size: usize| {
        let body = serde_json::to_vec(&new_file(id, size)).unwrap();
        ask(bed, Method::POST, "/files", &JSON, body).await
    };
    let over_grpc = |size: usize, body: Option<bytes::Bytes>| CreateRequest {
        id: Uuid::now_v7().to_string(),
        size: body.is_none().then_some(size as u64),
        body,
        ..CreateRequest::default()
    };
    let mut ingest = bed.ingest(A, &limited);
    // A file for which there is no room is not begun.
    let refused = create(&bed, Uuid::now_v7(), 4 * MIB).await;
    assert_eq!((refused.status.as_u16(), refused.problem().as_str()), (403, "quota"));
    assert_eq!(problem(ingest.create(over_grpc(4 * MIB, None)).await), "quota");
    // What came before the token with the quota counts, small files too.
    let small = Uuid::now_v7();
    let whole = async |bed: &Bed, id: Uuid, len: usize| {
        let said = format!(r#"{{"id":"{id}"}}"#);
        ask(bed, Method::POST, "/files", &[("file-metadata", &said)], noise(7, len).to_vec()).await
    };
    assert_eq!(whole(&bed, small, MIB / 2).await.status, 201);
    let id = Uuid::now_v7();
    assert_eq!(create(&bed, id, 2 * MIB).await.status, 201);
    let bytes = noise(71, 2 * MIB);
    let put = async |bed: &Bed, id: Uuid, index: u64, bytes: &bytes::Bytes| {
        let path = format!("/files/{id}/chunks/{index}");
        ask(bed, Method::PUT, &path, &[], bytes.to_vec()).await
    };
    for index in 0..2 {
        assert_eq!(put(&bed, id, index, &chunk(&bytes, index as usize)).await.status, 200);
    }
    assert_eq!(whole(&bed, Uuid::now_v7(), MIB).await.problem(), "quota", "half a MiB is left");
    let last = Uuid::now_v7();
    assert_eq!(whole(&bed, last, MIB / 2).await.status, 201);
    // Now nothing is left: also of a file that other tokens of the tenant began.
    let other = bed.create(A, 8 * MIB).await;
    assert_eq!(put(&bed, other, 0, &chunk(&bytes, 0)).await.problem(), "quota");
    assert_eq!(whole(&bed, Uuid::now_v7(), 0).await.problem(), "quota");
    // Nor through the other door, in any of its calls.
    let sent = |index: u64| PutRequest {
        id: other.to_string(),
        index,
        data: chunk(&bytes, index as usize),
        ..PutRequest::default()
    };
    assert_eq!(problem(ingest.put(sent(0)).await), "quota");
    assert_eq!(problem(ingest.create(over_grpc(0, Some(noise(7, 5)))).await), "quota");
    assert_eq!(problem(ingest.create(over_grpc(MIB, None)).await), "quota");
    // Nor for chunks whose metadata nobody knows.
    assert_eq!(put(&bed, Uuid::now_v7(), 0, &chunk(&bytes, 0)).await.problem(), "quota");
    let tiny = bed.create(A, 5).await;
    let refused = run_over_grpc(&mut ingest, tiny, 0, noise(7, 5)).await;
    assert!(refused.contains("Refused") && refused.contains("\"quota\""), "{refused}");

    // After a restart it is counted anew.
    bed.cluster.kill(A).await;
    bed.cluster.start(A).await.unwrap();
    assert_eq!(put(&bed, other, 0, &chunk(&bytes, 0)).await.problem(), "quota");
    let deleted = ask(&bed, Method::DELETE, &format!("/files/{last}"), &[], Vec::new()).await;
    assert_eq!(deleted.status, 204);
    assert_eq!(whole(&bed, Uuid::now_v7(), MIB / 2).await.status, 201);
    assert_eq!(put(&bed, other, 0, &chunk(&bytes, 0)).await.problem(), "quota");
    assert_eq!(ask(&bed, Method::DELETE, &format!("/files/{id}"), &[], Vec::new()).await.status, 204);
    assert_eq!(put(&bed, other, 0, &chunk(&bytes, 0)).await.status, 200);
    let mut ingest = bed.ingest(A, &limited);
    ingest.put(sent(1)).await.unwrap();
    // Chunks without metadata count.
    assert_eq!(ask(&bed, Method::DELETE, &format!("/files/{other}"), &[], Vec::new()).await.status, 204);
    let orphan = Uuid::now_v7();
    assert_eq!(put(&bed, orphan, 0, &chunk(&bytes, 0)).await.status, 202);
    assert_eq!(put(&bed, orphan, 1, &chunk(&bytes, 1)).await.status, 202);
    assert_eq!(put(&bed, orphan, 2, &chunk(&bytes, 0)).await.problem(), "quota");
    assert_eq!(put(&bed, Uuid::now_v7(), 0, &chunk(&bytes, 0)).await.problem(), "quota");
    // They are part of the file that they turn out to belong to, and count once.
    assert_eq!(create(&bed, Uuid::now_v7(), 2 * MIB).await.problem(), "quota");
    assert_eq!(create(&bed, orphan, 2 * MIB + 1).await.problem(), "quota");
    assert_eq!(create(&bed, orphan, 2 * MIB).await.status, 201);
    assert_eq!(create(&bed, Uuid::now_v7(), 1).await.problem(), "quota");
    // Another tenant has its own.
    let stranger = bed.mint(&TokenGrant { tenant: TenantId::new(8), quota: MIB as u64, ..grant() });
    let body = serde_json::to_vec(&new_file(Uuid::now_v7(), MIB)).unwrap();
    assert_eq!(bed.ask_with(&stranger, A, Method::POST, "/files", &JSON, body).await.unwrap().status, 201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_of_files_bounds_how_many_there_are_at_every_door_and_deleting_makes_room() {
    let mut bed = Bed::start(1).await;
    let limited = bed.mint(&TokenGrant { quota_files: 3, ..grant() });
    let ask = async |bed: &Bed, method: Method, path: &str, headers: &[(&str, &str)], body: Vec<u8>| {
        bed.ask_with(&limited, A, method, path, headers, body).await.unwrap()
    };
    let create = async |bed: &Bed, id: Uuid| {
        let body = serde_json::to_vec(&new_file(id, 2 * MIB)).unwrap();
        ask(bed, Method::POST, "/files", &JSON, body).await
    };
    let whole = async |bed: &Bed, id: Uuid| {
        let said = format!(r#"{{"id":"{id}"}}"#);
        ask(bed, Method::POST, "/files", &[("file-metadata", &said)], b"small".to_vec()).await
    };
    let over_grpc = |id: Uuid, body: Option<&'static [u8]>| CreateRequest {
        id: id.to_string(),
        size: body.is_none().then_some(2 * MIB as u64),
        body: body.map(Into::into),
        ..CreateRequest::default()
    };
    let is_full = async |bed: &Bed| {
        let refused = create(bed, Uuid::now_v7()).await;
        assert_eq!((refused.status.as_u16(), refused.problem().as_str()), (403, "quota"));
        let details: serde_json::Value = refused.json();
        assert_eq!(details["detail"], "3 of 3 files are in this datacenter");
        assert_eq!(whole(bed, Uuid::now_v7()).await.problem(), "quota");
        let mut ingest = bed.ingest(A, &limited);
        assert_eq!(problem(ingest.create(over_grpc(Uuid::now_v7(), None)).await), "quota");
        assert_eq!(problem(ingest.create(over_grpc(Uuid::now_v7(), Some(b"small"))).await), "quota");
        assert_eq!(bed.tenant(A).await.files, 3);
    };

    // What came before the token with the quota counts, finished or not, large or small.
    let (unfinished, small) = (bed.create(A, 2 * MIB).await, Uuid::now_v7());
    let kept = bed.post_whole(A, &serde_json::json!({ "id": small }), "small").await.unwrap();
    assert_eq!(kept.status, 201);
    let last = Uuid::now_v7();
    assert_eq!(create(&bed, last).await.status, 201);
    is_full(&bed).await;
    // What is there goes on, and said again it is what it was.
    let mut ingest = bed.ingest(A, &limited);
    assert_eq!(create(&bed, last).await.status, 200);
    assert_eq!(whole(&bed, small).await.status, 200);
    assert!(!ingest.create(over_grpc(small, Some(b"small"))).await.unwrap().into_inner().created);
    for index in 0..2 {
        let path = format!("/files/{unfinished}/chunks/{index}");
        assert_eq!(ask(&bed, Method::PUT, &path, &[], noise(index, MIB).to_vec()).await.status, 200);
    }
    let sent = PutRequest { id: last.to_string(), data: noise(0, MIB), ..PutRequest::default() };
    ingest.put(sent).await.unwrap();
    bed.reach(A, unfinished, State::Assembled).await;
    is_full(&bed).await;

    // After a restart they are counted anew, and none is forgotten.
    bed.cluster.kill(A).await;
    bed.cluster.start(A).await.unwrap();
    is_full(&bed).await;
    // Deleting makes room, of one in every state, through every door.
    let mut ingest = bed.ingest(A, &limited);
    for gone in [small, last, unfinished] {
        if gone == last {
            ingest.delete(DeleteRequest { id: gone.to_string() }).await.unwrap();
        } else {
            let path = format!("/files/{gone}");
            assert_eq!(ask(&bed, Method::DELETE, &path, &[], Vec::new()).await.status, 204);
        }
        assert_eq!(bed.tenant(A).await.files, 2);
        let next = Uuid::now_v7();
        if gone == small {
            assert_eq!(whole(&bed, next).await.status, 201);
        } else {
            assert!(ingest.create(over_grpc(next, None)).await.unwrap().into_inner().created);
        }
        is_full(&bed).await;
    }
    // What was deleted stays so after a restart, and takes no room.
    bed.cluster.kill(A).await;
    bed.cluster.start(A).await.unwrap();
    is_full(&bed).await;
    // Another tenant has its own.
    let stranger = bed.mint(&TokenGrant { tenant: TenantId::new(8), quota_files: 1, ..grant() });
    let theirs = async |id: Uuid| {
        let body = serde_json::to_vec(&new_file(id, MIB)).unwrap();
        bed.ask_with(&stranger, A, Method::POST, "/files", &JSON, body).await.unwrap().status.as_u16()
    };
    assert_eq!((theirs(Uuid::now_v7()).await, theirs(Uuid::now_v7()).await), (201, 403));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_came_elsewhere_counts_where_it_is_listed_until_it_is_deleted_anywhere() {
    let bed = Bed::start(2).await;
    let limited = bed.mint(&TokenGrant { quota_files: 1, ..grant() });
    let create = async || {
        let body = serde_json::to_vec(&new_file(Uuid::now_v7(), MIB)).unwrap();
        bed.ask_with(&limited, B, Method::POST, "/files", &JSON, body).await.unwrap()
    };
    // Counted there before it comes.
    assert_eq!(bed.tenant(B).await.files, 0);
    let (id, bytes) = (bed.create(A, 2 * MIB).await, noise(75, 2 * MIB));
    bed.put(B, id, 1, chunk(&bytes, 1)).await.unwrap();
    eventually("the record", async || (bed.tenant(B).await.files == 1).then_some(())).await;
    assert_eq!(create().await.problem(), "quota");
    assert_eq!(bed.delete(A, id).await, 204);
    eventually("the end", async || (bed.tenant(B).await.files == 0).then_some(())).await;
    // Of other shares it is remembered for a moment what was used there.
    eventually("room", async || (create().await.status == 201).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rate_is_kept_over_all_sessions_of_a_tenant_and_no_other_waits() {
    let bed = Bed::start(1).await;
    // A byte a second: the first request is ahead of it by hours.
    let slow = || bed.mint(&TokenGrant { rate: 1, ..grant() });
    let (one, two) = (slow(), slow());
    assert_eq!(bed.lists(A, &one).await, 200);
    let list = bed.ask_with(&two, A, Method::GET, "/files", &[], "").await.unwrap();
    assert_eq!((list.status.as_u16(), list.problem().as_str()), (429, "rate-limited"));
    assert_eq!(list.headers["retry-after"], "60");
    let (id, bytes) = (bed.create(A, MIB).await, noise(72, MIB).to_vec());
    let said = format!(r#"{{"id":"{}"}}"#, Uuid::now_v7());
    for (method, path, headers) in [
        (Method::PUT, format!("/files/{id}/chunks/0"), &[][..]),
        (Method::POST, "/files".to_owned(), &[("file-metadata", said.as_str())][..]),
    ] {
        let answer = bed.ask_with(&one, A, method, &path, headers, bytes.clone()).await.unwrap();
        assert_eq!(answer.problem(), "rate-limited", "{path}");
    }
    let mut ingest = bed.ingest(A, &one);
    let new = |body: Option<bytes::Bytes>| CreateRequest {
        id: Uuid::now_v7().to_string(),
        size: body.is_none().then_some(5),
        body,
        ..CreateRequest::default()
    };
    assert_eq!(problem(ingest.list(ListRequest::default()).await), "rate-limited");
    assert_eq!(problem(ingest.create(new(None)).await), "rate-limited");
    assert_eq!(problem(ingest.create(new(Some(noise(72, 5)))).await), "rate-limited");
    let sent = PutRequest { id: id.to_string(), data: bytes.into(), ..PutRequest::default() };
    assert_eq!(problem(ingest.put(sent).await), "rate-limited");
    let tiny = bed.create(A, 5).await;
    let refused = run_over_grpc(&mut ingest, tiny, 0, noise(72, 5)).await;
    assert!(refused.contains("Refused") && refused.contains("\"rate-limited\""), "{refused}");
    // Other tenants do not wait for this one, and a token without a rate does not either.
    let other = bed.mint(&TokenGrant { tenant: TenantId::new(8), rate: 1 << 30, ..grant() });
    assert_eq!(bed.lists(A, &other).await, 200);
    let sent = bed.upload(&[A], noise(73, MIB), WaitFor::Assembled).await;
    assert_eq!(bed.reach(A, sent.id, State::Assembled).await.size, Some(MIB as u64));
}
