//! A client: sends metadata and chunks anywhere, in any order, retries elsewhere, resumes with what is missing.

use std::collections::BTreeMap;

use sluice_engine::aggregator::RecordSummary;
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::Root;
use sluice_engine::ids::{ClientFileId, DcId, FileId, TenantId};
use sluice_engine::share::Share;

use super::disk::{Content, root_of};
use super::random::Random;

/// What a client wants of its file, beyond uploading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plan {
    /// Upload it.
    Upload,
    /// Send other bytes for one chunk to another datacenter.
    Contradict,
    /// Delete it at some point.
    Remove,
    /// Expect a root that the bytes do not have.
    WrongExpectation,
    /// Send another metadata record to another datacenter.
    TwoRecords,
    /// Send chunks and never the metadata.
    NeverDescribe,
    /// Upload it, to be kept for a while only.
    Expire,
    /// Upload it, and say its size at the end.
    SizeLater,
    /// The same, and say another size elsewhere.
    TwoSizes,
}

impl Plan {
    /// Whether the record does not say the size.
    pub fn leaves_size_open(self) -> bool {
        matches!(self, Self::SizeLater | Self::TwoSizes)
    }
}

pub struct Client {
    pub id: FileId,
    pub tenant: TenantId,
    pub shape: Geometry,
    pub plan: Plan,
    pub record: RecordSummary,
    pub other_record: Option<RecordSummary>,
    /// The bytes that the client means to send.
    pub contents: BTreeMap<u64, Content>,
    /// Chunks still to send, last first.
    pub todo: Vec<u64>,
    /// A chunk that will also be sent with other bytes.
    pub bad_chunk: Option<u64>,
    pub described: bool,
    pub described_twice: bool,
    pub removed: bool,
    /// Whether the size was said.
    pub settled: bool,
    pub done: bool,
    /// Where the client would like the file to be reassembled.
    pub home: Option<DcId>,
    /// Whether the file goes in one request.
    pub whole: bool,
    /// How often it is sent again.
    pub again: u64,
}

impl Client {
    pub fn new(number: u64, random: &mut Random, dcs: &[DcId], share: Share) -> Self {
        let tenant = TenantId::new(1 + number % 2);
        let id = loop {
            let uuid = uuid_of(random.next(), number);
            let id = FileId::derive(tenant, ClientFileId::new(uuid));
            if share.has(id) {
                break id;
            }
        };
        let whole = random.chance(25);
        let chunks = match random.below(10) {
            sent if whole => u64::from(sent > 0),
            0 => 0,
            1 => 1,
            2 => 2,
            9 => 60 + random.below(80),
            _ => 2 + random.below(30),
        };
        let shape = Geometry::new(chunks << 20).expect("small");
        let plan = match random.below(13) {
            0..=2 if whole && chunks > 0 => Plan::Contradict,
            3 | 4 if whole => Plan::Remove,
            5 if whole => Plan::TwoRecords,
            6 if whole => Plan::Expire,
            _ if whole => Plan::Upload,
            0 | 1 => Plan::Contradict,
            2 => Plan::Remove,
            3 => Plan::WrongExpectation,
            4 => Plan::TwoRecords,
            5 if chunks > 0 => Plan::NeverDescribe,
            6 => Plan::Expire,
            7 => Plan::SizeLater,
            8 => Plan::TwoSizes,
            _ => Plan::Upload,
        };
        let contents: BTreeMap<u64, Content> = (0..chunks).map(|i| (i, 1)).collect();
        let root = root_of(id, shape, &contents);
        let expected_root = match plan {
            Plan::WrongExpectation => Some(Root::of_bytes(b"something else")),
            _ if random.chance(30) => root,
            _ => None,
        };
        let digest = |n: u64| {
            sluice_engine::hash::RecordDigest::from_bytes(*blake3::hash(&n.to_be_bytes()).as_bytes())
        };
        let record = RecordSummary {
            digest: digest(number),
            tenant,
            size: (!plan.leaves_size_open()).then_some(shape),
            expected_root,
            expiry_ms: (plan == Plan::Expire).then(|| 20_000 + random.below(60_000)),
        };
        let other_record =
            (plan == Plan::TwoRecords).then(|| RecordSummary { digest: digest(number + 1000), ..record });
        let mut todo: Vec<u64> = if whole { Vec::new() } else { (0..chunks).collect() };
        // Runs mostly in order, now and then wildly out of it.
        if random.chance(50) {
            random.shuffle(&mut todo);
        }
        let bad_chunk = (plan == Plan::Contradict && chunks > 0).then(|| random.below(chunks));
        let again = random.below(3) + u64::from(bad_chunk.is_some() || other_record.is_some());
        let home = if random.chance(20) { random.pick(dcs) } else { None };
        Self {
            id,
            tenant,
            shape,
            plan,
            record,
            other_record,
            contents,
            todo,
            bad_chunk,
            described: false,
            described_twice: false,
            removed: false,
            settled: !plan.leaves_size_open(),
            done: false,
            home,
            whole,
            again,
        }
    }
}

fn uuid_of(a: u64, b: u64) -> uuid::Uuid {
    uuid::Uuid::from_u128(u128::from(a) << 64 | u128::from(b))
}
