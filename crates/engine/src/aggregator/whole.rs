//! Files that come whole, in one request.

use super::Aggregator;
use crate::hash::{RecordDigest, Root};
use crate::ids::{FileId, Generation};
use crate::ledger::FileState;

/// What a file that comes whole meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MeetsWhole {
    /// Nothing: it is to be stored, as of this generation.
    Nothing(Generation),
    /// Itself, assembled: there is nothing to do.
    Itself,
    /// A file of that id that came, or comes, as a record and chunks: it has to come like that, too.
    Parts,
    /// A file of that id that was deleted.
    Dropped,
    /// A file of that id in conflict, and why it is.
    Conflict(Option<String>),
    /// Other metadata under that id, which stand.
    OtherMetadata,
    /// Other bytes under that id, which stand.
    OtherBytes(Root),
}

impl Aggregator {
    /// What a whole file with this record and root meets here, if it is not [asleep](Self::is_asleep).
    pub fn meets_whole(&self, id: FileId, digest: RecordDigest, root: Root) -> MeetsWhole {
        let Some(file) = self.file(id) else { return MeetsWhole::Nothing(self.generation(id)) };
        let ledger = file.ledger();
        match (file.state(), ledger.record_digest(), ledger.root()) {
            (FileState::Dropped, ..) => MeetsWhole::Dropped,
            (FileState::Conflict, ..) => MeetsWhole::Conflict(ledger.conflict_reason()),
            (_, Some(held), _) if held != digest => MeetsWhole::OtherMetadata,
            (_, _, Some(held)) if held != root => MeetsWhole::OtherBytes(held),
            (FileState::Assembled, ..) => MeetsWhole::Itself,
            (FileState::Unheard, ..) if !file.is_orphan() => MeetsWhole::Nothing(self.generation(id)),
            (FileState::Unheard | FileState::Receiving | FileState::Complete, ..) => MeetsWhole::Parts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregator::{Config, Event, FileMemory, NodeEvent, NodeMemory, RecordSummary, StoredFile};
    use crate::command::DropReason;
    use crate::geometry::Geometry;
    use crate::ids::{DcId, Incarnation, TenantId, Timestamp};

    const ME: DcId = DcId::new(1);
    const ID: FileId = FileId::from_bytes([7; 16]);
    const TENANT: TenantId = TenantId::new(1);
    const NOW: Timestamp = Timestamp::new(1_000);

    fn digest(n: u8) -> RecordDigest {
        RecordDigest::from_bytes([n; 32])
    }

    fn root(n: u8) -> Root {
        Root::from_bytes([n; 32])
    }

    fn record(n: u8) -> RecordSummary {
        RecordSummary {
            tenant: TENANT,
            size: Geometry::new(3).ok(),
            digest: digest(n),
            expected_root: None,
            expiry_ms: None,
        }
    }

    fn started() -> Aggregator {
        let (mut aggregator, _) = Aggregator::start(Config::new(ME, []), NodeMemory::default(), NOW);
        aggregator.handle(NodeEvent::AllLoaded, NOW);
        aggregator
    }

    fn with(event: Event) -> Aggregator {
        let mut aggregator = started();
        aggregator.handle(NodeEvent::File(ID, event), NOW);
        aggregator
    }

    #[test]
    fn a_file_that_nobody_knows_is_stored_as_of_the_generation_of_this_life() {
        let aggregator = started();
        let meets = aggregator.meets_whole(ID, digest(1), root(1));
        assert_eq!(meets, MeetsWhole::Nothing(Generation::floor_of(aggregator.incarnation())));
    }

    #[test]
    fn a_file_that_came_whole_meets_itself_and_no_other() {
        let shape = Geometry::new(3).unwrap();
        let aggregator = with(Event::Loaded(StoredFile {
            tenant: TENANT,
            record: Some(record(1)),
            size: Some(shape),
            memory: FileMemory::of_whole(ME, root(1), shape, None),
            generation: Generation::default(),
            spans: Vec::new(),
            chunks: 1,
            published: Some(root(1)),
        }));
        assert_eq!(aggregator.meets_whole(ID, digest(1), root(1)), MeetsWhole::Itself);
        assert_eq!(aggregator.meets_whole(ID, digest(2), root(1)), MeetsWhole::OtherMetadata);
        assert_eq!(aggregator.meets_whole(ID, digest(1), root(2)), MeetsWhole::OtherBytes(root(1)));
    }

    #[test]
    fn a_file_that_has_begun_goes_on_as_it_began() {
        let created = with(Event::Created { record: record(1), home: ME });
        assert_eq!(created.meets_whole(ID, digest(1), root(1)), MeetsWhole::Parts);
        assert_eq!(created.meets_whole(ID, digest(2), root(1)), MeetsWhole::OtherMetadata);
        let orphan = with(Event::StoredOrphan { tenant: TENANT, chunks: 0..1 });
        assert_eq!(orphan.meets_whole(ID, digest(1), root(1)), MeetsWhole::Parts);
    }

    #[test]
    fn a_file_that_ended_does_not_begin_again() {
        let peer = DcId::new(2);
        let (mut ended, _) = Aggregator::start(Config::new(ME, [peer]), NodeMemory::default(), NOW);
        ended.handle(NodeEvent::AllLoaded, NOW);
        let link = (Incarnation::default(), Incarnation::default());
        ended.handle(NodeEvent::LinkUp { peer, incarnation: link.0, seen_of_me: link.1 }, NOW);
        let removed = Event::Remove { reason: DropReason::Deleted, tenant: TENANT };
        ended.handle(NodeEvent::File(ID, removed), NOW);
        assert!(!ended.is_asleep(ID), "the peer has to hear of it");
        assert_eq!(ended.meets_whole(ID, digest(1), root(1)), MeetsWhole::Dropped);
    }
}
