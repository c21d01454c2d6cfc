//! Bytes from anywhere are refused or canonical, and never a panic.

use proptest::prelude::*;
use sluice_engine::aggregator::{FileMemory, NodeMemory};
use sluice_engine::command::{COMMAND_LEN, Command};
use sluice_engine::context::SignedContext;
use sluice_engine::ids::{DcId, Incarnation};
use sluice_engine::ledger::{Ledger, Page};
use sluice_engine::metadata::{MetadataFields, MetadataRecord};
use sluice_engine::rules::Rules;

use crate::world::{TENANT, dc, generation, place, value};

/// Bytes that begin as they should, so that more than the magic is tried.
fn after(head: &'static [u8], len: usize) -> impl Strategy<Value = Vec<u8>> {
    let small = prop_oneof![3 => Just(0u8), 2 => 0u8..8, 1 => any::<u8>()];
    let body =
        prop_oneof![proptest::collection::vec(small, 0..len), proptest::collection::vec(any::<u8>(), 0..len)];
    body.prop_map(move |body| [head, &body].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn a_file_memory(bytes in after(b"SLF\x01", 200)) {
        if let Ok(memory) = FileMemory::from_bytes(&bytes) {
            prop_assert_eq!(memory.to_bytes(), bytes);
            let mut ledger = Ledger::new(Rules::all());
            for fact in memory.facts() {
                prop_assert!(ledger.take(fact).is_ok());
            }
        }
    }

    #[test]
    fn a_node_memory(bytes in after(b"SLN\x01", 60)) {
        if let Ok(memory) = NodeMemory::from_bytes(&bytes) {
            prop_assert_eq!(memory.to_bytes(), bytes);
        }
    }

    #[test]
    fn a_node_memory_with_revocations(bytes in after(b"SLN\x02\0\0\0\x01\0\0", 100)) {
        if let Ok(memory) = NodeMemory::from_bytes(&bytes) {
            prop_assert_eq!(memory.to_bytes(), bytes);
        }
    }

    #[test]
    fn a_node_memory_round_trips(incarnation: u32, seen in proptest::collection::btree_map(any::<u16>(), any::<u32>(), 0..64)) {
        let seen = seen.into_iter().map(|(dc, n)| (DcId::new(dc), Incarnation::new(n))).collect();
        let memory = NodeMemory { incarnation: Incarnation::new(incarnation), seen, ..NodeMemory::default() };
        prop_assert_eq!(NodeMemory::from_bytes(&memory.to_bytes()), Ok(memory));
    }

    #[test]
    fn a_page(bytes in after(b"SLP\x01\0\0\0\0\0\0\0\x01\0\0\0", 110)) {
        if let Ok(page) = Page::from_bytes(&bytes) {
            prop_assert_eq!(page.to_bytes(), bytes);
        }
    }

    #[test]
    fn a_page_round_trips(segment: u64, entries in proptest::collection::vec((any::<u16>(), any::<u64>(), 0u64..1000, 0u8..6), 0..40)) {
        let entries = entries.into_iter().map(|(holder, number, at, level)| {
            let place = place(at << level, level);
            (dc(holder), generation(number), sluice_engine::span::Span::new(place, value(at, 0)))
        });
        let page = Page { segment, entries: entries.collect() };
        prop_assert_eq!(Page::from_bytes(&page.to_bytes()), Ok(page.clone()));
        let bytes = page.to_bytes();
        prop_assert!(Page::from_bytes(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn a_command(body in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], COMMAND_LEN - 5), kind in 0u8..18) {
        let mut bytes = b"SLC\x01".to_vec();
        bytes.push(kind);
        bytes.extend(body);
        if let Ok((command, key)) = Command::decode(&bytes) {
            let again = command.to_body(key);
            prop_assert_eq!(&again[..], &bytes[..again.len()]);
            let _ = command.statement.to_string();
        }
    }

    #[test]
    fn a_record_begun_well(bytes in after(b"SLM\x01", 120)) {
        if let Ok(record) = MetadataRecord::from_bytes(&bytes) {
            prop_assert_eq!(record.to_bytes(), bytes);
        }
    }

    #[test]
    fn a_record_changed_in_one_byte_is_another(at in 0usize..200, bit in 0u8..8) {
        let fields = MetadataFields {
            size: Some(5 << 20),
            name: "a name".into(),
            content_type: "text/plain".into(),
            user: [("key".to_string(), "value".to_string()), ("other".to_string(), String::new())].into(),
            ..Default::default()
        };
        let client = "0193e4a0-7b1c-7def-8123-456789abcdef".parse().unwrap();
        let record = MetadataRecord::new(TENANT, client, fields).unwrap();
        let mut bytes = record.to_bytes();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        if let Ok(changed) = MetadataRecord::from_bytes(&bytes) {
            prop_assert_eq!(changed.to_bytes(), bytes);
            prop_assert_ne!(changed.digest(), record.digest());
        }
    }

    #[test]
    fn a_context(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let ring = sluice_engine::keys::KeyRing::new(
            sluice_engine::keys::Purpose::Context,
            sluice_engine::keys::ClusterTag::of_name("test"),
            [],
        );
        if let Ok(signed) = SignedContext::from_bytes(bytes) {
            prop_assert!(signed.verify(&ring, dc(1), sluice_engine::ids::Timestamp::new(0)).is_err());
        }
    }
}
