"""Checks `k8s`: renders the manifests, checks them, then runs what they describe and restarts all of it under load.

What runs is every container's own command, arguments, environment, mounts, user and probes, with the root filesystem of
Sluice's image, or with this machine's redis-server, in a network namespace each; Services are names, NetworkPolicies packet
filters, and a rolling restart goes as the manifests say: of one datacenter workload by workload, of the next all of them at
once, as `kubectl apply` of a new image does it. Where there is a Redis, aggregators must divide the files, and it is
away for a while. Where workers are processes of their own, one datacenter is drained to the other, and taken back. A Prometheus
scrapes it, and is asked all that the dashboard and the alerts ask. Where a datacenter is in a bucket, a Garage outside has that.
Needs root, iproute2, iptables, prometheus, redis-server, garage and kubectl (which renders, and asks no server).

  check_kubernetes.py --manifests                      only renders and checks
  check_kubernetes.py --binary target/debug/sluice --overlay dc-a --overlay dc-b
  check_kubernetes.py --binary target/debug/sluice --overlay dc-a-bucket --overlay dc-b
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import pathlib
import re
import sys
import tempfile
import threading
import time

from kubernetes.image import of_redis, of_sluice
from kubernetes.manifests import Manifests
from kubernetes.node import Node, secrets
from kubernetes.observed import BUCKET, REDIS, Prometheus, check
from kubernetes.pod import Pod, run
from kubernetes.s3 import PLACE, S3, garage

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
OVERLAYS = ("dc-a", "dc-a-bucket", "dc-b", "minimal")
SIZES = (700, 3 << 20, (12 << 20) + 5)
CLIENTS = 3
# How long a client rests between two files, in seconds: three that never rest leave two cores nothing for what is restarted.
REST = 0.2
READ_BACK = 40
# As k8s/README.md says.
SHARES = 16
# How long Redis is away, in seconds: longer than leases last.
AWAY = 5
PATIENCE = 60


def overlay(name):
    return str(ROOT / "k8s" / "overlays" / name)


def check_manifests():
    for name in OVERLAYS:
        manifests = Manifests(overlay(name))
        unchecked = manifests.check()
        print(f"{name}: {len(manifests.all)} objects; not checked against a schema: {', '.join(unchecked)}")


class Load:
    """Clients that send files until they are told to stop; each upload must succeed."""

    def __init__(self, node, binary, home, urls, tag="file", clients=CLIENTS):
        self.node, self.binary, self.home, self.urls, self.tag = node, binary, home, urls, tag
        self.stop, self.sent, self.failed, self.lock = threading.Event(), [], [], threading.Lock()
        self.threads = [threading.Thread(target=self.run, args=(n,), daemon=True) for n in range(clients)]

    def begin(self):
        for thread in self.threads:
            thread.start()

    def sluice(self, *args, token="token"):
        environment = {"HOME": str(self.home), "SLUICE_CA": str(self.home / "keys/ca.pem"),
                       "SLUICE_TOKEN_FILE": str(self.home / token), "SLUICE_URL": ",".join(self.urls)}
        process = self.node.command("client", [str(self.binary), *args], env=environment)
        out, errors = process.communicate(timeout=300)
        return process.returncode, out.strip(), errors

    def run(self, client):
        number = 0
        while not self.stop.is_set():
            number += 1
            size = SIZES[number % len(SIZES)]
            path = self.home / f"{self.tag}-{client}-{number}"
            content = os.urandom(size)
            path.write_bytes(content)
            code, id, errors = self.sluice("put", str(path))
            # What it was is enough: all of them together are several gigabytes.
            path.unlink()
            with self.lock:
                if code == 0:
                    self.sent.append((id, size, hashlib.sha256(content).digest()))
                else:
                    self.failed.append(f"put of {size} bytes ended with {code}: {errors}")
            self.stop.wait(REST)

    def finish(self, read_at=None):
        """Ends it, and reads back some of what was sent, wherever it is or at one URL."""
        self.stop.set()
        for thread in self.threads:
            thread.join()
        assert not self.failed, "\n".join(self.failed)
        # Some of all of them, the first and the last too.
        step = max(1, len(self.sent) // READ_BACK)
        read = [*self.sent[::step], self.sent[-1]]
        for id, _, digest in read:
            copy = self.home / f"{self.tag}-copy"
            where = ("--url", read_at) if read_at else ()
            code, _, errors = self.sluice("get", id, "-o", str(copy), *where)
            assert code == 0, errors
            assert hashlib.sha256(copy.read_bytes()).digest() == digest, f"{id} came back as something else"
            copy.unlink()
        return len(self.sent), len(read)


class Cluster:
    def __init__(self, node, manifests):
        self.node, self.manifests, self.numbers = node, manifests, itertools.count(1)
        self.running = {}
        for workload in manifests.workloads():
            pods = [self.start(workload, n) for n in range(manifests.replicas(workload))]
            self.running[self.key(workload)] = pods
        for pods in self.running.values():
            for pod in pods:
                pod.wait_ready()

    @staticmethod
    def key(workload):
        return workload["metadata"]["namespace"], workload["metadata"]["name"]

    def start(self, workload, ordinal):
        number = next(self.numbers)
        namespace, name = self.key(workload)
        stays = workload["kind"] == "StatefulSet"
        short = namespace.removeprefix("sluice-")
        pod = Pod(self.node, self.manifests, workload, f"{short}-{name}-{ordinal if stays else f'r{number}'}",
                  self.node.address(namespace))
        pod.start()
        return pod

    def of(self, namespace, name):
        return self.running[namespace, name]

    def pods(self, namespace=None):
        return [pod for (of, _), pods in self.running.items() for pod in pods if namespace in (None, of)]

    def restart(self, workload, meanwhile=None):
        """A rolling restart, as the controller of the workload does it; `meanwhile`: between the end of a process and the
        start of the next, where that is the order."""
        pods = self.running[self.key(workload)]
        order = list(enumerate(pods))
        if workload["kind"] == "StatefulSet":
            # The highest first.
            order.reverse()
        for ordinal, old in order:
            if workload["kind"] == "StatefulSet":
                took = old.terminate()
                pods[ordinal] = self.start(workload, ordinal)
                pods[ordinal].wait_ready()
            elif workload["spec"]["strategy"] == {"type": "Recreate"}:
                took = old.terminate()
                meanwhile()
                pods[ordinal] = self.start(workload, ordinal)
                pods[ordinal].wait_ready()
            else:
                rolling = workload["spec"]["strategy"]["rollingUpdate"]
                assert rolling == {"maxUnavailable": 0, "maxSurge": 1}
                pods[ordinal] = self.start(workload, ordinal)
                pods[ordinal].wait_ready()
                took = old.terminate()
            print(f"  {old.name} ended in order after {took:.1f} s; {pods[ordinal].name} is ready", flush=True)
            self.node.check()

    def restart_at_once(self, workloads):
        """Rolling restarts of all of these, each of which goes on when it is ready, whatever the others do."""
        with concurrent.futures.ThreadPoolExecutor(len(workloads)) as pool:
            list(pool.map(self.restart, workloads))


def eventually(what, true):
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until, what()
        time.sleep(0.2)


def both_ways(manifests):
    """Each of two datacenters, and the other."""
    namespaces = manifests.namespaces()
    return [(one, other) for one in namespaces for other in namespaces if one != other]


# Which of these can be connected to. Who is kept out finds out by waiting: all at once.
REACH = """
import concurrent.futures, socket, sys
def reach(at):
    address, port = at.split(":")
    try:
        socket.create_connection((address, int(port)), timeout=1).close()
    except OSError:
        return ""
    return at
with concurrent.futures.ThreadPoolExecutor(128) as pool:
    print(*pool.map(reach, sys.argv[1:]))
"""


def asked_by(pod):
    """Whom the file of a pod names, but for URLs that are told to clients."""
    known = [line.split() for line in (pod.directory / "hosts").read_text().splitlines()]
    lines = [line for line in pod.config.splitlines() if not line.startswith("url = ")]
    named = re.findall(r'(https://)?([\w.-]+)(?::(\d+))?"', "\n".join(lines))
    return {f"{address}:{port or 443}" for tls, host, port in named if tls or port
            for address, *names in known if host in names}


def check_policies(node, cluster):
    """Pods reach whom their files name, and nobody else. Clients reach edges and nothing else, whoever reads metrics every
    admin port, and the other datacenter what is there for it."""
    def behind(namespace, *services):
        """The ports that these Services lead to."""
        return {f"{pod.address}:{pod.ports[port['targetPort']]}" for service in node.manifests.of("Service", namespace)
                if service["metadata"]["name"] in services for pod in node.endpoints(service)
                for port in service["spec"]["ports"]}

    # Whoever is ready is known from now on.
    node.changed()
    ports = {f"{pod.address}:{port}": f"{pod.name}:{name}" for pod in cluster.pods() for name, port in pod.ports.items()}
    # What is outside lets in everyone: pods alone are kept from it.
    outside = {f"{node.hosts[PLACE][2]}:443": PLACE} if PLACE in node.hosts else {}
    may = {place: behind(None, "edge") for place in node.hosts}
    may["prometheus"] |= {f"{pod.address}:{pod.ports['admin']}" for pod in cluster.pods() if pod.is_sluice}
    for namespace, other in both_ways(node.manifests):
        may[f"stranger-{other}"] |= behind(namespace, "peer", "passing", "renewing")
    may |= {pod.name: asked_by(pod) for pod in cluster.pods()}

    def check(place):
        tried = ports if place in node.hosts else {
            at: name for at, name in (ports | outside).items() if not name.startswith(f"{place}:")}
        out, errors = node.command(place, [sys.executable, "-c", REACH, *tried]).communicate(timeout=60)
        reached = set(out.split())
        wrong = [f"{tried.get(at, at)} {'may not' if at in reached else 'cannot'}" for at in reached ^ may[place]]
        assert not errors and not wrong, f"from {place}: {', '.join(wrong)} be reached {errors}"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(check, may))
    for pod in cluster.pods():
        if not pod.is_sluice:
            continue
        url = f"http://{pod.address}:{pod.ports['admin']}/metrics"
        script = f"import urllib.request; print(urllib.request.urlopen('{url}', timeout=5).read().decode())"
        reader = node.command("prometheus", [sys.executable, "-c", script])
        text, errors = reader.communicate(timeout=10)
        assert "sluice_build_info" in text, errors


# What comes of a request with a certificate and its key, or without.
KNOCK = """
import socket, ssl, sys
address, port, *identity = sys.argv[1:]
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
if identity:
    context.load_cert_chain(*identity)
plain = socket.create_connection((address, int(port)), timeout=10)
try:
    with context.wrap_socket(plain) as inside:
        inside.sendall(b"GET / HTTP/1.1\\r\\nHost: inside\\r\\nConnection: close\\r\\n\\r\\n")
        print("answered" if inside.recv(64).startswith(b"HTTP/1.1 ") else "refused")
except (ssl.SSLError, ConnectionError):
    print("refused")
"""


def check_doors(node, cluster, load):
    """Of what is there for the other datacenter, its network reaches the port, and its role alone gets an answer."""
    for namespace, other in both_ways(node.manifests):
        roles = load.home / "keys/roles" / other.removeprefix("sluice-")
        for name, port in (("passing", "inside"), ("renewing", "session")):
            for pod in node.endpoints(node.manifests.named("Service", namespace, name)):
                def knock(*role):
                    identity = [next((roles / of).glob(f"dc-*/{of}{end}")) for of in role for end in (".pem", "-key.pem")]
                    args = [sys.executable, "-c", KNOCK, pod.address, str(pod.ports[port]), *map(str, identity)]
                    out, errors = node.command(f"stranger-{other}", args).communicate(timeout=30)
                    assert out, f"{pod.name}, from {other}: {errors}"
                    return out.strip()

                answers = knock(), knock("edge"), knock(pod.role)
                assert answers == ("refused", "refused", "answered"), f"{pod.name}, from {other}: {answers}"


ASK = """
import socket, ssl, sys
ca, name, address, token = sys.argv[1:]
token = open(token).read().strip()
plain = socket.create_connection((address, 8443), timeout=30)
with ssl.create_default_context(cafile=ca).wrap_socket(plain, server_hostname=name) as edge:
    edge.sendall(f"GET /v1/files HTTP/1.1\\r\\nHost: {name}\\r\\nAuthorization: Bearer {token}\\r\\n\\r\\n".encode())
    print(edge.recv(4096).split()[1].decode())
"""


class Shared:
    """What the processes of a namespace share through its Redis."""

    def __init__(self, cluster, load, namespace):
        self.cluster, self.load, self.namespace = cluster, load, namespace

    def shares(self):
        return {pod.name: pod.metric("sluice_shares") for pod in self.cluster.of(self.namespace, "aggregator")}

    # Each share goes to whom a hash says: none at all go to one of two once in 30,000 times.
    def is_divided(self):
        shares = self.shares().values()
        return len(shares) > 1 and min(shares) > 0 and sum(shares) == SHARES

    def check(self, when):
        """All are connected, and each aggregator has a part of the files, until it is so."""
        eventually(lambda: f"{when} {', '.join(self.cut_off())} cannot reach Redis", lambda: not self.cut_off())
        eventually(lambda: f"{when} not each has some of {SHARES} shares: {self.shares()}", self.is_divided)
        parts = ", ".join(f"{name} has {number:.0f}" for name, number in self.shares().items())
        print(f"  {when}, of {SHARES} shares {parts}", flush=True)

    def cut_off(self):
        """Who cannot reach Redis."""
        pods = self.cluster.pods(self.namespace)
        return [pod.name for pod in pods if pod.is_sluice and pod.metric("sluice_redis_up") != 1]

    def logs_in(self, token):
        """What each edge answers to whoever comes with a token."""
        answers = []
        name = f"{self.namespace.removeprefix('sluice-')}.edge.prod.sluice"
        for edge in self.cluster.of(self.namespace, "edge"):
            script = [sys.executable, "-c", ASK, str(self.load.home / "keys/ca.pem"), name, edge.address, str(token)]
            out, errors = self.cluster.node.command("client", script).communicate(timeout=60)
            assert out, errors
            answers.append(int(out))
        return answers

    def without(self):
        """While Redis is away: who had shares has them, sessions that began go on, none begin."""
        known, new = self.load.home / "token", self.load.home / f"token-{self.namespace}"
        time.sleep(AWAY)
        answers = self.logs_in(known), self.logs_in(new)
        assert (set(answers[0]), set(answers[1])) == ({200}, {503}), f"without Redis known and new sessions got {answers}"
        assert self.is_divided(), f"without Redis not each has some of {SHARES} shares: {self.shares()}"
        path = self.load.home / f"without-redis-{self.namespace}"
        path.write_bytes(os.urandom(SIZES[-1]))
        (url,) = [url for url in self.load.urls if self.namespace.removeprefix("sluice-") in url]
        code, _, errors = self.load.sluice("put", "--url", url, "--retry-for", "0s", str(path))
        assert code == 0, f"without Redis: {errors}"
        print(f"  {self.namespace} without Redis: uploads went on, known sessions got 200, new ones 503", flush=True)

    def restart(self, workload):
        """Takes Redis away for a while."""
        self.check("before Redis is away")
        known, new = self.load.home / "token", self.load.home / f"token-{self.namespace}"
        # So that the session has begun with each edge.
        eventually(lambda: f"a known session gets {self.logs_in(known)}", lambda: set(self.logs_in(known)) == {200})
        self.cluster.restart(workload, self.without)
        self.check("with another Redis")
        eventually(lambda: f"a new session gets {self.logs_in(new)}", lambda: set(self.logs_in(new)) == {200})


# Sends a chunk without a wish to be sent elsewhere; prints where it is.
SEND = """
import http.client, json, os, ssl, sys
ca, name, token = sys.argv[1:]
headers = {"Authorization": f"Bearer {open(token).read().strip()}"}
def ask(method, path, kind, body):
    edge = http.client.HTTPSConnection(name, 8443, context=ssl.create_default_context(cafile=ca), timeout=60)
    edge.request(method, path, body, headers | {"Content-Type": kind})
    answer = edge.getresponse()
    text = answer.read().decode()
    assert answer.status < 300, f"{method} {path}: {answer.status} {text}"
    return json.loads(text)
size = 1 << 20
id = ask("POST", "/v1/files", "application/json", json.dumps({"size": size}))["id"]
print(ask("PUT", f"/v1/files/{id}/chunks/0", "application/octet-stream", os.urandom(size))["dc"])
"""


class Drain:
    """Hands over the work of one datacenter to the other, and takes it back."""

    def __init__(self, cluster, load, shared):
        self.cluster, self.load, self.shared = cluster, load, shared
        self.namespace, other = cluster.manifests.namespaces()
        self.dc, self.to = (namespace.removeprefix("sluice-") for namespace in (self.namespace, other))
        self.url, self.there = (f"https://{dc}.edge.prod.sluice:8443" for dc in (self.dc, self.to))

    def order(self, *args):
        return self.load.sluice("admin", *args, "--url", self.url, token="operator")

    def begin(self):
        until = time.monotonic() + PATIENCE
        while True:
            code, said, errors = self.order("drain", self.dc, "--to", self.to, "--evacuate", "--wait", "2min")
            # A link of one of the shares may only just come up.
            if code == 0 or "cannot be reached from here" not in errors or time.monotonic() > until:
                return code, said, errors
            time.sleep(0.5)

    def takes(self):
        """Where a chunk is that came to it from a client that goes nowhere else."""
        name = f"{self.dc}.edge.prod.sluice"
        script = [sys.executable, "-c", SEND, str(self.load.home / "keys/ca.pem"), name, str(self.load.home / "token")]
        out, errors = self.cluster.node.command("client", script).communicate(timeout=120)
        assert out, errors
        return out.strip()

    def counted(self, role, metric):
        return sum(pod.metric(metric) for pod in self.cluster.pods(self.namespace) if pod.role == role)

    def check(self):
        began = time.monotonic()
        own = Load(self.load.node, self.load.binary, self.load.home, [self.url], f"from-{self.dc}", 1)
        own.begin()
        code, said, errors = self.begin()
        is_empty = f"none: {self.dc} holds the sole copy of nothing" in said
        assert code == 0 and is_empty, f"drain ended with {code}: {said} {errors}"
        took, there = time.monotonic() - began, self.takes()
        assert there == self.to, f"while {self.dc} is drained {there} took a chunk"
        passed = self.counted("worker", "sluice_spill_bytes_total")
        assert passed > 0, f"nothing was passed on by workers of {self.dc}"
        answers = self.shared.logs_in(self.load.home / "token-moved")
        moved = self.counted("session", "sluice_moved_contexts_total")
        assert set(answers) == {200} and moved > 0, f"a new session got {answers}, {moved} contexts came from {self.to}"
        sent, read = own.finish(read_at=self.there)
        print(f"  {self.dc} was drained to {self.to} after {took:.1f} s; {sent} uploads to it meanwhile, none failed; {read}"
              f" were read back at {self.to}; {passed / (1 << 20):.0f} MiB were passed on, {moved:.0f} contexts came from there",
              flush=True)
        code, said, errors = self.order("undrain", self.dc)
        assert code == 0 and "does not drain" in said, f"undrain ended with {code}: {said} {errors}"
        eventually(lambda: f"{self.dc} still passes on what it is sent", lambda: self.takes() == self.dc)
        sent = len(self.load.sent)
        eventually(lambda: "nothing is sent any more", lambda: len(self.load.sent) > sent + CLIENTS or self.load.failed)
        assert not self.load.failed, "\n".join(self.load.failed)


def check_carried(cluster):
    """Each porter takes its part of what clients send to the bucket."""
    def sent():
        porters = [pod for pod in cluster.pods() if "\nkeeper = " in pod.config]
        return {pod.name: pod.metric("sluice_bucket_sent_bytes_total") for pod in porters}

    eventually(lambda: f"not each porter has sent something: {sent()}", lambda: all(sent().values()))
    for name, sent_bytes in sent().items():
        print(f"  {name} has sent {sent_bytes / (1 << 20):.0f} MiB to the bucket", flush=True)


CALL = """
import os, sys
os.environ["GRPC_DNS_RESOLVER"] = "native"
import grpc
credentials = grpc.ssl_channel_credentials(open(sys.argv[1], 'rb').read())
with grpc.secure_channel(sys.argv[2], credentials) as channel:
    print(channel.unary_unary('/grpc.health.v1.Health/Check')(b'', timeout=10))
"""


def check_seen(node, cluster, load):
    """A call over gRPC, and what Prometheus sees."""
    for url in load.urls:
        at = url.removeprefix("https://")
        process = node.command("client", [sys.executable, "-c", CALL, str(load.home / "keys/ca.pem"), at])
        out, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
    prometheus = Prometheus(node, [pod for pod in cluster.pods() if pod.is_sluice])
    shared = any(name == "redis" for _, name in cluster.running)
    absent = [*[BUCKET] * (not node.manifests.in_a_bucket()), *[REDIS] * (not shared)]
    try:
        prometheus.wait()
        until = time.monotonic() + 60
        while len({size for _, size, _ in load.sent}) < len(SIZES):
            assert time.monotonic() < until and not load.failed, load.failed
            time.sleep(0.2)
        # A rate is there once two scrapes have seen it.
        while True:
            try:
                queries, alerts = check(prometheus, ROOT, absent)
                break
            except AssertionError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)
        print(f"  {queries} queries of the dashboard answered, {alerts} alerts have their metrics", flush=True)
    finally:
        prometheus.stop()


def check_cluster(binary, overlays):
    manifests = Manifests(*(overlay(name) for name in overlays))
    # When something failed clients may still write there.
    with (tempfile.TemporaryDirectory(prefix="sluice-kubernetes-", ignore_cleanup_errors=True) as directory,
          contextlib.ExitStack() as outside):
        home = pathlib.Path(directory)
        # Whoever runs as another user must get to what is theirs.
        home.chmod(0o755)
        images = {"sluice": of_sluice(ROOT / "k8s" / "image", home / "image", binary, manifests)}
        with_redis = [namespace for namespace in manifests.namespaces() if manifests.has_redis(namespace)]
        if with_redis:
            images["redis"] = of_redis(home / "redis", manifests)
        keys = home / "keys"
        divided = ("--shares", str(SHARES)) if with_redis else ()
        run(binary, "admin", "key", "make", keys, "--cluster", "prod", "--dc", "dc-a", "--dc", "dc-b", *divided)
        # One for the load; the others begin sessions when that is to be seen.
        for name in ("token", "token-moved", *(f"token-{namespace}" for namespace in with_redis)):
            run(binary, "admin", "token", "mint", "--keys", keys / "authority", "--tenant", "7", "--out", home / name)
        run(binary, "admin", "token", "mint", "--keys", keys / "authority", "--operator", "--out", home / "operator")
        buckets = [S3(home, manifests.config(workload)) for workload in manifests.in_a_bucket()[:1]]
        node = Node(home, images, manifests, secrets(ROOT / "k8s", home, manifests))
        node.outsider("client", "clients")
        node.outsider("prometheus", "monitoring")
        for namespace in manifests.namespaces():
            node.outsider(f"stranger-{namespace}", namespace)
        for bucket in buckets:
            outside.callback(bucket.stop)
            bucket.start(node)
        began = time.monotonic()
        cluster = Cluster(node, manifests)
        try:
            count = len(cluster.pods())
            print(f"{' + '.join(overlays)}: {count} processes are ready after {time.monotonic() - began:.1f} s", flush=True)
            check_policies(node, cluster)
            urls = [f"https://{name.removeprefix('sluice-')}.edge.prod.sluice:8443" for name in manifests.namespaces()]
            load = Load(node, binary, home, urls)
            shared = {namespace: Shared(cluster, load, namespace) for namespace in with_redis}
            for namespace in with_redis:
                shared[namespace].check("at first")
            # One process is told of the other's URL alone, and passes nothing on by itself.
            apart = [namespace for namespace, name in cluster.running if name == "worker"]
            if len(apart) == 2:
                check_doors(node, cluster, load)
            load.begin()
            check_seen(node, cluster, load)
            if len(apart) == 2:
                Drain(cluster, load, shared[apart[0]]).check()
            for number, namespace in enumerate(manifests.namespaces()):
                workloads = manifests.workloads(namespace)
                redis = [workload for workload in workloads if cluster.key(workload)[1] == "redis"]
                others = [workload for workload in workloads if workload not in redis]
                for steps in [others] if number else [[workload] for workload in others]:
                    cluster.restart_at_once(steps)
                for workload in redis:
                    shared[namespace].restart(workload)
            for namespace in with_redis:
                shared[namespace].check("when all were restarted")
            check_carried(cluster)
            sent, read = load.finish()
            assert sent > 2 * CLIENTS, f"only {sent} uploads"
            print(f"  {sent} uploads, none failed; {read} were read back, and equal", flush=True)
        except BaseException:
            for pod in filter(lambda pod: pod.process, list(node.pods)):
                print(f"--- what {pod.name} said last:\n{pod.tail()}", file=sys.stderr)
            raise
        finally:
            # Those, too, that another was to take the place of.
            for pod in list(node.pods):
                pod.terminating = True
                if pod.process:
                    pod.process.kill()
                    pod.process.wait()
        node.check()


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--manifests", action="store_true")
    arguments.add_argument("--binary", type=pathlib.Path)
    arguments.add_argument("--overlay", action="append", default=[])
    arguments = arguments.parse_args()
    check_manifests()
    if not arguments.manifests:
        if Manifests(*map(overlay, arguments.overlay)).in_a_bucket() and not garage():
            print("not run: garage is missing: cargo install garage --version 2.5.0 --locked")
            return
        check_cluster(arguments.binary.resolve(), arguments.overlay)
    print("passed")


if __name__ == "__main__":
    main()
