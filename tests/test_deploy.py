"""deploy/: images, the systemd unit, compose and the dashboard, checked against what they start."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from quatom.cli.main import app
from quatom.serving import health_check
from tests.serving.conftest import running_server
from tests.serving.engines import make_engine

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile*"))


def instructions(path):
    """(name, arguments) of every instruction of a Dockerfile."""
    lines = [line for line in path.read_text().splitlines() if not line.strip().startswith("#")]
    whole = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in whole.splitlines() if line.strip()]
    return [(name.upper(), arguments) for name, arguments in pairs]


def option_names():
    """Every option of `quatom serve`."""
    from typer.main import get_command

    command = get_command(app).commands["serve"]
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts)}


def ignored(name):
    """Whether .dockerignore keeps a file at the top out of the build."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and fnmatch.fnmatch(name, pattern):
            verdict = not line.startswith("!")
    return verdict


def test_there_are_images():
    assert [f.name for f in DOCKERFILES] == ["Dockerfile", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda f: f.name)
def test_images(path):
    steps = instructions(path)
    by_name = dict(steps)  # the last of each
    for name, arguments in steps:
        assert name not in ("ADD", "MAINTAINER", "ONBUILD")
        if name == "FROM":  # a version, never what is newest on the day
            assert re.match(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*( AS \w+)?$", arguments), arguments
        if name == "RUN":
            for command in arguments.split(" && "):
                words = shlex.split(command)
                if words[0].endswith("pip") or words[0] == "pip":
                    assert {"--no-cache-dir", "--constraint"} <= set(words), command
                if words[:2] == ["apt-get", "install"]:
                    assert {"--yes", "--no-install-recommends"} <= set(words)
                    assert "rm -rf /var/lib/apt/lists/*" in arguments
                assert not {"sudo", "curl", "wget"} & set(words)
        if name == "COPY" and not arguments.startswith("--from="):
            *sources, _ = arguments.split()
            assert all((ROOT / s).exists() and not ignored(s) for s in sources), sources
    assert int(by_name["USER"]) >= 1000
    assert [name for name, _ in steps].index("USER") > max(
        i for i, (name, _) in enumerate(steps) if name == "RUN"
    )
    assert by_name["STOPSIGNAL"] == "SIGTERM"
    probe = json.loads(by_name["HEALTHCHECK"].partition("CMD")[2])
    assert probe == ["python", "-m", health_check.__name__, by_name["EXPOSE"]]
    entry = json.loads(by_name["ENTRYPOINT"])
    assert entry[:2] == ["quatom", "serve"]
    assert {word for word in entry if word.startswith("--")} <= option_names()
    assert entry[entry.index("--port") + 1] == by_name["EXPOSE"]
    assert json.loads(by_name["CMD"])
    extras = re.search(r"'\.\[([\w,]+)\]'", path.read_text())[1].split(",")
    declared = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = ", declared, re.M) for extra in extras)


def test_nothing_but_the_package_goes_into_an_image():
    for name in ("tests", "docs", "benchmarks", ".git", ".venv", "demo-output", "deploy"):
        assert ignored(name)
    assert not ignored("src")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda f: f.name)
def test_hadolint(path):
    command = Path(sys.executable).with_name("hadolint")
    if not command.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        # DL3008: versions of Debian's packages are those of the pinned image's release.
        [command, "--ignore", "DL3008", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_options_file_is_read_by_serve(monkeypatch, tmp_path, serve_in_process):
    from typer.testing import CliRunner

    calls = {}

    def start_engine(arguments, **options):
        calls.update(arguments, **options)

    monkeypatch.setattr("quatom.serving.served_model.start_engine", start_engine)
    monkeypatch.setattr("quatom.serving.server.serve_engine", lambda *given: calls.update(o=given))
    keys = tmp_path / "keys"
    keys.write_text("a\n")
    file = tmp_path / "serve.yaml"
    file.write_text((DEPLOY / "serve.yaml").read_text())
    # The unit's user cannot read root's files: systemd hands it the keys.
    name, stored = dict(unit())["LoadCredential"].split(":")
    assert (name, stored) == ("keys", "/etc/quatom/keys")
    command = dict(unit())["ExecStart"].replace("${CREDENTIALS_DIRECTORY}", str(tmp_path))
    words = shlex.split(command.replace("/etc/quatom", str(tmp_path)))
    done = CliRunner().invoke(app, [*words[1:], "--port", "0"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert calls["restart"] is True
    assert calls["o"][1].api_keys == ("a",)
    assert calls["o"][1].model_names == ("assistant",)
    calls["o"][2].listener.close()


def unit():
    """(key, value) pairs of the systemd unit."""
    lines = (DEPLOY / "quatom.service").read_text().splitlines()
    return [tuple(line.split("=", 1)) for line in lines if "=" in line and line[0] != "#"]


def test_the_unit_starts_serve_and_lets_it_drain():
    values = dict(unit())
    words = shlex.split(values["ExecStart"])
    assert words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= option_names()
    options = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    assert int(values["TimeoutStopSec"]) > options["drain-seconds"]
    assert values["KillMode"] == "mixed"
    assert values["Restart"] == "on-failure"


def test_systemd_accepts_the_unit(tmp_path):
    command = shutil.which("systemd-analyze")
    if command is None:
        pytest.skip("systemd-analyze is not on this machine")
    text = (DEPLOY / "quatom.service").read_text()
    copy = tmp_path / "quatom.service"
    copy.write_text(text.replace("/opt/quatom/bin/quatom", shutil.which("true")))
    done = subprocess.run(
        [command, "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "quatom.service" in line]
    assert said == []


def compose():
    """The services, those of the GPU's file laid over the others."""
    base = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    over = yaml.safe_load((DEPLOY / "compose.cuda.yaml").read_text())
    assert over["services"].keys() <= base["services"].keys()
    return base, over


def test_compose_mounts_what_is_there_and_starts_serve():
    base, over = compose()
    for name, service in base["services"].items():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{[^}]*\}", "/models", volume).split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), (name, volume)
            elif not source.startswith("/"):
                assert source in base["volumes"]
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    server = base["services"]["quatom"]
    for build in (server["build"], over["services"]["quatom"]["build"]):
        assert (DEPLOY / server["build"]["context"] / build["dockerfile"]).exists()
    options = [word for word in server["command"] if word.startswith("--")]
    assert set(options) <= option_names()
    drain = int(server["command"][server["command"].index("--drain-seconds") + 1])
    assert int(server["stop_grace_period"].removesuffix("s")) > drain
    # The engine's sockets are in /tmp, kernels in the cache: all else is read-only.
    assert server["read_only"]
    assert "/tmp" in server["tmpfs"]
    assert server["init"]  # someone must wait for children of an engine that was killed


def test_prometheus_reads_the_server():
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["quatom:8000"]
    assert job["metrics_path"] == "/metrics"


def test_the_dashboard_shows_metrics_that_exist():
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "quatom.json").read_text())
    source = yaml.safe_load(
        (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text()
    )["datasources"][0]
    with running_server(make_engine()) as server:
        import httpx

        body = {"prompt": "hello", "max_tokens": 3}
        httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status()
        text = httpx.get(f"{server.url}/metrics").text
    exposed = set(re.findall(r"^(vllm:\w+)", text, re.M))
    labels = set(re.findall(r'(\w+)="', text))
    expressions = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    expressions += [v["query"]["query"] for v in dashboard["templating"]["list"]]
    used = {name for e in expressions for name in re.findall(r"vllm:\w+", e)}
    assert used <= exposed, used - exposed
    assert {name for e in expressions for name in re.findall(r"(\w+)=~", e)} <= labels
    assert {n for e in expressions for n in re.findall(r"by \((\w+)\)", e)} <= labels
    for panel in dashboard["panels"]:
        for shown in (panel, *panel["targets"]):
            assert shown["datasource"] == {"type": source["type"], "uid": source["uid"]}
    # No panel lies over another.
    cells = [
        (x, y)
        for p in dashboard["panels"]
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
