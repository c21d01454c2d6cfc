//! nginx as a peer: files by PUT over TLS 1.3 into a temporary directory, unverified and unsynced.
//!
//! Dropping an [`Nginx`] stops it and removes the directory.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tempfile::TempDir;

use crate::client::{Door, Target};
use crate::server::stop;

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// An nginx under measurement.
pub(crate) struct Nginx {
    process: Child,
    _directory: TempDir,
    target: Target,
}

/// The version of the nginx that is installed; `None` if there is none.
pub(crate) fn version() -> Option<String> {
    let output = Command::new("nginx").arg("-v").output().ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Some(text.rsplit_once(':')?.1.trim().to_owned())
}

impl Nginx {
    /// Starts it with so many worker processes, and its files below `parent`.
    pub(crate) async fn start(parent: &Path, workers: usize) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("nginx-load-").tempdir_in(parent)?;
        let path = directory.path();
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        let ca = made.cert.pem();
        fs::write(path.join("cert.pem"), &ca)?;
        fs::write(path.join("key.pem"), made.signing_key.serialize_pem())?;
        fs::create_dir(path.join("www"))?;
        // It takes no socket from us, so the port may be lost to somebody else: then it does not start.
        let address = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
        let root = path.display();
        let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
        fs::write(path.join("nginx.conf"), configuration(&root.to_string(), address.port(), workers, user))?;
        let process = Command::new("nginx")
            .args(["-e", "stderr", "-p"])
            .arg(path)
            .arg("-c")
            .arg(path.join("nginx.conf"))
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start nginx")?;
        let target = Target::new(address, "localhost", ca.as_bytes(), Door::Http1, None)?;
        let mut nginx = Self { process, _directory: directory, target };
        let until = Instant::now() + PATIENCE;
        while nginx.target.open().await.is_err() {
            if Instant::now() > until || !matches!(nginx.process.try_wait(), Ok(None)) {
                bail!("nginx does not listen on {address}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(nginx)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        stop(&mut self.process);
    }
}

/// Buffers as large as pay (512 KiB: larger ones change nothing), no logs, and bodies received on the filesystem that
/// they stay on, so that nothing is copied.
fn configuration(root: &str, port: u16, workers: usize, user: &str) -> String {
    format!(
        "daemon off; {user} worker_processes {workers}; pid {root}/pid;
events {{ worker_connections 1024; }}
http {{
    access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000000;
    client_max_body_size 0; client_body_buffer_size 512k; client_body_temp_path {root}/body;
    output_buffers 2 512k; ssl_buffer_size 16k;
    proxy_temp_path {root}/proxy; fastcgi_temp_path {root}/fastcgi; uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl; server_name localhost; root {root}/www;
        ssl_protocols TLSv1.3; ssl_certificate {root}/cert.pem; ssl_certificate_key {root}/key.pem;
        location / {{ dav_methods PUT DELETE; }}
    }}
}}
"
    )
}
