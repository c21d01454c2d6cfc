"""A pod: a process with a root filesystem, mounts, a user and a network of its own, as a kubelet would make it."""

import base64
import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request

from .manifests import container_of, role_of

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 32, 4096, 16384, 1 << 18
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 38, 24
PATIENCE = 60


def call(name, *args):
    if getattr(LIBC, name)(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source, target, kind, flags):
    call("mount", source and os.fsencode(source), os.fsencode(target), kind and kind.encode(), flags, None)


def run(*args, **more):
    return subprocess.run(args, check=True, capture_output=True, text=True, **more)


class Pod:
    """One container of a workload."""

    def __init__(self, node, manifests, workload, name, address):
        self.node, self.manifests, self.name, self.address = node, manifests, name, address
        self.namespace = workload["metadata"]["namespace"]
        self.labels = workload["spec"]["template"]["metadata"]["labels"]
        self.spec = workload["spec"]["template"]["spec"]
        self.container = container_of(workload)
        self.claims = workload["spec"].get("volumeClaimTemplates", [])
        self.ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        self.is_sluice = self.labels["app.kubernetes.io/name"] == "sluice"
        self.role = role_of(workload) if self.is_sluice else None
        self.config = manifests.config(workload) if self.is_sluice else ""
        self.directory = node.directory / "pods" / self.namespace / name
        self.ready, self.process, self.ended = False, None, threading.Event()
        self.terminating = False

    def volumes(self):
        """Directories as they are mounted: where, what, whether they can be written to."""
        sources = {}
        for volume in self.spec["volumes"]:
            place = self.directory / "volumes" / volume["name"]
            if "configMap" in volume:
                found = self.manifests.named("ConfigMap", self.namespace, volume["configMap"]["name"])
                files, mode = {n: text.encode() for n, text in found["data"].items()}, 0o444
            else:
                found = self.node.secrets[self.namespace, volume["secret"]["secretName"]]
                data = found["data"]
                if "items" in volume["secret"]:
                    data = {item["path"]: data[item["key"]] for item in volume["secret"]["items"]}
                files, mode = {n: base64.b64decode(text) for n, text in data.items()}, volume["secret"]["defaultMode"]
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            for file, content in files.items():
                (place / file).write_bytes(content)
                os.chown(place / file, 0, self.spec["securityContext"]["fsGroup"])
                os.chmod(place / file, mode)
            sources[volume["name"]] = place
        for claim in self.claims:
            place = self.node.directory / "claims" / self.namespace / f"{claim['metadata']['name']}-{self.name}"
            place.mkdir(parents=True, exist_ok=True)
            os.chown(place, 0, self.spec["securityContext"]["fsGroup"])
            os.chmod(place, 0o2775)
            sources[claim["metadata"]["name"]] = place
        return [(m["mountPath"], sources[m["name"]], m.get("readOnly", False)) for m in self.container["volumeMounts"]]

    def start(self):
        image = self.node.images[self.container["image"].split(":")[0]]
        self.directory.mkdir(parents=True, exist_ok=True)
        root, hosts = self.directory / "root", self.directory / "hosts"
        root.mkdir(exist_ok=True)
        hosts.touch()
        self.node.plug(self)
        mounts = self.volumes()
        environment = dict(image.environment)
        environment.update({e["name"]: e["value"] for e in self.container.get("env", [])})
        for source in self.container.get("envFrom", []):
            assert source["configMapRef"]["optional"]
        environment.update(self.node.environment)
        network = os.open(f"/run/netns/{self.name}", os.O_RDONLY)

        def enter():
            call("setns", network, CLONE_NEWNET)
            call("unshare", CLONE_NEWNS)
            mount(None, "/", None, MS_REC | MS_PRIVATE)
            mount(image.root, root, None, MS_BIND)
            for place, source, _ in mounts:
                mount(source, f"{root}{place}", None, MS_BIND)
            mount(hosts, f"{root}/etc/hosts", None, MS_BIND)
            mount("proc", f"{root}/proc", "proc", MS_NOSUID)
            mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY)
            for place, _, read_only in mounts:
                if read_only:
                    mount(None, f"{root}{place}", None, MS_REMOUNT | MS_BIND | MS_RDONLY)
            self.become(root)

        self.log, self.environment = open(self.directory / "log", "ab"), environment
        self.process = subprocess.Popen(
            [*self.container.get("command", image.entrypoint), *self.container["args"]],
            preexec_fn=enter, env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )
        os.close(network)
        threading.Thread(target=self.watch, daemon=True).start()

    def become(self, root):
        """What this process may do and see from now on: what the container may."""
        security = self.spec["securityContext"]
        os.chroot(root)
        os.chdir("/")
        for capability in range(41):
            LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.setgroups([security["fsGroup"]])
        os.setgid(security["runAsGroup"])
        os.setuid(security["runAsUser"])
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

    def runs(self, command, timeout):
        """Whether a command ends well inside the container, in time."""
        network, root = f"/run/netns/{self.name}", f"/proc/{self.process.pid}/root"

        def enter():
            handle = os.open(network, os.O_RDONLY)
            call("setns", handle, CLONE_NEWNET)
            self.become(root)

        try:
            done = subprocess.run(command, preexec_fn=enter, env=self.environment, stdin=subprocess.DEVNULL,
                                  capture_output=True, timeout=timeout)
            return done.returncode == 0
        except (OSError, subprocess.SubprocessError):
            # It ended meanwhile, or does not answer.
            return False

    def probe(self, name):
        probe = self.container[name]
        if "exec" in probe:
            return self.runs(probe["exec"]["command"], probe.get("timeoutSeconds", 1))
        url = f"http://{self.address}:{self.ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
        try:
            with urllib.request.urlopen(url, timeout=probe.get("timeoutSeconds", 1)) as answer:
                return answer.status < 400
        except OSError:
            return False

    def watch(self):
        """The kubelet: starts with the startup probe, then follows readiness and liveness."""
        failed, startup = 0, self.container.get("startupProbe")
        while startup and not self.probe("startupProbe"):
            failed += 1
            if failed > startup["failureThreshold"] or self.process.poll() is not None:
                self.node.fail(f"{self.name} did not start: {self.tail()}")
                return
            time.sleep(startup["periodSeconds"] / 4)
        liveness, readiness = self.container["livenessProbe"], self.container["readinessProbe"]
        missed, next_liveness = 0, time.monotonic()
        while not self.ended.is_set() and self.process.poll() is None:
            ready = self.probe("readinessProbe")
            with self.node.lock:
                # It may have been told to end meanwhile.
                ready = ready and not self.terminating
                changed, self.ready = ready != self.ready, ready
            if changed:
                self.node.changed()
            if time.monotonic() >= next_liveness:
                missed = 0 if self.probe("livenessProbe") or self.process.poll() is not None else missed + 1
                if missed >= liveness["failureThreshold"]:
                    self.node.fail(f"{self.name} is not alive: {self.tail()}")
                next_liveness = time.monotonic() + liveness["periodSeconds"]
            self.ended.wait(readiness["periodSeconds"] / 4)
        if not self.terminating:
            self.node.fail(f"{self.name} ended by itself with {self.process.poll()}: {self.tail()}")

    def tail(self):
        return (self.directory / "log").read_text(errors="replace")[-2000:]

    def wait_ready(self):
        until = time.monotonic() + PATIENCE
        while not self.ready:
            self.node.check()
            assert time.monotonic() < until, f"{self.name} is not ready: {self.tail()}"
            time.sleep(0.05)

    def terminate(self):
        """As when a pod is deleted: out of the endpoints, preStop, SIGTERM, and the grace period for both."""
        began = time.monotonic()
        with self.node.lock:
            self.terminating, self.ready = True, False
        self.node.changed()
        if "lifecycle" in self.container:
            time.sleep(self.container["lifecycle"]["preStop"]["sleep"]["seconds"])
        assert self.process.poll() is None, f"{self.name} ended before it was told: {self.tail()}"
        self.process.send_signal(signal.SIGTERM)
        left = self.spec["terminationGracePeriodSeconds"] - (time.monotonic() - began)
        code = self.process.wait(left)
        assert code == 0, f"{self.name} ended with {code}: {self.tail()}"
        self.ended.set()
        self.node.unplug(self)
        return time.monotonic() - began

    def metric(self, name):
        """What it says of a metric that it has one series of; 0 if there is none."""
        with urllib.request.urlopen(f"http://{self.address}:{self.ports['admin']}/metrics", timeout=5) as answer:
            found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", answer.read().decode(), re.MULTILINE)
        assert len(found) <= 1, f"{self.name} has several series of {name}"
        return float(found[0]) if found else 0
