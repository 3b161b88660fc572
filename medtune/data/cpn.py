"""The CPN X-ray set (Mendeley Data dvntn9yhd2 v1, CC BY 4.0): a zip that holds an inner zip of the published name."""

from __future__ import annotations

import requests

from medtune.data.archive import Published
from medtune.data.folders import AGENT
from medtune.data.image_folder import Layout

INNER = "Covid19-Pneumonia-Normal Chest X-Ray Images Dataset.zip"
LISTING = "https://data.mendeley.com/public-api/datasets/dvntn9yhd2/files?folder_id=root&version=1"


def published_sha256(listing: str | None = None, timeout: float = 10.0) -> str | None:
    """The inner zip's SHA-256 as the publisher lists it; None where it cannot be had."""
    try:
        answer = requests.get(listing or LISTING, headers={"User-Agent": AGENT}, timeout=timeout)
        answer.raise_for_status()
        names = {file["filename"]: file["content_details"]["sha256_hash"] for file in answer.json()}
        return str(names[INNER]).lower()
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return None


SET = Published(
    key="cpn",
    called="cpn",
    title="CPN X-ray",
    files=("cpn-xray.zip", "dvntn9yhd2-1.zip", INNER),
    counts={"COVID": 1626, "NORMAL": 1802, "PNEUMONIA": 1800},
    layout=Layout({"NORMAL": 0, "PNEUMONIA": 1}, side=256),
    page="https://doi.org/10.17632/dvntn9yhd2.1",
    urls=(
        "https://data.mendeley.com/public-api/zip/dvntn9yhd2/download/1",
        "https://prod-dcd-datasets-cache-zipfiles.s3.eu-west-1.amazonaws.com/dvntn9yhd2-1.zip",
    ),
    pair="pneumoniamnist-cpn",
    inner=INNER,
    one_size=True,
    published_sha256=published_sha256,
)
