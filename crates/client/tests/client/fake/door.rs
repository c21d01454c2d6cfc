//! The operations of the stand-in's door.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::ChainingValue;
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::span::Place;
use sluice_engine::span_tree::{merge_chunks, proof_places};
use sluice_proto::http::{
    About, ChunkReceipt, CreateFile, DcInfo, FileEntry, FilePage, ProblemDetails, ProofNode, SettleFile,
    State, TreeNode,
};
use sluice_proto::problem::{Problem, Refusal};
use uuid::Uuid;

use super::{FakeDc, FakeFile, TOKEN};

impl FakeDc {
    pub(super) fn refuse(&self, refusal: Refusal) -> Response<Full<Bytes>> {
        let problem = refusal.problem;
        let details = ProblemDetails {
            kind: format!("/problems/{problem}"),
            title: problem.title().into(),
            status: problem.status(),
            detail: refusal.detail,
            hint: refusal.hint,
            dc: self.name.clone(),
            trace: "0123456789abcdef0123456789abcdef".into(),
        };
        let mut response = self.json(problem.status(), &details);
        if let Some(after) = refusal.retry_after {
            response.headers_mut().insert("retry-after", after.as_secs().to_string().parse().unwrap());
        }
        response
    }

    fn json(&self, status: u16, body: &impl serde::Serialize) -> Response<Full<Bytes>> {
        Response::builder()
            .status(status)
            .header("sluice-dc", &self.name)
            .header("trace-id", "0123456789abcdef0123456789abcdef")
            .body(Full::from(serde_json::to_vec(body).unwrap()))
            .unwrap()
    }

    pub(super) async fn route(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Refusal> {
        let authorized = request
            .headers()
            .get("authorization")
            .is_some_and(|v| v.as_bytes() == format!("Bearer {TOKEN}").as_bytes());
        if !authorized {
            return Err(Refusal::new(Problem::InvalidToken, "the token is not one of this cluster"));
        }
        let path = request.uri().path().to_owned();
        let query: BTreeMap<String, String> = request
            .uri()
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let id = |text: &str| {
            text.parse::<Uuid>().map_err(|_| Refusal::new(Problem::InvalidId, format!("{text:?} is no UUID")))
        };
        match (request.method().clone(), parts.as_slice()) {
            (Method::GET, ["v1"]) => Ok(self.about()),
            (Method::POST, ["v1", "files"]) => self.create(request).await,
            (Method::GET, ["v1", "files"]) => Ok(self.list(&query)),
            (Method::GET, ["v1", "files", file]) => self.status(id(file)?, &query).await,
            (Method::PATCH, ["v1", "files", file]) => self.settle(id(file)?, request).await,
            (Method::DELETE, ["v1", "files", file]) => self.remove(id(file)?),
            (Method::PUT, ["v1", "files", file, "chunks", index]) => {
                self.put(id(file)?, index.parse().unwrap(), request).await
            }
            (Method::GET, ["v1", "files", file, "content"]) => self.content(id(file)?, &request),
            (Method::GET, ["v1", "files", file, "tree"]) => self.tree(id(file)?, &query),
            _ => Err(Refusal::new(Problem::NoRoute, path.clone())),
        }
    }

    fn about(&self) -> Response<Full<Bytes>> {
        let urls = self.files.urls.lock().unwrap().clone();
        let dcs = self.names.iter().enumerate().map(|(i, name)| DcInfo {
            name: name.clone(),
            url: urls.get(i).cloned(),
            drain: None,
            reachable: true,
        });
        let about =
            About { cluster: "test".into(), dc: self.name.clone(), dcs: dcs.collect(), version: "0".into() };
        self.json(200, &about)
    }

    async fn create(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Refusal> {
        let said = request.headers().get("file-metadata").cloned();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let create: CreateFile = serde_json::from_slice(said.as_ref().map_or(&body, |said| said.as_bytes()))
            .map_err(|error| Refusal::new(Problem::InvalidMetadata, error.to_string()))?;
        let id = create.id.unwrap();
        *self.bereft.lock().unwrap() = None;
        let told = self.files.told();
        let mut files = self.files.files.lock().unwrap();
        let new = !files.contains_key(&id);
        let file = files.entry(id).or_insert_with(|| FakeFile {
            home: create.home.clone().unwrap_or_else(|| self.name.clone()),
            create: create.clone(),
            size: create.size,
            chunks: BTreeMap::new(),
            held: BTreeMap::new(),
            dropped: false,
        });
        // Where it is to be assembled is no metadata.
        if file.create != (CreateFile { home: file.create.home.clone(), ..create }) {
            return Err(Refusal::new(Problem::MetadataConflict, "the file has other metadata"));
        }
        if said.is_some() && !body.is_empty() {
            assert!(body.len() as u64 <= CHUNK_LEN, "the real door refuses it");
            let value = ChainingValue::of_chunk(ChunkIndex::new(0).unwrap(), &body).unwrap();
            let (held, _) = file.chunks.entry(0).or_insert((body.clone(), value));
            if *held != body {
                return Err(Refusal::new(Problem::ChunkConflict, "the file has other bytes"));
            }
            file.held.entry(self.name.clone()).or_default().insert(0);
        }
        Ok(self.json(if new { 201 } else { 200 }, &file.status(id, &self.name, &told)))
    }

    async fn settle(&self, id: Uuid, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Refusal> {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let SettleFile { size } = serde_json::from_slice(&body)
            .map_err(|error| Refusal::new(Problem::InvalidMetadata, error.to_string()))?;
        self.has_metadata()?;
        let told = self.files.told();
        let mut files = self.files.files.lock().unwrap();
        let file = files.get_mut(&id).ok_or_else(Refusal::not_found)?;
        if let Some(held) = file.size.filter(|held| *held != size) {
            let detail = format!("the file has {held} bytes, got a size of {size}");
            return Err(Refusal::new(Problem::SizeConflict, detail));
        }
        file.size = Some(size);
        let status = file.status(id, &self.name, &told);
        drop(files);
        self.files.changed.notify_waiters();
        Ok(self.json(200, &status))
    }

    fn list(&self, query: &BTreeMap<String, String>) -> Response<Full<Bytes>> {
        let limit: usize = query.get("limit").map_or(100, |text| text.parse().unwrap());
        assert!((1..=1000).contains(&limit), "the real door refuses {limit}");
        let after: Uuid = query.get("after").map_or(Uuid::nil(), |text| text.parse().unwrap());
        let told = self.files.told();
        let files = self.files.files.lock().unwrap();
        let mut entries: Vec<FileEntry> = files
            .iter()
            .filter(|(id, _)| **id > after)
            .map(|(id, file)| file.status(*id, &self.name, &told))
            .filter(|status| query.get("state").is_none_or(|state| status.state.name() == state))
            .map(|status| FileEntry {
                id: status.id,
                size: status.size,
                name: status.name,
                state: status.state,
                home: status.home,
                root: status.root,
            })
            .collect();
        let more = entries.len() > limit;
        entries.truncate(limit);
        let next = entries.last().filter(|_| more).map(|entry| entry.id);
        self.json(200, &FilePage { files: entries, next })
    }

    async fn status(
        &self,
        id: Uuid,
        query: &BTreeMap<String, String>,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        self.has_metadata()?;
        let wanted = query.get("wait").map(|name| State::from_name(name).unwrap());
        let longest = Duration::from_secs(query.get("timeout").map_or(0, |text| text.parse().unwrap()));
        let deadline = tokio::time::Instant::now() + longest;
        loop {
            let changed = self.files.changed.notified();
            let status = {
                let told = self.files.told();
                let files = self.files.files.lock().unwrap();
                files.get(&id).ok_or_else(Refusal::not_found)?.status(id, &self.name, &told)
            };
            if status.state == State::Dropped {
                return Err(Refusal::new(Problem::Dropped, "it was deleted"));
            }
            let reached = wanted.is_none_or(|wanted| status.state >= wanted);
            if reached || tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Ok(self.json(200, &status));
            }
        }
    }

    fn has_metadata(&self) -> Result<(), Refusal> {
        match *self.bereft.lock().unwrap() {
            None => Ok(()),
            Some(_) => Err(Refusal::new(Problem::NoMetadata, "the metadata is not here")),
        }
    }

    fn remove(&self, id: Uuid) -> Result<Response<Full<Bytes>>, Refusal> {
        let mut files = self.files.files.lock().unwrap();
        files.get_mut(&id).ok_or_else(Refusal::not_found)?.dropped = true;
        Ok(self.json(204, &()))
    }

    async fn put(
        &self,
        id: Uuid,
        start: u64,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        let length: u64 = request.headers()["content-length"].to_str().unwrap().parse().unwrap();
        let announced = request.headers()["chunk-value"].to_str().unwrap().to_owned();
        let body = request.into_body().collect().await;
        let body = body.map_err(|_| Refusal::new(Problem::Truncated, "the body ended early"))?.to_bytes();
        assert_eq!(body.len() as u64, length);
        let mut bereft = self.bereft.lock().unwrap();
        let provisional = bereft.is_some();
        if let Some(left) = &mut *bereft {
            let more = left.checked_sub(length.div_ceil(CHUNK_LEN));
            let full = || Refusal::new(Problem::RateLimited, "so many chunks without metadata are here");
            *left = more.ok_or_else(|| full().retry_after(Duration::ZERO))?;
        }
        drop(bereft);
        let mut files = self.files.files.lock().unwrap();
        let file = files.get_mut(&id).ok_or_else(Refusal::not_found)?;
        let index = ChunkIndex::new(start).unwrap();
        if file.size.is_none() && !length.is_multiple_of(CHUNK_LEN) {
            return Err(Refusal::new(Problem::SizeOpen, "only whole chunks while the size is open"));
        }
        file.geometry()
            .run(index, length)
            .map_err(|error| Refusal::new(Problem::ChunkLength, error.to_string()))?;
        let mut values = Vec::new();
        let mut new_chunks = 0;
        for (chunk, part) in (start..).zip(body.chunks(CHUNK_LEN as usize)) {
            let value = ChainingValue::of_chunk(ChunkIndex::new(chunk).unwrap(), part).unwrap();
            if let Some((_, held)) = file.chunks.get(&chunk)
                && *held != value
            {
                let detail = format!("chunk {chunk} is stored with other bytes");
                return Err(Refusal::new(Problem::ChunkConflict, detail));
            }
            file.chunks.insert(chunk, (Bytes::copy_from_slice(part), value));
            new_chunks += u64::from(file.held.entry(self.name.clone()).or_default().insert(chunk));
            values.push(value.to_string());
        }
        assert_eq!(announced, values.join(","), "the client announces what it sends");
        drop(files);
        self.files.changed.notify_waiters();
        let (dc, busy) = (self.name.clone(), false);
        let receipt = ChunkReceipt { dc, start, values, new_chunks, provisional, busy };
        Ok(self.json(200, &receipt))
    }

    fn content(&self, id: Uuid, request: &Request<Incoming>) -> Result<Response<Full<Bytes>>, Refusal> {
        let files = self.files.files.lock().unwrap();
        let file = files.get(&id).ok_or_else(Refusal::not_found)?;
        let range = request.headers()["range"].to_str().unwrap().strip_prefix("bytes=").unwrap();
        let (first, last) = range.split_once('-').unwrap();
        let range: Range<u64> = first.parse().unwrap()..last.parse::<u64>().unwrap() + 1;
        let mut bytes = Vec::new();
        for (index, (chunk, _)) in &file.chunks {
            let offset = index * CHUNK_LEN;
            let from = range.start.clamp(offset, offset + chunk.len() as u64) - offset;
            let to = range.end.clamp(offset, offset + chunk.len() as u64) - offset;
            bytes.extend_from_slice(&chunk[from as usize..to as usize]);
        }
        Ok(Response::builder()
            .status(206)
            .header("sluice-dc", &self.name)
            .header("trace-id", "0123456789abcdef0123456789abcdef")
            .body(Full::from(bytes))
            .unwrap())
    }

    fn tree(&self, id: Uuid, query: &BTreeMap<String, String>) -> Result<Response<Full<Bytes>>, Refusal> {
        let files = self.files.files.lock().unwrap();
        let file = files.get(&id).ok_or_else(Refusal::not_found)?;
        let geometry = file.geometry();
        let place = Place::new(query["start"].parse().unwrap(), query["level"].parse().unwrap()).unwrap();
        place.check(geometry).map_err(|error| Refusal::new(Problem::InvalidParameter, error.to_string()))?;
        let value = |chunk: u64| file.chunks.get(&chunk).map(|(_, value)| *value);
        let of = |place: Place| {
            let values: Option<Vec<ChainingValue>> = place.range(geometry).map(value).collect();
            merge_chunks(geometry, place, &values?)
        };
        let whole = file.chunks.len() as u64 == geometry.chunks();
        let proof = proof_places(geometry, place).into_iter().filter(|_| whole).map(|sibling| ProofNode {
            start: sibling.start(),
            level: sibling.level(),
            value: of(sibling).unwrap().to_string(),
        });
        let node = TreeNode {
            start: place.start(),
            level: place.level(),
            value: of(place).map(|value| value.to_string()),
            chunk_values: place.range(geometry).map(|chunk| value(chunk).map(|v| v.to_string())).collect(),
            proof: proof.collect(),
            root: file.root().map(|root| root.to_string()),
        };
        Ok(self.json(200, &node))
    }
}
