"""What is refused before anything is started."""

import socket
from dataclasses import fields
from inspect import signature

import pytest

from medtune import cli
from medtune.deploy import serving
from medtune.deploy.serve_command import serve
from medtune.deploy.serving import ServeConfig, gpu_share, read_token, require_token
from medtune.errors import ConfigError
from tests.support.made_bundle import make_bundle

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "b")


@pytest.fixture
def no_ray(monkeypatch):
    def started():
        raise AssertionError("Ray was started")

    monkeypatch.setattr(serving, "start_local_ray", started)


def says(capsys, *args):
    assert cli.main(["serve", *map(str, args)]) == 2
    return capsys.readouterr().err


def test_the_command_has_every_setting_with_the_same_default():
    given = {name: parameter.default for name, parameter in signature(serve).parameters.items()}
    assert set(given) == {field.name for field in fields(ServeConfig)}
    assert {field.name: field.default for field in fields(ServeConfig) if field.name != "bundle"} == {
        name: value for name, value in given.items() if name != "bundle"
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70000), ("replicas", 0), ("batch", 0), ("max_mb", 0), ("waiting", 0), ("seconds", 0), ("threads", 0)],
)
def test_settings_out_of_range_are_named(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name} must be .* got {value}"):
        ServeConfig(bundle=tmp_path, **{name: value})


def test_a_bundle_that_was_changed_by_a_byte_is_refused(bundle, tmp_path, capsys, no_ray):
    changed = make_bundle(tmp_path / "b")
    weights = changed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors" in says(capsys, changed)
    assert "no bundle" in says(capsys, tmp_path)


def test_a_port_that_is_taken_is_named(bundle, capsys, no_ray):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"127.0.0.1 port {port}" in says(capsys, bundle, "--port", port)


def test_a_ray_that_does_not_start_is_said_in_words(bundle, capsys, monkeypatch):
    def late():
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setattr(serving, "start_local_ray", late)
    assert "error: Ray does not start: The current node timed out" in says(capsys, bundle, "--port", "0")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_others_are_not_let_in_without_a_token(bundle, capsys, no_ray, host):
    error = says(capsys, bundle, "--host", host)
    assert host in error and "--token-file" in error


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8"])
def test_this_machine_needs_none(host):
    require_token(host, None)
    require_token("0.0.0.0", TOKEN)


def test_a_host_that_is_none_is_named(bundle, capsys, no_ray):
    assert "no address" in says(capsys, bundle, "--host", "no such host")


def test_the_token_comes_from_a_file_or_the_environment_and_is_taken_out_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv(serving.TOKEN, f"{TOKEN}-env")
    assert read_token(None) == f"{TOKEN}-env"
    assert read_token(None) is None
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(file) == TOKEN


@pytest.mark.parametrize("text", ["", "short", "with spaces in it, and long", "ünicode-ünicode-ünicode"])
def test_a_token_that_is_none_is_refused(tmp_path, text):
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ConfigError, match="at least 16"):
        read_token(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_token(tmp_path / "missing")


@pytest.mark.parametrize(("gpus", "replicas", "share"), [(0, 2, 0), (1, 1, 1), (1, 4, 0.25), (2, 3, 0.5), (8, 2, 1)])
def test_replicas_share_the_gpus_that_are_there(gpus, replicas, share):
    assert gpu_share(gpus, replicas) == share
