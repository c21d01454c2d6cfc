"""What is seen of a running cluster from outside: a real Prometheus scrapes it, and every query of the dashboard and every
metric of the alerts is asked of that."""

import json
import pathlib
import re
import time
import urllib.error
import urllib.parse
import urllib.request

import yaml

PORT = 9090
PATIENCE = 60
METRIC = re.compile(r"\b((?:sluice|http|rpc)_\w+|up)\b(\{[^}]*\})?")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
BY = re.compile(r"\bby \(([^)]*)\)")
# What only some have: it is looked for where there is a bucket, or a Redis.
BUCKET = re.compile(r"\bsluice_bucket_")
REDIS = re.compile(r"\bsluice_redis_")
# A line of the table of all alerts: its name, and where the rest of it is.
TOLD = re.compile(r"^\| \[(\w+)\]\((alerts\.md#\w+)\) \|", re.MULTILINE)


class Prometheus:
    def __init__(self, node, pods):
        directory = node.directory / "prometheus"
        directory.mkdir()
        targets = [f"{pod.address}:{pod.ports['admin']}" for pod in pods]
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
                  "scrape_configs": [{"job_name": "sluice", "static_configs": [{"targets": targets}]}]}
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.url = f"http://{node.hosts['prometheus'][2]}:{PORT}/api/v1"
        self.targets = targets
        self.process = node.command("prometheus", ["prometheus", f"--config.file={directory}/prometheus.yml",
                                                   f"--storage.tsdb.path={directory}/data", "--log.level=error",
                                                   f"--web.listen-address=0.0.0.0:{PORT}"])

    def ask(self, query):
        url = f"{self.url}/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def wait(self):
        """Until each process was scraped often enough for a rate."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                if len(self.ask("count_over_time(up[1m]) >= 4 and up == 1")) == len(self.targets):
                    return
            except (OSError, AssertionError):
                # It starts.
                pass
            assert time.monotonic() < until, f"not all of {self.targets} could be scraped"
            time.sleep(0.5)

    def stop(self):
        self.process.terminate()
        self.process.wait()


def queries(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def check(prometheus, root, absent):
    """Returns how many queries and alerts were checked; of what is `absent` nothing is expected."""
    dashboard = json.loads((root / "k8s/base/common/dashboard.json").read_text())
    checked, empty = 0, []
    for title, expr in queries(dashboard):
        asked = expr.replace("$dc", ".*").replace("$__rate_interval", "30s")
        assert "$" not in asked, f"{title}: a variable that this does not know in {expr}"
        found = prometheus.ask(asked)
        if not found and not any(metrics.search(expr) for metrics in absent):
            empty.append(f"{title}: {asked}")
        wanted = {label.strip() for label in (BY.search(expr) or [None, ""])[1].split(",") if label.strip()} - {"le"}
        for series in found:
            assert wanted <= set(series["metric"]), f"{title}: {expr} has no {wanted - set(series['metric'])}"
        checked += 1
    assert not empty, "nothing comes of\n" + "\n".join(empty)
    rules = yaml.safe_load((root / "k8s/rules/sluice.rules.yaml").read_text())
    resource = yaml.safe_load((root / "k8s/base/common/alerts.yaml").read_text())
    assert resource["spec"] == rules, "run k8s/rules/as-resource"
    told = (root / "docs/alerts.md").read_text().splitlines()
    sections, used = {line[3:].strip().lower() for line in told if line.startswith("## ")}, set()
    for rule in rules["groups"][0]["rules"]:
        prometheus.ask(rule["expr"])
        file, section = rule["annotations"]["runbook"].split("#")
        assert file == "docs/alerts.md" and section in sections, f"{rule['alert']}: there is no {file}#{section}"
        assert rule["alert"].lower().startswith(section)
        used.add(section)
        for name, matchers in METRIC.findall(rule["expr"]):
            if any(metrics.search(name) for metrics in absent):
                continue
            series = prometheus.ask(f"count by ({', '.join(LABEL.findall(matchers)) or 'job'}) ({name})")
            assert series, f"{rule['alert']}: there is no {name}"
            for label in LABEL.findall(matchers):
                assert all(one["metric"].get(label) for one in series), f"{rule['alert']}: {name} has no {label}"
    assert used == sections, f"docs/alerts.md tells of alerts that are not there: {sections - used}"
    wanted = {(rule["alert"], rule["annotations"]["runbook"].removeprefix("docs/")) for rule in rules["groups"][0]["rules"]}
    told = set(TOLD.findall((root / "docs/operations.md").read_text()))
    assert told == wanted, f"the table of docs/operations.md has not the same alerts: {told ^ wanted}"
    firing = prometheus.ask("sluice_damaged_files > 0 or sluice_volume_readonly == 1 or sluice_peer_up == 0")
    assert not firing, f"this cluster should be well: {firing}"
    return checked, len(rules["groups"][0]["rules"])
