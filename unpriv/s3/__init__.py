"""Talk to S3. This folder alone imports boto3, botocore and urllib3.

Rule 1: boto3 and what it calls may raise anything on a hostile reply (boto3 1.44: AttributeError on a 503 answer that
        carries a checksum); every exception leaves this folder as a FetchError.
Rule 2: one call is one request. boto3 does not retry here: it cannot retry inside a body, and it ignores Retry-After.
Rule 3: what a server answers is untrusted until it matches the pin: status 206, the exact Content-Range, the ETag.
Rule 4: the user's AWS configuration is boto3's business; nothing here reads it, except to name files for the sandbox.

Imported late: boto3 costs 0.3 s (Debian 12, boto3 1.44).
"""

from unpriv.s3.client import CHUNK_BYTES, Body, Checksum, Client
from unpriv.s3.connecting import QUIRKS, connect
from unpriv.s3.errors import translate, translated
from unpriv.s3.line import Line

__all__ = ["CHUNK_BYTES", "QUIRKS", "Body", "Checksum", "Client", "Line", "connect", "translate", "translated"]
