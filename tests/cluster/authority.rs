//! Who may do what, certificates and signatures; and peers that say nothing, or too much.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use sluice::datacenter::DatacenterSettings;
use sluice_client::WaitFor;
use sluice_engine::command::{COMMAND_LEN, Command, DropReason, Statement};
use sluice_engine::ids::{DcId, Incarnation, Sequence, Timestamp};
use sluice_engine::share::Shares;
use sluice_node::material::ClusterMaterial;
use sluice_node::role::Role;
use sluice_node::shutdown::Stopped;
use sluice_node::tls::{self, PeerError};
use sluice_proto::http::State;
use sluice_proto::peer::peer_client::PeerClient;
use sluice_proto::peer::{ChunksRequest, Hello, LinkFrame, RecordRequest};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::bed::{A, B, Bed, C, MIB, PATIENCE, TENANT, chunk, eventually, noise};
use crate::scale::resident;

/// Opens the peer port of dc-a with this material, as this datacenter.
pub(crate) async fn dial(
    bed: &Bed,
    material: &ClusterMaterial,
    me: DcId,
) -> Result<PeerClient<Channel>, String> {
    let address = bed.cluster.config(A).unwrap().ports.peer.address();
    let tls = TlsConnector::from(tls::peer_client(material, me).unwrap());
    // Our own CA would refuse dc-a's certificate first: a stranger that trusts anyone gets no further.
    let name = tls::peer_name(material, A).unwrap();
    let connector = tower::service_fn(move |_| {
        let (tls, name) = (tls.clone(), name.clone());
        async move {
            let stream = TcpStream::connect(address).await?;
            Ok::<_, std::io::Error>(TokioIo::new(tls.connect(name, stream).await?))
        }
    });
    let endpoint = Endpoint::from_static("http://peer.sluice");
    let channel = endpoint.connect_with_connector(connector).await.map_err(|error| format!("{error:?}"))?;
    Ok(PeerClient::new(channel))
}

/// Says hello as `dc`, and returns a way to send commands.
async fn link(
    client: &mut PeerClient<Channel>,
    dc: DcId,
) -> Result<(mpsc::Sender<LinkFrame>, tonic::Streaming<LinkFrame>), tonic::Status> {
    let (frames, receiver) = mpsc::channel(8);
    let hello = Hello { dc: dc.number().into(), incarnation: 1, seen: 0 };
    frames.send(LinkFrame { hello: Some(hello), ..LinkFrame::default() }).await.unwrap();
    let mut answers = client.link(ReceiverStream::new(receiver)).await?.into_inner();
    let answer = answers.message().await?.and_then(|frame| frame.hello);
    assert_eq!(answer.map(|hello| hello.dc), Some(A.number().into()));
    Ok((frames, answers))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_another_ca_and_a_false_name_are_refused() {
    // Only dc-a runs: the others' certificates are used by the test.
    let mut bed = Bed::divided(3, DatacenterSettings::default(), Shares::ONE);
    bed.cluster.start(A).await.unwrap();
    let names = [(A, "dc-a"), (B, "dc-b"), (C, "dc-c")];
    let stranger = ClusterMaterial::generate("test", &names).unwrap();

    let id = bed.create(A, MIB).await;
    let request = RecordRequest { file: Bed::file_id(id).as_bytes().to_vec().into() };
    assert!(dial(&bed, &stranger, B).await.is_err(), "another CA");
    // One that would take any server gets no further either.
    let address = bed.cluster.config(A).unwrap().ports.peer.address();
    let nobody = tls::edge_client(&bed.cluster.material().cas(), &[b"h2"]).unwrap();
    let name = tls::peer_name(bed.cluster.material(), A).unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    if let Ok(mut stream) = TlsConnector::from(Arc::new(nobody)).connect(name, stream).await {
        // TLS 1.3 tells a client without certificate with the first thing it reads.
        let mut byte = [0];
        assert!(stream.read_exact(&mut byte).await.is_err());
    }

    let mut b = dial(&bed, bed.cluster.material(), B).await.unwrap();
    assert!(b.record(request).await.is_ok(), "dc-b may ask");
    let refused = link(&mut b, C).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    assert!(link(&mut b, B).await.is_ok());
}

/// Whether the peer port of dc-a says anything to whoever dials with this; if not, why.
async fn greeted(bed: &Bed, config: &ClientConfig) -> Result<u8, String> {
    let mut config = config.clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let address = bed.cluster.config(A).unwrap().ports.peer.address();
    let name = tls::peer_name(bed.material(), A).unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let mut stream =
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|e| e.to_string())?;
    let first = tokio::time::timeout(PATIENCE, stream.read_u8()).await.expect("an answer or an end");
    first.map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_role_speaks_for_a_datacenter_and_none_that_the_cluster_does_not_list_speaks_at_all() {
    // The same CA has vouched for dc-c, which was taken out of the list.
    let all = ClusterMaterial::generate("test", &[(A, "dc-a"), (B, "dc-b"), (C, "dc-c")]).unwrap();
    let keys = tempfile::tempdir().unwrap();
    all.save(keys.path()).unwrap();
    let index = keys.path().join("cluster.json");
    let mut known: serde_json::Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    known["dcs"].as_array_mut().unwrap().retain(|dc| dc["name"] != "dc-c");
    std::fs::write(&index, known.to_string()).unwrap();
    let listed = ClusterMaterial::load(keys.path()).unwrap();
    assert_eq!(listed.dcs().collect::<Vec<_>>(), [(A, "dc-a"), (B, "dc-b")]);
    let mut bed = Bed::of(listed, DatacenterSettings::default());
    bed.cluster.start(A).await.unwrap();
    let id = bed.create(A, MIB).await;

    assert!(greeted(&bed, &tls::peer_client(&all, B).unwrap()).await.is_ok(), "dc-b");
    for dc in [A, B, C] {
        for role in Role::ALL {
            let kept_out = greeted(&bed, &tls::role_client(&all, dc, role).unwrap()).await.unwrap_err();
            assert!(kept_out.contains("close_notify"), "{role} of {dc}: {kept_out}");
            let shown = all.role_identity(dc, role).unwrap().chain();
            assert_eq!(tls::peer_dc(bed.material(), Some(&shown)), Err(PeerError::Name), "{role} of {dc}");
        }
    }
    let shown = all.peer_identity(C).unwrap().chain();
    assert_eq!(tls::peer_dc(bed.material(), Some(&shown)), Err(PeerError::Name));
    for dc in [A, C] {
        let kept_out = greeted(&bed, &tls::peer_client(&all, dc).unwrap()).await.unwrap_err();
        assert!(kept_out.contains("close_notify"), "{dc}: {kept_out}");
    }
    // Nothing has come of it.
    let status: sluice_proto::http::FileStatus = bed.get(A, &format!("/files/{id}"), &[]).await.json();
    assert_eq!(status.state, State::Receiving);
    bed.put_ok(A, id, 0, noise(72, MIB)).await;
    let mut b = dial(&bed, &all, B).await.unwrap();
    assert!(link(&mut b, B).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_that_divides_slots_otherwise_is_told_so() {
    let mut bed = Bed::divided(2, DatacenterSettings::default(), Shares::new(4).unwrap());
    bed.cluster.start(A).await.unwrap();
    let mut b = dial(&bed, bed.cluster.material(), B).await.unwrap();
    let refused = link(&mut b, B).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("4 shares here, and into 1"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_count_only_with_the_signature_of_who_speaks() {
    let mut bed = Bed::divided(3, DatacenterSettings::default(), Shares::ONE);
    bed.cluster.start(A).await.unwrap();
    let material = bed.cluster.material();
    let bytes = noise(71, 2 * MIB);
    let id = bed.create(A, bytes.len()).await;
    bed.put_ok(A, id, 0, chunk(&bytes, 0)).await;

    let file = Bed::file_id(id);
    let drop = |from: DcId, to: DcId, count: u32| Command {
        from,
        to,
        sequence: Sequence::of(Incarnation::new(1), count),
        slot: file.slot(),
        sent_at: Timestamp::new(1),
        file,
        statement: Statement::Drop { reason: DropReason::Deleted, tenant: TENANT },
    };
    let key = |material: &ClusterMaterial, dc| material.command_key(dc).unwrap();
    let mut flipped = drop(B, A, 1).sign(&key(material, B));
    flipped[COMMAND_LEN - 1] ^= 1;
    let mut altered = drop(B, A, 2).sign(&key(material, B));
    altered[20] ^= 1;
    let stranger = ClusterMaterial::generate("test", &[(A, "dc-a"), (B, "dc-b"), (C, "dc-c")]).unwrap();
    let other = ClusterMaterial::generate("other", &[(A, "dc-a"), (B, "dc-b"), (C, "dc-c")]).unwrap();
    let bad: Vec<[u8; COMMAND_LEN]> = vec![
        flipped,
        altered,
        drop(B, A, 3).sign(&key(&stranger, B)),
        drop(B, A, 4).sign(&key(&other, B)),
        // A valid signer that speaks for another, even over its own link.
        drop(C, A, 5).sign(&key(material, B)),
        // For somebody else.
        drop(B, C, 6).sign(&key(material, B)),
        [0; COMMAND_LEN],
    ];
    let mut client = dial(&bed, material, B).await.unwrap();
    let (frames, _answers) = link(&mut client, B).await.unwrap();
    for command in &bad {
        let commands = Bytes::copy_from_slice(command);
        frames.send(LinkFrame { commands, ..LinkFrame::default() }).await.unwrap();
    }
    frames.send(LinkFrame { commands: Bytes::from_static(&[1; 33]), ..LinkFrame::default() }).await.unwrap();
    let named = [
        ("signature", 2),
        ("key-unknown", 2),
        ("key-owner", 1),
        ("destination", 1),
        ("magic", 1),
        ("length", 1),
    ];
    for (code, times) in named {
        eventually(code, async || {
            let labels = format!("outcome=\"{code}\"");
            let refused = bed.metric(A, "sluice_commands_total", &labels).await;
            (refused == f64::from(times)).then_some(())
        })
        .await;
    }
    let status: sluice_proto::http::FileStatus = bed.get(A, &format!("/files/{id}"), &[]).await.json();
    assert_eq!((status.state, status.missing_chunks), (State::Receiving, 1), "nothing has changed");

    // The same with the signature that counts does what it says.
    let good = Bytes::copy_from_slice(&drop(B, A, 7).sign(&key(material, B)));
    frames.send(LinkFrame { commands: good, ..LinkFrame::default() }).await.unwrap();
    let gone = tokio::time::timeout(Duration::from_secs(30), bed.answers(A, id, 410)).await;
    assert_eq!(gone.unwrap().problem(), "dropped");
}

/// Tasks of dc-a.
fn tasks(bed: &Bed) -> usize {
    let said = format!("{:?}", bed.cluster.running(A).unwrap());
    said.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// Says nothing, and waits until the other side has enough of it.
async fn is_ended(mut stream: impl AsyncRead + Unpin) {
    let ended = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut Vec::new())).await;
    // How it ends does not matter.
    assert!(ended.is_ok(), "it is still open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_say_nothing_are_sent_away_and_keep_nothing() {
    let mut bed = Bed::divided(2, DatacenterSettings::default(), Shares::ONE);
    bed.cluster.start(A).await.unwrap();
    let before = tasks(&bed);
    let address = bed.cluster.config(A).unwrap().ports.peer.address();
    let material = bed.cluster.material();
    let mut silent = JoinSet::new();
    for _ in 0..8 {
        // No handshake; a handshake and no call; a call and no hello.
        silent.spawn(is_ended(TcpStream::connect(address).await.unwrap()));
        let connector = TlsConnector::from(tls::peer_client(material, B).unwrap());
        let name = tls::peer_name(material, A).unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        silent.spawn(is_ended(connector.connect(name, stream).await.unwrap()));
        let mut client = dial(&bed, material, B).await.unwrap();
        silent.spawn(async move {
            let (frames, receiver) = mpsc::channel::<LinkFrame>(1);
            let called = client.link(ReceiverStream::new(receiver));
            let refused = tokio::time::timeout(Duration::from_secs(30), called).await;
            let refused = refused.expect("it is still open").unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
            assert_eq!(refused.message(), "no hello came in time");
            drop(frames);
        });
    }
    eventually("24 connections", async || (tasks(&bed) >= before + 24).then_some(())).await;
    // Nobody waits for them.
    let mut client = dial(&bed, material, B).await.unwrap();
    let linked = link(&mut client, B).await.unwrap();
    bed.upload(&[A], noise(73, 2 * MIB), WaitFor::Assembled).await;
    while let Some(ended) = silent.join_next().await {
        ended.unwrap();
    }
    drop((linked, client));
    eventually("the end of their tasks", async || (tasks(&bed) <= before).then_some(())).await;
}

/// Commands of a flood.
const FLOOD: usize = 100_000;

/// Commands in each of its frames.
const FLOOD_FRAME: usize = 1_000;

/// KiB by which the process may grow while it refuses them: a third of a KiB for each.
const FLOOD_GROWTH: u64 = 32 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_commands_that_nobody_signed_is_counted_and_costs_no_memory() {
    let mut bed = Bed::divided(2, DatacenterSettings::default(), Shares::ONE);
    bed.cluster.start(A).await.unwrap();
    let material = bed.cluster.material();
    let bytes = noise(74, 4 * MIB);
    let file = Bed::file_id(bed.upload(&[A], bytes.clone(), WaitFor::Assembled).await.id);
    let command = Command {
        from: B,
        to: A,
        sequence: Sequence::of(Incarnation::new(1), 1),
        slot: file.slot(),
        sent_at: Timestamp::new(1),
        file,
        statement: Statement::Drop { reason: DropReason::Deleted, tenant: TENANT },
    };
    let mut forged = command.sign(&material.command_key(B).unwrap());
    forged[COMMAND_LEN - 1] ^= 1;
    // Half of them are signed by nobody, and half are not even commands.
    let commands = Bytes::from([forged, [0; COMMAND_LEN]].concat().repeat(FLOOD_FRAME / 2));
    let mut client = dial(&bed, material, B).await.unwrap();
    let (frames, _answers) = link(&mut client, B).await.unwrap();
    let flood = async |count: usize| {
        for _ in 0..count / FLOOD_FRAME {
            let commands = commands.clone();
            frames.send(LinkFrame { commands, ..LinkFrame::default() }).await.unwrap();
        }
    };
    let refused = async |count: usize| {
        for code in ["signature", "magic"] {
            eventually(code, async || {
                let labels = format!("outcome=\"{code}\"");
                let refused = bed.metric(A, "sluice_commands_total", &labels).await;
                (refused == (count / 2) as f64).then_some(())
            })
            .await;
        }
    };
    // What is needed once is there before it is measured.
    let warm = FLOOD / 10;
    flood(warm).await;
    for _ in 0..4 {
        bed.upload(&[A], bytes.clone(), WaitFor::Assembled).await;
    }
    refused(warm).await;

    let before = resident();
    let uploads = async {
        let mut last = None;
        for _ in 0..4 {
            last = Some(bed.upload(&[A], bytes.clone(), WaitFor::Assembled).await);
        }
        last.unwrap()
    };
    let ((), sent) = tokio::join!(flood(FLOOD), uploads);
    refused(warm + FLOOD).await;
    assert!(bed.read(A, sent.id, sent.root).await == bytes);
    let grown = resident().saturating_sub(before);
    println!("{FLOOD} commands were refused, and {grown} KiB became resident");
    assert!(grown <= FLOOD_GROWTH, "{grown} KiB");
    // More at once than anybody says are not even looked at.
    let commands = Bytes::from(forged.repeat(1025));
    frames.send(LinkFrame { commands, ..LinkFrame::default() }).await.unwrap();
    eventually("the frame", async || {
        let refused = bed.metric(A, "sluice_commands_total", "outcome=\"length\"").await;
        (refused == 1.0).then_some(())
    })
    .await;
    refused(warm + FLOOD).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_take_what_it_asked_for_is_given_up_and_holds_nobody_up() {
    const CHUNKS: usize = 32;
    for gives_up in [true, false] {
        let mut settings = DatacenterSettings::default();
        if gives_up {
            settings.aggregator.stall = Duration::from_millis(300);
        }
        let mut bed = Bed::divided(2, settings, Shares::ONE);
        bed.cluster.start(A).await.unwrap();
        let bytes = noise(75, CHUNKS * MIB);
        let file = Bed::file_id(bed.upload(&[A], bytes, WaitFor::Assembled).await.id);
        let client = dial(&bed, bed.cluster.material(), B).await.unwrap();
        let file = Bytes::copy_from_slice(file.as_bytes());
        let ask = async || {
            let request = ChunksRequest { file: file.clone(), start: 0, count: CHUNKS as u32, relay: false };
            client.clone().chunks(request).await.unwrap().into_inner()
        };
        if gives_up {
            // How soon it stalls is the machine's to say.
            eventually("the end of a stream", async || {
                let (mut stream, mut came) = (ask().await, 0);
                tokio::time::sleep(Duration::from_secs(1)).await;
                while let Ok(Some(piece)) = stream.message().await {
                    came += piece.data.len();
                }
                (1..CHUNKS * MIB).contains(&came).then_some(())
            })
            .await;
        } else {
            let _stream = ask().await;
            let began = std::time::Instant::now();
            assert_eq!(bed.cluster.stop(A, PATIENCE).await, Stopped::Clean);
            assert!(began.elapsed() < PATIENCE / 3, "{:?}", began.elapsed());
        }
    }
}
