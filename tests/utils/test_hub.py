"""A hub that accepts requests and never answers."""

import socket
import threading
import time

import huggingface_hub
import huggingface_hub.constants
import pytest

from statex.checkpoint.folder import model_folder
from statex.errors import UserError
from statex.utils import hub


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """huggingface_hub, asking a server that accepts and says nothing."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        huggingface_hub.close_session()  # a new one sees no proxy
        yield server
        huggingface_hub.close_session()


def accept_for_ever(server: socket.socket) -> None:
    kept = []
    try:
        while True:
            kept.append(server.accept())
    except OSError:
        pass  # the test has closed it


def test_a_model_is_not_waited_for_without_end(silent_hub, monkeypatch):
    monkeypatch.setattr(hub, "SILENCE", 0.5)
    threading.Thread(target=accept_for_ever, args=(silent_hub,), daemon=True).start()
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"could not be fetched from the hub \(timed out\)"):
        model_folder("some/model")
    assert time.monotonic() - begun < 30


def test_requests_keep_the_limits_that_they_have(silent_hub, monkeypatch):
    monkeypatch.setattr(hub, "SILENCE", 7)
    hub.limit_waiting()
    hub.limit_waiting()
    session = huggingface_hub.get_session()
    assert session.event_hooks["request"].count(hub._limit) == 1
    for given, read in ((None, 7), (2.0, 2.0)):
        request = session.build_request("GET", "http://127.0.0.1/", timeout=given)
        hub._limit(request)
        assert request.extensions["timeout"]["read"] == read
