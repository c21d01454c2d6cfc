//! What of a datacenter, or of a process of one, can be changed while it runs.

use std::sync::Arc;

use sluice_node::budget::MemoryBudget;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;

/// Handles to what runs; a clone means the same.
#[derive(Clone, Debug)]
pub struct Live {
    /// Certificates can be [renewed](ClusterMaterial::renew).
    pub material: Arc<ClusterMaterial>,
    /// The memory for bodies in flight can be [resized](MemoryBudget::resize).
    pub memory: MemoryBudget,
    /// Where that is shown.
    pub metrics: Arc<Metrics>,
}

impl Live {
    /// What a process begins with.
    pub(crate) fn new(dc: &str, material: &Arc<ClusterMaterial>, memory: u64) -> Self {
        let metrics = Arc::new(Metrics::new(dc));
        metrics.show_expiries(material.clone());
        Self { material: material.clone(), memory: MemoryBudget::measured(memory, &metrics), metrics }
    }
}
