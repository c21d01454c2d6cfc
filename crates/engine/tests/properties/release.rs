//! A copy is freed in favour of another home only by whoever takes that home for the home.

use sluice_engine::ledger::FileState;
use sluice_engine::rules::Rules;

use crate::cluster::Cluster;
use crate::world::{chunk, dc, shape, values};

#[test]
fn nothing_is_freed_for_a_home_whose_claim_was_not_heard() {
    let file = shape(3);
    let mut cluster = Cluster::new(2, file, &values(file, None), Rules::all());
    // Both take the file while they are apart, and both assemble it.
    cluster.cut(dc(1), dc(2), true);
    cluster.create(dc(2));
    for id in [dc(1), dc(2)] {
        (0..3).for_each(|index| cluster.put(id, chunk(index)));
    }
    cluster.run(60_000);
    assert!(cluster.published(dc(1)).is_some() && cluster.published(dc(2)).is_some());

    // That the higher one has assembled it arrives, and that it is the home does not.
    cluster.unheard = Some(dc(2));
    cluster.cut(dc(1), dc(2), false);
    cluster.run(600_000);
    let claim = cluster.ledger(dc(1)).claim().map(|claim| claim.home);
    assert_eq!((claim, cluster.ledger(dc(1)).copies().count()), (Some(dc(1)), 2));
    assert!(cluster.published(dc(1)).is_some(), "it says that it has the file, so it has it");

    cluster.unheard = None;
    cluster.run(600_000);
    assert!(cluster.published(dc(1)).is_none() && cluster.published(dc(2)).is_some());
    for id in [dc(1), dc(2)] {
        assert_eq!(cluster.state(id), FileState::Assembled);
        assert_eq!(cluster.ledger(id).claim().map(|claim| claim.home), Some(dc(2)));
    }
}
