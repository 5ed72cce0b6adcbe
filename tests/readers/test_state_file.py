from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt.errors import DamagedError, DistckptError
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.state_file import (
    CheckpointState,
    from_log_state,
    generate_checkpoint_state_proto,
    get_checkpoint_state,
    parse,
    render,
    update_checkpoint_state,
)
from distckpt.storage import MemoryStore, open_store
from tests.support.checkpoints import new_attempt, put_manifest

# What TensorFlow 2 writes for the first of its own test's states, and a state with all that a text may have in it.
GOLDEN = """\
model_checkpoint_path: "ckpt-2"
all_model_checkpoint_paths: "ckpt-1"
all_model_checkpoint_paths: "ckpt-2"
all_model_checkpoint_timestamps: 10000.0
all_model_checkpoint_timestamps: 13610.0
last_preserved_timestamp: 2.0
"""
GOLDEN_STATE = CheckpointState("ckpt-2", ("ckpt-1", "ckpt-2"), (10000.0, 13610.0), 2.0)


def record(number: int, time: float, *, epoch: int = 1) -> CheckpointRecord:
    return CheckpointRecord(
        name="ckpt",
        number=number,
        attempt=f"e{epoch}-{number:032x}",
        manifest_size=1,
        manifest_crc32c=1,
        time=time,
        world_size=1,
        nbytes=1,
    )


# ---- text ---------------------------------------------------------------------------------------------------------


def test_text_is_tensorflows() -> None:
    assert render(GOLDEN_STATE) == GOLDEN


def test_text_reads_back() -> None:
    assert parse(GOLDEN) == GOLDEN_STATE


def test_zero_and_empty_fields_are_not_printed() -> None:
    assert render(CheckpointState("m")) == 'model_checkpoint_path: "m"\n'
    assert render(CheckpointState("")) == ""


# The texts that TensorFlow 2.21 writes for these values.
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1732.0, "1732.0"),
        (3, "3.0"),
        (1763703841.2345679, "1763703841.2345679"),
        (0.1, "0.1"),
        (1e-7, "1e-07"),
        (1e15, "1000000000000000.0"),
        (1e16, "1e+16"),
        (1e22, "1e+22"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (-0.0, "-0.0"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        (float("nan"), "nan"),
    ],
)
def test_doubles_are_printed_as_tensorflow_prints_them(value: float, text: str) -> None:
    state = generate_checkpoint_state_proto("/t", "m", ["m"], [value], value)
    assert render(state) == (
        'model_checkpoint_path: "m"\nall_model_checkpoint_paths: "m"\n'
        f"all_model_checkpoint_timestamps: {text}\nlast_preserved_timestamp: {text}\n"
    )


def test_a_timestamp_of_zero_is_printed_but_not_the_last_preserved_one() -> None:
    assert render(generate_checkpoint_state_proto("/t", "m", ["m"], [0.0], 0.0)) == (
        'model_checkpoint_path: "m"\nall_model_checkpoint_paths: "m"\nall_model_checkpoint_timestamps: 0.0\n'
    )


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("model.ckpt-7", "model.ckpt-7"),
        ("a b?*", "a b?*"),
        ('a"b', r"a\"b"),
        ("a'b", r"a\'b"),
        (r"a\b", r"a\\b"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\0\x01\x7f", r"\000\001\177"),
        ("é日本😀", "é日本😀"),
        ("gs://bucket/run/ckpt-1", "gs://bucket/run/ckpt-1"),
    ],
)
def test_strings_are_escaped_as_tensorflow_escapes_them(path: str, text: str) -> None:
    assert render(CheckpointState(path)) == f'model_checkpoint_path: "{text}"\n'
    assert parse(render(CheckpointState(path))).model_checkpoint_path == path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"model_checkpoint_path: '\303\251'", CheckpointState("é")),  # as older releases of protobuf escape it
        (r'model_checkpoint_path: "a\u00e9"', CheckpointState("aé")),
        ("model_checkpoint_path: 'a' 'b'", CheckpointState("ab")),
        ('model_checkpoint_path: "a"\r\nall_model_checkpoint_paths: "a"\r\n', CheckpointState("a", ("a",))),
        ('model_checkpoint_path: "a" model_checkpoint_path: "b"', CheckpointState("b")),
        ('model_checkpoint_path: "a"; last_preserved_timestamp: 3,', CheckpointState("a", (), (), 3.0)),
        (
            'model_checkpoint_path: "a" all_model_checkpoint_timestamps: [1, 2.5e3, -inf]',
            CheckpointState("a", (), (1.0, 2500.0, float("-inf"))),
        ),
        (
            'model_checkpoint_path: "a" all_model_checkpoint_timestamps: 1f last_preserved_timestamp: 1e400',
            CheckpointState("a", (), (1.0,), float("inf")),
        ),
    ],
)
def test_what_tensorflow_reads_is_read_alike(text: str, expected: CheckpointState) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        '   model_checkpoint_path: "a"\n\n  all_model_checkpoint_paths: "a"',
        'all_model_checkpoint_paths: "a" model_checkpoint_path: "a"',
        "# a comment\nmodel_checkpoint_path: 'a'\nall_model_checkpoint_paths: ['a']",
    ],
)
def test_indentation_order_and_spelling_of_a_text_do_not_matter(text: str) -> None:
    assert parse(text) == CheckpointState("a", ("a",))


@pytest.mark.parametrize(
    "text",
    [
        "garbage",
        "model_checkpoint_path: ",
        "model_checkpoint_path: 3",
        'model_checkpoint_path: "a',
        'model_checkpoint_path "a"',
        r'model_checkpoint_path: "\xe9"',
        'Model_Checkpoint_Path: "a"',
        'unknown_field: "a"',
        'model_checkpoint_path: "a" last_preserved_timestamp: 0x10',
        '\ufeffmodel_checkpoint_path: "a"',
        '1: "a"',
        "{}",
        "\0",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a checkpoint state"):
        parse(text)


@given(
    st.builds(
        CheckpointState,
        st.text(),
        st.lists(st.text()).map(tuple),
        st.lists(st.floats(allow_nan=False)).map(tuple),
        st.floats(allow_nan=False),
    )
)
def test_every_state_reads_back_equal(state: CheckpointState) -> None:
    assert parse(render(state)) == state


# ---- from the log -------------------------------------------------------------------------------------------------


def test_log_state_becomes_relative_paths_in_save_order() -> None:
    state = State(active=(record(9, 5.0), record(3, 7.5)), last_preserved_timestamp=2.0)
    assert from_log_state(state) == CheckpointState("ckpt-3", ("ckpt-9", "ckpt-3"), (5.0, 7.5), 2.0)


def test_preserved_checkpoints_are_listed_only_when_nothing_else_is_left() -> None:
    preserved = (record(2, 6.0), record(1, 5.0))
    assert from_log_state(State(preserved=preserved)) == CheckpointState("ckpt-2", ("ckpt-2",), (6.0,))
    both = State(active=(record(3, 7.0),), preserved=preserved)
    assert from_log_state(both).all_model_checkpoint_paths == ["ckpt-3"]


def test_empty_log_state_has_no_paths() -> None:
    assert from_log_state(State(retiring=(record(1, 5.0),))) == CheckpointState("")


# ---- generate -----------------------------------------------------------------------------------------------------


def test_model_path_alone_is_all_paths() -> None:
    state = generate_checkpoint_state_proto("/train", "/train/model-0")
    assert state == CheckpointState("/train/model-0", ("/train/model-0",))


@pytest.mark.parametrize("paths", [[], None])
def test_no_paths_become_the_model_path(paths: list[str] | None) -> None:
    assert generate_checkpoint_state_proto("/t", "model-1", paths).all_model_checkpoint_paths == ["model-1"]


def test_model_path_is_added_and_the_arguments_stay_as_they_are() -> None:
    paths = ["model-2"]
    state = generate_checkpoint_state_proto("/t", "model-1", paths)
    assert state.all_model_checkpoint_paths == ["model-2", "model-1"]
    assert paths == ["model-2"]


def test_paths_may_be_a_tuple() -> None:
    state = generate_checkpoint_state_proto("/t", "m-1", ("m-1", "m-0"), (1, 2, 3), 4)
    assert state == CheckpointState("m-1", ("m-1", "m-0", "m-1"), (1.0, 2.0, 3.0), 4.0)


def test_timestamps_are_counted_against_the_result() -> None:
    with pytest.raises(ValueError, match="1 timestamps for 2"):
        generate_checkpoint_state_proto("/t", "model-1", ["model-2"], [1.0])
    assert generate_checkpoint_state_proto("/t", "model-1", ["model-2"], []).all_model_checkpoint_timestamps == []


@pytest.mark.parametrize(
    ("directory", "path", "recorded"),
    [
        ("train", "train/model-0", "model-0"),
        ("train", "model-0", "../model-0"),
        ("train", "/elsewhere/model-0", "/elsewhere/model-0"),
        ("train", "gs://bucket/model-0", "gs://bucket/model-0"),
        ("/train", "model-0", "model-0"),
        ("/train", "/train/model-0", "/train/model-0"),
        ("gs://bucket/run", "gs://bucket/run/model-0", "model-0"),
        ("gs://bucket/run/", "gs://bucket/run/model-0", "model-0"),
        ("gs://bucket/run", "gs://bucket/run-2/model-0", "gs://bucket/run-2/model-0"),
        ("gs://bucket/run", "gs://other/x", "gs://other/x"),
        ("gs://bucket/run", "model-0", "model-0"),
    ],
)
def test_paths_relative_to_the_directory(directory: str, path: str, recorded: str) -> None:
    state = generate_checkpoint_state_proto(directory, path, ["x", path])
    assert state.model_checkpoint_path == state.all_model_checkpoint_paths[-1] == recorded


def test_directory_and_paths_may_be_path_objects() -> None:
    state = generate_checkpoint_state_proto(Path("train"), Path("train/model-0"), [Path("train/x"), "train/model-0"])
    assert state == CheckpointState("model-0", ("x", "model-0"))


# ---- update and get -----------------------------------------------------------------------------------------------


def test_update_then_get_in_an_absolute_directory(tmp_path: Path) -> None:
    last = str(tmp_path / "model-2")
    update_checkpoint_state(tmp_path, last, [str(tmp_path / "model-1"), last], None, [1.5, 2.5], 0.5)
    state = get_checkpoint_state(tmp_path)
    assert state == CheckpointState(last, (str(tmp_path / "model-1"), last), (1.5, 2.5), 0.5)


def test_update_then_get_in_a_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("train")
    update_checkpoint_state("train", "train/model-0")
    assert (tmp_path / "train/checkpoint").read_text().startswith('model_checkpoint_path: "model-0"\n')
    state = get_checkpoint_state("train")
    assert state is not None
    assert state.model_checkpoint_path == "train/model-0"


def test_update_then_get_at_a_url() -> None:
    store = MemoryStore.named("state-file-test")
    update_checkpoint_state(store.url, f"{store.url}/model-0", latest_filename="newest")
    assert b'"model-0"' in store.objects["newest"].data
    assert get_checkpoint_state(store.url, "newest") == CheckpointState(
        f"{store.url}/model-0", (f"{store.url}/model-0",)
    )
    assert get_checkpoint_state(store.url) is None


def test_a_manager_and_what_it_saved_may_be_recorded_under_another_name(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path) as manager:
        update_checkpoint_state(tmp_path, manager.save(3), latest_filename="best")
        manager.save(4)
    assert get_checkpoint_state(tmp_path, "best") == CheckpointState(f"{tmp_path}/ckpt-3", (f"{tmp_path}/ckpt-3",))
    assert distckpt.latest_checkpoint(tmp_path, "best") == f"{tmp_path}/ckpt-3"
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-4"
    (tmp_path / "ckpt-3" / next((tmp_path / "ckpt-3").iterdir()) / "manifest.json").unlink()
    assert distckpt.latest_checkpoint(tmp_path, "best") is None


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run/", "hdfs://name/run"])
def test_urls_stay_urls(url: str) -> None:
    """TensorFlow makes of gs://other/x in gs://bucket/run a path that climbs out of its own bucket."""
    below = f"{url.rstrip('/')}/ckpt-1"
    state = generate_checkpoint_state_proto(url, below, ["gs://other/x", "/local/y", below])
    assert state == CheckpointState("ckpt-1", ("gs://other/x", "/local/y", "ckpt-1"))
    assert generate_checkpoint_state_proto("train", below).model_checkpoint_path == below


def test_update_then_get_at_a_file_url(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/run"
    update_checkpoint_state(url, f"{url}/ckpt-2", ["/elsewhere/ckpt-1", f"{url}/ckpt-2"])
    assert parse((tmp_path / "run" / "checkpoint").read_text()) == CheckpointState(
        "ckpt-2", ("/elsewhere/ckpt-1", "ckpt-2")
    )
    state = get_checkpoint_state(url)
    assert state == CheckpointState(f"{url}/ckpt-2", ("/elsewhere/ckpt-1", f"{url}/ckpt-2"))
    state = get_checkpoint_state(tmp_path / "run")
    assert state == CheckpointState(f"{tmp_path}/run/ckpt-2", ("/elsewhere/ckpt-1", f"{tmp_path}/run/ckpt-2"))


def test_a_relocated_directory_is_read_where_it_is(tmp_path: Path) -> None:
    """What TensorFlow's own manager has left there, with names that need care."""
    folder = tmp_path / 'it\'s "here" é \\ now'
    folder.mkdir()
    (folder / "checkpoint").write_text(GOLDEN)
    moved = folder.rename(tmp_path / "moved")
    state = get_checkpoint_state(moved)
    assert state == CheckpointState(f"{moved}/ckpt-2", (f"{moved}/ckpt-1", f"{moved}/ckpt-2"), (10000.0, 13610.0), 2.0)


def test_recorded_paths_are_joined_but_not_normalized(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "./m"\nall_model_checkpoint_paths: "gs://b/m"\n')
    state = get_checkpoint_state(str(tmp_path))
    assert state == CheckpointState(f"{tmp_path}/./m", ("gs://b/m",))


def test_an_update_replaces_the_text_whole_while_others_read_it(tmp_path: Path) -> None:
    long = [f"model-{'x' * 500}-{number}" for number in range(50)]
    update_checkpoint_state(tmp_path, "short")
    seen: list[int] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            state = get_checkpoint_state(tmp_path)
            seen.append(len(state.all_model_checkpoint_paths) if state else 0)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        update_checkpoint_state(tmp_path, long[-1], long)
        update_checkpoint_state(tmp_path, "short")
    stop.set()
    reader.join()
    assert set(seen) <= {1, 50}
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("path", ["{}/checkpoint", "checkpoint", "./checkpoint", "{}/x/../checkpoint"])
def test_saving_over_the_state_file_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="state file"):
        update_checkpoint_state(tmp_path, path.format(tmp_path))
    assert os.listdir(tmp_path) == []


def test_saving_over_the_state_file_is_refused_for_relative_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="state file"):
        update_checkpoint_state("train", "train/checkpoint")
    update_checkpoint_state("train", "checkpoint")  # another one, beside the directory
    assert parse((tmp_path / "train/checkpoint").read_text()).model_checkpoint_path == "../checkpoint"


@pytest.mark.parametrize("filename", ["", ".", "..", "a/b", "../x"])
def test_file_names_with_a_path_are_refused(filename: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latest_filename"):
        get_checkpoint_state(tmp_path, filename)
    with pytest.raises(ValueError, match="latest_filename"):
        update_checkpoint_state(tmp_path, "m", latest_filename=filename)


def test_no_file_and_no_directory_are_no_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert get_checkpoint_state(tmp_path) is None
    assert get_checkpoint_state(tmp_path / "nowhere") is None
    assert not caplog.records
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("content", [b"garbage", b'unknown: "x"', b"\xff\xfe", b'model_checkpoint_path: "\xff"', b"{"])
def test_a_damaged_file_is_told_from_a_missing_one(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(DamagedError) as caught:
        get_checkpoint_state(tmp_path)
    assert caught.value.path == str(tmp_path / "checkpoint")
    (tmp_path / "checkpoint").rename(tmp_path / "best")
    with pytest.raises(DamagedError):
        distckpt.latest_checkpoint(tmp_path, "best")
    assert get_checkpoint_state(tmp_path) is None


def test_a_file_that_cannot_be_read_is_told_from_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match="checkpoint"):
        get_checkpoint_state(tmp_path)


def test_lists_equal_lists_as_tensorflows_users_compare_them(tmp_path: Path) -> None:
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    update_checkpoint_state(tmp_path, paths[-1], paths, None, [1.0, 2.0])
    state = get_checkpoint_state(tmp_path)
    assert state is not None
    assert state.all_model_checkpoint_paths == paths
    assert state.all_model_checkpoint_timestamps == [1.0, 2.0]
    assert state == CheckpointState(paths[-1], tuple(paths), (1.0, 2.0))
    made = generate_checkpoint_state_proto(tmp_path, paths[-1], paths)
    assert (made.all_model_checkpoint_paths, made.all_model_checkpoint_timestamps) == (paths, [])
    assert parse(render(made)).all_model_checkpoint_paths == paths


@pytest.mark.parametrize(
    "content",
    [
        "",
        " \n",
        "# nothing",
        'model_checkpoint_path: ""',
        'all_model_checkpoint_paths: "a"',
        "last_preserved_timestamp: 1.0",
    ],
)
def test_text_that_names_no_checkpoint_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text(content)
    with pytest.raises(ValueError, match=r"names no newest checkpoint.*delete this file") as caught:
        get_checkpoint_state(tmp_path)
    assert isinstance(caught.value, DistckptError)
    assert str(caught.value).startswith(f"{tmp_path}/checkpoint: ")


def test_what_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no checkpoint"):
        update_checkpoint_state(tmp_path, "")
    with pytest.raises(ValueError, match="too long to be read"):
        update_checkpoint_state(tmp_path, "m", ["m" * (1 << 20)] * 65)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_read_from_the_store_that_the_url_means(tmp_path: Path) -> None:
    update_checkpoint_state(tmp_path.as_uri(), "m")
    assert open_store(tmp_path).read("checkpoint", 1 << 20) == render(CheckpointState("m", ("m",))).encode()


# ---- small helpers -----------------------------------------------------------------------------------------------------


def test_which_checkpoints_exist_and_since_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, max_to_keep=2) as manager:
        for number in (1, 2, 30):
            now[0] += 10.0
            manager.save(number).result(30)
    put_manifest(open_store(tmp_path), 4, new_attempt())
    paths = [f"{tmp_path}/ckpt-{number}" for number in (1, 2, 3, 30, 4)]
    assert [distckpt.checkpoint_exists(path) for path in paths] == [False, True, False, True, False]
    assert distckpt.get_checkpoint_mtimes(paths) == [None, 1020.0, None, 1030.0, None]
    assert distckpt.checkpoint_exists(tmp_path / "ckpt-2")
    for pattern in ("ckpt-?", "ckpt-*", "nowhere/ckpt-1"):
        assert not distckpt.checkpoint_exists(tmp_path / pattern)
    next(tmp_path.glob("ckpt-2/*/manifest.json")).write_bytes(b"{}")
    assert distckpt.get_checkpoint_mtimes(paths[1:2]) == [None]
