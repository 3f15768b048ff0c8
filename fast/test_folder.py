"""A model takes another's place in a folder as a whole, whenever it is stopped, and what is no model is told from one."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from fast.folder import BEFORE, LEAVING, MODEL, NEW, check_folder, files_of, replacing_model

OLD = {
    "config.json": '{"old": 1}', "pytorch_model-00001-of-00001.bin": "old", "pytorch_model.bin.index.json": "old",
    "tokenizer.model": "old", "chat_template.jinja": "old",
}  # fmt: skip
FRESH = {"config.json": '{"new": 1}', "model.safetensors": "new", "tokenizer.model": "new"}
OTHERS = {"diary.txt": "mine", "memory.safetensors": "mine", "checkpoint.pt": "mine"}
STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}  # audited as they are about to happen

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share what is imported")


def fill(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def texts(folder: Path, patterns: tuple[str, ...] = MODEL) -> dict[str, str]:
    return {path.name: path.read_text() for path in files_of(folder, patterns)}


def write(folder: Path):
    with replacing_model(folder) as made:
        for name, text in FRESH.items():
            (made / name).write_text(text)


def stopped(folder: Path, n: int, stop: Callable) -> int:
    """Writes the new model in a process that calls `stop` before its n-th change to the folder; the status it ends with."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = count(1)

    def look(event: str, _):
        if event in STEPS and next(steps) == n:
            stop()

    try:
        sys.addaudithook(look)
        write(folder)
        os._exit(0)
    except BaseException:
        os._exit(1)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise OSError("of the disk")


@pytest.mark.parametrize(
    "old", [OLD, {}, {"model.safetensors": "of no model"}], ids=["a model", "none", "weights alone"]
)
def test_a_new_model_takes_the_place_of_all_files_of_the_old_one_and_of_no_others(old, tmp_path):
    folder = fill(tmp_path / "new" / "a", old | OTHERS) if old else tmp_path / "new" / "a"
    write(folder)
    assert texts(folder, ("*",)) == FRESH | (OTHERS if old else {})


@needs_fork
@pytest.mark.parametrize("stop", [interrupt, fail])
def test_after_an_error_at_any_step_the_old_model_is_back_or_the_new_one_whole(stop, tmp_path):
    ends = []
    for n in count(2):  # the first makes the folder, which is there
        folder = fill(tmp_path / str(n), OLD | OTHERS)
        if stopped(folder, n, stop) == 0:
            break
        ends.append(texts(folder))
        assert ends[-1] in (OLD, FRESH), n
        assert texts(folder, tuple(OTHERS)) == OTHERS
    assert ends[: len(OLD) + 6] == [OLD] * (len(OLD) + 6) and FRESH in ends  # up to the last that moves the new ones


@needs_fork
def test_a_kill_at_any_step_leaves_the_old_model_or_the_new_one_or_a_folder_that_says_where_the_old_one_is(tmp_path):
    seen = set()
    for n in count(1):
        folder = fill(tmp_path / str(n), OLD | OTHERS)
        if stopped(folder, n, kill) == 0:
            break
        before, leaving = folder / BEFORE, folder / LEAVING
        if (folder / "config.json").exists():
            check_folder(folder)
            assert texts(folder) in (OLD, FRESH), n
            seen.add(texts(folder)["config.json"])
        else:
            with pytest.raises(ValueError, match="is unfinished") as raised:
                check_folder(folder)
            if before.exists():
                assert str(before) in str(raised.value) and texts(before) == OLD
            else:
                assert str(leaving) in str(raised.value) and texts(leaving) | texts(folder) == OLD
            seen.add(before.exists())
        assert texts(folder, tuple(OTHERS)) == OTHERS
    assert seen == {OLD["config.json"], FRESH["config.json"], True, False}


@needs_fork
def test_what_was_killed_is_undone_or_ended_by_the_next_that_writes_there_even_if_that_is_killed_too(tmp_path):
    def whole(folder: Path):
        with suppress(ZeroDivisionError), replacing_model(folder):
            raise ZeroDivisionError
        left = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
        assert texts(folder) in (OLD, FRESH) and texts(folder, tuple(OTHERS)) == OTHERS and not left

    for first in (6, len(OLD) + 6):  # while the old ones leave, and while the new ones come
        for second in count(1):
            folder = fill(tmp_path / f"{first} {second}", OLD | OTHERS)
            assert stopped(folder, first, kill) == -signal.SIGKILL
            if stopped(folder, second, kill) == 0:
                assert texts(folder) == FRESH
                break
            whole(folder)


def test_a_folder_in_the_place_of_a_file_is_named_before_anything_is_moved(tmp_path):
    folder = fill(tmp_path, OLD)
    (folder / "model.safetensors" / "mine").mkdir(parents=True)
    with pytest.raises(OSError, match="model.safetensors is a folder"):
        write(folder)
    assert {name: (folder / name).read_text() for name in OLD} == OLD and len(list(folder.iterdir())) == len(OLD) + 1


def test_links_are_replaced_and_not_what_they_point_to(tmp_path):
    folder, kept = fill(tmp_path / "a", {"config.json": "{}"}), fill(tmp_path / "kept", {"blob": "old"}) / "blob"
    (folder / "model.safetensors").symlink_to(kept)
    (folder / "tokenizer.model").symlink_to(tmp_path / "nowhere")
    write(folder)
    assert texts(folder, ("*",)) == FRESH and kept.read_text() == "old"
    assert not (folder / "model.safetensors").is_symlink()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 499723\n"


@pytest.mark.parametrize(
    "files, said",
    [
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "holds an adapter"),
        ({"config.json": "{}", "adapter_config.json": "{}", "adapter_model.safetensors": ""}, "holds an adapter"),
        ({"memory_layers.safetensors": ""}, "holds tuned memory layers, not a model: convert.py --over"),
        ({"params.json": "{}", "consolidated.00.pth": "", "tokenizer.model": ""}, "Meta's own layout"),
        ({"consolidated.00.pth": ""}, "Meta's own layout"),
        ({"config.json": "{}", "small.Q4_K.gguf": ""}, "holds GGUF files"),
        ({"tokenizer.json": "{}"}, "has no config.json"),
        ({}, "has no config.json"),
        ({"config.json": LFS}, "config.json is a Git LFS pointer.*git lfs pull"),
        ({"config.json": "\n<!DOCTYPE html><html>"}, "config.json is a web page"),
        ({"config.json": "\ufeff{}"}, "config.json is text with a byte-order mark"),
        ({"config.json": "[" * 100_000}, "config.json is broken"),
        ({"config.json": "{"}, "config.json is broken"),
        ({"config.json": "[1]"}, "config.json is broken: it is no JSON object"),
    ],
)  # fmt: skip
def test_a_folder_that_holds_no_model_is_told_by_what_it_holds(files, said, tmp_path):
    with pytest.raises((OSError, ValueError), match=said):
        check_folder(fill(tmp_path, files))


def test_a_file_or_nothing_where_a_folder_should_be_is_told(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    for name, said in {"model.gguf": "is a GGUF file", "missing": "is not a folder"}.items():
        with pytest.raises((OSError, ValueError), match=said):
            check_folder(tmp_path / name)


def test_a_first_model_that_was_killed_is_to_be_written_again(tmp_path):
    (tmp_path / NEW).mkdir()
    with pytest.raises(ValueError, match="is unfinished.*write the new one again"):
        check_folder(tmp_path)
    write(tmp_path)
    assert texts(tmp_path, ("*",)) == FRESH
