"""The index: all records by line, none believed that was changed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.storage_schemas.errors import DamagedCacheError, NotACacheError
from secondcast.storage_schemas.schema.commits import CommitRecord, FileRecord, Records, encode_index
from secondcast.storage_schemas.schema.index import Index
from secondcast.storage_schemas.schema.json_files import stays_inside

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(lambda name: name not in ("..", "."))
# A path with an unprintable character is refused, as one that leads out of the cache is.
FILES = NAMES.filter(lambda name: stays_inside(f"trajectories/{name}"))


@st.composite
def some_records(draw):
    keys = draw(st.sets(st.tuples(st.sampled_from(["trajectories", "embeddings"]), st.integers(0, 9)), max_size=12))
    provenances = draw(st.lists(st.dictionaries(NAMES, st.integers() | NAMES), min_size=1, max_size=3))
    return [
        CommitRecord(
            kind=kind, shard=shard, segment=0, rows=draw(st.integers(1, 64)), content="c", raw_bytes=7, seconds=1.5,
            finished_at="now", provenance=draw(st.sampled_from(provenances)),
            files=tuple(
                FileRecord(path=f"{kind}/{shard}/{name}", bytes=draw(st.integers(0, 2**40)), xxh3_128="x")
                for name in draw(st.sets(FILES, max_size=3))
            ),
        )
        for kind, shard in keys
    ]  # fmt: skip


def read(data):
    return Records((), "index.json", index=Index(data, "index.json"))


@pytest.mark.thorough
@given(some_records())
def test_an_index_gives_back_its_records(records):
    data, plain = encode_index(Records(records)), Records(records)
    found = read(data)
    assert dict(found) == dict(plain) and len(found) == len(records)
    assert found.bytes == plain.bytes and all(found.rows(kind) == plain.rows(kind) for kind, _ in plain)
    for record in records:
        for file in record.files:
            assert read(data).owner(file.path) == (file, record)
    assert found.owner("nowhere") is None and ("trajectories", 10) not in found
    assert encode_index(found) == data and json.loads(data)["format"] == "secondcast-index"


@pytest.mark.thorough
@given(some_records(), st.data())
def test_a_changed_or_cut_index_is_refused(records, data):
    whole = encode_index(Records(records))
    place = data.draw(st.integers(0, len(whole) - 2))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    for wrong in (bytes(changed), whole[:place]):
        with pytest.raises((DamagedCacheError, NotACacheError)):
            read(wrong)


def test_the_refusal_says_what_to_do():
    with pytest.raises(
        DamagedCacheError, match=r"index.json differs from what was written \(3 bytes, .*delete it and rerun the"
    ):
        read(b"abc")
