//! What of a datacenter, or of a process of one, can be changed while it runs.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use sluice_node::budget::MemoryBudget;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;
use sluice_node::rate::{ScrubRate, UploadRate};

/// Handles to what runs; a clone means the same.
#[derive(Clone, Debug)]
pub struct Live {
    /// Keys and certificates can be [renewed](ClusterMaterial::renew).
    pub material: Arc<ClusterMaterial>,
    /// The memory for bodies in flight can be [resized](MemoryBudget::resize).
    pub memory: MemoryBudget,
    /// Bytes of uploads a second that are taken.
    uploads: UploadRate,
    /// Bytes a second at which what is stored is read again.
    scrub: ScrubRate,
    /// Where that is shown.
    pub metrics: Arc<Metrics>,
    limits: Family<LimitLabels, Gauge>,
}

/// Labels of `sluice_limit_bytes_per_second`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabels {
    limit: &'static str,
}

impl Live {
    /// What a process begins with.
    pub(crate) fn new(dc: &str, material: &Arc<ClusterMaterial>, memory: u64) -> Self {
        let metrics = Arc::new(Metrics::new(dc));
        metrics.show_keys(material.clone());
        let limits = Family::default();
        metrics.register(|registry| {
            registry.register(
                "sluice_limit_bytes_per_second",
                "Configured rates; 0: no cap on uploads, no scrub",
                Family::clone(&limits),
            );
        });
        Self {
            material: material.clone(),
            memory: MemoryBudget::measured(memory, &metrics),
            uploads: UploadRate::new(None),
            scrub: ScrubRate::default(),
            metrics,
            limits,
        }
    }

    /// The same for what takes uploads through `uploads`.
    #[must_use]
    pub(crate) fn taking(self, uploads: UploadRate, rate: Option<u64>) -> Self {
        let this = Self { uploads, ..self };
        this.set_upload_rate(rate);
        this
    }

    /// How fast what is stored is read again, for whoever does.
    pub(crate) fn scrub_rate(&self) -> ScrubRate {
        self.scrub.clone()
    }

    /// Takes at most so many bytes of uploads a second from now on; `None`: as many as come.
    pub fn set_upload_rate(&self, rate: Option<u64>) {
        self.uploads.set(rate);
        self.show("upload_rate", rate.unwrap_or(0));
    }

    /// Reads so many bytes a second again from now on; 0: none.
    pub fn set_scrub_rate(&self, rate: u64) {
        self.scrub.set(rate);
        self.show("scrub_rate", rate);
    }

    fn show(&self, limit: &'static str, rate: u64) {
        self.limits.get_or_create(&LimitLabels { limit }).set(i64::try_from(rate).unwrap_or(i64::MAX));
    }
}
