"""What an S3 may answer, and what nobody should."""

from __future__ import annotations

import crc32c
import pytest

from distckpt.storage.interface import ObjectInfo
from distckpt.storage.remote import s3_answers as answers
from distckpt.storage.remote.s3_answers import NotUnderstood, Upload

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
PAGE = f"""<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult {NAMESPACE}><EncodingType>url</EncodingType><IsTruncated>true</IsTruncated>
<NextContinuationToken>t+/=</NextContinuationToken>
<Contents><Key>run/a/</Key><LastModified>2026-11-26T08:00:00.500Z</LastModified><Size>0</Size></Contents>
<Contents><Key>run/a/.hidden</Key><LastModified>2026-11-26T08:00:00Z</LastModified><Size>0</Size></Contents>
<Contents><Key>run/a/x%01y</Key><LastModified>2026-11-26T08:00:00Z</LastModified><Size>0</Size></Contents>
<Contents><Key>run/a/b+c%2Bd</Key><LastModified>2026-11-26T08:00:00.500Z</LastModified><Size>17</Size></Contents>
<CommonPrefixes><Prefix>run/a/f%C3%A9/</Prefix></CommonPrefixes><CommonPrefixes><Prefix>run/a//</Prefix></CommonPrefixes>
</ListBucketResult>""".encode()


def test_a_page_has_what_a_store_takes() -> None:
    page = answers.page_of(PAGE, "run/", "run/a/")
    assert page.objects == (ObjectInfo("a/b c+d", 17, 1795680000.0),)
    assert page.folders == ("fé",)
    assert page.following == "t+/="


def test_names_that_are_not_encoded_stay_as_they_are() -> None:
    page = answers.page_of(PAGE.replace(b"<EncodingType>url</EncodingType>", b""), "run/", "run/a/")
    assert [info.path for info in page.objects] == ["a/x%01y", "a/b+c%2Bd"]


BOMB = b"""<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><ListBucketResult>&b;
</ListBucketResult>"""


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"not xml",
            b"<Error><Code>InternalError</Code></Error>",
            b"\xff\xfe<\x00",
            BOMB,
            BOMB.decode().encode("utf-16"),
        ),
        PAGE[:-20],
        PAGE.replace(b"<Size>17</Size>", b"<Size>-17</Size>"),
        PAGE.replace(b"<Size>17</Size>", b""),
        PAGE.replace(b"2026-11-26T08:00:00.500Z", b"yesterday"),
    ],
)
def test_what_is_no_page_is_refused(body: bytes) -> None:
    with pytest.raises(NotUnderstood):
        answers.page_of(body, "run/", "run/a/")


@pytest.mark.parametrize(("sound", "damaged"), [(b"run/a/", b"run/b/"), (b"<IsTruncated>true", b"<IsTruncated>trud")])
def test_a_page_that_is_damaged_does_not_hide_anything(sound: bytes, damaged: bytes) -> None:
    assert sound in PAGE
    with pytest.raises(NotUnderstood):
        answers.page_of(PAGE.replace(sound, damaged), "run/", "run/a/")


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html><p>Log in", b"\n<HTML><body>Log in</body></HTML>"])
def test_a_page_for_people_is_told_as_one(page: bytes) -> None:
    with pytest.raises(NotUnderstood, match="an HTML page instead of a ListBucketResult"):
        answers.page_of(page, "", "")


def test_the_error_in_an_answer_of_200_is_told() -> None:
    with pytest.raises(NotUnderstood, match="InternalError: try again"):
        answers.completed_crc_of(b"\n\n <Error><Code>InternalError</Code><Message>try again</Message></Error>")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"x-amz-checksum-crc32c": "yZRlqg=="}, 0xC99465AA),
        ({"x-amz-checksum-crc32c": "yZRlqg==", "x-amz-checksum-type": "FULL_OBJECT", "etag": '"a-3"'}, 0xC99465AA),
        ({"x-amz-checksum-crc32c": "yZRlqg==", "etag": '"a-3"'}, None),
        ({"x-amz-checksum-crc32c": "yZRlqg==-3", "x-amz-checksum-type": "COMPOSITE", "etag": '"a-3"'}, None),
        ({"x-amz-checksum-crc32c": "yZRlqg==-3"}, None),
        ({"x-amz-checksum-crc32c": "AAAA"}, None),
        ({"x-amz-checksum-crc32c": "é"}, None),
        ({}, None),
    ],
)
def test_only_a_checksum_of_the_whole_is_one(headers: dict[str, str], expected: int | None) -> None:
    assert answers.info_of("a", 1, headers).crc32c == expected


def test_a_checksum_is_written_as_it_is_read() -> None:
    crc = crc32c.crc32c(b"content")
    assert answers.crc_of(answers.crc_header(crc)) == crc


def test_parts_are_told_in_order_and_uploads_are_read() -> None:
    told = answers.completion([('"e1"', 0), ('"e2"', 0xC99465AA)]).decode()
    assert told.index('<ETag>"e1"</ETag><PartNumber>1<') < told.index("<ChecksumCRC32C>yZRlqg==</ChecksumCRC32C>")
    body = f"""<ListMultipartUploadsResult {NAMESPACE}><IsTruncated>true</IsTruncated><NextKeyMarker>k</NextKeyMarker>
    <Upload><Key>run/a</Key><UploadId>u1</UploadId><Initiated>2026-11-26T08:00:00.000Z</Initiated></Upload>
    </ListMultipartUploadsResult>"""
    assert answers.uploads_of(body.encode()) == answers.Uploads((Upload("run/a", "u1", 1795680000.0),), ("k", ""))
