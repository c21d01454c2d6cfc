//! The connection to Redis: made, watched over and made again by one task, used by everybody.
//!
//! The task owns it, and shows in a watch whether it is there. It looks every [`LOOK`] whether Redis still answers, and is
//! still a primary. A call that fails in a way that another connection may mend says so, and is tried once more on the next
//! one. The task lives on the [`Shutdown`] that [`Redis::open`] was given, until that is killed: it has to be the one that
//! outlives whoever calls.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, FromRedisValue, RedisConnectionInfo, RedisResult, Script};
use sluice_node::metrics::Metrics;
use sluice_node::seldom::Seldom;
use sluice_node::shutdown::Shutdown;
use sluice_node::tcp;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

use crate::config::RedisConfig;
use crate::error::RedisError;
use crate::metrics::RedisMetrics;

/// How often a connection that nobody uses is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// The first pause after a failed try to connect, and the longest; each is drawn between half and all of it.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Commands that may be on their way at once. Each is small; more would only wait in Redis.
const IN_FLIGHT: usize = 256;

/// Everything a connection needs to be driven.
type Driver = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// Whether there is a connection, and why not.
#[derive(Clone)]
enum Link {
    /// The first try goes on, or one after a connection broke.
    Connecting,
    /// Its number, so that only what failed on it ends it.
    Up(u64, MultiplexedConnection),
    Down(RedisError),
}

/// Redis, or rather the way to it. Clones share it.
#[derive(Clone)]
pub struct Redis(Arc<Inner>);

struct Inner {
    address: String,
    patience: Duration,
    connect: Duration,
    link: watch::Receiver<Link>,
    /// The highest number of a connection that failed a call.
    broken: watch::Sender<u64>,
    metrics: RedisMetrics,
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redis({})", self.0.address)
    }
}

impl Redis {
    /// Connects. An error is what does not pass by itself: Redis refuses us. If it cannot be reached, that is logged, and
    /// tried again on `tasks` for as long as they are not killed.
    pub async fn open(config: RedisConfig, metrics: &Metrics, tasks: &Shutdown) -> Result<Self, RedisError> {
        let (shown, link) = watch::channel(Link::Connecting);
        let (broken, breaks) = watch::channel(0);
        let metrics = RedisMetrics::new(metrics);
        let this = Self(Arc::new(Inner {
            address: config.address(),
            patience: config.patience,
            connect: config.connect,
            link,
            broken,
            metrics: metrics.clone(),
        }));
        let first = connect(&config).await;
        metrics.connected(first.as_ref().err().map_or("ok", RedisError::code));
        let first = match first {
            Err(error @ RedisError::Refused { .. }) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "no connection to Redis yet");
                shown.send_replace(Link::Down(error));
                None
            }
            Ok(connection) => Some(connection),
        };
        let keeper = Keeper { config, metrics, shown, breaks };
        tasks.spawn(keeper.keep(first));
        Ok(this)
    }

    /// `host:port`, for people.
    pub fn address(&self) -> &str {
        &self.0.address
    }

    /// Whether there is a connection now; if not, why.
    pub fn state(&self) -> Result<(), RedisError> {
        match &*self.0.link.borrow() {
            Link::Up(..) => Ok(()),
            Link::Down(error) => Err(error.clone()),
            Link::Connecting => Err(self.unreachable("connecting")),
        }
    }

    /// Runs a script, and once more if the connection broke.
    pub(crate) async fn script<T: FromRedisValue>(
        &self,
        script: &Script,
        keys: &[String],
        arguments: &[String],
    ) -> Result<T, RedisError> {
        let mut result = self.once(script, keys, arguments).await;
        if let Err(RedisError::Unreachable { .. } | RedisError::Replica { .. }) = &result
            && !matches!(&*self.0.link.borrow(), Link::Down(_))
        {
            result = self.once(script, keys, arguments).await;
        }
        self.0.metrics.called(result.as_ref().err().map_or("ok", RedisError::code));
        result
    }

    async fn once<T: FromRedisValue>(
        &self,
        script: &Script,
        keys: &[String],
        arguments: &[String],
    ) -> Result<T, RedisError> {
        let mut prepared = script.prepare_invoke();
        prepared.key(keys).arg(arguments);
        let (number, mut connection) = self.connection().await?;
        let Inner { address, patience, .. } = &*self.0;
        let answered = timeout(*patience, prepared.invoke_async(&mut connection)).await;
        let error = match answered {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => RedisError::of(address, *patience, &error),
            Err(_) => RedisError::Slow { address: address.clone(), patience: *patience },
        };
        if error.ends_connection() {
            self.0.broken.send_if_modified(|highest| {
                let newer = number > *highest;
                *highest = number.max(*highest);
                newer
            });
            // The next look at the link must not find this one.
            let mut link = self.0.link.clone();
            let gone = link.wait_for(|link| !matches!(link, Link::Up(other, _) if *other == number));
            let _ = timeout(*patience, gone).await;
        }
        Err(error)
    }

    /// The connection, waited for only while one is being made.
    async fn connection(&self) -> Result<(u64, MultiplexedConnection), RedisError> {
        let mut link = self.0.link.clone();
        let settled = link.wait_for(|link| !matches!(link, Link::Connecting));
        let settled = match timeout(self.0.connect, settled).await {
            Ok(Ok(settled)) => settled.clone(),
            Ok(Err(_)) => return Err(self.unreachable("the process is stopping")),
            Err(_) => return Err(self.unreachable("still connecting")),
        };
        match settled {
            Link::Up(number, connection) => Ok((number, connection)),
            Link::Down(error) => Err(error),
            Link::Connecting => Err(self.unreachable("still connecting")),
        }
    }

    fn unreachable(&self, reason: &str) -> RedisError {
        RedisError::Unreachable { address: self.0.address.clone(), reason: reason.to_owned() }
    }
}

/// Makes connections, one after the other.
struct Keeper {
    config: RedisConfig,
    metrics: RedisMetrics,
    shown: watch::Sender<Link>,
    breaks: watch::Receiver<u64>,
}

impl Keeper {
    async fn keep(mut self, first: Option<(MultiplexedConnection, Driver)>) {
        let mut next = first;
        let (mut number, mut pause) = (0, PAUSES.0);
        let refused = Seldom::default();
        loop {
            if let Some((connection, driver)) = next.take() {
                number += 1;
                pause = PAUSES.0;
                self.shown.send_replace(Link::Up(number, connection.clone()));
                let reason = self.watch_over(number, connection, driver).await;
                tracing::warn!(address = %self.config.address(), %reason, "the connection to Redis ended");
                self.metrics.down();
                self.shown.send_replace(Link::Connecting);
            } else {
                sleep(pause.mul_f64(rand::random_range(0.5..=1.0))).await;
                pause = (pause * 2).min(PAUSES.1);
            }
            match connect(&self.config).await {
                Ok(connection) => {
                    self.metrics.connected("ok");
                    tracing::info!(address = %self.config.address(), "connected to Redis");
                    next = Some(connection);
                }
                Err(error) => {
                    self.metrics.connected(error.code());
                    tracing::debug!(%error, "no connection to Redis");
                    if let RedisError::Refused { .. } = &error
                        && let Some(times) = refused.met(error.code())
                    {
                        tracing::warn!(%error, times, "Redis lets nobody in");
                    }
                    self.shown.send_replace(Link::Down(error));
                }
            }
        }
    }

    /// Drives a connection until it ends, or should; says why.
    async fn watch_over(
        &mut self,
        number: u64,
        mut connection: MultiplexedConnection,
        driver: Driver,
    ) -> String {
        let breaks = &mut self.breaks;
        let config = &self.config;
        let looks = async {
            loop {
                sleep(LOOK).await;
                if let Err(error) = role(config, &mut connection).await {
                    return error.to_string();
                }
            }
        };
        tokio::select! {
            () = driver => "it was closed".to_owned(),
            reason = looks => reason,
            _ = breaks.wait_for(|highest| *highest >= number) => "a call failed".to_owned(),
        }
    }
}

/// Connects, and finds out whether that is a primary that lets us in.
async fn connect(config: &RedisConfig) -> Result<(MultiplexedConnection, Driver), RedisError> {
    let address = config.address();
    let greeting = async {
        let stream = TcpStream::connect((config.host.as_str(), config.port)).await?;
        tcp::watch_over(&stream)?;
        Ok::<Box<dyn Stream>, std::io::Error>(match &config.tls {
            None => Box::new(stream),
            Some((tls, name)) => {
                Box::new(TlsConnector::from(tls.clone()).connect(name.clone(), stream).await?)
            }
        })
    };
    let late = || RedisError::Slow { address: address.clone(), patience: config.connect };
    let unreachable = |error: std::io::Error| RedisError::Unreachable {
        address: address.clone(),
        reason: error.to_string(),
    };
    let whole = async {
        let stream = greeting.await.map_err(unreachable)?;
        let mut settings = RedisConnectionInfo::default().set_db(config.database).set_skip_set_lib_name();
        if let Some(user) = &config.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = &config.password {
            settings = settings.set_password(password);
        }
        let limits = AsyncConnectionConfig::new()
            .set_response_timeout(Some(config.patience))
            .set_pipeline_buffer_size(IN_FLIGHT);
        let made = MultiplexedConnection::new_with_config(&settings, stream, limits).await;
        let (mut connection, driver) =
            made.map_err(|error| RedisError::of(&address, config.patience, &error))?;
        let mut driver: Driver = Box::pin(driver);
        let found_out = async {
            role(config, &mut connection).await?;
            rights(config, &mut connection).await
        };
        tokio::select! {
            result = found_out => result?,
            () = &mut driver => return Err(RedisError::Unreachable { address: address.clone(), reason: "it hung up".to_owned() }),
        }
        Ok((connection, driver))
    };
    timeout(config.connect, whole).await.unwrap_or_else(|_| Err(late()))
}

/// Whether the user may do what scripts do here. What is missing is told apart from other errors now only: inside of a
/// script it is an error like any.
async fn rights(config: &RedisConfig, connection: &mut MultiplexedConnection) -> Result<(), RedisError> {
    let script =
        redis::Script::new("redis.call('TIME') redis.call('GET', KEYS[1]) return redis.call('DEL', KEYS[1])");
    let tried: RedisResult<i64> = script.key("sluice:rights").invoke_async(connection).await;
    let failed = |error| match RedisError::of(&config.address(), config.patience, &error) {
        RedisError::Failed { address, reason } => RedisError::Refused { address, reason },
        other => other,
    };
    tried.map(|_| ()).map_err(failed)
}

/// Whether it answers, and takes writes.
async fn role(config: &RedisConfig, connection: &mut MultiplexedConnection) -> Result<(), RedisError> {
    let address = config.address();
    let asked = redis::cmd("ROLE");
    let answer: RedisResult<Vec<redis::Value>> = asked.query_async(connection).await;
    let answer = answer.map_err(|error| RedisError::of(&address, config.patience, &error))?;
    match answer.first().map(redis::from_redis_value_ref::<String>) {
        Some(Ok(role)) if role == "master" => Ok(()),
        _ => Err(RedisError::Replica { address }),
    }
}

/// What a connection runs over.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}
