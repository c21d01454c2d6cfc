//! A server of its own for a test.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long a server may take until it serves: one takes a second.
const PATIENCE: Duration = Duration::from_secs(60);

/// The bucket that it has.
const BUCKET: &str = "sluice";

/// The region that it says it is.
const REGION: &str = "garage";

/// An access key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its id.
    pub id: String,
    /// Its secret.
    pub secret: String,
}

/// A running server.
#[derive(Debug)]
pub struct Garage {
    program: PathBuf,
    process: Child,
    directory: TempDir,
    address: SocketAddr,
    key: Key,
}

impl Garage {
    /// Starts a server with a bucket and a key that may do everything with it. `None`, with a word on stderr, where the
    /// program `garage` is not installed; in CI (`CI` is set) that is a failure.
    pub fn start() -> Option<Self> {
        Self::start_in(&std::env::temp_dir())
    }

    /// The same, with its data in a temporary directory below `parent`.
    pub fn start_in(parent: &Path) -> Option<Self> {
        let Some(program) = find() else {
            assert!(std::env::var_os("CI").is_none(), "garage is not installed; ./test installs it");
            eprintln!("did not run: garage is not installed (cargo install garage --version 2.5.0 --locked)");
            return None;
        };
        // Somebody else may take a port between the choice and the server: then it ends, and another is tried.
        (0..5).find_map(|_| Self::try_start(&program, parent)).or_else(|| panic!("garage does not start"))
    }

    fn try_start(program: &Path, parent: &Path) -> Option<Self> {
        let directory = tempfile::tempdir_in(parent).unwrap();
        let ports: Vec<TcpListener> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let [s3, rpc, admin] = [0, 1, 2].map(|i| ports[i].local_addr().unwrap());
        drop(ports);
        let at = directory.path().display();
        let config = format!(
            "metadata_dir = \"{at}/meta\"\n\
             data_dir = \"{at}/data\"\n\
             db_engine = \"lmdb\"\n\
             lmdb_map_size = \"1G\"\n\
             replication_factor = 1\n\
             data_fsync = true\n\
             metadata_fsync = true\n\
             rpc_bind_addr = \"{rpc}\"\n\
             rpc_public_addr = \"{rpc}\"\n\
             rpc_secret = \"{}\"\n\
             [s3_api]\n\
             s3_region = \"{REGION}\"\n\
             api_bind_addr = \"{s3}\"\n\
             [admin]\n\
             api_bind_addr = \"{admin}\"\n",
            "5".repeat(64)
        );
        std::fs::File::create(directory.path().join("garage.toml"))
            .unwrap()
            .write_all(config.as_bytes())
            .unwrap();
        let key = Key { id: format!("GK{}", "a1".repeat(12)), secret: "b2".repeat(32) };
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let process = Command::new(program)
            .arg("-c")
            .arg(directory.path().join("garage.toml"))
            .args(["server", "--single-node", "--default-bucket"])
            .env("GARAGE_DEFAULT_ACCESS_KEY", &key.id)
            .env("GARAGE_DEFAULT_SECRET_KEY", &key.secret)
            .env("GARAGE_DEFAULT_BUCKET", BUCKET)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut garage = Self { program: program.to_owned(), process, directory, address: s3, key };
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if garage.process.try_wait().unwrap().is_some() {
                return None;
            }
            // It listens for S3 last, when it is ready.
            if TcpStream::connect_timeout(&s3, Duration::from_secs(1)).is_ok() {
                return Some(garage);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("garage does not serve: {}", garage.log());
    }

    /// Where it serves S3.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same as a URL.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The bucket.
    pub fn bucket(&self) -> &'static str {
        BUCKET
    }

    /// The region.
    pub fn region(&self) -> &'static str {
        REGION
    }

    /// The key that may do everything.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// A new key that has these of the rights `read`, `write` and `owner` on the bucket.
    pub fn limited_key(&self, rights: &[&str]) -> Key {
        let made = self.run(&["key", "create", "limited"]);
        let field = |name: &str| {
            let line = made.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {made}")).trim().to_owned()
        };
        let key = Key { id: field("Key ID:"), secret: field("Secret key:") };
        let rights: Vec<String> = rights.iter().map(|right| format!("--{right}")).collect();
        let mut arguments = vec!["bucket", "allow", BUCKET, "--key", &key.id];
        arguments.extend(rights.iter().map(String::as_str));
        self.run(&arguments);
        key
    }

    /// Its name and version.
    pub fn version(&self) -> String {
        let said = self.run(&["--version"]);
        said.split(" [").next().unwrap_or("").trim().to_owned()
    }

    /// The processor time that it has used: user and system.
    pub fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let ticks: u64 = [11, 12].into_iter().filter_map(|i| fields.get(i)?.parse::<u64>().ok()).sum();
        // The unit is 1/100 s on every Linux that this runs on.
        Duration::from_millis(ticks * 10)
    }

    /// What it said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = Command::new(&self.program)
            .arg("-c")
            .arg(self.directory.path().join("garage.toml"))
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "garage {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Garage {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Where the program is: on the path, or where cargo keeps its programs.
fn find() -> Option<PathBuf> {
    let home = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cargo = home("CARGO_HOME").or_else(|| Some(home("HOME")?.join(".cargo")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(cargo.map(|cargo| cargo.join("bin")));
    directories.map(|directory| directory.join("garage")).find(|program| program.is_file())
}
