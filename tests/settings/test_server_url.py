"""Addresses of servers: malformed ones are named at once, passwords and keys never."""

import pytest

import trl_fast
from trl_fast.settings.server_url import ServerURL, read_server_url, without_password

GOOD = {
    "http://localhost:8000": ServerURL("http://localhost:8000"),
    "https://me:pa%40ss@h:1/x/": ServerURL("https://h:1/x", ("me", "pa@ss")),
    "http://me@h": ServerURL("http://h", ("me", "")),
    "http://[::1]:8000/": ServerURL("http://[::1]:8000"),
}
BAD = {
    "localhost:8000": "has no scheme; did you mean 'http://localhost:8000'?",
    "me:secret@h:1": r"'\*\*\*@h:1' has no scheme; did you mean 'http://\*\*\*@h:1'?",
    "http:/h:1": "has no scheme; expected http://HOST:PORT",
    "http://h:99999": "has a malformed host or port; expected http://HOST:PORT, such as",
    "http://h:port": "has a malformed host or port",
    "http://h:0": "has a malformed host or port",
    "http://h:": "has a malformed host or port",
    "http://h:80:90": "has a malformed host or port",
    "http://": "has a malformed host or port",
    "http://:8000": "has a malformed host or port",
    "http://a..b:1": "has a malformed host or port",
    "http://[::1": "has a malformed host or port",
    "http://me:se/cret@h:1": r"'http://\*\*\*@h:1' has a malformed host or port",
    "http://me:secret@h:x": r"'http://\*\*\*@h:x' has a malformed host or port",
    "ftp://me:secret@h:1": r"'ftp://\*\*\*@h:1' has the scheme 'ftp'",
    "http://h:1?key=secret": r"'http://h:1\?…' has a query or a fragment; leave out",
    "http://h:1/v1": "ends with /v1, the place of completions only; leave /v1 out",
    "http://h:1 ": "has white space",
    "http://me:se\ncret@h:1": r"'http://\*\*\*@h:1' has white space",
    "": "is no URL",
    8000: "has no scheme",
}


@pytest.mark.parametrize("url", GOOD)
def test_addresses_are_read(url):
    assert read_server_url(url, "vllm_server_base_url") == GOOD[url]


@pytest.mark.parametrize("url", BAD)
def test_malformed_addresses_are_named_at_once(url, tmp_path):
    with pytest.raises(ValueError, match=f"^vllm_server_base_url=.*{BAD[url]}") as caught:
        trl_fast.GRPOConfig(str(tmp_path), bf16=False, use_vllm=True, vllm_mode="server", vllm_server_base_url=url)
    assert "cret" not in str(caught.value) and "\n" not in str(caught.value)


def test_hosts_and_ports(tmp_path):
    def config(host, **settings):
        return trl_fast.RLOOConfig(str(tmp_path), bf16=False, vllm_server_host=host, **settings)

    config("http://unused")
    config("::1", use_vllm=True, vllm_mode="server")
    for host in ("http://h", "h/x", "me:secret@h", "h 1", ""):
        with pytest.raises(ValueError, match="vllm_server_host: expected the name of a host .* alone") as caught:
            config(host, use_vllm=True, vllm_mode="server")
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="vllm_server_host='http://h:9:8000' has a malformed host or port"):
        config("h:9", use_vllm=True, vllm_mode="server")


def test_configs_do_not_show_passwords(tmp_path):
    config = trl_fast.GRPOConfig(str(tmp_path), bf16=False, vllm_server_base_url="http://me:secret@h:1")
    for text in (repr(config), str(config), str(config.to_dict()), config.to_json_string()):
        assert "secret" not in text
    assert config.to_dict()["vllm_server_base_url"] == "http://***@h:1"
    assert config.vllm_server_base_url == "http://me:secret@h:1"
    assert without_password(None) is None
