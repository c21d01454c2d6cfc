"""Manifests, rendered by the real kustomize and read as they are."""

import subprocess

import kubernetes_validate
import yaml

# The oldest version whose API has everything that is used (a preStop that sleeps is there by default since 1.30).
VERSION = "1.30"

# Their schemas are not Kubernetes' own; only an API server with the operator could check them.
FOREIGN = {"ServiceMonitor", "PrometheusRule"}


def render(overlay):
    done = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def key(found):
    return (found["metadata"].get("namespace", ""), found["kind"], found["metadata"]["name"])


def matches(selector, labels):
    assert not set(selector) - {"matchLabels", "matchExpressions"}, f"a selector that this does not understand: {selector}"
    wanted = [(name, [value]) for name, value in selector.get("matchLabels", {}).items()]
    for one in selector.get("matchExpressions", []):
        assert one["operator"] == "In", f"an operator that this does not understand: {one}"
        wanted.append((one["key"], one["values"]))
    return all(labels.get(name) in values for name, values in wanted)


def container_of(workload):
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    return only


def role_of(workload):
    """What Sluice is there: `sluice worker` is a worker, whatever the workload is called."""
    return container_of(workload)["args"][0]


def secrets_of(workload):
    volumes = workload["spec"]["template"]["spec"]["volumes"]
    return {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}


class Manifests:
    """What some overlays make together."""

    def __init__(self, *overlays):
        self.all = [found for overlay in overlays for found in render(overlay)]
        keys = [key(found) for found in self.all]
        assert len(set(keys)) == len(keys), "something is there twice"

    def of(self, kind, namespace=None):
        return [
            found
            for found in self.all
            if found["kind"] == kind and namespace in (None, found["metadata"].get("namespace"))
        ]

    def named(self, kind, namespace, name):
        (found,) = [found for found in self.of(kind, namespace) if found["metadata"]["name"] == name]
        return found

    def namespaces(self):
        return [found["metadata"]["name"] for found in self.of("Namespace")]

    def workloads(self, namespace=None):
        return self.of("StatefulSet", namespace) + self.of("Deployment", namespace)

    def has_redis(self, namespace):
        return any(workload["metadata"]["name"] == "redis" for workload in self.workloads(namespace))

    def in_a_bucket(self, namespace=None):
        """The workloads that have a key of a bucket."""
        return [workload for workload in self.workloads(namespace) if "sluice-s3" in secrets_of(workload)]

    def config(self, workload):
        """The file that it is started with."""
        args, volumes = container_of(workload)["args"], workload["spec"]["template"]["spec"]["volumes"]
        (name,) = [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]
        found = self.named("ConfigMap", workload["metadata"]["namespace"], name)["data"]
        return found[args[args.index("--config") + 1].rsplit("/", 1)[1]]

    def mounts(self, image):
        """Where something is mounted in its containers."""
        containers = [container_of(workload) for workload in self.workloads()]
        return [mount["mountPath"] for container in containers if container["image"].split(":")[0] == image
                for mount in container["volumeMounts"]]

    def replicas(self, workload):
        """How many processes it begins with: what its autoscaler says, if it has one."""
        for scaler in self.of("HorizontalPodAutoscaler", workload["metadata"]["namespace"]):
            target = scaler["spec"]["scaleTargetRef"]
            if (target["kind"], target["name"]) == (workload["kind"], workload["metadata"]["name"]):
                return scaler["spec"]["minReplicas"]
        return workload["spec"]["replicas"]

    def check(self):
        """Checks all of it against the published schemas, and what these cannot know."""
        unchecked = []
        for found in self.all:
            if found["kind"] in FOREIGN:
                unchecked.append("/".join(key(found)))
            else:
                kubernetes_validate.validate(found, VERSION, strict=True)
        for name in self.namespaces():
            labels = self.named("Namespace", None, name)["metadata"]["labels"]
            assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
            denied = [policy for policy in self.of("NetworkPolicy", name) if policy["spec"]["podSelector"] == {}]
            assert any(set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"} and not
                       ({"ingress", "egress"} & set(policy["spec"])) for policy in denied), "nothing is denied"
        for workload in self.workloads():
            self.check_workload(workload)
        for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            for found in self.of(kind):
                self.check_selection(found)
        for monitor in self.of("ServiceMonitor"):
            wanted = monitor["spec"]["selector"]
            services = [s for s in self.of("Service", monitor["metadata"]["namespace"])
                        if matches(wanted, s["metadata"]["labels"])
                        and any(port["name"] == "admin" for port in s["spec"]["ports"])]
            selected = {tuple(s["spec"]["selector"].items()) for s in services}
            scraped = [workload for workload in self.workloads(monitor["metadata"]["namespace"])
                       if matches(wanted, workload["metadata"]["labels"])]
            assert len(selected) == len(services) == len(scraped)
        return unchecked

    def check_workload(self, workload):
        namespace, name = workload["metadata"]["namespace"], workload["metadata"]["name"]
        spec = workload["spec"]["template"]["spec"]
        container = container_of(workload)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        within = container["securityContext"]
        assert within["readOnlyRootFilesystem"] and within["allowPrivilegeEscalation"] is False
        assert within["capabilities"] == {"drop": ["ALL"]}
        if name == "redis":
            self.check_redis(workload, container)
        else:
            self.check_sluice(workload, spec, container)
        assert container["image"].count(":") == 1, f"{container['image']} is whatever is newest"
        assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
        assert secrets_of(workload) <= {f"sluice-keys-{role_of(workload)}", "sluice-redis", "sluice-s3"}
        assert not self.of("Secret"), "secrets are referred to, and not in here"
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert matches(workload["spec"]["selector"], labels)
        budgets = [b for b in self.of("PodDisruptionBudget", namespace) if matches(b["spec"]["selector"], labels)]
        assert len(budgets) == 1, f"{name} has {len(budgets)} budgets"
        assert self.replicas(workload) >= 1

    def check_sluice(self, workload, spec, container):
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] == "admin"
        stop = int(container["args"][container["args"].index("--stop-within") + 1].removesuffix("s"))
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        # A chunk takes 80 s at the most.
        assert 80 < stop and stop + pause < spec["terminationGracePeriodSeconds"]
        if workload["kind"] == "Deployment":
            assert self.replicas(workload) > 1 and spec["topologySpreadConstraints"]
        secrets, config = secrets_of(workload), self.config(workload)
        assert ("sluice-redis" in secrets) == ("redis = " in config) == self.has_redis(workload["metadata"]["namespace"])
        assert ("sluice-s3" in secrets) == ("[store.s3]" in config)

    def check_redis(self, workload, container):
        assert self.replicas(workload) == 1 and workload["spec"]["strategy"] == {"type": "Recreate"}
        settings = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
        assert (settings["--save"], settings["--appendonly"]) == ("", "no"), "it would write"
        assert settings["--maxmemory-policy"] == "noeviction"
        most, limit = settings["--maxmemory"], container["resources"]["limits"]["memory"]
        assert int(most.removesuffix("mb")) * 5 / 4 < int(limit.removesuffix("Mi")), f"{most} within {limit}"

    def check_selection(self, found):
        """Whatever selects something, and names a port of it, finds it."""
        namespace, spec = found["metadata"]["namespace"], found["spec"]
        templates = [workload["spec"]["template"] for workload in self.workloads(namespace)]
        if found["kind"] == "Service":
            selector = {"matchLabels": spec["selector"]}
            ports = [port["targetPort"] for port in spec["ports"]]
        elif found["kind"] == "PodDisruptionBudget":
            selector, ports = spec["selector"], []
        else:
            selector = spec["podSelector"]
            ports = [port["port"] for rule in spec.get("ingress", []) for port in rule.get("ports", [])]
        selected = [t for t in templates if matches(selector, t["metadata"]["labels"])]
        assert selected, f"{key(found)} selects nothing"
        for port in ports:
            for template in selected:
                names = {p["name"] for p in template["spec"]["containers"][0]["ports"]}
                assert port in names, f"{key(found)}: {template['metadata']['labels']} has no port {port}"
