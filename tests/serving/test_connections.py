"""How clients reach the server: keys, TLS, pages of other origins, idle connections, probes."""

import signal
import socket
import ssl

import httpx
import pytest
import trustme

from quatom.errors import ServerError
from quatom.serving import health_check
from quatom.serving import server as server_module
from quatom.serving.app import ServerOptions
from quatom.serving.connections import (
    check_origins,
    open_listener,
    read_api_keys,
    read_tls,
    url_of,
)
from quatom.serving.server import Connections, serve_engine
from tests.serving.conftest import make_engine, running_server

ORIGIN = "https://chat.example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def ask(server, **headers):
    body = {"prompt": "hello", "max_tokens": 2}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)


@pytest.fixture(scope="module")
def guarded():
    with running_server(
        make_engine(), api_keys=("first", "sécond"), allowed_origins=(ORIGIN,)
    ) as server:
        yield server


def test_any_of_several_keys_opens(guarded):
    for key in (b"first", "sécond".encode()):
        assert ask(guarded, Authorization=b"Bearer " + key).status_code == 200
    for key in (b"", b"firs", b"third", b"firstsecond"):
        assert ask(guarded, Authorization=b"Bearer x" + key).status_code == 401
        assert ask(guarded, Authorization=b"Bearer " + key + b"x").status_code == 401


def test_a_preflight_needs_no_key_and_an_answer_names_the_origin(guarded):
    asked = httpx.options(f"{guarded.url}/v1/chat/completions", headers=PREFLIGHT)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    assert asked.headers["x-request-id"]
    for headers, status in (({}, 401), ({"Authorization": "Bearer first"}, 200)):
        answer = ask(guarded, Origin=ORIGIN, **headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    other = httpx.options(
        f"{guarded.url}/v1/models", headers={**PREFLIGHT, "Origin": "https://evil.example"}
    )
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


def test_without_the_option_no_origin_is_let_in(server):
    asked = httpx.options(f"{server.url}/v1/chat/completions", headers=PREFLIGHT)
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in ask(server, Origin=ORIGIN).headers


def test_an_unexpected_error_is_an_answer_like_any_other(guarded, monkeypatch):
    monkeypatch.setattr("quatom.serving.app.create_completion", lambda *_: 1 // 0)
    answer = ask(guarded, Origin=ORIGIN, Authorization="Bearer first")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "ZeroDivisionError" in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"]
    assert answer.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize(
    "path", ["/health", "/ping", "/metrics", "/version", "/v1/models", "/v1/models/hash", "/"]
)
def test_head_is_get_without_the_body(server, path):
    asked, got = httpx.head(server.url + path), httpx.get(server.url + path)
    assert (asked.status_code, asked.content) == (got.status_code, b"") == (200, b"")
    assert asked.headers.get("content-type") == got.headers.get("content-type")


def test_probes_need_no_key(guarded):
    for path in ("/health", "/ping", "/metrics"):
        for method in ("GET", "HEAD"):
            assert httpx.request(method, guarded.url + path).status_code == 200


@pytest.fixture
def uvicorn_config(monkeypatch):
    """A function: what serve_engine would have uvicorn do with these connections."""
    seen = []
    monkeypatch.setattr(
        server_module._Server, "run", lambda self, sockets: seen.append((self.config, sockets))
    )
    monkeypatch.setattr(server_module.signal, "signal", lambda *_: None)

    def config(**options):
        with open_listener("127.0.0.1", 0) as listener:
            made = Connections(listener=listener, **options)
            serve_engine(make_engine(), ServerOptions(model_names=("m",)), made)
            assert seen[-1][1] == [listener]
        return seen[-1][0]

    return config


def test_idle_connections_outlive_the_pools_of_clients(uvicorn_config):
    # Pools and proxies close an idle connection themselves after 5 s (httpx) to 60 s (AWS's load
    # balancer). Whoever waits longer than the server loses the request that it sends then.
    assert uvicorn_config().timeout_keep_alive >= 75
    assert uvicorn_config(keep_alive_seconds=7).timeout_keep_alive == 7


@pytest.fixture
def certificate(tmp_path):
    """(authority, certificate file, key file) for localhost."""
    authority = trustme.CA()
    made = authority.issue_cert("localhost")
    made.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    return authority, tmp_path / "cert.pem", tmp_path / "key.pem"


def test_https(certificate):
    authority, certfile, keyfile = certificate
    read_tls(certfile, keyfile)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    files = {"ssl_certfile": certfile, "ssl_keyfile": keyfile}
    with running_server(make_engine(), uvicorn_options=files) as server:
        url = f"https://localhost:{server.port}/health"
        assert httpx.get(url, verify=trust).status_code == 200
        assert health_check.main(server.port) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http"))


def test_the_health_check_of_the_images(capsys):
    with running_server(make_engine()) as server:
        assert health_check.main(server.port) == 0
        server.app.state.async_engine.error = "the engine has stopped"
        assert health_check.main(server.port) == 1
        assert "the engine has stopped" in capsys.readouterr().out
    assert health_check.main(server.port) == 1
    assert capsys.readouterr().out.startswith(f"no answer from port {server.port}: Connection")


def test_uvicorn_gets_the_files_and_the_drain(certificate, uvicorn_config):
    tls = read_tls(*certificate[1:])
    config = uvicorn_config(tls=tls, drain_seconds=9)
    assert (config.ssl_certfile, config.ssl_keyfile) == certificate[1:]
    assert config.timeout_graceful_shutdown == 9


def test_unusable_certificates(certificate, tmp_path):
    _, certfile, keyfile = certificate
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(other)
    missing, text = tmp_path / "missing.pem", tmp_path / "text.pem"
    text.write_text("hello")
    assert read_tls(None, None) is None
    for pair, message in [
        ((certfile, None), "belong together"),
        ((None, keyfile), "belong together"),
        ((missing, keyfile), "cannot read .*missing.pem: No such file"),
        ((certfile, tmp_path), "cannot read .*Is a directory"),
        ((certfile, other), "no certificate chain and its key"),
        ((keyfile, certfile), "no certificate chain and its key"),
        ((certfile, text), "no certificate chain and its key"),
    ]:
        with pytest.raises(ServerError, match=message):
            read_tls(*pair)


def test_a_taken_port_is_an_error_at_once_and_a_port_is_kept():
    with open_listener("127.0.0.1", 0) as kept:
        port = kept.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port}: Address already in use; choose"):
            open_listener("127.0.0.1", port)  # nobody listens there yet
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        assert url_of(kept, None) == f"http://127.0.0.1:{port}"
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ServerError, match="already in use"),
    ):
        open_listener("127.0.0.1", other.getsockname()[1])
    for host in ("256.0.0.1", "no.such.host.invalid", "192.0.2.7"):
        with pytest.raises(ServerError, match="cannot listen on"):
            open_listener(host, 0)


def test_keys_and_origins_that_no_client_could_send(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# for the website\nalpha\n\n  beta  \nalpha\n")
    assert read_api_keys(None, file, "unused") == ("alpha", "beta")
    assert read_api_keys(["gamma"], file, None) == ("gamma", "alpha", "beta")
    assert read_api_keys(None, None, "one") == ("one",)
    assert read_api_keys(None, None, "") == read_api_keys(None, None, None) == ()
    # An unset variable on the command line must not open the server to everybody.
    for keys in ([""], ["good", ""], [" x"], ["a\nb"], ["\t"]):
        with pytest.raises(ServerError, match="no client could send it"):
            read_api_keys(keys, None, None)
    file.write_text("# nothing\n")
    with pytest.raises(ServerError, match="holds no API key"):
        read_api_keys(None, file, None)
    with pytest.raises(ServerError, match="cannot read the API keys"):
        read_api_keys(None, tmp_path / "missing", None)
    given = ("*", ORIGIN, "http://localhost:3000", "https://localhost:80")
    assert check_origins(given) == given
    # Browsers write an origin in lower case and without the scheme's own port.
    assert check_origins(["https://Chat.Example.org:443"]) == (ORIGIN,)
    assert check_origins(["HTTP://[::1]:80"]) == ("http://[::1]",)
    for origin in ("chat.example.org", f"{ORIGIN}/", "https://*.example.org", "", "null"):
        with pytest.raises(ServerError, match="is no origin"):
            check_origins([origin])


def test_a_signal_before_the_server_runs_is_not_lost(monkeypatch):
    async def main_loop(self):
        raise AssertionError("it serves on")

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(
        server_module, "forget_startup", lambda: signal.raise_signal(signal.SIGTERM)
    )
    monkeypatch.setattr(server_module._Server, "main_loop", main_loop)
    try:
        with open_listener("127.0.0.1", 0) as listener:
            connections = Connections(listener=listener)
            serve_engine(make_engine(), ServerOptions(model_names=("m",)), connections)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
