//! [`Keeper`], from process to process: what a porter asks the worker that keeps the bucket.
//!
//! Whatever is asked may be asked again: a claim is shared by whoever makes it once more, and one that was settled is
//! lost to whoever settles it again, who then finds the run recorded. So calls are made again for a while, also when the
//! keeper is being replaced.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use axum::Router;
use axum::extract::State as AppState;
use axum::routing::post;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sluice_engine::geometry::Run;
use sluice_engine::ids::{FileId, TenantId};
use sluice_proto::problem::Refusal;
use sluice_store::StoreError;
use sluice_store::s3::{Carried, ChunkPlace, Claimed, Keeper, Landed, MAX_PLACES, PorterClaim, PorterId};

use super::forms::{Answered, Part, Refused, file, index, value};
use super::unreachable;
use crate::call::{Answer, Call, garbled, misunderstood};
use crate::caller::{Caller, Head};
use crate::owner::Owner;

const CLAIM: &str = "/v1/keeper/claim";
const SETTLE: &str = "/v1/keeper/settle";
const PLACES: &str = "/v1/keeper/places";

#[derive(Serialize, Deserialize)]
struct WireCarried {
    porter: u64,
    file: String,
    tenant: u64,
    start: u64,
    len: u64,
    /// In hexadecimal digits.
    values: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WireClaimed {
    Held,
    Put { claim: String, key: String, new_chunks: u64 },
}

#[derive(Serialize, Deserialize)]
struct Settled {
    claim: String,
    landed: WireLanded,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WireLanded {
    Yes,
    No,
    Unknown,
}

#[derive(Serialize, Deserialize)]
struct WirePlace {
    key: String,
    start: u64,
    end: u64,
    value: String,
    #[serde(default)]
    damaged: bool,
}

impl WireCarried {
    fn of(carried: &Carried) -> Self {
        Self {
            porter: carried.porter.0,
            file: carried.file.to_string(),
            tenant: carried.tenant.number(),
            start: carried.run.start().number(),
            len: carried.len,
            values: carried.values.iter().map(ToString::to_string).collect(),
        }
    }

    fn parse(self) -> Result<Carried, Refusal> {
        let run = Run::new(index(self.start)?, self.values.len() as u64).map_err(garbled)?;
        Ok(Carried {
            porter: PorterId(self.porter),
            file: file(&self.file)?,
            tenant: TenantId::new(self.tenant),
            run,
            len: self.len,
            values: self.values.iter().map(|text| value(text)).collect::<Result<_, _>>()?,
        })
    }
}

fn claim(text: &str) -> Result<PorterClaim, Refusal> {
    u128::from_str_radix(text, 16).map(PorterClaim).map_err(garbled)
}

impl WireClaimed {
    fn of(claimed: Claimed) -> Self {
        match claimed {
            Claimed::Held => Self::Held,
            Claimed::Put { claim, key, new_chunks } => {
                Self::Put { claim: format!("{:032x}", claim.0), key, new_chunks }
            }
        }
    }

    fn parse(self) -> Result<Claimed, Refusal> {
        Ok(match self {
            Self::Held => Claimed::Held,
            Self::Put { claim: text, key, new_chunks } => {
                Claimed::Put { claim: claim(&text)?, key, new_chunks }
            }
        })
    }
}

impl WirePlace {
    fn of(place: ChunkPlace) -> Self {
        let ChunkPlace { key, bytes, value, is_damaged } = place;
        Self { key, start: bytes.start, end: bytes.end, value: value.to_string(), damaged: is_damaged }
    }

    fn parse(self) -> Result<ChunkPlace, Refusal> {
        let value = value(&self.value)?;
        if self.end <= self.start || self.end - self.start > sluice_engine::limits::CHUNK_LEN {
            return Err(misunderstood("a chunk of no length that one has"));
        }
        Ok(ChunkPlace { key: self.key, bytes: self.start..self.end, value, is_damaged: self.damaged })
    }
}

type Served = AppState<Arc<dyn Keeper>>;

/// What serves `keeper` to porters.
pub fn serve_keeper(keeper: Arc<dyn Keeper>) -> Router {
    Router::new()
        .route(CLAIM, post(claim_run))
        .route(SETTLE, post(settle))
        .route(PLACES, post(places))
        .with_state(keeper)
}

async fn claim_run(AppState(keeper): Served, call: Call<WireCarried>) -> Answer<Answered<WireClaimed>> {
    let claimed = async { Ok(WireClaimed::of(keeper.claim(call.arguments.parse()?).await?)) };
    Answer(Ok(claimed.await))
}

async fn settle(AppState(keeper): Served, call: Call<Settled>) -> Answer<Answered<()>> {
    let settled = async {
        let landed = match call.arguments.landed {
            WireLanded::Yes => Landed::Yes,
            WireLanded::No => Landed::No,
            WireLanded::Unknown => Landed::Unknown,
        };
        Ok(keeper.settle(claim(&call.arguments.claim)?, landed).await?)
    };
    Answer(Ok(settled.await))
}

async fn places(AppState(keeper): Served, call: Call<Part>) -> Answer<Answered<Vec<Option<WirePlace>>>> {
    let places = async {
        let Part { file: id, start, end } = call.arguments;
        let places = keeper.places(file(&id)?, start..end).await?;
        Ok(places.into_iter().map(|place| place.map(WirePlace::of)).collect())
    };
    Answer(Ok(places.await))
}

/// The keeper in another process.
#[derive(Clone, Debug)]
pub struct RemoteKeeper(Owner);

impl RemoteKeeper {
    /// Asked by way of `caller`.
    pub fn new(caller: Caller) -> Self {
        Self(Owner::keeper(caller))
    }

    async fn ask<A: DeserializeOwned>(
        &self,
        path: &'static str,
        arguments: &impl Serialize,
    ) -> Result<A, StoreError> {
        let answer = self.0.ask_with(Head::own(path), arguments, Bytes::new(), std::time::Duration::ZERO);
        match answer.await.map_err(unreachable)? {
            Ok(answer) => Ok(answer),
            Err(Refused::Store(error)) => Err(error.parse().unwrap_or_else(unreachable)),
            Err(
                refused @ (Refused::NotHeld | Refused::NoShare | Refused::Fence(_) | Refused::Garbled(_)),
            ) => Err(unreachable(format!("{refused:?}"))),
        }
    }
}

#[async_trait]
impl Keeper for RemoteKeeper {
    async fn claim(&self, carried: Carried) -> Result<Claimed, StoreError> {
        let claimed: WireClaimed = self.ask(CLAIM, &WireCarried::of(&carried)).await?;
        claimed.parse().map_err(unreachable)
    }

    async fn settle(&self, claim: PorterClaim, landed: Landed) -> Result<(), StoreError> {
        let landed = match landed {
            Landed::Yes => WireLanded::Yes,
            Landed::No => WireLanded::No,
            Landed::Unknown => WireLanded::Unknown,
        };
        self.ask(SETTLE, &Settled { claim: format!("{:032x}", claim.0), landed }).await
    }

    async fn places(&self, file: FileId, range: Range<u64>) -> Result<Vec<Option<ChunkPlace>>, StoreError> {
        let arguments = Part { file: file.to_string(), start: range.start, end: range.end };
        let places: Vec<Option<WirePlace>> = self.ask(PLACES, &arguments).await?;
        if places.len() as u64 > MAX_PLACES {
            return Err(unreachable("more chunks than were asked for"));
        }
        let parse = |place: Option<WirePlace>| place.map(WirePlace::parse).transpose();
        places.into_iter().map(parse).collect::<Result<_, _>>().map_err(unreachable)
    }
}
