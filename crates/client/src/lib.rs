//! The client library of Sluice: one file over several datacenters at once, proven to have arrived.
//!
//! Contract:
//! 1. [`Client::upload`], and [`Client::upload_stream`] for what has no length, returns when the cluster has every chunk, and the root it reports is that of the bytes read
//!    here. [`Client::download`] gives out no byte that does not lead to the file's root.
//! 2. A datacenter that dies or refuses for a while costs nothing but time: its work moves to the others, and comes
//!    back. When none is left, calls go on for [`RetryPolicy::retry_for`] and then say so; the same call with the
//!    same id carries on.
//! 3. Memory stays below [`ClientConfig::jobs`] × 8 MiB, whatever the size of the file.
//! 4. Every error is a [`ClientError`]: who refused what and why, whether trying again helps, and the trace.
//! 5. A call that is dropped stops; tasks do not outlive it.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use sluice_client::{Client, ClientConfig, Source, Token, UploadOptions, unobserved};
//!
//! let urls = vec!["https://127.0.0.1:41311".into(), "https://127.0.0.1:41312".into()];
//! let client = Client::new(ClientConfig::new(urls, Token::new("…"), std::fs::read("ca.pem")?))?;
//! let source = Source::open("disk.img")?;
//! let uploaded = client.upload(&source, &UploadOptions::default(), unobserved()).await?;
//! println!("{} {}", uploaded.id, uploaded.root);
//! # Ok(())
//! # }
//! ```

mod advice;
mod chunk_set;
mod client;
mod concurrency;
mod config;
mod creation;
mod door;
mod doors;
mod download;
mod error;
mod event;
mod hosts;
mod part;
mod plan;
mod refused;
mod settle;
mod source;
mod stream;
mod unfinished;
mod upload;
mod whole;
mod wire;

pub use advice::{Advice, ExitClass};
pub use client::Client;
pub use config::{ClientConfig, ConfigError, MAX_JOBS, RetryPolicy, Timeouts, Token};
pub use door::{DrainRequest, ListFilter};
pub use download::{ByteRange, DownloadOptions, Downloaded, Target};
pub use error::ClientError;
pub use event::{Event, Observer, SharedObserver, unobserved};
pub use plan::Order;
pub use refused::{Operation, Refused};
pub use source::{FileStamp, Source};
pub use unfinished::{Unfinished, UnfinishedUploads};
pub use upload::{UploadOptions, Uploaded, WaitFor};
