//! Marks of chunks that are known to be damaged, in the node's record.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use sluice_engine::ids::FileId;
use sluice_engine::ranges::Ranges;

use super::shared::Shared;

impl Shared {
    /// The chunks of a file that are known to be damaged.
    pub(crate) fn damage(&self, file: FileId) -> Ranges {
        self.node(|node| node.damage.get(&file).cloned().unwrap_or_default())
    }

    /// Marks chunks as damaged, or not any more, durably. What cannot be kept is found again.
    pub(crate) async fn mark(self: &Arc<Self>, file: FileId, chunks: Range<u64>, damaged: bool) {
        let changed = self.change_node(move |node| {
            let before = node.damage.get(&file).cloned().unwrap_or_default();
            let mut marks = before.clone();
            if damaged {
                marks.insert(chunks)
            } else {
                marks.remove(chunks)
            };
            if marks.is_empty() {
                node.damage.remove(&file)
            } else {
                node.damage.insert(file, marks.clone())
            };
            marks != before
        });
        if let Err(error) = changed.await {
            tracing::error!(%file, %error, "marks of damage cannot be kept");
        }
    }

    /// Takes marks back of chunks that went.
    pub(crate) async fn clear_damage(self: &Arc<Self>, file: FileId, chunks: BTreeSet<u64>) {
        let damage = self.damage(file);
        for chunk in chunks.into_iter().filter(|chunk| damage.covers(*chunk..*chunk + 1)) {
            self.mark(file, chunk..chunk + 1, false).await;
        }
    }

    /// Takes all marks of a file back.
    pub(crate) async fn clear_all_damage(self: &Arc<Self>, file: FileId) {
        if !self.damage(file).is_empty() {
            self.mark(file, 0..u64::MAX, false).await;
        }
    }
}
