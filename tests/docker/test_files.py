"""The Docker files agree with each other and with the project, as far as can be told without building an image."""

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path, PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DRAIN_S = 30  # the longest the server drains after SIGTERM
TARGETS = ["cpu", "cuda"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())


def parse_dockerfile() -> list[tuple[str, str]]:
    lines = [line for line in (ROOT / "docker/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


INSTRUCTIONS = parse_dockerfile()


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage name -> (what it is built from, its instructions), in file order."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in INSTRUCTIONS:
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            found[name] = (source, [])
        elif found:
            found[list(found)[-1]][1].append((word, rest))
    return found


def effective(target: str, word: str) -> list[str]:
    """Every `word` instruction that a build of `target` inherits, oldest first; the last one wins."""
    source, own = stages()[target]
    inherited = effective(source, word) if source in stages() else []
    return inherited + [rest for name, rest in own if name == word]


def image_env(target: str) -> dict[str, str]:
    pairs = [pair for line in effective(target, "ENV") for pair in line.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def volumes(target: str) -> list[str]:
    return [path for line in effective(target, "VOLUME") for path in json.loads(line)]


def build_context_has(path: str) -> bool:
    """Apply .dockerignore: the last pattern that matches the path or a parent of it decides."""
    included = True
    for raw in (ROOT / ".dockerignore").read_text().splitlines():
        if not raw or raw.startswith("#"):
            continue
        pattern = re.escape(raw.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if re.match(rf"{pattern}(?:/|$)", path):
            included = raw.startswith("!")
    return included


def copied_from_context() -> list[str]:
    copies = [rest.split() for word, rest in INSTRUCTIONS if word == "COPY" and not rest.startswith("--from=")]
    return [source for words in copies for source in words[:-1]]


def test_every_stage_starts_from_a_tagged_image_or_an_earlier_stage() -> None:
    seen: list[str] = []
    for name, (source, _) in stages().items():
        assert source in seen or re.fullmatch(r"python:3\.\d+-slim-\w+", source), source
        seen.append(name)
    assert seen[-1] == "cpu"
    assert "cuda" in seen


def test_stages_copy_only_from_earlier_stages() -> None:
    seen: list[str] = []
    copies = 0
    for name, (_, own) in stages().items():
        for source in (m[1] for word, rest in own if word == "COPY" and (m := re.match(r"--from=(\S+)", rest))):
            assert source in seen, source
            copies += 1
        seen.append(name)
    assert copies == 4


@pytest.mark.parametrize("path", copied_from_context())
def test_copied_path_exists_and_reaches_the_builder(path: str) -> None:
    assert (ROOT / path).exists()
    assert build_context_has(path)


def test_build_context_holds_what_the_wheel_needs_and_little_else() -> None:
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for path in [*wheel, PYPROJECT["project"]["readme"], "pyproject.toml", "LICENSE"]:
        assert build_context_has(path), path
        assert any(PurePosixPath(path).is_relative_to(source) for source in copied_from_context()), path
    for path in [".git/config", ".env", "tests/docker/test_files.py", "docker/compose.yaml", "server/.env",
                 "server/deltaserve/__pycache__/errors.cpython-312.pyc", "models/base/model.safetensors"]:  # fmt: skip
        assert not build_context_has(path), path


def test_versions_agree_with_the_project() -> None:
    defaults = dict(rest.split("=") for word, rest in INSTRUCTIONS if word == "ARG" and "=" in rest)
    assert defaults["VERSION"] == PYPROJECT["project"]["version"]
    server = [Requirement(line) for line in PYPROJECT["project"]["optional-dependencies"]["server"]]
    (torch,) = (requirement for requirement in server if requirement.name == "torch")
    assert torch.specifier.contains(defaults["TORCH_VERSION"])


@pytest.mark.parametrize("target", TARGETS)
def test_image_runs_the_console_script_as_an_ordinary_user(target: str) -> None:
    uid, gid = effective(target, "USER")[-1].split(":")
    assert int(uid) == int(gid) == 10001
    assert any(f"--uid {uid} " in line for line in effective(target, "RUN"))
    (script,) = json.loads(effective(target, "ENTRYPOINT")[-1])
    assert script in PYPROJECT["project"]["scripts"]
    command = json.loads(effective(target, "CMD")[-1])
    assert command[0] == "serve"
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert effective(target, "STOPSIGNAL") == ["SIGTERM"]


@pytest.mark.parametrize("target", TARGETS)
def test_paths_written_at_run_time_lie_on_volumes_that_the_user_owns(target: str) -> None:
    env = image_env(target)
    writable = ["DELTASERVE_STORE", "HF_HOME"] + ["TRITON_CACHE_DIR"] * (target == "cuda")
    owned = re.findall(r"install -d -o deltaserve -g deltaserve ((?:/\S+ ?)+)", " ".join(effective(target, "RUN")))
    assert owned
    for path in (PurePosixPath(env[name]) for name in writable):
        assert any(path.is_relative_to(volume) for volume in volumes(target)), path
        assert any(path.is_relative_to(parent) for parent in owned[0].split()), path


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/health" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (None, False)])
def test_healthcheck_command_tells_healthy_from_not(status: int | None, healthy: bool) -> None:
    (line,) = effective("cpu", "HEALTHCHECK")
    assert effective("cuda", "HEALTHCHECK") == [line]
    python, flag, code = json.loads(line.partition("CMD ")[2])
    assert (python, flag) == ("python", "-c")
    (port,) = effective("cpu", "EXPOSE")
    assert f"127.0.0.1:{port}/health" in code

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        server.status = status  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        if status is None:
            server.server_close()  # nothing listens
        else:
            thread.start()
        code = code.replace(f":{port}/", f":{server.server_port}/")
        env = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        done = subprocess.run([sys.executable, flag, code], env=env, capture_output=True, timeout=30, check=False)
        if status is not None:
            server.shutdown()
            thread.join()
    assert (done.returncode == 0) is healthy, done.stderr


@pytest.mark.parametrize(("service", "target"), [("deltaserve", "cpu"), ("deltaserve-cuda", "cuda")])
def test_compose_service_matches_its_image(service: str, target: str) -> None:
    spec = COMPOSE["services"][service]
    assert spec["build"]["target"] == target
    assert (ROOT / "docker" / spec["build"]["context"]).resolve() == ROOT
    assert (ROOT / spec["build"]["dockerfile"]).is_file()

    (port,) = spec["ports"]
    assert re.fullmatch(r"\$\{\w+:-127\.0\.0\.1:8000}:" + effective(target, "EXPOSE")[0], port)

    mounts = dict(mount.split(":") for mount in spec["volumes"])
    assert set(mounts) == set(COMPOSE["volumes"])
    assert set(mounts.values()) == set(volumes(target))
    assert [entry.split(":")[0] for entry in spec["tmpfs"]] == ["/tmp"]


@pytest.mark.parametrize("service", ["deltaserve", "deltaserve-cuda"])
def test_compose_service_is_locked_down_and_has_time_to_drain(service: str) -> None:
    spec = COMPOSE["services"][service]
    assert spec["read_only"] is True
    assert spec["cap_drop"] == ["ALL"]
    assert spec["security_opt"] == ["no-new-privileges:true"]
    assert spec["environment"]["DELTASERVE_API_KEY"].startswith("${DELTASERVE_API_KEY:?")
    assert "user" not in spec
    assert "privileged" not in spec
    assert int(spec["stop_grace_period"].removesuffix("s")) > DRAIN_S
    assert "start_period" in spec["healthcheck"]


def test_only_the_cuda_service_asks_for_a_gpu_and_waits_for_its_profile() -> None:
    cpu, cuda = COMPOSE["services"]["deltaserve"], COMPOSE["services"]["deltaserve-cuda"]
    assert "profiles" not in cpu
    assert "deploy" not in cpu
    assert cuda["profiles"] == ["cuda"]
    (device,) = cuda["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
