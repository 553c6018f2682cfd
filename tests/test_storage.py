"""The second place of a run's files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.storage import Storage, restore, stored
from ript_ray.config import Config
from ript_ray.errors import UserError


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("as_url", [False, True])
def test_a_run_comes_back_as_it_was_when_last_copied(tmp_path: Path, as_url: bool) -> None:
    run, place, back = tmp_path / "run", tmp_path / "a place", tmp_path / "back"
    url = place.as_uri() if as_url else str(place)
    (run / "checkpoints/0001").mkdir(parents=True)
    (run / "learners/0").mkdir(parents=True)
    (run / "config.yaml").write_text("run: {}\n")
    (run / "checkpoints/0001/model.safetensors").write_bytes(bytes(1000))
    (run / "metrics.jsonl").write_text('{"update": 0}\n{"upd')
    (run / ".metrics.jsonl.partial").write_text("{}")
    (run / "learners/0/state").write_text("of Ray Train")
    assert not restore(url, back)
    with stored(url, run) as (storage,):
        (run / "journal.jsonl").write_text('{"kind": "session"}\n{"kind": "pla')
        storage({})
    (run / "journal.jsonl").write_text('{"kind": "session"}\n')
    (run / "metrics.jsonl").write_text('{"update": 0}\n')
    kept = {name: content for name, content in files_of(run).items() if not name.startswith((".", "learners"))}
    assert files_of(place) == kept
    assert restore(url, back)
    assert files_of(back) == kept

    before = (place / "checkpoints/0001/model.safetensors").stat().st_mtime_ns
    (run / "journal.jsonl").write_text('{"kind": "session"}\n' * 2)
    with stored(url, run):
        pass
    assert (place / "checkpoints/0001/model.safetensors").stat().st_mtime_ns == before  # not copied again
    assert files_of(place)["journal.jsonl"] == b'{"kind": "session"}\n' * 2

    with (run / "journal.jsonl").open("a") as journal:
        journal.write('{"kind": "played"}\n')
    (run / "journal.jsonl").rename(run / "older")  # a machine that the run has left comes back
    (run / "journal.jsonl").write_text('{"kind": "session"}\n')
    with pytest.raises(UserError, match=r"is further than .*move"), stored(url, run):
        pass
    (run / "journal.jsonl").write_text('{"kind": "session"}\n' + '{"kind": "played"}\n' * 5)  # it had played more
    with pytest.raises(UserError, match=r"is further than .*move"), stored(url, run):
        pass
    (run / "older").rename(run / "journal.jsonl")

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"holds another run than .*other"), stored(url, other):
        pass
    assert files_of(place)["config.yaml"] == b"run: {}\n"


def test_older_checkpoints_go_when_newer_ones_are_there(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "place"

    def checkpoints() -> set[str]:
        return {path.name for path in (place / "checkpoints").iterdir()}

    def learn(update: int, *files: str) -> None:
        for file in files:
            (run / f"checkpoints/{update:04d}").mkdir(parents=True, exist_ok=True)
            (run / f"checkpoints/{update:04d}" / file).write_text("{}")

    learn(1, "model.safetensors", "policy.json")
    learn(2, "model.safetensors", "policy.json")
    (run / "checkpoints/unaveraged-0001").mkdir()
    (run / "checkpoints/unaveraged-0001/policy.json").write_text("{}")
    (run / "config.yaml").write_text("")
    (run / "journal.jsonl").write_text('{"kind": "session"}\n')
    with stored(str(place), run, 2):
        pass
    assert checkpoints() == {"0001", "0002", "unaveraged-0001"}
    shutil.rmtree(run / "checkpoints/0001")
    shutil.rmtree(run / "checkpoints/unaveraged-0001")
    with stored(str(place), run):  # whoever makes room here keeps what is there
        pass
    learn(3, "model.safetensors")  # half copied
    with stored(str(place), run, 2):
        pass
    assert checkpoints() == {"0001", "0002", "0003", "unaveraged-0001"}
    learn(3, "policy.json")
    with stored(str(place), run, 2):
        pass
    assert checkpoints() == {"0002", "0003"}
    learn(4, "model.safetensors", "policy.json")
    with stored(str(place), run, 2):  # the run itself keeps 2, which did best
        pass
    assert checkpoints() == {"0002", "0003", "0004"}


def test_a_place_that_lets_nothing_go_takes_the_journal_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = tmp_path / "run", tmp_path / "place"

    def refuse(*_: object) -> None:
        raise PermissionError("delete_dir: access denied")

    monkeypatch.setattr(Storage, "_prune", refuse)
    run.mkdir()
    (run / "config.yaml").write_text("")
    (run / "journal.jsonl").write_text('{"kind": "session"}\n')
    with stored(str(place), run, 2):
        pass
    assert files_of(place) == files_of(run)


def test_a_restore_that_is_interrupted_is_not_taken_for_whole(tmp_path: Path) -> None:
    place, back = tmp_path / "place", tmp_path / "back"
    for name in ("checkpoints/0001/policy.json", "journal.jsonl", "z.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("{}\n")
    back.mkdir()
    (back / "z.json").mkdir()  # in the way
    with pytest.raises(UserError):
        restore(str(place), back)
    assert not (back / "journal.jsonl").exists()
    (back / "z.json").rmdir()
    assert restore(str(place), back)
    assert files_of(back) == files_of(place)


def test_what_the_journal_does_not_know_yet_is_no_metric(tmp_path: Path) -> None:
    place, back = tmp_path / "place", tmp_path / "back"
    place.mkdir()
    (place / "journal.jsonl").write_text('{"kind": "session"}\n{"kind": "collected", "step": 0}\n{"kind": "played"}\n')
    (place / "metrics.jsonl").write_text('{"update": 1}\n{"update": 1, "a/b": 2}\n{"update": 2}\n')
    assert restore(str(place), back)
    assert (back / "metrics.jsonl").read_text() == '{"update": 1}\n{"update": 1, "a/b": 2}\n'


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "config.yaml").write_text("")
    for url in (str(tmp_path / "file/run"), "nowhere://bucket/run"):
        with pytest.raises(UserError, match=rf"run\.storage='{url}': .*a URL such as s3://"), stored(url, tmp_path):
            pass
    with pytest.raises(ValueError, match=r"run\.storage='x' with scaling\.ray=false"):
        Config.model_validate({"run": {"storage": "x"}, "scaling": {"ray": False}})
