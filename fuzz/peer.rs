//! Messages of the peer protocol that are not quite right, over real mutual TLS: each call ends with a reply or a
//! named status, each frame of commands is counted, and the datacenter goes on.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bolero::TypeGenerator;
use bytes::{Buf, BufMut, Bytes};
use hyper_util::rt::TokioIo;
use sluice::datacenter::DatacenterSettings;
use sluice_node::tls;
use sluice_proto::peer::{
    ChunksRequest, Hello, LinkFrame, LocateRequest, RecordRequest, StatusRequest, ValuesRequest,
};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio_rustls::TlsConnector;
use tokio_stream::StreamExt as _;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::bed::{A, B, Bed, noise};
use crate::mangle::{Mangled, vectors};
use crate::times;

const CALLS: [&str; 6] = ["Record", "Values", "Chunks", "Status", "Locate", "Link"];

/// Messages as bytes.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

struct World {
    bed: Bed,
    runtime: Runtime,
    channel: Channel,
    examples: Vec<Vec<Vec<u8>>>,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (bed, channel, file) = runtime.block_on(async {
        let mut bed = Bed::reserve(2, DatacenterSettings::default());
        bed.cluster.start(A).await.unwrap();
        let bytes = noise(5, 3000);
        let id = bed.create(A, bytes.len()).await;
        bed.put_ok(A, id, 0, bytes).await;
        let address = bed.cluster.config(A).unwrap().ports.peer.address();
        let material = bed.cluster.material();
        let tls = TlsConnector::from(tls::peer_client(material, B).unwrap());
        let name = tls::peer_name(material, A).unwrap();
        let connector = tower::service_fn(move |_| {
            let (tls, name) = (tls.clone(), name.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Ok::<_, std::io::Error>(TokioIo::new(tls.connect(name, stream).await?))
            }
        });
        let endpoint = Endpoint::from_static("http://peer.sluice");
        (bed, endpoint.connect_with_connector(connector).await.unwrap(), (id, Bed::file_id(id)))
    });
    let (id, file) = file;
    let (file, id) = (Bytes::copy_from_slice(file.as_bytes()), Bytes::copy_from_slice(id.as_bytes()));
    let context = Bytes::from(vectors("contexts", "bytes").remove(0));
    let hello = LinkFrame { hello: Some(Hello { dc: 2, incarnation: 1, seen: 0 }), ..LinkFrame::default() };
    let commands = vectors("commands", "bytes").into_iter();
    let frames = commands.map(|bytes| LinkFrame { commands: bytes.into(), ..LinkFrame::default() });
    let examples = vec![
        vec![encoded(&RecordRequest { file: file.clone() })],
        vec![encoded(&ValuesRequest { file: file.clone(), ..Default::default() })],
        vec![encoded(&ChunksRequest { file, start: 0, count: 1, relay: true })],
        vec![encoded(&StatusRequest { context: context.clone(), id: id.clone() })],
        vec![encoded(&LocateRequest { context, id, start: 0, level: 0 })],
        [hello].into_iter().chain(frames).map(|frame| encoded(&frame)).collect(),
    ];
    World { bed, runtime, channel, examples }
});

fn encoded(message: &impl prost::Message) -> Vec<u8> {
    message.encode_to_vec()
}

#[derive(Clone, Debug, TypeGenerator)]
struct Call {
    which: u8,
    messages: Vec<Mangled>,
    greet: bool,
}

/// How a call ends: with a status that says something, or in order.
async fn call(world: &World, which: usize, messages: Vec<Bytes>) -> Result<usize, Status> {
    let mut grpc = Grpc::new(world.channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = format!("/sluice.peer.v1.Peer/{}", CALLS[which]).parse().unwrap();
    let answers = grpc.streaming(Request::new(tokio_stream::iter(messages)), path, Raw).await?;
    let mut answers = answers.into_inner();
    let mut count = 0;
    while let Some(answer) = answers.next().await {
        answer?;
        count += 1;
    }
    Ok(count)
}

#[test]
fn messages() {
    static GOOD: AtomicUsize = AtomicUsize::new(0);
    static BAD: AtomicUsize = AtomicUsize::new(0);
    bolero::check!().with_type::<Call>().with_iterations(times(1_000)).for_each(|input| {
        let world = &*WORLD;
        let which = usize::from(input.which) % CALLS.len();
        let examples = &world.examples[which];
        let mut messages: Vec<Bytes> =
            input.messages.iter().take(4).map(|message| message.bytes(examples).into()).collect();
        if which == 5 && input.greet {
            messages.insert(0, examples[0].clone().into());
        }
        if which != 5 {
            messages.truncate(1);
            if messages.is_empty() {
                messages.push(examples[0].clone().into());
            }
        }
        let ended = world.runtime.block_on(async {
            let patience = Duration::from_secs(60);
            tokio::time::timeout(patience, call(world, which, messages)).await.expect("no answer, no end")
        });
        match ended {
            Ok(_) => GOOD.fetch_add(1, Ordering::Relaxed),
            Err(status) => {
                let said = status.metadata().contains_key("sluice-problem");
                // What is no protobuf is tonic's to refuse.
                let garbled = status.code() == Code::Internal && status.message().contains("decode");
                let short = status.message().contains("Missing request message");
                assert!(said || garbled || short, "{} ended with {status:?}", CALLS[which]);
                BAD.fetch_add(1, Ordering::Relaxed)
            }
        };
    });
    let (good, bad) = (GOOD.load(Ordering::Relaxed), BAD.load(Ordering::Relaxed));
    assert!(good > 0 && bad > 0, "{good} good, {bad} bad");
    let world = &*WORLD;
    world.runtime.block_on(async {
        let bytes = noise(8, 500);
        let id = world.bed.create(A, bytes.len()).await;
        world.bed.put_ok(A, id, 0, bytes).await;
        world.bed.readable(A, id).await;
        // No key of these commands is this cluster's.
        assert_eq!(world.bed.metric(A, "sluice_commands_total", "outcome=\"taken\"").await, 0.0);
    });
}
