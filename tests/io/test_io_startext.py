"""STAR text: blocks and values come back exactly as written, other readers agree, and bad files are named."""

from __future__ import annotations

import numpy as np
import pytest

from cryoiso.core.errors import InputError
from cryoiso.io.star import library, text_column
from cryoiso.io.star.passed_on import copy_shared
from cryoiso.io.star.text import StarBlock, format_blocks, read_blocks, read_packed_blocks, write_blocks
from cryoiso.io.star.text_column import TextColumn


def test_every_real_star_file_comes_back_from_blocks_unchanged(shared, tmp_path):
    files = sorted((shared / "data").rglob("*.star"))
    assert len(files) > 25
    for file in files:
        blocks = read_blocks(file)
        write_blocks(tmp_path / "again.star", blocks)
        assert read_blocks(tmp_path / "again.star") == blocks, file


def test_blocks_hold_what_gemmi_reads(shared):
    from gemmi import cif

    for path in sorted((shared / "data").rglob("*.star")):
        theirs, ours = cif.read_file(str(path)), read_blocks(path)
        assert [b.name.strip() for b in theirs] == [b.name for b in ours], path
        for their, our in zip(theirs, ours):
            tags = [tag for item in their for tag in ([item.pair[0]] if item.pair else item.loop.tags)]
            assert tags == [f"_{name}" for name in our.columns]
            for tag, values in zip(tags, our.columns.values()):
                raw = list(their.find_values(tag))
                assert values == [cif.as_string(v) if v[:1] in ("'", '"') else v for v in raw], (path, tag)


def blocks_of(tmp_path, text: str) -> list[StarBlock]:
    """As both readers have it: by starfile, and some rows at a time."""
    (tmp_path / "blocks.star").write_bytes(text.encode("utf-8", errors="surrogateescape"))
    try:
        found = read_blocks(tmp_path / "blocks.star")
    except InputError as error:
        with pytest.raises(InputError) as other:
            read_packed_blocks(tmp_path / "blocks.star")
        assert str(other.value) == str(error)
        raise
    packed = read_packed_blocks(tmp_path / "blocks.star")
    assert [(b.name, b.loop, {k: list(v) for k, v in b.columns.items()}) for b in packed] == [
        (b.name, b.loop, b.columns) for b in found
    ]
    return found


def test_text_that_looks_like_numbers_stays_text(tmp_path):
    text = (
        'data_a\n\n_one 007\n_two "x y"\n_empty ""\n\ndata_b\nloop_\n_k #1\n_v #2\n 0001 1.234567890123456789\n\n'
        '# note\n a#b "it\'s"\n\ndata_c\nloop_\n_none\n'
    )
    blocks = blocks_of(tmp_path, text)
    assert blocks == [
        StarBlock("a", False, {"one": ["007"], "two": ["x y"], "empty": [""]}),
        StarBlock("b", True, {"k": ["0001", "a#b"], "v": ["1.234567890123456789", "it's"]}),
        StarBlock("c", True, {"none": []}),
    ]
    assert blocks_of(tmp_path, format_blocks(blocks)) == blocks


AWKWARD = [
    *("None", "nan", "NaN", "<NA>", "NA", "N/A", "null", "-", "inf", "True", "0010", "1e5", "0x1f", "1_000", "1,5"),
    *("18446744073709551615", "99999999999999999999999", "", "a#b", "#c", "it's", "'q", '"', 'p"q', "a''b", '"a" b'),
    *("data_x", "data_x/1@b.mrcs", "loop_", "loop_a", "_u", "_u v", "C:\\new", "é", "\udcff", "a\u00a0b", "\u2028x"),
]


@pytest.mark.parametrize("value", AWKWARD)
def test_awkward_values_survive_in_lists_and_loops(tmp_path, value):
    blocks = [
        StarBlock("list", False, {"k": [value], "v": ["1"]}),
        StarBlock("first", True, {"k": [value, "1"], "v": ["2", "3"]}),
        StarBlock("last", True, {"v": ["2", "3", "4"], "k": ["1", value, value]}),
        StarBlock("alone", True, {"k": [value, "1"]}),
        StarBlock("row", True, {"k": [value], "v": [value]}),
    ]
    for chosen in ([b] for b in blocks):
        assert blocks_of(tmp_path, format_blocks(chosen)) == chosen
    assert blocks_of(tmp_path, format_blocks(blocks)) == blocks


def test_blocks_of_any_order_kind_and_name_come_back(tmp_path):
    names = ("k", "name", "columns", "index", "0", "rlnImageName")
    for seed in range(60):
        rng = np.random.default_rng(seed)
        blocks = []
        for number in range(rng.integers(1, 5)):
            loop = bool(rng.integers(3))
            columns = rng.permutation(names)[: rng.integers(1 if loop else 0, 6)].tolist()
            rows = rng.choice([0, 1, 2, 7]) if loop else 1
            values = {c: [AWKWARD[i] for i in rng.integers(len(AWKWARD), size=rows)] for c in columns}
            blocks.append(StarBlock(str(rng.choice(["", "particles", f"b{number}"])), loop, values))
        assert blocks_of(tmp_path, format_blocks(blocks)) == blocks, seed


def test_a_lone_column_of_awkward_values_survives(tmp_path):
    blocks = [StarBlock(n, True, {"k": ["data_a", "loop_", "_u", "#c", "'q", '"', "a b"]}) for n in "xy"]
    assert blocks_of(tmp_path, format_blocks(blocks)) == blocks


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s,
        lambda s: s.replace("\n", "\r\n"),
        lambda s: s.replace(" ", " \t "),
        lambda s: s.replace("\n", "\n\n").replace("2 b", "  2 b"),
        lambda s: s.replace("\n", " # a note 'here\n"),
        lambda s: s.replace("\n", "\n# a note\n"),
        lambda s: s.rstrip(),
        lambda s: "\ufeff" + s,
        lambda s: s.replace("loop_", "LOOP_").replace("data_", "DATA_"),
    ],
    ids=[
        "plain",
        "windows",
        "tabs",
        "blank lines",
        "notes behind",
        "notes between",
        "no last line end",
        "bom",
        "capitals",
    ],
)
def test_layout_does_not_matter(tmp_path, change):
    text = "data_none\nloop_\n_k #1\n\n# version 30001\ndata_l\n_a 1\n_b x\ndata_t\nloop_\n_k #1\n_v #2\n1 a\n2 b\n"
    assert blocks_of(tmp_path, change(text)) == [
        StarBlock("none", True, {"k": []}),
        StarBlock("l", False, {"a": ["1"], "b": ["x"]}),
        StarBlock("t", True, {"k": ["1", "2"], "v": ["a", "b"]}),
    ]


def test_plain_tables_are_read_by_starfile_alone(tmp_path, monkeypatch):
    def looked_up(line: str) -> list[str]:
        raise AssertionError(f"read from its line: {line}")

    monkeypatch.setattr(library, "tokens", looked_up)
    block = StarBlock("particles", True, {"rlnImageName": ["000001@s.mrcs", "2@s.mrcs"], "rlnX": ["1e3", "None"]})
    write_blocks(tmp_path / "blocks.star", [block])
    assert read_blocks(tmp_path / "blocks.star") == [block]
    block.columns["rlnX"][1] = "nan"
    write_blocks(tmp_path / "blocks.star", [block])
    with pytest.raises(AssertionError, match=r"2@s\.mrcs nan"):
        read_blocks(tmp_path / "blocks.star")


def test_tables_of_several_slabs_are_those_of_one(tmp_path, monkeypatch):
    values = [v for v in AWKWARD if v != "\udcff"]
    rows = {
        "plain": StarBlock("plain", True, {"k": [f"{i:06d}@s.mrcs" for i in range(50)], "v": ["1e3", "nan"] * 25}),
        "odd": StarBlock("odd", True, {"k": values, "v": ["x"] * len(values)}),
        "not UTF-8": StarBlock("bytes", True, {"k": ["a", "\udcff", "c"] * 9, "v": ["x", "y", "z"] * 9}),
    }
    whole = format_blocks(list(rows.values()))
    monkeypatch.setattr(text_column, "SLAB", 7)
    assert format_blocks(list(rows.values())) == whole
    assert blocks_of(tmp_path, whole) == list(rows.values())
    packed = {b.name: b.columns for b in read_packed_blocks(tmp_path / "blocks.star")}
    assert all(isinstance(column, TextColumn) for name in ("plain", "odd") for column in packed[name].values())
    assert list(packed["bytes"]["k"]) == rows["not UTF-8"].columns["k"]
    with pytest.raises(InputError, match=r"(?s)row 19.*expected 2 values.*found 3.*line 23 .*first row is on line 5"):
        blocks_of(tmp_path, "data_x\nloop_\n_k\n_v\n" + "1 2\n" * 18 + "1 2 3\n" + "1 2\n" * 20)


def test_a_file_mended_after_an_error_is_read_anew(tmp_path):
    with pytest.raises(InputError):
        blocks_of(tmp_path, "data_x\nloop_\n_k\n_v\n1 2 3\n")
    assert blocks_of(tmp_path, "data_x\nloop_\n_k\n_v\n1 2\n")[0].columns == {"k": ["1"], "v": ["2"]}


LOOP = "data_x\nloop_\n_k #1\n_v #2\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LOOP + "1 2\n\n1 2 3\n", ["data_x", "row 2", "expected 2 values", "found 3", "line 7"]),
        (LOOP + "1 2 3\n1 2\n", ["row 1", "expected 2 values", "found 3"]),
        (LOOP + "1 2\n1 2\n1\n", ["row 3", "expected 2 values", "found 1"]),
        (LOOP + "1\n2\n", ["row 1", "expected 2 values", "found 1"]),
        (LOOP + "1 2 3\n4 5 6\n", ["row 1", "expected 2 values", "found 3"]),
        (LOOP + "1\n1 2 3\n", ["row 1", "expected 2 values", "found 1"]),
        (LOOP + "1 #2\n", ["row 1", "expected 2 values", "found 1"]),
        (LOOP + '1 "2 3" 4\n', ["row 1", "expected 2 values", "found 3"]),
        (LOOP + "1 2\n_w 3\n", ["column name below", "data_x", "line 6", "quotes"]),
        (LOOP + "1 2\nloop_\n_w\n3\n", ["two tables", "data_x"]),
        ("data_x\n_a 1\nloop_\n_k\n3\n", ["two tables", "data_x"]),
        ("data_x\nloop_\n_k\n_k\n1 2\n", ["_k appears twice", "data_x"]),
        ("data_x\n_k 1\n_k 2\n", ["_k appears twice", "data_x"]),
        ("data_x\n_k two words\n", ["_k", "more than one value", "two words", "line 2"]),
        ("data_x\n_k 1\nword\n", ["outside any loop", "word", "line 3"]),
        ("data_x\nloop_\n1 2\n", ["outside any loop", "line 3"]),
        ("_k 1\n", ["not a STAR file", "_k 1"]),
        ("# nothing\n", ["not a STAR file"]),
    ],
)
def test_bad_blocks_are_named(tmp_path, text, words):
    with pytest.raises(InputError) as caught:
        blocks_of(tmp_path, text)
    for word in [str(tmp_path / "blocks.star"), *words]:
        assert word in str(caught.value)


def test_what_is_passed_on_names_no_folder(tmp_path):
    rows = [
        "000001@/home/me/my_set/Extract/a.mrcs /data/scope/x.mrc 1.5 'no path'",
        '000002@/home/me/my_set/Extract/deep/b.mrcs "/data/scope/a b/y.mrc" 2/3 rel/z',
    ]
    head = "data_\n\nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n_rlnX #3\n_rlnY #4\n"
    (tmp_path / "a.star").write_text(head + "\n".join(rows) + "\n")
    assert copy_shared(tmp_path / "a.star", tmp_path / "b.star") == ["/data/scope", "/home/me/my_set/Extract"]
    text = (tmp_path / "b.star").read_text()
    assert text == head + ("000001@a.mrcs x.mrc 1.5 'no path'\n" + '000002@deep/b.mrcs "a b/y.mrc" 2/3 rel/z\n')
    assert copy_shared(tmp_path / "b.star", tmp_path / "c.star") == []
    assert (tmp_path / "c.star").read_bytes() == (tmp_path / "b.star").read_bytes()
