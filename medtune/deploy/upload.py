"""The image in a request's body: read within limits of size and time, raw or as a form's file, never written to disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from medtune.deploy.refusal import Refusal

HOW = "send the image as the body with Content-Type image/png or image/jpeg, or as the file of a multipart form"


class _InMemory(MultiPartParser):
    spool_max_size = 0  # no size from which on the file goes to disk: images of patients are not left there


async def read_upload(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """The bytes of the image that a request brings.

    Raises Refusal: 400 for what is no whole upload, 408 for one that took longer than `seconds`, 413 for one of more
    than `max_bytes`, 415 for another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = kind == "multipart/form-data"
    if not form and not kind.startswith("image/"):
        raise Refusal(415, f"Content-Type is {kind or 'missing'}", "only images are taken", HOW)
    _declared_size(request, max_bytes)
    try:
        async with asyncio.timeout(seconds):
            image = await (_form_file(request, max_bytes) if form else _whole(request, max_bytes))
    except TimeoutError:
        rule = f"an upload may take {seconds:g} s"
        raise Refusal(408, "the image did not arrive in time", rule, "send a smaller one, or again") from None
    except ClientDisconnect:
        raise Refusal(400, "the connection was closed before the whole image was there", "", HOW) from None
    if not image:
        raise Refusal(400, "the image is empty", "it must have at least one byte", HOW)
    return image


def _declared_size(request: Request, max_bytes: int) -> None:
    """Refuse before anything is read where the size is known. h11 has made sure that it is a number."""
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> Refusal:
    rule = f"a request may have {max_bytes / 1e6:g} MB"
    return Refusal(413, "the image is too large", rule, "send a smaller one, or serve with a larger --max-mb")


async def _bounded(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    count = 0
    async for chunk in request.stream():
        count += len(chunk)
        if count > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


async def _whole(request: Request, max_bytes: int) -> bytes:
    return b"".join([chunk async for chunk in _bounded(request, max_bytes)])


async def _form_file(request: Request, max_bytes: int) -> bytes:
    """The one file of a multipart form, under any field name; its own name is not looked at."""
    parser = _InMemory(request.headers, _bounded(request, max_bytes), max_files=1, max_fields=8)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, f"the form cannot be read: {error.message}", "a form has one file", HOW) from None
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise Refusal(400, "the form has no file", "a form has one file", HOW)
        return await files[0].read()
    finally:
        await form.close()
