"""A machine for pods: addresses, names, and who may talk to whom, in network namespaces of this process alone.

Names are in hosts files, which are written anew whenever an endpoint comes or goes, as a cluster's DNS would answer.
NetworkPolicies are packet filters in the namespace of each pod.
"""

import ipaddress
import os
import pathlib
import subprocess
import threading

import yaml

from .manifests import matches, secrets_of
from .pod import CLONE_NEWNET, CLONE_NEWNS, MS_BIND, MS_PRIVATE, MS_REC, call, mount, run

ADDRESS = "10.0.0.1"
# Where the overlays say that the datacenters are, and the bucket.
NETWORKS = {"sluice-dc-a": "10.1", "sluice-dc-b": "10.2", "s3": "10.7", "clients": "10.8", "monitoring": "10.9"}
NAMESPACE = "kubernetes.io/metadata.name"


class Node:
    def __init__(self, directory, images, manifests, secrets):
        self.directory, self.images, self.manifests, self.secrets = pathlib.Path(directory), images, manifests, secrets
        self.environment, self.pods, self.failures, self.hosts, self.names = {}, [], [], {}, {}
        self.lock, self.count = threading.RLock(), 0
        # This process's alone: nothing of it is seen outside.
        call("unshare", CLONE_NEWNET | CLONE_NEWNS)
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        os.makedirs("/run/netns", exist_ok=True)
        mount("netns", "/run/netns", "tmpfs", 0)
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "br0", "type", "bridge")
        run("ip", "address", "add", f"{ADDRESS}/8", "dev", "br0")
        run("ip", "link", "set", "br0", "up")

    # Failures of threads end the test.
    def fail(self, reason):
        self.failures.append(reason)

    def check(self):
        assert not self.failures, "\n".join(self.failures)

    def wire(self, name, address):
        with self.lock:
            self.count += 1
            link = f"v{self.count}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", link, "master", "br0", "up")
        for command in (["address", "add", f"{address}/8", "dev", "eth0"], ["link", "set", "eth0", "up"],
                        ["link", "set", "lo", "up"]):
            run("ip", "-n", name, *command)

    def address(self, namespace):
        with self.lock:
            self.count += 1
            return f"{NETWORKS[namespace]}.{self.count // 250}.{self.count % 250 + 1}"

    def plug(self, pod):
        self.wire(pod.name, pod.address)
        with self.lock:
            self.pods.append(pod)
        self.changed()

    def unplug(self, pod):
        with self.lock:
            self.pods.remove(pod)
        run("ip", "netns", "delete", pod.name)
        self.changed()

    def outsider(self, name, namespace, *known_as):
        """A place in which something else runs, such as clients, or whoever reads metrics; everybody knows its names."""
        address = self.address(namespace)
        self.wire(name, address)
        hosts = self.directory / f"hosts-{name}"
        with self.lock:
            self.hosts[name] = (namespace, hosts, address)
            self.names.update({name: address for name in known_as})
        self.changed()

    def command(self, place, args, **more):
        """Starts a command there: as an outsider, or in the network of a pod."""
        network = f"/run/netns/{place}"
        hosts = self.hosts[place][1] if place in self.hosts else self.pod(place).directory / "hosts"

        def enter():
            handle = os.open(network, os.O_RDONLY)
            call("setns", handle, CLONE_NEWNET)
            call("unshare", CLONE_NEWNS)
            mount(None, "/", None, MS_REC | MS_PRIVATE)
            mount(hosts, "/etc/hosts", None, MS_BIND)

        more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
        return subprocess.Popen(args, preexec_fn=enter, **more)

    def pod(self, name):
        (pod,) = [pod for pod in self.pods if pod.name == name]
        return pod

    def changed(self):
        """Something came, went, or changed its readiness: names and filters follow."""
        with self.lock:
            for pod in self.pods:
                self.write_hosts(pod.directory / "hosts", pod.namespace)
            for namespace, hosts, _ in self.hosts.values():
                self.write_hosts(hosts, namespace)
            for pod in self.pods:
                self.filter(pod)

    def write_hosts(self, path, namespace):
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.names.items())]
        for service in self.manifests.of("Service"):
            name, of = service["metadata"]["name"], service["metadata"]["namespace"]
            names = [f"{name}.{of}", f"{name}.{of}.svc", f"{name}.{of}.svc.cluster.local"]
            if of == namespace:
                names.append(name)
            if service["spec"].get("type") == "LoadBalancer":
                # What an operator has to make known outside.
                names.append(f"{of.removeprefix('sluice-')}.{name}.prod.sluice")
            for pod in self.endpoints(service):
                lines.append(f"{pod.address} {' '.join(names)}")
        text = "\n".join(lines) + "\n"
        # In place: it is mounted.
        with open(path, "r+" if path.exists() else "w") as file:
            file.write(text)
            file.truncate()

    def endpoints(self, service):
        selector = {"matchLabels": service["spec"]["selector"]}
        unready = service["spec"].get("publishNotReadyAddresses", False)
        return [pod for pod in self.pods
                if (pod.ready or unready) and pod.namespace == service["metadata"]["namespace"] and matches(selector, pod.labels)]

    def others(self, peers, namespace):
        """Pods and networks that a rule of a policy means: (network, pod or None)."""
        if peers is None:
            yield "0.0.0.0/0", None
        for peer in peers or []:
            if "ipBlock" in peer:
                yield peer["ipBlock"]["cidr"], None
                continue
            wanted = peer.get("namespaceSelector")
            for pod in self.pods:
                there = pod.namespace == namespace if wanted is None else matches(wanted, {NAMESPACE: pod.namespace})
                if there and matches(peer.get("podSelector", {}), pod.labels):
                    yield f"{pod.address}/32", pod
            for of, _, address in self.hosts.values():
                if wanted is not None and "podSelector" not in peer and matches(wanted, {NAMESPACE: of}):
                    yield f"{address}/32", None

    def filter(self, pod):
        policies = [p for p in self.manifests.of("NetworkPolicy", pod.namespace)
                    if matches(p["spec"]["podSelector"], pod.labels)]
        rules = ["*filter", ":FORWARD DROP"]
        for kind, chain, side, peers in (("Ingress", "INPUT", "-s", "from"), ("Egress", "OUTPUT", "-d", "to")):
            binding = [p["spec"] for p in policies if kind in p["spec"]["policyTypes"]]
            rules += [f":{chain} {'DROP' if binding else 'ACCEPT'}", f"-A {chain} {'-i' if chain == 'INPUT' else '-o'} lo -j ACCEPT",
                      f"-A {chain} -p tcp ! --syn -j ACCEPT"]
            if chain == "INPUT":
                # Probes come from the node, which no policy keeps out.
                rules.append(f"-A {chain} -s {ADDRESS}/32 -j ACCEPT")
            for spec in binding:
                for rule in spec.get(kind.lower(), []):
                    for network, other in self.others(rule.get(peers), pod.namespace):
                        ipaddress.ip_network(network)
                        for port in rule["ports"]:
                            number = port["port"]
                            if isinstance(number, str):
                                number = (pod if chain == "INPUT" else other).ports[number]
                            rules.append(f"-A {chain} -p {port['protocol'].lower()} {side} {network} --dport {number} -j ACCEPT")
        run("ip", "netns", "exec", pod.name, "iptables-restore", input="\n".join([*rules, "COMMIT", ""]))


def secrets(scripts, home, manifests):
    """What an operator makes with `k8s/secret`, by namespace and name: of `sluice admin key make` (in `keys`), of
    `k8s/redis-password` (in `passwords`), and of the key of a bucket (in `s3`)."""
    found = {}
    for namespace in manifests.namespaces():
        dc, keys = namespace.removeprefix("sluice-"), home / "keys"
        for secret in sorted(set().union(*map(secrets_of, manifests.workloads(namespace)))):
            role = secret.removeprefix("sluice-keys-")
            if secret == "sluice-redis":
                directory = home / "passwords" / dc
                run(scripts / "redis-password", directory)
            elif secret == "sluice-s3":
                directory = home / "s3"
            else:
                directory = keys / dc if role == "dc" else keys / "roles" / dc / role
            found[namespace, secret] = yaml.safe_load(run(scripts / "secret", secret, directory).stdout)
    return found
