"""Options of stores: each means what it says or is refused by its name, and no password or token is ever shown."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from distckpt.cli import main
from distckpt.errors import StorageError
from distckpt.storage import open_store
from distckpt.storage.remote.generic import FsspecStore
from distckpt.storage.remote.http import Endpoint
from tests.support.honest import Honest

TOKEN = "ya29.a0/Secret+of-somebody="
SHORT = "ya29.short"
SERVICE = {"client_email": "a@b", "token_uri": "https://b/token"}


@pytest.mark.parametrize(
    ("url", "options", "named"),
    [
        *(("s3", {name: "False"}, f"{name} is True or False, not 'False'") for name in ("anon", "requester_pays")),
        ("s3", {"use_ssl": "no"}, "use_ssl is True or False"),
        ("s3", {"client_kwargs": {"use_ssl": 0}}, "client_kwargs: use_ssl is True or False"),
        ("s3", {"config_kwargs": {"use_fips_endpoint": "true"}}, "config_kwargs: use_fips_endpoint is True or False"),
        (
            "s3",
            {"config_kwargs": {"s3": {"addressing_stile": "virtual"}}},
            r"addressing_stile in config_kwargs\['s3'\]",
        ),
        ("s3", {"config_kwargs": {"s3": {"payload_signing_enabled": "no"}}}, "payload_signing_enabled is True or"),
        ("s3", {"config_kwargs": {"s3": {"us_east_1_regional_endpoint": "x"}}}, "legacy or regional, not 'x'"),
        ("s3", {"patience": float("nan")}, "patience is a number above 0, not nan"),
        ("s3", {"connections": 1.5}, "connections is a whole number"),
        ("gs", {"patience": -1}, "patience is a number above 0, not -1"),
        ("gs", {"part_size": 1.5}, "part_size is a whole number above 0, not 1.5"),
        ("gs", {"part_size": "1MiB"}, "part_size is a number above 0, not '1MiB'"),
        ("gs", {"timeout": "abc"}, "timeout is a number above 0, not 'abc'"),
        ("gs", {"connections": "many"}, "connections is a number above 0, not 'many'"),
        ("gs", {"access": "nope"}, "access is one of full_control, read_write, read_only, not 'nope'"),
        ("gs", {"requester_pays": "false"}, "requester_pays is True, False or the name of a project"),
        ("gs", {"token": SERVICE}, "token is a dict, which has to have client_email, private_key, token_uri of"),
        ("s3", {"s3_additional_kwargs": {"Tagging": "проект=x"}}, "s3_additional_kwargs: Tagging has .*quote does it"),
    ],
)
def test_what_means_something_else_than_it_says_is_refused_by_name(
    url: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        open_store(f"{url}://bucket/run", options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"client_kwargs": "endpoint_url=http://127.0.0.1:9"},
            "client_kwargs is a dict, not str; at the command line that is JSON",
        ),
        ({"s3_additional_kwargs": "ACL=private"}, "s3_additional_kwargs is a dict, not str"),
        ({"config_kwargs": {"s3": "path"}}, "config_kwargs: s3 is a dict, not str"),
    ],
)
def test_an_option_with_others_in_it_is_a_dict(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        open_store("s3://bucket/run", options)


def test_around_the_page_cache_is_yes_or_no(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="direct_io is True, False or None, not 'False'"):
        open_store(tmp_path, {"direct_io": "False"})


@pytest.mark.parametrize("word", ["False", "false"])
def test_the_command_line_takes_false_as_people_write_it(word: str) -> None:
    options = ("-o", f"anon={word}", "-o", "key=half")
    done = CliRunner().invoke(main, ["ls", "s3://bucket/run", *options])
    assert done.exit_code == 2
    assert "key and secret go together" in done.output  # which nobody asks of who is anonymous


@pytest.mark.parametrize("name", ["key", "secret", "token"])
def test_credentials_with_the_end_of_their_line_are_refused_and_not_shown(name: str) -> None:
    given = {"key": "k", "secret": "s", name: "hidden\n"}
    with pytest.raises(ValueError, match=rf"{name} has a line break.*\.strip\(\)") as caught:
        open_store("s3://bucket/run", given)
    assert "hidden" not in str(caught.value)
    if name == "token":
        with pytest.raises(ValueError, match="token has a line break"):
            open_store("gs://bucket/run", {"token": "hidden\n"})


@pytest.mark.parametrize("token", [TOKEN, SHORT])
def test_a_token_is_in_no_error_when_google_cannot_be_asked_about_it(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    store = open_store("gs://bucket/run", {"token": token, "patience": 0.1, "timeout": 1})
    with pytest.raises(StorageError, match="no credentials from the text in token") as caught:
        store.put_if_absent("a", b"")
    shown = "".join(traceback.format_exception(caught.value))
    assert "access_token=***" in shown
    assert not any(part in shown for part in ("Secret", "somebody", "short"))


def test_a_token_that_names_a_file_or_lacks_its_key_says_so(tmp_path: Path) -> None:
    path = tmp_path / "ключ key.json"
    path.write_text("{}")
    options = {"patience": 0.1, "timeout": 1, "token": str(path)}
    with pytest.raises(StorageError, match=r"token='.*key.json'.*has to have client_email, private_key, token_uri"):
        open_store("gs://bucket/run", options).put_if_absent("a", b"")
    broken = {**SERVICE, "private_key": "no key"}
    with pytest.raises(StorageError, match="has a private_key that cannot be read"):
        open_store("gs://bucket/run", {**options, "token": broken}).put_if_absent("a", b"")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_endpoint_takes_no_password_which_is_not_shown(scheme: str) -> None:
    options = {"endpoint_url": "http://user:hidden@127.0.0.1:9", "token": "anon"}
    with pytest.raises(ValueError, match=r"user:\*\*\*@127\.0\.0\.1:9.*would be ignored") as caught:
        open_store(f"{scheme}://bucket/run", options)
    assert "hidden" not in str(caught.value)
    with pytest.raises(ValueError, match="would be ignored"):
        Endpoint("http://user@127.0.0.1:9")  # as the environment may have it


class Telling(Honest):
    """Fails, and says with what it was opened."""

    protocol = "telling"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        raise OSError(f"no way to {path} with user:hidden%21")


def test_the_password_of_a_url_is_in_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fsspec.register_implementation("telling", Telling, clobber=True)
    url = "telling://user:hidden%21@bucket"
    store = FsspecStore(url, {"base": str(tmp_path)}, patience=0.2)
    (tmp_path / "user:hidden%21@bucket").mkdir()
    with pytest.raises(StorageError, match=r"telling://user:\*\*\*@bucket/a: no answer") as caught:
        store.put_if_absent("a", b"x")
    assert "hidden" not in "".join(traceback.format_exception(caught.value))
    assert "telling://user:***@bucket/a is created once more" in caplog.text
    assert "hidden" not in caplog.text
    assert store.url == url
