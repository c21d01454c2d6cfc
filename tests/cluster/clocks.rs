//! Clocks that are an hour off: what is dated is refused by name where its time has not come, or is over, and nothing else
//! minds (fault 13).

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use sluice::datacenter::DatacenterSettings;
use sluice_client::{Source, Token, UploadOptions, WaitFor, unobserved};
use sluice_engine::context::{Scope, SessionContext};
use sluice_engine::hash::Root;
use sluice_engine::ids::{DcId, RevocationEpoch, SessionId, Timestamp};
use sluice_engine::limits::MAX_CONTEXT_LIFE_MS;
use sluice_engine::share::Shares;
use sluice_node::clock::{Clock, SystemClock};
use sluice_node::token::TokenGrant;
use sluice_proto::http::{FileStatus, State};
use sluice_proto::peer::StatusRequest;
use uuid::Uuid;

use crate::authority::dial;
use crate::bed::{A, B, Bed, C, MIB, TENANT, chunk, eventually, new_file, noise, read, shuffled};

const HOUR: i64 = 3_600_000;

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

/// A clock that is off by so many milliseconds.
#[derive(Debug)]
struct Off(i64);

impl Clock for Off {
    fn now(&self) -> Timestamp {
        Timestamp::new(SystemClock.now().number().saturating_add_signed(self.0))
    }
}

/// A right clock at dc-a, one that is ahead at dc-b, and one that is behind at dc-c. The port for peers is asked without a
/// share.
async fn start() -> Bed {
    let mut bed = Bed::divided(3, DatacenterSettings::default(), Shares::ONE);
    for (dc, off) in [(A, 0), (B, HOUR), (C, -HOUR)] {
        bed.cluster.config_mut(dc).unwrap().clock = Arc::new(Off(off));
        bed.cluster.start(dc).await.unwrap();
    }
    bed
}

/// A token that was minted when this clock told the time, and lives for so many hours.
fn minted(bed: &Bed, clock: Off, hours: u64) -> String {
    let grant = TokenGrant::everything(TENANT, "test", Duration::from_secs(hours * 3600));
    bed.material().token_mint().unwrap().mint(&grant, clock.now()).unwrap()
}

/// The bytes of a context as `issuer` issues it, whose clock is off by this.
fn issued(bed: &Bed, issuer: DcId, off: i64) -> Vec<u8> {
    let issued_at = Off(off).now();
    let context = SessionContext {
        session: SessionId::new(Uuid::now_v7()),
        tenant: TENANT,
        scopes: [Scope::Read].into_iter().collect(),
        rate: 0,
        quota: 0,
        quota_files: 0,
        revocation: RevocationEpoch::default(),
        issuer,
        issued_at,
        ends_at: issued_at.plus(MAX_CONTEXT_LIFE_MS),
        allowed: [].into(),
    };
    context.sign(&bed.material().context_key(issuer).unwrap()).as_bytes().to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contexts_and_tokens_that_are_an_hour_off_are_refused_with_what_is_tolerated() {
    let bed = start().await;
    let id = bed.create(A, MIB).await;
    let mut peer = dial(&bed, bed.material(), B).await.unwrap();
    let mut ask = async |context: Vec<u8>| {
        let request = StatusRequest { context: context.into(), id: id.as_bytes().to_vec().into() };
        peer.status(request).await
    };
    // That of dc-c ended five minutes after it was issued.
    for (issuer, off) in [(A, 0), (B, 50_000), (C, -350_000)] {
        let reply = ask(issued(&bed, issuer, off)).await.unwrap().into_inner();
        assert!(reply.status.is_some(), "{off} ms are tolerated");
    }
    for (issuer, off, code, words) in [
        (B, HOUR, "invalid-token", "ms ahead of this clock, 60000 ms are tolerated"),
        (C, -HOUR, "expired-token", "ms ago, 60000 ms are tolerated"),
    ] {
        let refused = ask(issued(&bed, issuer, off)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated, "{refused}");
        assert!(refused.message().ends_with(words), "{refused}");
        let said = |name: &str| refused.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(said("sluice-problem").as_deref(), Some(code));
        assert_eq!(said("sluice-hint").as_deref(), Some("compare the clocks of the datacenters"));
    }

    // Of tokens the same is told to whoever brings them.
    for (dc, token, code, words) in [
        (B, minted(&bed, Off(-HOUR), 1), "expired-token", "s ago, 60 s are tolerated"),
        (C, minted(&bed, Off(0), 1), "invalid-token", "s, 60 s are tolerated"),
    ] {
        let refused = bed.ask_with(&token, dc, Method::GET, "/files", &[], "").await.unwrap();
        assert_eq!((refused.status.as_u16(), refused.problem().as_str()), (401, code));
        let details: serde_json::Value = refused.json();
        assert!(details["detail"].as_str().unwrap().ends_with(words), "{details}");
        assert!(details["hint"].is_string(), "{details}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_commands_and_uploads_mind_no_clock_that_is_an_hour_off() {
    let bed = start().await;
    // One that counts by all three clocks.
    let token = minted(&bed, Off(-2 * HOUR), 6);
    let client = |dc: DcId| bed.client_with(&[dc], |config| config.token = Token::new(&token));
    for (seed, dc) in [(600, A), (601, B), (602, C)] {
        let bytes = noise(seed, 3 * MIB + 9);
        let options = UploadOptions { wait: WaitFor::Assembled, ..shuffled() };
        let sent = client(dc).upload(&Source::memory(bytes.clone()), &options, unobserved()).await.unwrap();
        assert_eq!(sent.root, Root::of_bytes(&bytes));
        assert!(read(&client(dc), sent.id, sent.root).await == bytes, "at {dc}");
    }

    // Half of a file comes to its home, and half to another, from which the home has to fetch it.
    for (seed, home, other) in [(610, A, B), (611, B, A), (612, A, C), (613, C, A), (614, B, C), (615, C, B)]
    {
        let bytes = noise(seed, 2 * MIB);
        let id = Uuid::now_v7();
        let path = format!("/files/{id}");
        let new = serde_json::to_vec(&new_file(id, bytes.len())).unwrap();
        let created = bed.ask_with(&token, home, Method::POST, "/files", &JSON, new).await.unwrap();
        assert_eq!(created.status, 201, "{:?}", created.body);
        for (dc, index) in [(home, 0), (other, 1)] {
            let (path, run) = (format!("{path}/chunks/{index}"), chunk(&bytes, index));
            let put = bed.ask_with(&token, dc, Method::PUT, &path, &[], run).await.unwrap();
            assert!(put.status.is_success(), "{:?}", put.body);
        }
        for dc in [home, other] {
            let status = eventually("an assembled file", async || {
                let answer = bed.ask_with(&token, dc, Method::GET, &path, &[], "").await.unwrap();
                let status = (answer.status == 200).then(|| answer.json::<FileStatus>())?;
                (status.state == State::Assembled).then_some(status)
            })
            .await;
            assert_eq!(status.root, Some(Root::of_bytes(&bytes).to_string()), "at {dc}");
        }
        assert!(read(&client(home), id, Root::of_bytes(&bytes)).await == bytes, "at {home}");
        // What needs the session in both is refused as what passes, and never as something else.
        let content = format!("{path}/content");
        let answer = bed.ask_with(&token, other, Method::GET, &content, &[], "").await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.problem().as_str()), (503, "unavailable"));
    }
}
