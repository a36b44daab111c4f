"""Finding sources, their names and keys, sidecars, and importers of annotations."""

import json
import re
from pathlib import Path

import pytest

from avatar.data.preprocess.importers import hdtf, talkvid
from avatar.data.preprocess.reasons import Rejected
from avatar.data.preprocess.sources import Source, find, read_sidecar

KEY = re.compile("[a-z0-9_-]+")


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a.MOV", "deep/er/c v1.5.mkv", "Grüße [1].webm", "notes.txt", "a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_find_lists_only_videos_of_a_folder_sorted_by_name(folder):
    assert [source.name for source in find(str(folder))] == ["Grüße [1].webm", "a.MOV", "b.mp4", "deep/er/c v1.5.mkv"]


def test_keys_are_unique_and_valid_in_shards(folder):
    sources = [
        *find(str(folder)),
        Source("b/x.mp4", Path("x")),
        Source("c/x.mp4", Path("x")),
        Source("视频.mp4", Path("x")),
    ]
    keys = [source.key for source in sources]
    assert len(set(keys)) == len(keys)
    assert all(KEY.fullmatch(key) for key in keys)
    assert any("c-v1-5" in key for key in keys)  # a dot would end a key in a shard
    assert len(Source("x" * 300 + ".mp4", Path("x")).key) < 60


def test_find_accepts_patterns_lists_and_files(folder):
    listed = folder / "list.txt"
    listed.write_text("# two of them\nb.mp4\n\ndeep/er/c v1.5.mkv\n")
    two = ["b.mp4", "deep/er/c v1.5.mkv"]
    assert [source.name for source in find(str(listed))] == two
    assert [source.name for source in find(str(folder / "**/*.m[pk][4v]"))] == two
    assert [source.name for source in find([str(folder / "b.mp4"), str(folder / "deep")])] == ["b.mp4", "er/c v1.5.mkv"]
    assert [source.name for source in find(str(folder / "Grüße [1].webm"))] == [
        "Grüße [1].webm"
    ]  # no pattern: it exists


def test_find_rejects_missing_files_and_duplicate_names(folder):
    (folder / "list.txt").write_text("lost.mp4\n")
    (folder / "empty").mkdir()
    for source in ("nowhere", str(folder / "list.txt")):
        with pytest.raises(FileNotFoundError, match=r"check|correct"):
            find(source)
    with pytest.raises(ValueError, match="no video in"):
        find(str(folder / "empty"))
    with pytest.raises(ValueError, match="same name"):
        (folder / "empty" / "b.mp4").touch()
        find([str(folder / "b.mp4"), str(folder / "empty")])


def test_stamp_depends_on_sidecar(folder):
    (source,) = find(str(folder / "b.mp4"))
    before = source.stamp()
    assert source.stamp() == before
    (folder / "b.txt").write_text("a man")
    assert source.stamp() != before


def test_read_sidecar_returns_caption_person_and_scores(folder):
    assert read_sidecar(folder / "b.mp4") == {"caption": None, "person_id": None, "scores": {}}
    (folder / "b.txt").write_text(" ein Mann \n", encoding="utf-8")
    assert read_sidecar(folder / "b.mp4")["caption"] == "ein Mann"
    (folder / "b.json").write_text(
        json.dumps({"caption": "a man", "person_id": 7, "scores": {"dover": 0.5, "iqa": None}})
    )
    expected = {"caption": "a man", "person_id": "7", "scores": {"dover": 0.5, "iqa": None}}
    assert read_sidecar(folder / "b.mp4") == expected
    for content in ("[1]", '{"caption": 3}', '{"scores": {"dover": "good"}}', '{"scores": [1]}', "{"):
        (folder / "b.json").write_text(content)
        with pytest.raises(Rejected, match="bad_caption"):
            read_sidecar(folder / "b.mp4")


def entry(clip: str, video: str, start: float, end: float, person: str, **more) -> dict:
    """A clip of TalkVid's list, with the keys of the published list."""
    return {
        "id": clip,
        "height": 1080,
        "width": 1920,
        "fps": 24.0,
        "start-time": start,
        "start-frame": round(24 * start),
        "end-time": end,
        "end-frame": round(24 * end),
        "durations": f"{end - start:.3f}s",
        "info": {"Person ID": person, "Language": "English", "Video Link": f"https://www.youtube.com/watch?v={video}"},
        **more,
    }


def test_talkvid_imports_complete_and_cut_videos(tmp_path):
    head = {"scores": {"avg_movement": 97.9, "min_movement": 89.4}}
    clips = [
        entry("videoAAA-scene2-scene1", "AAA_-1", 20.0, 30.5, "597", description="an older man in a suit"),
        entry(
            "videoAAA-scene1-scene1",
            "AAA_-1",
            0.1,
            5.14,
            "597",
            dover_scores=8.9,
            cotracker_ratio=0.93,
            head_detail=head,
        ),
        entry("videoBBB-scene1-scene1", "BBB", 1.0, 8.0, "12"),
        entry("videoCCC-scene1-scene1", "CCC", 1.0, 8.0, "13"),
    ]
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    for name in ("AAA_-1.mp4", "videoBBB-scene1-scene1.mp4"):
        (tmp_path / name).touch()
    sources, notes = talkvid(tmp_path / "clips.json", tmp_path)
    assert len(notes) == 1 and notes[0].startswith("1 ") and "videoCCC-scene1-scene1" in notes[0]
    complete, cut = sources
    assert (complete.name, cut.name) == ("AAA_-1.mp4", "videoBBB-scene1-scene1.mp4")
    assert [(span.start_s, span.end_s) for span in complete.spans] == [(0.1, 5.14), (20.0, 30.5)]
    assert complete.spans[0].scores == {
        "dover": 8.9,
        "cotracker": 0.93,
        "head_avg_movement": 97.9,
        "head_min_movement": 89.4,
    }
    assert complete.spans[1].scores == {} and complete.spans[1].caption == "an older man in a suit"
    assert {span.person for span in complete.spans} == {"talkvid-597"}
    assert [(span.start_s, span.end_s, span.person) for span in cut.spans] == [(0.0, None, "talkvid-12")]


def test_hdtf_imports_complete_and_cut_videos(tmp_path):
    lists, videos = tmp_path / "HDTF_dataset", tmp_path / "videos"
    lists.mkdir()
    videos.mkdir()
    (lists / "RD_annotion_time.txt").write_text("Radio11.mp4 00:30-01:00 1:01:30-1:02:30 \nRadio12.mp4 00:05-00:50\n")
    (lists / "RD_crop_wh.txt").write_text("Radio11_0.mp4 412 599 0 599\nRadio11_1.mp4 557 478 36 478\n")
    (lists / "RD_resolution.txt").write_text("Radio11.mp4 720\nRadio12.mp4 720\n")
    (lists / "WRA_annotion_time.txt").write_text("KevinBrady2.mp4 08:10-08:30 00:33-08:53\nLostMan.mp4 00:01-00:30\n")
    for name in ("Radio11.mp4", "KevinBrady2_1.mp4"):
        (videos / name).touch()
    sources, (missing, uncropped) = hdtf(lists, videos)
    assert "Radio12, LostMan" in missing and str(videos) in missing
    assert uncropped.startswith("2 ") and "KevinBrady2_0, KevinBrady2_1" in uncropped and "not cropped" in uncropped
    cut, complete = sources
    assert [(span.start_s, span.end_s) for span in complete.spans] == [(30.0, 60.0), (3690.0, 3750.0)]
    left, top, width, height = complete.spans[1].crop  # the file has left, width, top, height
    assert (left * 720, top * 720, width * 720, height * 720) == pytest.approx((557, 36, 478, 478))
    assert {span.person for span in complete.spans} == {"RD-Radio11"}
    assert [(span.start_s, span.end_s, span.person, span.crop) for span in cut.spans] == [
        (0.0, None, "WRA-KevinBrady", None)
    ]


def test_hdtf_notes_windows_without_resolution(tmp_path):
    (tmp_path / "RD_annotion_time.txt").write_text("Radio1.mp4 00:00-01:00\nRadio2.mp4 00:00-01:00\n")
    (tmp_path / "RD_crop_wh.txt").write_text("Radio1_0.mp4 412 599 0 599\nRadio2_0.mp4 412 599 0 599\n")
    for name in ("Radio1.mp4", "Radio2.mp4"):
        (tmp_path / name).touch()
    _, notes = hdtf(tmp_path, tmp_path)
    assert len(notes) == 1 and "XX_resolution.txt" in notes[0] and "Radio1_0, Radio2_0" in notes[0]
    (tmp_path / "RD_resolution.txt").write_text("Radio1.mp4 720\n")
    sources, (note,) = hdtf(tmp_path, tmp_path)
    assert "Radio2_0" in note and "Radio1_0" not in note
    assert [source.spans[0].crop is None for source in sources] == [False, True]
    (tmp_path / "RD_resolution.txt").write_text("Radio1.mp4 720\nRadio2.mp4 720\n")
    assert hdtf(tmp_path, tmp_path)[1] == []


def test_importers_reject_invalid_annotations(tmp_path):
    (tmp_path / "clips.json").write_text('[{"id": "a"}]')
    with pytest.raises(ValueError, match="TalkVid's layout"):
        talkvid(tmp_path / "clips.json", tmp_path)
    with pytest.raises(ValueError, match="HDTF_dataset"):
        hdtf(tmp_path, tmp_path)
    (tmp_path / "RD_annotion_time.txt").write_text("Radio1.mp4 soon-later\n")
    with pytest.raises(ValueError, match="mm:ss"):
        hdtf(tmp_path, tmp_path)
