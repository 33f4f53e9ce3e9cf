"""The demo's data: parsers on a few made-up lines, splits that cannot leak, archives that are not trusted."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import demo_data
import demo_items
import demo_texts
from demo_texts import Row


def rows_of(groups: int, each: int) -> list[Row]:
    return [Row(f"text {i} of group {g}", "ab"[i % 2], f"g{g}") for g in range(groups) for i in range(each)]


def test_splits_have_their_sizes_and_share_no_group() -> None:
    parts = demo_texts.split(rows_of(60, 5), {"train": 100, "tuning": 22, "test": 33})
    assert {name: len(part) for name, part in parts.items()} == {"train": 100, "tuning": 22, "test": 33}
    groups = [{row.group for row in part} for part in parts.values()]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_splits_do_not_depend_on_the_order_of_the_rows() -> None:
    rows, sizes = rows_of(60, 5), {"train": 100, "tuning": 22, "test": 33}
    assert demo_texts.split(rows, sizes) == demo_texts.split(rows[::-1], sizes)


def test_few_rows_leave_half_for_training() -> None:
    parts = demo_texts.split([Row(f"text {i}") for i in range(60)], {"train": 3000, "tuning": 500, "test": 1000})
    assert {name: len(part) for name, part in parts.items()} == {"train": 30, "tuning": 10, "test": 20}


def test_sizes_may_count_characters() -> None:
    rows = [Row(f"{i:03d} " * 5) for i in range(100)]
    parts = demo_texts.split(rows, {"train": 400, "tuning": 100, "test": 205}, lambda row: len(row.text))
    assert {name: sum(len(row.text) for row in part) for name, part in parts.items()} == {
        "train": 400,
        "tuning": 100,
        "test": 200,
    }


def test_texts_are_unique_up_to_punctuation_and_case() -> None:
    rows = [Row("A fine film.", "a"), Row("a FINE film!", "a"), Row("Odd", "a"), Row("odd.", "b"), Row(":)", "a")]
    assert demo_texts.unique(rows) == [Row("A fine film.", "a")]


def test_pieces_are_packed_in_order_without_loss() -> None:
    assert list(demo_texts.pack(["aaa", "b", "cc", "d"], "-", least=3)) == ["aaa", "b-cc", "d"]


def test_sarcasm() -> None:
    sample = {"input": [{"role": "system", "content": "prompt"}, {"role": "user", "content": "area man wins"}]}
    text = "\n".join(json.dumps(sample | {"ideal": ideal}) for ideal in "10")
    assert [row.label for row in demo_texts.sarcasm_rows(text)] == ["sarcastic", "sincere"]
    assert {row.text for row in demo_texts.sarcasm_rows(text)} == {"area man wins"}


def test_rotten_tomatoes() -> None:
    table = 'category,text,movie_name\nplot,"A bank is robbed, twice.",heat\nfresh,"Tense, taut.",heat\n'
    assert list(demo_texts.rotten_tomatoes_rows(table)) == [Row("Tense, taut.", "fresh", "heat")]


def test_vader_ratings_become_signs_and_reviews_groups() -> None:
    table = "1_1\t-0.9\tno picture.\n1_2\t0.15\tA repost.\n2_1\t0.5\tgood &amp; cheap\n"
    assert list(demo_texts.vader_rows(table)) == [
        Row("no picture.", "negative", "1"),
        Row("good & cheap", "positive", "2"),
    ]


def test_messages_without_a_review_stand_alone() -> None:
    assert next(demo_texts.vader_rows("17\t2.7\tYay.\n")).group == ""


def test_kjv() -> None:
    source = 'bible = Bible(\n    V,\n    """\nAnd darkness [was] upon the face.\nAnd God said.\n""",\n    {1: 1},\n)\n'
    assert [row.text for row in demo_texts.kjv_rows(source)] == ["And darkness was upon the face.\nAnd God said."]


def test_maths_and_german() -> None:
    problem = json.dumps({"passage": "Ann has 2 pens. ", "question": "How many?", "answer": "2 pens"})
    assert [row.text for row in demo_texts.maths_rows(problem)] == ["Ann has 2 pens. How many?\nAnswer: 2 pens"]
    exam = json.dumps({"input": [{"content": "prompt"}, {"content": "Was ist das?\nA. Eis.\nAnswer:"}], "ideal": "[A]"})
    assert [row.text for row in demo_texts.german_rows(exam)] == ["Was ist das?\nA. Eis."]


def test_subjects_come_from_the_names_of_files() -> None:
    question = json.dumps({"question": " Which nerve? ", "options": "A. ...", "answer": "A."})
    files = {"Test/Anatomy.jsonl": question, "Validation/Anatomy.jsonl": question, "Test/Dental.jsonl": question}
    assert list(demo_texts.medicine_rows(files)) == [Row("Which nerve?", "anatomy")] * 2


def test_a_folder_of_a_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for name in ("a/b/2.jsonl", "a/b/1.jsonl", "a/b/1.csv", "a/3.jsonl"):
            wheel.writestr(name, name)
    found = demo_texts.zip_folder(tmp_path / "a.whl", "a/b/", ".jsonl")
    assert found == {"1.jsonl": "a/b/1.jsonl", "2.jsonl": "a/b/2.jsonl"}


def test_sentences_that_go_on_and_those_that_do_not() -> None:
    sample = {"type": "intersentence", "context": "The cook came in. ", "stereotype": "x", "unrelated": "Rain fell."}
    lines = [sample | {"anti-stereotype": "He sang."}, sample | {"type": "intrasentence"}]
    assert list(demo_texts.sequel_rows("\n".join(map(json.dumps, lines)))) == [
        Row("The cook came in. He sang.", "sequel", "the cook came in"),
        Row("The cook came in. Rain fell.", "other", "the cook came in"),
    ]


def test_verses_have_the_part_of_their_book() -> None:
    starts = "{\n 1001001: 0,\n 43011035: 20,\n }"
    source = f'bible = Bible(\n    """In the [first] day. Jesus wept.\n""",\n    {starts},\n {{1001001: 9}})'
    assert list(demo_texts.scripture_rows(source)) == [Row("In the first day.", "law"), Row("Jesus wept.", "gospels")]
    assert list(demo_texts.PARTS)[-1] == 66


def test_speeches_are_cut_into_passages_of_whole_sentences() -> None:
    long = " ".join(f"This is sentence number {i} of a long speech." for i in range(9))
    table = f'party,speaker,text\ndemocrat,ANN,"Thank you.\n{long}"\nrepublican,BOB,Thanks.\n'
    rows = list(demo_texts.speech_rows(table, per_speech=2))
    assert [(row.label, row.group) for row in rows] == [("democrat", "ANN")] * 2 + [("republican", "BOB")]
    assert rows[0].text.startswith("Thank you. This is sentence number 0")
    assert all(row.text.endswith(".") for row in rows)
    assert len(rows[0].text) >= demo_texts.PASSAGE


def test_law_and_drama() -> None:
    assert list(demo_texts.law_rows(json.dumps({"document": " On March 8th. "}))) == [Row("On March 8th.")]
    scene = "HAMLET\nWords, words.\n\n \nPOLONIUS\nWhat matter?"
    assert [row.text for row in demo_texts.drama_rows(scene)] == ["HAMLET\nWords, words.\n\nPOLONIUS\nWhat matter?"]


def test_modules_are_groups_and_give_a_few_documents_each(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("\n\n".join(f"x{i} = '{'y' * demo_texts.DOCUMENT}'" for i in range(9)))
    (tmp_path / "short.py").write_text("z = 1\n")
    rows = list(demo_texts.python_rows(tmp_path))
    assert [row.group for row in rows] == ["long"] * 4 + ["short"]


def tar_of(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size, member.type, member.linkname = len(content), kind, "/etc/hostname"
        tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_tar_member() -> None:
    assert demo_texts.tar_member(tar_of("a/b.txt", b"hello"), "a/b.txt") == b"hello"


@pytest.mark.parametrize("name", ["../b.txt", "a/../../b.txt", "/b.txt"])
def test_tar_paths_that_leave_the_archive_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unsafe path"):
        demo_texts.tar_member(tar_of(name, b"hello"), name)


def test_tar_links_are_not_followed() -> None:
    with pytest.raises(ValueError, match=r"no file 'b\.txt'"):
        demo_texts.tar_member(tar_of("b.txt", b"", tarfile.SYMTYPE), "b.txt")


def test_every_package_of_an_item_is_pinned_by_one_hash() -> None:
    pins = demo_data.pins(demo_data.PINS.read_text())
    assert {item.package for item in demo_data.ITEMS.values() if item.package} == set(pins)
    assert all(line.count("--hash=sha256:") == 1 for line in pins.values())


class AskedPip(Exception):
    """Stands for the download."""


def test_an_archive_with_another_hash_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(pin: str, folder: Path) -> None:
        raise AskedPip

    (tmp_path / "evals-3.0.1.post1-py3-none-any.whl").write_bytes(b"not the one")
    monkeypatch.setattr(demo_data, "_pip_download", download)
    with pytest.raises(AskedPip):
        demo_data.fetched("evals", tmp_path)


def lay_out_with(maker: demo_items.Maker, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(demo_data.ITEMS, "made_up", demo_items.Item(None, maker, "made-up texts", "none"))
    demo_data.main(["--out", str(out), "--only", "made_up"])
    return out / "made_up"


def make_small_task(archive: Path, folder: Path) -> str:
    return demo_items.make_task(rows_of(60, 5), folder)


def test_a_folder_is_named_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(archive: Path, folder: Path) -> str:
        (folder / "rest.jsonl").write_text("half")
        raise ValueError("broken archive")

    with pytest.raises(SystemExit, match="made_up: broken archive"):
        lay_out_with(fail, tmp_path, monkeypatch)
    assert not (tmp_path / "made_up").exists()
    folder = lay_out_with(make_small_task, tmp_path, monkeypatch)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "test.jsonl", "train.jsonl", "tuning.jsonl"]
    assert set(json.loads((folder / "test.jsonl").read_text().splitlines()[0])) == {"text", "label"}


def test_what_is_complete_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(archive: Path, folder: Path) -> str:
        raise AssertionError("made again")

    lay_out_with(make_small_task, tmp_path, monkeypatch)
    lay_out_with(again, tmp_path, monkeypatch)


def test_a_failing_pip_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data.sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match=r"^sarcasm: pip could not download evals==\S+ .*network") as raised:
        demo_data.main(["--out", str(tmp_path), "--only", "sarcasm"])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "sarcasm").exists()
