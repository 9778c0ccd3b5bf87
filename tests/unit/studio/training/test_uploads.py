"""An upload is stored whole or not at all, and nothing in it leads out of its folder or fills the disk."""

from __future__ import annotations

import zipfile

import pytest

from restune_diffusion.studio.training.uploading.archives import ArchiveLimits
from restune_diffusion.studio.training.uploading.uploads import describe_upload, remove_leftovers, store_upload
from restune_diffusion.utils.errors import DataError, UsageError

from .archives import huge_image, image_bytes, write_zip


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    return root


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_archive_becomes_a_folder_without_its_outer_one(tmp_path, root):
    files = {f"cats/{name}.png": image_bytes() for name in "ab"}
    files |= {"cats/more/c.png": image_bytes(), "cats/a.txt": b"a cat", "cats/notes.pdf": b"x"}
    files |= {"__MACOSX/cats/._a.png": b"x", "cats/.DS_Store": b"x"}
    upload = store_upload([write_zip(tmp_path / "My cats.zip", files)], root)
    assert (upload.folder.name, upload.images) == ("My cats", 3)
    assert names(upload.folder) == ["a.png", "a.txt", "b.png", "more/c.png"]
    assert (upload.folder / "a.png").read_bytes() == image_bytes()
    assert [str(each) for each in upload.refused] == ["notes.pdf is not an image file (unknown extension `.pdf`)."]
    assert "3 images stored in My cats." in describe_upload(upload)


def test_single_images_of_one_name_do_not_replace_each_other(tmp_path, root):
    paths = []
    for number, color in enumerate(("red", "blue")):
        (tmp_path / str(number)).mkdir()
        paths.append(tmp_path / str(number) / "a.png")
        paths[-1].write_bytes(image_bytes(color))
    first = store_upload(paths, root, "two")
    assert [(first.folder / name).read_bytes() for name in names(first.folder)] == [
        image_bytes("blue"),
        image_bytes("red"),
    ]
    assert store_upload(paths, root, "two").folder == root / "two-2"


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"]
)
def test_an_archive_that_leads_out_of_its_folder_is_refused_whole(tmp_path, root, name):
    archive = write_zip(tmp_path / "a.zip", {"good.png": image_bytes(), name: image_bytes()})
    with pytest.raises(DataError, match="leads out of its folder; nothing was unpacked"):
        store_upload([archive], root)
    assert names(tmp_path) == ["a.zip"]
    assert list(root.iterdir()) == []


def test_links_are_not_followed(tmp_path, root):
    files = {"a.png": image_bytes(), "link.png": b"/etc/passwd"}
    upload = store_upload([write_zip(tmp_path / "a.zip", files, links=("link.png",))], root)
    assert names(upload.folder) == ["a.png"]
    assert "link.png is a link, which is not followed." in describe_upload(upload)


LIMITS = ArchiveLimits(files=5, file_bytes=200_000, total_bytes=300_000, depth=2)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({f"{number}.png": image_bytes() for number in range(6)}, "the limit is 5"),
        ({"a.png": b"\0" * 400_000}, "would unpack to 0.4 MiB"),
        ({"a.png": b"\0" * 250_000}, "unpacks to more than the limit of 0.2 MiB"),
        ({"a/b/c/d.png": image_bytes()}, "more than 2 nested folders"),
        ({"a.txt": b"x"}, "no image to use"),
    ],
)
def test_limits_of_an_archive(tmp_path, root, files, reason):
    archive = write_zip(tmp_path / "a.zip", files, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=reason):
        store_upload([archive], root, limits=LIMITS)
    assert list(root.iterdir()) == []


def test_a_bomb_that_declares_a_small_size_is_stopped_by_its_real_size(tmp_path, root):
    archive = write_zip(tmp_path / "a.zip", {"a.png": b"\0" * 5_000_000}, method=zipfile.ZIP_DEFLATED)
    content = archive.read_bytes().replace((5_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be unpacked|unpacks to more"):
        store_upload([archive], root, limits=LIMITS)
    assert list(root.iterdir()) == []


def test_a_list_of_files_is_not_read_if_it_would_fill_the_memory(tmp_path, root):
    archive = write_zip(tmp_path / "a.zip", {"a.png": image_bytes()})
    content = bytearray(archive.read_bytes())
    place = content.rfind(b"PK\x05\x06")
    content[place + 12 : place + 16] = (2**31).to_bytes(4, "little")
    archive.write_bytes(content)
    with pytest.raises(DataError, match="lists more than"):
        store_upload([archive], root)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\0" * 1000])
def test_what_is_not_an_archive_is_named(tmp_path, root, content):
    (tmp_path / "bad.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.zip is not a zip file"):
        store_upload([tmp_path / "bad.zip"], root)


def test_a_damaged_entry_is_one_sentence(tmp_path, root):
    archive = write_zip(tmp_path / "a.zip", {"a.png": image_bytes("red", (64, 64))})
    content = bytearray(archive.read_bytes())
    content[60] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(DataError, match="cannot be unpacked"):
        store_upload([archive], root)
    assert list(root.iterdir()) == []


def test_an_image_of_200_megapixels_is_left_out_by_its_header(tmp_path, root):
    (tmp_path / "huge.png").write_bytes(huge_image())
    (tmp_path / "a.png").write_bytes(image_bytes())
    upload = store_upload([tmp_path / "huge.png", tmp_path / "a.png"], root)
    assert names(upload.folder) == ["a.png"]
    assert "huge.png has 200 megapixels, and the limit is 80; save a smaller copy." in describe_upload(upload)


@pytest.mark.parametrize(
    "row",
    [
        b'{"file_name": "../../secret.png", "text": "x"}',
        b'{"file_name": "a.png", "condition": "/etc/secret.png", "text": "x"}',
        b'{"file_name": "a.png", "conditions": {"canny": "..\\\\b.png"}, "text": "x"}',
    ],
)
def test_metadata_that_names_files_outside_the_upload_is_refused(tmp_path, root, row):
    archive = write_zip(tmp_path / "a.zip", {"a.png": image_bytes(), "metadata.jsonl": row})
    with pytest.raises(DataError, match="is outside the upload"):
        store_upload([archive], root)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "x" * 100, "ends."])
def test_names_of_folders_are_checked(tmp_path, root, name):
    (tmp_path / "a.png").write_bytes(image_bytes())
    with pytest.raises(UsageError, match="cannot be the name of a folder"):
        store_upload([tmp_path / "a.png"], root, name)


def test_old_leftovers_of_a_killed_process_are_removed(root):
    import os

    for name in (".incoming-old", ".incoming-new", "kept"):
        (root / name).mkdir()
    os.utime(root / ".incoming-old", (0, 0))
    remove_leftovers(root)
    assert sorted(path.name for path in root.iterdir()) == [".incoming-new", "kept"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.png", b"x"), ("a.png", b"y")], "two of its files have the same name"),
        ([(f"{'a' * 300}.png", b"x")], r"\(file name too long\)"),
        ([("metadata.csv", b"file_name,text\na.png," + b"x" * 200_000)], "metadata.csv cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_unusual_archives_are_one_sentence_without_internal_paths(tmp_path, root, files, reason):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for name, content in files:
            archive.writestr(name, content)
    with pytest.raises(DataError, match=reason) as error:
        store_upload([tmp_path / "odd.zip"], root)
    assert str(tmp_path) not in str(error.value)
    assert list(root.iterdir()) == []


def test_an_entry_without_a_name_is_one_sentence(tmp_path, root):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        archive.writestr("a", b"x")
    content = (tmp_path / "odd.zip").read_bytes()
    (tmp_path / "odd.zip").write_bytes(content.replace(b"a" + content[-22:], b"\0" + content[-22:]))
    with pytest.raises(DataError, match="a file in it has no name"):
        store_upload([tmp_path / "odd.zip"], root)
