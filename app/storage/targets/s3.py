"""`s3:BUCKET/PREFIX`: the artifact's files in object storage, below PREFIX and the job's id."""

import mimetypes
from contextlib import suppress

from app.contracts.object_storage import Location
from app.contracts.settings import Settings
from app.contracts.targets import Target
from app.storage.objects.bucket import AT_WORK, Bucket
from app.storage.objects.errors import Forbidden, NoBucket, StorageAway
from app.storage.targets.target import NotPublished, Receipt, WholeArtifact, content_of, digests_of
from worker.engine.catalog.contracts.report import MANIFEST

LONGEST_MANIFEST = 100_000_000  # bytes


def publish(target: Target, artifact: WholeArtifact, settings: Settings) -> Receipt:
    """Write every file, and the manifest last: a folder without one is not whole.

    Each job has a folder of its own, so that no reader finds files of two merges.
    """
    place = Location.parse(target.name).below(artifact.job)
    receipt = Receipt({target.name: artifact.job}, f"s3://{place.bucket}/{place.key}/")
    try:
        bucket = Bucket(place.bucket, settings.object_storage, AT_WORK)
        try:
            there, _ = bucket.read_whole(place.below(MANIFEST).key, LONGEST_MANIFEST)
        except FileNotFoundError:
            pass  # it is the first time, or there is no bucket, of which the first file tells
        else:
            with suppress(ValueError):
                if content_of(digests_of(there)) == artifact.content:
                    return Receipt(receipt.versions, receipt.url, is_new=False)
            bucket.remove([place.below(MANIFEST).key])  # until all files are of this attempt
        for name in sorted(artifact.digests.keys() - {MANIFEST}):
            media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
            bucket.upload(place.below(name).key, artifact.folder / name, media_type, lambda count: None)
        bucket.upload(place.below(MANIFEST).key, artifact.folder / MANIFEST, "application/json", lambda count: None)
    except Forbidden as error:
        raise NotPublished("denied", f"{error}; they must be allowed to write there") from error
    except (FileNotFoundError, NoBucket) as error:
        raise NotPublished("refused", f"there is no bucket {place.bucket}") from error
    except StorageAway as error:
        raise NotPublished("unavailable", str(error), retryable=True) from error
    return receipt
