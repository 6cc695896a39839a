"""Readers: what they read, and what they say about what they refuse."""

import csv
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molex.train.data import (
    DataError,
    LabelledText,
    PromptText,
    label_indices,
    label_names,
    read_labelled,
    read_prompts,
)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_tsv_keeps_quotes_and_skips_blank_lines(tmp_path):
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"so\tbad\n\nfine "\tgood\r\n')
    dataset = read_labelled(path)
    assert dataset.examples == (LabelledText('"so', "bad"), LabelledText('fine "', "good"))
    assert dataset.lines == (2, 4)
    assert dataset.name == "a.tsv"


def test_csv_reads_quoted_cells_over_lines(tmp_path):
    path = write(tmp_path, "a.csv", 'label,text,text_pair\nx,"a, b","c\nd"\ny,e,"f ""g"""\n')
    assert read_labelled(path).examples == (
        LabelledText("a, b", "x", "c\nd"),
        LabelledText("e", "y", 'f "g"'),
    )


def test_jsonl_reads_prompts_with_completion_or_references(tmp_path):
    lines = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "references": ["r", "s"]}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_prompts(path).examples == (PromptText("p", ("c",)), PromptText("q", ("r", "s")))


def test_jsonl_labels_may_be_whole_numbers_and_sort_as_such(tmp_path):
    rows = [{"text": "a", "label": label} for label in (10, 9, 2, 10)]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    dataset = read_labelled(path)
    assert label_names(dataset) == ["2", "9", "10"]
    assert label_indices(dataset, ["2", "9", "10"]) == [2, 1, 0, 2]


def test_digest_is_that_of_the_bytes(tmp_path):
    first = read_labelled(write(tmp_path, "a.tsv", "text\tlabel\na\tb\n"))
    second = read_labelled(write(tmp_path, "b.tsv", "text\tlabel\na\tb\n"))
    third = read_labelled(write(tmp_path, "c.tsv", "text\tlabel\na\tc\n"))
    assert first.digest == second.digest != third.digest
    assert first.digest.startswith("sha256:")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text\tlabel\n", "a.txt: unknown format '.txt'"),
        ("a.tsv", "", "a.tsv: no examples"),
        ("a.tsv", "text\tlabel\n", "a.tsv: no examples"),
        ("a.tsv", "text\nfine\n", "a.tsv, line 2, column 'label': missing"),
        ("a.tsv", "text\tlabel\nfine\n", "a.tsv, line 2: 1 cells, but the header has 2"),
        ("a.tsv", "text\tlabel\n \tx\n", "a.tsv, line 2, column 'text': empty"),
        ("a.tsv", "text\tlabel\na\t\n", "a.tsv, line 2, column 'label': empty"),
        ("a.tsv", "text\ttext\tlabel\na\tb\tc\n", "column 'text': appears twice"),
        ("a.tsv", "text\tlabel\tidx\na\tb\tc\n", "line 2, column 'idx': unknown column"),
        ("a.tsv", "text\tlabel\na\t0.5\nb\t2\n", "--problem-type regression"),
        ("a.tsv", b"text\tlabel\na\tb\n\xff\tb\n", "a.tsv, line 3: not UTF-8"),
        ("a.csv", 'text,label\n"a,b\n', "a.csv, line 2: unexpected end of data"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: not a JSON object"),
        ("a.jsonl", '{"text": 1, "label": "b"}', "line 1, column 'text': not a text"),
        ("a.jsonl", '{"text": "a", "label": true}', "line 1, column 'label': not a text"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', "--problem-type regression"),
    ],
)
def test_bad_labelled_files_are_refused_by_place(tmp_path, name, content, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_labelled(write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"completion": "c"}, "column 'prompt': missing"),
        ({"prompt": "p"}, "either 'completion' or 'references'"),
        ({"prompt": "p", "completion": "c", "references": ["r"]}, "either 'completion' or"),
        ({"prompt": "p", "references": []}, "column 'references': not a list of texts"),
        ({"prompt": "p", "references": "r"}, "column 'references': not a list of texts"),
        ({"prompt": "p", "references": ["r", ""]}, "column 'references': empty"),
        ({"prompt": "", "completion": "c"}, "column 'prompt': empty"),
        ({"prompt": "p", "text": "c"}, "column 'text': unknown column"),
    ],
)
def test_bad_prompts_are_refused_by_place(tmp_path, cells, message):
    path = write(tmp_path, "a.jsonl", "\n" + json.dumps(cells))
    with pytest.raises(DataError, match=f"a.jsonl, line 2, .*{re.escape(message)}"):
        read_prompts(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.tsv: cannot be read"):
        read_labelled(tmp_path / "absent.tsv")


def test_one_class_is_too_few(tmp_path):
    dataset = read_labelled(write(tmp_path, "a.tsv", "text\tlabel\na\tx\nb\tx\n"))
    with pytest.raises(DataError, match="every label is 'x'"):
        label_names(dataset)


def test_an_unknown_label_is_refused_by_place(tmp_path):
    dataset = read_labelled(write(tmp_path, "a.tsv", "text\tlabel\na\tx\nb\tz\n"))
    with pytest.raises(DataError, match=r"line 3, column 'label': unknown label 'z' \(known: x, y"):
        label_indices(dataset, ["x", "y"])


visible = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(visible, visible), min_size=1))
def test_what_csv_and_jsonl_writers_write_is_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("written")
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("prompt", "completion"), *rows])
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in rows]
    expected = tuple(PromptText(prompt, (completion,)) for prompt, completion in rows)
    assert read_prompts(write(folder, "a.csv", buffer.getvalue())).examples == expected
    assert read_prompts(write(folder, "a.jsonl", "\n".join(lines))).examples == expected


@given(st.binary(), st.sampled_from([".tsv", ".csv", ".jsonl"]))
def test_any_bytes_are_read_or_refused_by_name(tmp_path_factory, content, suffix):
    path = write(tmp_path_factory.mktemp("any"), f"some{suffix}", b"text\tlabel\n" + content)
    try:
        dataset = read_labelled(path)
    except DataError as error:
        message = str(error)
    else:
        message = dataset.name
        assert len(dataset.examples) == len(dataset.lines) > 0
    assert f"some{suffix}" in message
